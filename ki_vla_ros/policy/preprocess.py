"""Pixels, joint state and instruction to the arrays that the prefill graph takes, as the manifest says.

Training calls these same functions, so what the model learned from and what the robot feeds it cannot drift apart.

Legend: V cameras, C channel, H W image rows and columns, S model image size, L prompt tokens, J joints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ki_vla_ros.bundle import (
    IN_PROMPT,
    PAD_TOKEN,
    UNKNOWN_TOKEN,
    Bundle,
    PolicySpec,
    PromptSpec,
    PromptStyle,
    StateEncoding,
    encode,
    state_bin_token,
)
from ki_vla_ros.errors import InputError, InstructionError
from ki_vla_ros.records import CameraFrame, ModelInput, Observation
from ki_vla_ros.robot import continuous, nearest_rotation, nearest_turn


def resize_with_pad(rgb_HWC: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Fit the image into size x size without changing its proportions; the rest is black, in equal parts on both sides.

    Shrinking averages areas by the largest whole factor that divides both sides: each pixel is then exactly the mean of
    the pixels it covers. The rest is bilinear below a factor of two, otherwise area averaging again. This is five times
    as fast as averaging once, and as close to the antialiased bilinear filter that other trainers use.
    """
    if rgb_HWC.dtype != np.uint8 or rgb_HWC.ndim != 3 or rgb_HWC.shape[2] != 3 or rgb_HWC.size == 0:
        raise InputError(f"image: expected uint8 [H, W, 3], got {rgb_HWC.dtype} {list(rgb_HWC.shape)}")
    height, width = rgb_HWC.shape[:2]
    if height == width == size:
        return rgb_HWC
    top, left, new_height, new_width = fit_square(height, width, size)
    if (new_height, new_width) == (height, width):
        resized = rgb_HWC
    else:
        factors = range(max(height, width) // size, 1, -1)
        if whole := next((n for n in factors if height % n == 0 and width % n == 0), None):
            rgb_HWC = _resize(rgb_HWC, width // whole, height // whole, cv2.INTER_AREA)
        far = max(rgb_HWC.shape) >= 2 * size
        resized = _resize(rgb_HWC, new_width, new_height, cv2.INTER_AREA if far else cv2.INTER_LINEAR)
    padded = np.zeros((size, size, 3), dtype=np.uint8)
    padded[top : top + new_height, left : left + new_width] = resized
    return padded


def fit_square(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Top, left, height and width that `resize_with_pad` gives an image in its square, in pixels."""
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    return (size - new_height) // 2, (size - new_width) // 2, new_height, new_width


def _resize(rgb_HWC: NDArray[np.uint8], width: int, height: int, interpolation: int) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(rgb_HWC, (width, height), interpolation=interpolation), dtype=np.uint8)


def images_to_input(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1]."""
    *batch, height, width, _ = rgb.shape
    planes = np.empty((int(np.prod(batch)), 3, height, width), dtype=np.float32)
    for planes_CHW, rgb_HWC in zip(planes, rgb.reshape(-1, height, width, 3), strict=True):
        _image_to_input(rgb_HWC, planes_CHW)
    return planes.reshape(*batch, 3, height, width)


def _image_to_input(rgb_HWC: NDArray[np.uint8], out_CHW: NDArray[np.float32]) -> None:
    # OpenCV splits an image ten times as fast as numpy transposes its axes.
    for plane_HW, channel_HW in zip(out_CHW, cv2.split(np.ascontiguousarray(rgb_HWC)), strict=True):
        np.multiply(channel_HW, np.float32(1.0 / 127.5), out=plane_HW)
        plane_HW -= np.float32(1.0)


def normalize(x: NDArray[np.floating], low: Sequence[float], high: Sequence[float]) -> NDArray[np.float64]:
    """Map low..high (last axis) linearly to -1..1, without clipping."""
    low_J, high_J = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    return np.asarray(2.0 * (x - low_J) / (high_J - low_J) - 1.0, dtype=np.float64)


def unnormalize(x: NDArray[np.floating], low: Sequence[float], high: Sequence[float]) -> NDArray[np.float64]:
    """The inverse of `normalize`."""
    low_J, high_J = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    return np.asarray((x + 1.0) * 0.5 * (high_J - low_J) + low_J, dtype=np.float64)


def state_to_bins(
    state_norm_J: NDArray[np.floating], bins: int = 256, style: PromptStyle = "words"
) -> NDArray[np.int64]:
    """Normalised state -> bin 0..bins-1 of equal widths over [-1, 1]; values outside land in the outermost bins.

    With style "openpi" values below -1 give bin -1, as in openpi's training.
    """
    if not np.all(np.isfinite(state_norm_J)):
        raise InputError(f"joint state: expected finite numbers, got {np.asarray(state_norm_J).tolist()}")
    edges = np.linspace(-1.0, 1.0, bins + 1)[:-1]
    lowest = -1 if style == "openpi" else 0
    return np.asarray(np.clip(np.digitize(state_norm_J, edges) - 1, lowest, bins - 1), dtype=np.int64)


def clean_instruction(task: str, style: PromptStyle = "words") -> str:
    """The form in which training saw every instruction.

    "words": lower case, single spaces, no final full stop. "openpi": no surrounding white space, underscores and line
    breaks as spaces, capitals and punctuation kept.
    """
    if style == "openpi":
        cleaned = task.strip().replace("_", " ").replace("\n", " ")
    else:
        cleaned = " ".join(task.lower().split()).rstrip(". ")
    if not cleaned.strip():
        raise InstructionError(f"instruction: expected some words, got {task!r}")
    if not cleaned.isprintable():
        raise InstructionError(f"instruction: expected plain words, got characters that are none in {task!r}")
    if "<" in cleaned or ">" in cleaned:
        # The prompt's own special tokens are written in angle brackets; an instruction must not be able to add one.
        raise InstructionError(f"instruction: expected plain words, got '<' or '>' in {task!r}")
    return cleaned


def render_prompt(
    template: str, task: str, bins: Iterable[int] = (), style: PromptStyle = "words", special: bool = False
) -> str:
    """The prompt text; `bins` (one integer per joint) fill {state} where the template has it.

    `special`: each bin is a special token; without, a number.
    """
    numbers = [int(value) for value in bins]
    state = "".join(map(state_bin_token, numbers)) if special else " ".join(map(str, numbers))
    return template.replace("{state}", state).replace("{task}", clean_instruction(task, style))


def write_prompt(prompt: PromptSpec, encoding: StateEncoding, task: str, state_norm_S: NDArray[np.floating]) -> str:
    """The prompt of a task and a normalised state, which counts where its `encoding` has it in the prompt."""
    special = encoding == "special"
    style = "words" if special else prompt.style  # no special token is less than 0
    bins = state_to_bins(state_norm_S, prompt.state_bins, style) if encoding in IN_PROMPT else ()
    return render_prompt(prompt.template, task, bins, prompt.style, special)


def tokenize(tokenizer: Tokenizer, text: str, length: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Token ids, padded at the end, and the mask of the real ones; unknown words and overlong text are refused."""
    encoding = encode(tokenizer, text)
    unknown_id = tokenizer.token_to_id(UNKNOWN_TOKEN)
    unknown = [text[a:b] for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) if i == unknown_id]
    if unknown:
        raise InstructionError(
            f"prompt: the bundle's tokenizer does not know {', '.join(map(repr, unknown))} in {text!r}; "
            "use the words that the model card lists"
        )
    count = len(encoding.ids)
    if count > length:
        raise InstructionError(
            f"prompt: expected at most {length} tokens, got {count} in {text!r}; shorten the instruction"
        )
    tokens_L = np.full(length, tokenizer.token_to_id(PAD_TOKEN), dtype=np.int64)
    tokens_L[:count] = encoding.ids
    return tokens_L, np.arange(length) < count


def make_model_input(
    manifest: PolicySpec, tokenizer: Tokenizer, observation: Observation, instruction: str
) -> ModelInput:
    """Observation and instruction as the model reads them; an absent camera is masked out if optional, else refused."""
    if len(instruction) > manifest.prompt.max_instruction_chars:
        raise InstructionError(
            f"instruction: expected at most {manifest.prompt.max_instruction_chars} characters, got {len(instruction)} "
            f"in {instruction[:40]!r}...; shorten the instruction"
        )
    size = manifest.image.size
    images_VCHW = np.empty((len(manifest.cameras), 3, size, size), dtype=np.float32)
    image_mask_V = np.zeros(len(manifest.cameras), dtype=np.bool_)
    for v, camera in enumerate(manifest.cameras):
        frame = observation.frames.get(camera.name)
        if frame is not None:
            _image_to_input(resize_with_pad(frame.rgb_HWC, size), images_VCHW[v])
            image_mask_V[v] = True
        elif camera.optional:
            images_VCHW[v] = -1.0  # black
        else:
            raise InputError(
                f"camera {camera.name!r}: expected a frame in the observation, got only {sorted(observation.frames)}"
            )
    if observation.state_S.shape != (len(manifest.robot.state),):
        names = ", ".join(dimension.name for dimension in manifest.robot.state)
        raise InputError(
            f"joint state: expected {len(manifest.robot.state)} numbers ({names}), "
            f"got an array of shape {list(observation.state_S.shape)}"
        )
    if not np.all(np.isfinite(observation.state_S)):
        raise InputError(f"joint state: expected finite numbers, got {observation.state_S.tolist()}")
    state_norm_J = normalize(trained_turn(manifest, observation.state_S), manifest.state.low, manifest.state.high)
    prompt = write_prompt(manifest.prompt, manifest.state.encoding, instruction, state_norm_J)
    tokens_L, token_mask_L = tokenize(tokenizer, prompt, manifest.prompt.length)
    state_S = state_token(manifest, observation.state_S)
    return ModelInput(images_VCHW, image_mask_V, tokens_L, token_mask_L, state_S)


def longest_input(policy: PolicySpec, vocab_size: int, seed: int = 0) -> ModelInput:
    """Noise from `seed`, with every camera present and every prompt token used: what takes longest to compute."""
    rng = np.random.default_rng(seed)
    cameras, size, length = len(policy.cameras), policy.image.size, policy.prompt.length
    return ModelInput(
        images_VCHW=rng.uniform(-1.0, 1.0, (cameras, 3, size, size)).astype(np.float32),
        image_mask_V=np.ones(cameras, dtype=np.bool_),
        tokens_L=rng.integers(0, vocab_size, length),
        token_mask_L=np.ones(length, dtype=np.bool_),
        state_S=rng.uniform(-1.0, 1.0, len(policy.robot.state)).astype(np.float32) if policy.state.as_token else None,
    )


def state_token(manifest: PolicySpec, state_S: NDArray[np.float64]) -> NDArray[np.float32] | None:
    """The state as the expert reads it, normalised [J]; None where the bundle has it in the prompt alone."""
    if not manifest.state.as_token:
        return None
    return normalize(trained_turn(manifest, state_S), manifest.state.low, manifest.state.high).astype(np.float32)


def trained_turn(manifest: PolicySpec, state_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same state as training saw it: joints that turn without end in its turns, rotations written its way."""
    middle_S = (np.array(manifest.state.low) + np.array(manifest.state.high)) / 2.0
    state_S = nearest_turn(state_S, middle_S, continuous(manifest.robot.state))
    return nearest_rotation(state_S, middle_S, manifest.robot.state)


def check_instruction(bundle: Bundle, instruction: str) -> None:
    """InstructionError unless a tick can use it: it is tried as in a tick, with black images and a mid-range state."""
    manifest = bundle.manifest
    size = manifest.image.size  # nothing to resize: OpenCV 4.5.4 (Ubuntu 22.04) fails at images of one pixel
    black_HWC = np.zeros((size, size, 3), dtype=np.uint8)
    frames = {camera.name: CameraFrame(camera.name, 0, black_HWC) for camera in manifest.cameras}
    middle_J = (np.array(manifest.state.low) + np.array(manifest.state.high)) / 2.0
    make_model_input(manifest, bundle.tokenizer, Observation(0, frames, middle_J), instruction)
