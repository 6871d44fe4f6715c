"""The bundle: the folder that training writes and the robot reads, and the checks that it passes before anything moves.

A bundle holds `manifest.json`, `prefill.onnx`, `expert.onnx` (perhaps with external weight files), `tokenizer.json` and
`README.md`; no pickle, no code. Legend: V cameras, S image size, L prompt tokens, P prefix length, N layers, K kv heads,
D head dim, H horizon, J joints (= action dimensions A).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tokenizers import Tokenizer

from ki_vla_ros.errors import BundleError
from ki_vla_ros.onnx_header import GraphHeader, TensorType, read_header
from ki_vla_ros.preprocess import PAD_TOKEN, UNKNOWN_TOKEN

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PREFILL = "prefill.onnx"
EXPERT = "expert.onnx"
TOKENIZER = "tokenizer.json"
MODEL_CARD = "README.md"

Positive = Annotated[int, Field(gt=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-/ ]*$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class CameraSpec(_Frozen):
    """One camera of the model, in the order of the images; an optional one may be absent (its tokens are masked out)."""

    name: Name
    optional: bool = False


class ImageSpec(_Frozen):
    """Square model input of `size` pixels in [-1, 1]; other proportions are padded with `pad_value` (black)."""

    size: Positive
    pad_value: Literal[-1] = -1
    resize: Literal["pad"] = "pad"


class PromptSpec(_Frozen):
    """`template` with {task} and, for a state as text, {state}; `length` tokens after padding."""

    template: str
    length: Positive
    max_instruction_chars: Positive = 200
    state_bins: Annotated[int, Field(ge=2, le=4096)] = 256


class JointSpec(_Frozen):
    """One joint: position limits and speed limit in `unit` (per second), and whether its action is relative to the state."""

    name: Name
    unit: Literal["rad", "m"]
    lower: Finite
    upper: Finite
    max_velocity: Annotated[Finite, Field(gt=0)]
    relative: bool

    @model_validator(mode="after")
    def _ordered(self) -> JointSpec:
        if not self.lower < self.upper:
            raise ValueError(f"joint {self.name!r}: expected lower < upper, got {self.lower} and {self.upper}")
        return self


class _Range(_Frozen):
    low: tuple[Finite, ...]
    high: tuple[Finite, ...]

    @model_validator(mode="after")
    def _ordered(self) -> _Range:
        if len(self.low) != len(self.high):
            raise ValueError(f"expected low and high of one length, got {len(self.low)} and {len(self.high)}")
        for j, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if not low < high:
                raise ValueError(f"dimension {j}: expected low < high, got {low} and {high}")
        return self


class StateSpec(_Range):
    """low..high of each joint map to [-1, 1]; the state enters the prompt as text or the expert as a token."""

    encoding: Literal["text", "token"]


class ActionStats(_Range):
    """low..high of each action dimension (after subtracting the state where relative) map to [-1, 1], unclipped."""


class FlowSpec(_Frozen):
    """Euler steps the model was judged with. `noise_at_one`: x_t = t * noise + (1 - t) * action, integrated from t = 1 to 0."""

    steps: Annotated[int, Field(ge=1, le=100)] = 10
    convention: Literal["noise_at_one"] = "noise_at_one"


class GraphSpec(_Frozen):
    """Dimensions of the two graphs: `image_tokens` per camera, `vocab_size` embedding rows of the prompt."""

    layers: Positive
    kv_heads: Positive
    head_dim: Positive
    image_tokens: Positive
    prefix_length: Positive
    action_dim: Positive
    vocab_size: Positive


class Provenance(_Frozen):
    """Where the weights come from; `figures` are measured results by name."""

    recipe: str
    seed: int
    commit: str
    data_fingerprint: str
    figures: dict[str, Finite] = Field(default_factory=dict)


class PolicySpec(_Frozen):
    """What training knows before any export; it lies as `policy.json` beside a checkpoint."""

    name: Name
    created: str
    cameras: Annotated[tuple[CameraSpec, ...], Field(min_length=1)]
    image: ImageSpec
    prompt: PromptSpec
    joints: Annotated[tuple[JointSpec, ...], Field(min_length=1)]
    state: StateSpec
    action: ActionStats
    horizon: Annotated[int, Field(ge=2)]
    action_period_s: Annotated[Finite, Field(gt=0, le=1.0)]
    flow: FlowSpec = FlowSpec()
    max_prefix_delay: Annotated[int, Field(ge=0)] = 0
    provenance: Provenance

    @property
    def joint_names(self) -> tuple[str, ...]:
        return tuple(joint.name for joint in self.joints)

    @property
    def action_period_ns(self) -> int:
        return round(self.action_period_s * 1e9)

    @model_validator(mode="after")
    def _consistent(self) -> PolicySpec:
        for what, names in (("cameras", [c.name for c in self.cameras]), ("joints", list(self.joint_names))):
            if len(set(names)) != len(names):
                raise ValueError(f"{what}: expected distinct names, got {names}")
        if all(camera.optional for camera in self.cameras):
            raise ValueError("cameras: expected at least one that is required, got only optional ones")
        for what, stats in (("state", self.state), ("action", self.action)):
            if len(stats.low) != len(self.joints):
                raise ValueError(f"{what}: expected {len(self.joints)} values (one per joint), got {len(stats.low)}")
        if self.max_prefix_delay >= self.horizon:
            raise ValueError(
                f"max_prefix_delay: expected less than the horizon {self.horizon}, got {self.max_prefix_delay}"
            )
        if self.prompt.template.count("{task}") != 1:
            raise ValueError(f"prompt.template: expected {{task}} exactly once, got {self.prompt.template!r}")
        expected = 1 if self.state.encoding == "text" else 0
        if self.prompt.template.count("{state}") != expected:
            raise ValueError(
                f"prompt.template: expected {{state}} {expected} times (state.encoding is {self.state.encoding!r}), "
                f"got {self.prompt.template!r}"
            )
        return self


class Manifest(PolicySpec):
    """`manifest.json`: the policy, the dimensions of its graphs and the sha256 of every other file of the bundle."""

    format_version: Literal[1] = FORMAT_VERSION
    files: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]
    graph: GraphSpec

    @model_validator(mode="after")
    def _graphs_fit(self) -> Manifest:
        prefix_length = len(self.cameras) * self.graph.image_tokens + self.prompt.length
        if self.graph.prefix_length != prefix_length:
            raise ValueError(
                f"graph.prefix_length: expected {prefix_length} ({len(self.cameras)} cameras x {self.graph.image_tokens} tokens "
                f"+ {self.prompt.length} prompt tokens), got {self.graph.prefix_length}"
            )
        if self.graph.action_dim != len(self.joints):
            raise ValueError(
                f"graph.action_dim: expected {len(self.joints)} (one per joint), got {self.graph.action_dim}"
            )
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """A bundle that has passed every check of `load_bundle`; `path` is its real folder."""

    path: Path
    manifest: Manifest
    tokenizer: Tokenizer


def graph_interface(manifest: Manifest) -> dict[str, tuple[dict[str, TensorType], dict[str, TensorType]]]:
    """Inputs and outputs that each graph file must have, by name."""
    size, graph = manifest.image.size, manifest.graph
    cameras, length, joints = len(manifest.cameras), manifest.prompt.length, len(manifest.joints)
    kv = TensorType("float32", (graph.layers, graph.kv_heads, graph.prefix_length, graph.head_dim))
    actions = TensorType("float32", (manifest.horizon, graph.action_dim))
    cache = {"keys": kv, "values": kv, "prefix_mask": TensorType("bool", (graph.prefix_length,))}
    prefill_inputs = {
        "images": TensorType("float32", (cameras, 3, size, size)),
        "image_mask": TensorType("bool", (cameras,)),
        "tokens": TensorType("int64", (length,)),
        "token_mask": TensorType("bool", (length,)),
    }
    state = {"state": TensorType("float32", (joints,))} if manifest.state.encoding == "token" else {}
    expert_inputs = {**cache, **state, "x_t": actions, "time": TensorType("float32", (manifest.horizon,))}
    return {PREFILL: (prefill_inputs, cache), EXPERT: (expert_inputs, {"velocity": actions})}


def load_bundle(path: Path | str) -> Bundle:
    """Read and verify a bundle; BundleError names the first fault.

    Files may be symbolic links (as colcon's --symlink-install makes them) as long as all lie in the folder that
    the manifest really lies in.
    """
    given = Path(path).expanduser()
    if not given.is_dir():
        raise BundleError(
            f"bundle: expected a folder, got {given}, which is {'a file' if given.exists() else 'not there'}"
        )
    if not (given / MANIFEST).is_file():
        raise BundleError(f"{given}: expected {MANIFEST} in a bundle, got none; is this the folder that export wrote?")
    root = (given / MANIFEST).resolve().parent
    manifest = _read_manifest(root / MANIFEST)
    _check_files(root, manifest)
    headers = {name: read_header(root / name) for name in (PREFILL, EXPERT)}
    _check_external_data(root, manifest, headers)
    for name, (inputs, outputs) in graph_interface(manifest).items():
        _check_interface(root / name, "input", inputs, headers[name].inputs)
        _check_interface(root / name, "output", outputs, headers[name].outputs)
        if headers[name].foreign_domains:
            domains = ", ".join(sorted(headers[name].foreign_domains))
            raise BundleError(
                f"{root / name}: expected standard ONNX operators only, got domain {domains}; export again"
            )
    return Bundle(root, manifest, _read_tokenizer(root / TOKENIZER, manifest))


def write_bundle(folder: Path, policy: PolicySpec, graph: GraphSpec, tokenizer: Tokenizer, model_card: str) -> Bundle:
    """Complete a folder that already holds the two graphs: tokenizer, model card, manifest with hashes; then load it."""
    tokenizer.save(str(folder / TOKENIZER), pretty=False)
    (folder / MODEL_CARD).write_text(model_card, encoding="utf-8")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name != MANIFEST)
    files = {name: file_sha256(folder / name) for name in names}
    manifest = Manifest(**dict(policy), files=files, graph=graph)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return load_bundle(folder)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe_validation(error: ValidationError) -> str:
    """pydantic's findings in one line: where, what was expected, what was got."""
    parts = []
    for finding in error.errors(include_url=False):
        where = ".".join(str(part) for part in finding["loc"]) or "as a whole"
        got = "" if finding["type"] in ("missing", "value_error") else f", got {finding['input']!r:.80}"
        parts.append(f"{where}: {finding['msg'].removeprefix('Value error, ')}{got}")
    return "; ".join(parts)


def _read_manifest(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path}: expected JSON, got something else ({error}); export again") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path}: expected a JSON object, got {type(content).__name__}; export again")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {version!r}; export with the training package "
            "of the same release as this one"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise BundleError(f"{path}: {describe_validation(error)}; export again") from error


def _check_files(root: Path, manifest: Manifest) -> None:
    for name in (PREFILL, EXPERT, TOKENIZER, MODEL_CARD):
        if name not in manifest.files:
            raise BundleError(f"{root / MANIFEST}: files: expected {name} among them, got {sorted(manifest.files)}")
    for name, expected in manifest.files.items():
        file = root / name
        if Path(name).name != name or name == MANIFEST:
            raise BundleError(
                f"{root / MANIFEST}: files: expected plain names of files beside the manifest, got {name!r}"
            )
        if not file.is_file():
            raise BundleError(
                f"{root}: expected file {name}, which the manifest lists, got none; copy the whole folder"
            )
        if file.resolve().parent != root:
            raise BundleError(f"{file}: expected a file inside the bundle, got a link to {file.resolve()}")
        got = file_sha256(file)
        if got != expected:
            raise BundleError(
                f"{file}: expected sha256 {expected[:12]}..., got {got[:12]}...; it was changed or cut off, copy it again"
            )
    for entry in sorted(root.iterdir()):
        if entry.name not in manifest.files and entry.name != MANIFEST:
            raise BundleError(
                f"{root}: expected only the files that the manifest lists, got {entry.name!r} beside them; remove it"
            )


def _check_external_data(root: Path, manifest: Manifest, headers: dict[str, GraphHeader]) -> None:
    known = {PREFILL, EXPERT, TOKENIZER, MODEL_CARD}
    for name, header in headers.items():
        unlisted = sorted(header.external_files - (set(manifest.files) - known))
        if unlisted:
            raise BundleError(f"{root / name}: expected weights in files that the manifest lists, got {unlisted[0]!r}")
    referred = known.union(*(header.external_files for header in headers.values()))
    for name in manifest.files:
        if name not in referred:
            raise BundleError(
                f"{root / MANIFEST}: files: expected the two graphs, their weights, {TOKENIZER} and {MODEL_CARD}, got {name!r}, "
                "which no graph refers to; a bundle holds no code and no pickle"
            )


def _check_interface(path: Path, side: str, expected: dict[str, TensorType], got: dict[str, TensorType]) -> None:
    if set(expected) != set(got):
        raise BundleError(f"{path}: expected {side}s {sorted(expected)}, got {sorted(got)}; export again")
    for name, tensor in expected.items():
        if got[name] != tensor:
            raise BundleError(f"{path}: {side} {name!r}: expected {tensor}, got {got[name]}; export again")


def _read_tokenizer(path: Path, manifest: Manifest) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise BundleError(f"{path}: expected a tokenizers file, got something else ({error}); export again") from error
    prompt, vocab_size = manifest.prompt, manifest.graph.vocab_size
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        raise BundleError(
            f"{path}: expected no truncation and no padding of its own, got {tokenizer.truncation or tokenizer.padding}"
        )
    for token in (PAD_TOKEN, UNKNOWN_TOKEN):
        if tokenizer.token_to_id(token) is None:
            raise BundleError(f"{path}: expected the token {token} in the vocabulary, got none")
    word, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise BundleError(f"{path}: expected ids below {vocab_size} (graph.vocab_size), got {largest} for {word!r}")
    unknown_id = tokenizer.token_to_id(UNKNOWN_TOKEN)
    frame_text = prompt.template.replace("{task}", " ").replace("{state}", " ")
    frame = tokenizer.encode(frame_text)
    if unknown_id in frame.ids:
        start, end = frame.offsets[frame.ids.index(unknown_id)]
        raise BundleError(
            f"{path}: expected every token of prompt.template, got no {frame_text[start:end]!r} in the vocabulary"
        )
    needed = len(frame.ids) + 1
    if manifest.state.encoding == "text":
        needed += len(manifest.joints)
        bins = tokenizer.encode_batch([str(i) for i in range(prompt.state_bins)], add_special_tokens=False)
        for i, encoding in enumerate(bins):
            if len(encoding.ids) != 1 or encoding.ids[0] == unknown_id:
                raise BundleError(
                    f"{path}: expected a token for each state bin 0..{prompt.state_bins - 1}, got none for '{i}'"
                )
    if needed > prompt.length:
        raise BundleError(
            f"{path}: expected room for an instruction in prompt.length {prompt.length}, got a template that needs {needed} tokens "
            "with a single word"
        )
    return tokenizer
