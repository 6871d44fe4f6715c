"""The bundle: the folder that training writes and the robot reads, and the checks that it passes before anything moves.

A bundle holds `manifest.json`, `prefill.onnx`, `expert.onnx` (perhaps with weight files beside them), `time.npz`
(bundle/time_table.py), `tokenizer.json` and `README.md`; no pickle, no code. For the torch engine it may also hold both
graphs as `prefill.pt2` and `expert.pt2`: numbers and a list of known operations, read by bundle/pt2.py and never by
torch's own loader, which uses pickle.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError
from tokenizers import Tokenizer

from ki_vla_ros.bundle.manifest import (
    GraphSpec,
    Manifest,
    PolicySpec,
)
from ki_vla_ros.bundle.onnx_header import GraphHeader, TensorType, read_header
from ki_vla_ros.bundle.pt2 import read_program
from ki_vla_ros.bundle.time_table import TimeTable
from ki_vla_ros.bundle.tokenizer import read_tokenizer
from ki_vla_ros.errors import BundleError, describe_validation
from ki_vla_ros.files import is_name, read_json
from ki_vla_ros.robot import Robot, check_agreement, read_urdf
from ki_vla_ros.share import expand

FORMAT_VERSIONS = (2, 3)
MANIFEST = "manifest.json"
PREFILL = "prefill.onnx"
EXPERT = "expert.onnx"
PROGRAMS = {PREFILL: "prefill.pt2", EXPERT: "expert.pt2"}  # the same graphs for the torch engine, if exported
TIME = "time.npz"
TOKENIZER = "tokenizer.json"
MODEL_CARD = "README.md"
# What git and Hugging Face's downloads leave beside a bundle's files; nothing reads it.
DOWNLOAD_TRACES = (".git", ".gitattributes", ".cache")
MOST_NUMBERS = 1 << 28


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """A bundle that has passed every check of `load_bundle`; `path` is the folder that has its files by their names."""

    path: Path
    manifest: Manifest
    tokenizer: Tokenizer

    def described_by(self, robot: Robot) -> Bundle:
        """The same with this robot's topics, outputs and limits; ConfigurationError as `check_agreement`."""
        check_agreement(self.manifest.robot, robot)
        return replace(self, manifest=self.manifest.model_copy(update={"robot": robot}))

    def on_robot(self, robot_description: str) -> Bundle:
        """The same with joints continuous that the robot's URDF calls so; ConfigurationError as in `read_urdf`."""
        robot = self.manifest.robot
        urdf = read_urdf(robot_description, self.manifest.axis_names)
        turning = [name for name, joint in urdf.items() if joint.continuous]
        if not turning:
            return self
        marked = robot.turning(turning)
        return replace(self, manifest=self.manifest.model_copy(update={"robot": marked}))


def graph_interface(manifest: Manifest) -> dict[str, tuple[dict[str, TensorType], dict[str, TensorType]]]:
    """Inputs and outputs that each graph file must have, by name.

    The expert's graph is one step: `modulation` stands for the flow time (bundle/time_table.py), and `clean` marks
    actions that are already known (their time is 0). x_next is x_t - step * velocity, or x_t for clean actions, so an
    engine can chain steps by swapping addresses.
    """
    size, graph = manifest.image.size, manifest.graph
    cameras, length = len(manifest.cameras), manifest.prompt.length
    kv = TensorType(graph.dtype, (graph.layers, graph.kv_heads, graph.prefix_length, graph.head_dim))
    actions = TensorType("float32", (manifest.horizon, graph.action_dim))
    cache = {"keys": kv, "values": kv, "prefix_mask": TensorType("bool", (graph.prefix_length,))}
    prefill_inputs = {
        "images": TensorType("float32", (cameras, 3, size, size)),
        "image_mask": TensorType("bool", (cameras,)),
        "tokens": TensorType("int64", (length,)),
        "token_mask": TensorType("bool", (length,)),
    }
    state = {} if graph.state_dim is None else {"state": TensorType("float32", (graph.state_dim,))}
    step_inputs = {
        "x_t": actions,
        "modulation": TensorType("float32", (graph.modulation,)),
        "clean": TensorType("bool", (manifest.horizon,)),
        "step": TensorType("float32", (1,)),
    }
    return {
        PREFILL: (prefill_inputs, cache),
        EXPERT: ({**cache, **state, **step_inputs}, {"velocity": actions, "x_next": actions}),
    }


def load_bundle(path: Path | str) -> Bundle:
    """Read and verify a bundle; BundleError names the first fault.

    Files may be symbolic links if all of them point into the folder that the manifest's link points into: as colcon's
    --symlink-install makes them, with the same names there, or as a Hugging Face cache does, whose blobs have others.
    """
    given = expand(path)
    if not given.is_dir():
        raise BundleError(
            f"bundle: expected a folder, got {given}, which is {'a file' if given.exists() else 'missing'}"
        )
    if not (given / MANIFEST).is_file():
        raise BundleError(f"{given}: expected {MANIFEST} in a bundle, got none; is this the folder that export wrote?")
    real = (given / MANIFEST).resolve()
    root = real.parent if real.name == MANIFEST else given.resolve()
    manifest = _read_manifest(root / MANIFEST)
    _check_files(root, real.parent, manifest)
    _check_size(root, manifest)
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
        if PROGRAMS[name] in manifest.files:
            program = read_program(root / PROGRAMS[name])
            _check_interface(program.path, "input", inputs, program.inputs)
            _check_interface(program.path, "output", outputs, program.named_outputs(outputs))
    TimeTable(root / TIME, manifest.graph.modulation)
    return Bundle(root, manifest, read_tokenizer(root / TOKENIZER, manifest))


def write_bundle(folder: Path, policy: PolicySpec, graph: GraphSpec, tokenizer: Tokenizer, model_card: str) -> Bundle:
    """Complete a folder that holds the two graphs: tokenizer, model card, manifest with hashes; then load it."""
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


def _read_manifest(path: Path) -> Manifest:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: expected JSON, got something else ({error}); export again") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path}: expected a JSON object, got {type(content).__name__}; export again")
    version = content.get("format_version")
    if version not in FORMAT_VERSIONS:
        raise BundleError(
            f"{path}: expected format_version 2 or 3, got {version!r}; export with the training package "
            "of the same release as this one"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise BundleError(f"{path}: {describe_validation(error)}; export again") from error


def _check_files(root: Path, home: Path, manifest: Manifest) -> None:
    """`home` is the folder that all files of `root` must really be in; links into any other could lead anywhere."""
    for name in (PREFILL, EXPERT, TIME, TOKENIZER, MODEL_CARD):
        if name not in manifest.files:
            raise BundleError(f"{root / MANIFEST}: files: expected {name} among them, got {sorted(manifest.files)}")
    for name, expected in manifest.files.items():
        file = root / name
        if not is_name(name) or name == MANIFEST:
            raise BundleError(
                f"{root / MANIFEST}: files: expected plain names of files beside the manifest, got {name!r}"
            )
        if not file.is_file():
            got_link = f"a link to {file.readlink()}, where there is none" if file.is_symlink() else "none"
            raise BundleError(
                f"{root}: expected file {name}, which the manifest lists, got {got_link}; copy or download the whole "
                "folder"
            )
        if file.resolve().parent != home:
            raise BundleError(
                f"{file}: expected a file inside the bundle{'' if home == root else f', in {home}'}, got a link to "
                f"{file.resolve()}; copy what the link points to into its place"
            )
        got = file_sha256(file)
        if got != expected:
            raise BundleError(
                f"{file}: expected sha256 {expected[:12]}..., got {got[:12]}...; changed or cut off: copy it again"
            )
    for entry in sorted(root.iterdir()):
        if entry.name not in manifest.files and entry.name not in (MANIFEST, *DOWNLOAD_TRACES):
            raise BundleError(
                f"{root}: expected only the files that the manifest lists, got {entry.name!r} beside them; remove it"
            )


def _check_size(root: Path, manifest: Manifest) -> None:
    """Engines allocate every input and output once; pi0.5's take 45 MB."""
    sides = [side for graph in graph_interface(manifest).values() for side in graph]
    numbers = sum(math.prod(map(int, tensor.shape)) for side in sides for tensor in side.values())
    if numbers > MOST_NUMBERS:
        raise BundleError(
            f"{root / MANIFEST}: expected graphs with at most {MOST_NUMBERS} numbers as inputs and outputs, got "
            f"{numbers}: cameras, image.size, prompt.length, horizon, layers, kv_heads, prefix_length or head_dim "
            "cannot be right; export again"
        )


def _check_external_data(root: Path, manifest: Manifest, headers: dict[str, GraphHeader]) -> None:
    known = {PREFILL, EXPERT, *PROGRAMS.values(), TIME, TOKENIZER, MODEL_CARD}
    for name, header in headers.items():
        unlisted = sorted(header.external_files - (set(manifest.files) - known))
        if unlisted:
            raise BundleError(f"{root / name}: expected weights in files that the manifest lists, got {unlisted[0]!r}")
    referred = known.union(*(header.external_files for header in headers.values()))
    programs = sorted(set(manifest.files) & set(PROGRAMS.values()))
    if len(programs) == 1:
        raise BundleError(
            f"{root / MANIFEST}: files: expected both of {sorted(PROGRAMS.values())} or neither, got {programs[0]!r}; "
            "export again with --torch"
        )
    for name in manifest.files:
        if name not in referred:
            raise BundleError(
                f"{root / MANIFEST}: files: expected the two graphs, their weights, {TIME}, {TOKENIZER}, {MODEL_CARD}, "
                f"got {name!r}, which no graph refers to; a bundle holds no code and no pickle"
            )


def _check_interface(path: Path, side: str, expected: dict[str, TensorType], got: dict[str, TensorType]) -> None:
    if set(expected) != set(got):
        raise BundleError(f"{path}: expected {side}s {sorted(expected)}, got {sorted(got)}; export again")
    for name, tensor in expected.items():
        if got[name] != tensor:
            raise BundleError(f"{path}: {side} {name!r}: expected {tensor}, got {got[name]}; export again")
