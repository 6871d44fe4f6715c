"""Does a bundle compute what the model computes? Both answer random inputs.

Legend: H horizon, A action dim.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch

from ki_vla_ros.bundle.folder import PREFILL, Bundle
from ki_vla_ros.engines.base import prefill_inputs
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.engines.torch_engine import TorchEngine
from ki_vla_ros.policy.policy import Policy, widen
from ki_vla_ros.records import ModelInput
from training.model.vla import VLA, Cache
from training.weights.checkpoints import load_checkpoint

CASES = 4


def parity_error(
    model: VLA, bundle: Bundle, cases: int = CASES, engine: OnnxEngine | TorchEngine | None = None
) -> float:
    """Largest difference between bundle and torch, over keys, values and whole chunks of random inputs.

    `engine` (default: onnxruntime) runs the bundle and is closed afterwards.
    """
    engine = engine or OnnxEngine(bundle)
    policy = Policy(bundle, engine)
    session = onnxruntime.InferenceSession(str(bundle.path / PREFILL), providers=["CPUExecutionProvider"])
    worst = 0.0
    for case in range(cases):
        given, noise_HA = random_input(bundle, case), policy.noise(case)
        cache, chunk_HA = answer(model, given, noise_HA, bundle.manifest.flow.steps)
        got_HA = policy.denoise(policy.prefill(given), noise_HA, given.state_J)
        if isinstance(engine, TorchEngine):
            keys, values, mask = (engine.prefix[name].numpy() for name in ("keys", "values", "prefix_mask"))
        else:
            keys, values, mask = session.run(None, prefill_inputs(given))
        for expected, got in (
            (cache.keys_NBKPD[:, 0], keys),
            (cache.values_NBKPD[:, 0], values),
            (cache.mask_BP[0].float(), mask.astype(np.float32)),
            (chunk_HA, got_HA),
        ):
            worst = float(np.maximum(worst, np.abs(expected.numpy() - got).max()))  # NaN stays NaN
    engine.close()
    return worst


def lowest_cosine(checkpoint: Path, bundle: Bundle, cases: int = CASES) -> float:
    """Of whole chunks of random inputs, the bundle's on the torch engine and the model's in float32.

    One after the other: of a large model, memory does not hold both.
    """
    steps, shape = bundle.manifest.flow.steps, (bundle.manifest.horizon, bundle.manifest.graph.action_dim)
    noise = [np.random.default_rng(case).standard_normal(shape, dtype=np.float32) for case in range(cases)]
    given = [random_input(bundle, case) for case in range(cases)]
    model = load_checkpoint(checkpoint).eval()
    expected = [answer(model, *case, steps)[1].numpy() for case in zip(given, noise, strict=True)]
    del model
    engine = TorchEngine(bundle)
    policy = Policy(bundle, engine)
    got = [policy.denoise(policy.prefill(case), x_t, case.state_J) for case, x_t in zip(given, noise, strict=True)]
    engine.close()
    ours, theirs = (np.stack(chunks).reshape(cases, -1) for chunks in (got, expected))
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(np.min(np.sum(ours * theirs, axis=1) / lengths))  # NaN stays NaN


def answer(model: VLA, given: ModelInput, noise_HA: np.ndarray, steps: int) -> tuple[Cache, torch.Tensor]:
    """The model's own cache and chunk [H, A] for one input."""
    arrays = (given.images_VCHW, given.image_mask_V, given.tokens_L, given.token_mask_L)
    width = model.config.state_dim
    state = None if width is None else torch.from_numpy(widen(given.state_J, width))[None]
    with torch.no_grad():
        cache = model.prefill(*(torch.from_numpy(array)[None] for array in arrays))
        return cache, model.sample_actions(cache, torch.from_numpy(noise_HA)[None], steps, state)[0]


def random_input(bundle: Bundle, case: int) -> ModelInput:
    """Noise pictures, random prompts of random length; every other case lacks the last of several cameras."""
    manifest, rng = bundle.manifest, np.random.default_rng(case)
    cameras, size, length = len(manifest.cameras), manifest.image.size, manifest.prompt.length
    image_mask_V = np.ones(cameras, dtype=np.bool_)
    image_mask_V[-1] = cameras == 1 or case % 2 == 0
    with_state = manifest.state.as_token
    return ModelInput(
        images_VCHW=rng.uniform(-1, 1, (cameras, 3, size, size)).astype(np.float32),
        image_mask_V=image_mask_V,
        tokens_L=rng.integers(0, manifest.graph.vocab_size, length),
        token_mask_L=np.arange(length) < rng.integers(1, length + 1),
        state_J=rng.uniform(-1, 1, len(manifest.joints)).astype(np.float32) if with_state else None,
    )
