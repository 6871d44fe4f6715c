"""Reads a `torch.export` program (.pt2) as data: its interface, weights and list of tensor operations. No torch here.

torch's own loader is not used: it may unpickle sample inputs, constants and weights with `weights_only=False`, evaluate
symbolic expressions, and compile Python source from names in the file. Here every record must be JSON or raw numbers
and every operation one of `OPERATORS`; any other file is refused.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle.onnx_header import TensorType
from ki_vla_ros.errors import BundleError
from ki_vla_ros.files import LARGEST_TEXT, open_stored, parse_json

SCHEMA = 8  # major version of torch's serialised programs; torch 2.13 writes it
# What prefill and expert use, and nothing else: torch.ops.aten also has operators that read and write files.
_ALLOWED = """
    __or__.Tensor add.Tensor addcmul.default alias.default arange.default arange.start_step cat.default
    chunk.default contiguous.default conv2d.default cos.default cumsum.default div.Tensor embedding.default
    eq.Scalar expand.default flatten.using_ints ge.Scalar gelu.default gt.Scalar layer_norm.default linear.default
    mean.dim mul.Tensor neg.default pad.default pow.Scalar
    repeat_interleave.self_int reshape.default rsqrt.default scaled_dot_product_attention.default select.int
    silu.default sin.default slice.Tensor square.default stack.default sub.Tensor sum.dim_IntList to.dtype
    transpose.int unbind.int unflatten.int unsqueeze.default where.Scalar where.self
"""
OPERATORS = frozenset(_ALLOWED.split())
_DTYPES = {4: "int32", 5: "int64", 7: "float32", 8: "float64", 12: "bool", 13: "bfloat16"}
_WEIGHT = re.compile(r"data/weights/weight_\d+")
_CONFIG, _CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
_MODEL, _SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_SMALL = {"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id"}


class TensorName(str):
    """A tensor, by its name in the program."""


class Constant(str):
    """A dtype or memory format, by its name in the module torch."""


class AnyDevice:
    """The device that the program runs on; the one in the file is where it was traced."""


@dataclass(frozen=True, slots=True)
class Operation:
    """`torch.ops.aten.<operator>(*arguments, **options)` on numbers, text, lists, and the three types above."""

    operator: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    outputs: TensorName | tuple[TensorName, ...]

    def names(self) -> set[TensorName]:
        """Names of the tensors that it reads or writes."""
        return {*_names([*self.arguments, *self.options.values(), self.outputs])}


@dataclass(frozen=True, slots=True)
class Weight:
    record: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """A program without branches: each operation reads inputs, weights and what earlier ones wrote."""

    path: Path
    inputs: dict[str, TensorType]
    outputs: tuple[TensorName, ...]
    output_types: tuple[TensorType, ...]
    weights: dict[str, Weight]
    operations: tuple[Operation, ...]

    def named_outputs(self, names: Iterable[str]) -> dict[str, TensorType]:
        """Outputs under `names`: the file only orders them, so those beyond the last name get a number."""
        wanted = [*names]
        return {(wanted[k : k + 1] or [f"output {k}"])[0]: tensor for k, tensor in enumerate(self.output_types)}

    def read_weight(self, name: str) -> NDArray[np.generic]:
        """A copy that the caller may keep and change; bfloat16 comes as uint16 with the same bits."""
        weight = self.weights[name]
        try:
            with open_stored(self.path) as archive:
                content = bytearray(archive.read(weight.record))
        except (KeyError, OSError, ValueError) as error:
            raise BundleError(f"{self.path}: {name}: cannot be read ({error}); copy it again") from error
        return np.frombuffer(content, dtype=_stored(weight.dtype)).reshape(weight.shape)


def read_program(path: Path) -> Program:
    """Read and check a program; BundleError if it holds anything but numbers and known operations."""
    try:
        with open_stored(path) as archive:
            return _read(path, archive)
    except (AttributeError, LookupError, OSError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise BundleError(
            f"{path}: expected a torch.export program of schema {SCHEMA}, got something else ({error!r}); "
            "export again with --torch"
        ) from error


def _read(path: Path, archive: zipfile.ZipFile) -> Program:
    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    root = min(sizes).partition("/")[0] + "/"
    for entry in archive.infolist():
        name, inner = entry.filename, entry.filename.removeprefix(root)
        known = inner in {_CONFIG, _CONSTANTS, _MODEL, *_SMALL} or _WEIGHT.fullmatch(inner)
        empty = inner == _SAMPLES and entry.file_size == 0
        if inner == name or not (known or empty):
            raise BundleError(
                f"{path}: expected only weights and a graph, got the record {name!r}; a bundle holds no code and no "
                "pickle, export again with --torch"
            )

    def load(name: str) -> Any:
        if sizes[root + name] > LARGEST_TEXT:
            raise ValueError(f"{name} of {sizes[root + name]} bytes")
        return parse_json(archive.read(root + name))

    if load(_CONSTANTS)["config"]:
        raise BundleError(f"{path}: expected no constants beside the weights, got {sorted(load(_CONSTANTS)['config'])}")
    model = load(_MODEL)
    major = model["schema_version"]["major"]
    if major != SCHEMA:
        raise BundleError(f"{path}: expected schema {SCHEMA} of torch.export, got {major}; export again with --torch")
    module = model["graph_module"]
    graph = module["graph"]
    types = {name: TensorType(*_tensor_type(path, name, meta)) for name, meta in graph["tensor_values"].items()}
    stored = {key: _weight(path, key, entry, root, sizes) for key, entry in load(_CONFIG)["config"].items()}
    inputs: dict[str, TensorType] = {}
    weights: dict[str, Weight] = {}
    for spec in module["signature"]["input_specs"]:
        if "parameter" in spec:
            weights[spec["parameter"]["arg"]["name"]] = stored.pop(spec["parameter"]["parameter_name"])
        else:
            name = spec["user_input"]["arg"]["as_tensor"]["name"]
            inputs[name] = types[name]
    if stored:
        raise BundleError(f"{path}: expected only weights that the graph reads, got {sorted(stored)[0]!r}")
    operations = tuple(_operation(path, node) for node in graph["nodes"])
    outputs = tuple(TensorName(output["as_tensor"]["name"]) for output in graph["outputs"])
    written = {*inputs, *weights}
    for operation in operations:
        _check_written(path, written, [*operation.arguments, *operation.options.values()])
        written.update(_names(operation.outputs))
    _check_written(path, written, outputs)
    return Program(path, inputs, outputs, tuple(types[name] for name in outputs), weights, operations)


def _tensor_type(path: Path, name: str, meta: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
    if meta["dtype"] not in _DTYPES:
        raise BundleError(f"{path}: {name}: expected one of {sorted(_DTYPES.values())}, got torch's {meta['dtype']}")
    return _DTYPES[meta["dtype"]], tuple(int(size["as_int"]) for size in meta["sizes"])


def _weight(path: Path, key: str, entry: dict[str, Any], root: str, sizes: dict[str, int]) -> Weight:
    if entry["use_pickle"]:
        raise BundleError(f"{path}: {key}: expected raw numbers, got a pickle; export again with --torch")
    record, meta = f"{root}data/weights/{entry['path_name']}", entry["tensor_meta"]
    dtype, shape = _tensor_type(path, key, meta)
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    laid_out = (tuple(stride["as_int"] for stride in meta["strides"]), meta["storage_offset"]["as_int"])
    size = math.prod(shape) * np.dtype(_stored(dtype)).itemsize
    if laid_out != (strides, 0) or sizes[record] != size:
        raise BundleError(
            f"{path}: {key}: expected {size} bytes, row after row, got {sizes[record]} with strides {laid_out[0]} "
            f"from {laid_out[1]} on"
        )
    return Weight(record, dtype, shape)


def _stored(dtype: str) -> str:
    """numpy's type for the stored bits: it has no bfloat16."""
    return "uint16" if dtype == "bfloat16" else dtype


def _operation(path: Path, node: dict[str, Any]) -> Operation:
    operator = str(node["target"]).removeprefix("torch.ops.aten.")
    if operator not in OPERATORS:
        raise BundleError(f"{path}: expected only operators that prefill and expert use, got {node['target']!r}")
    arguments, options = [], {}
    for given in node["inputs"]:
        value = _value(path, operator, given["arg"])
        if given["kind"] == 1:
            arguments.append(value)
        else:
            options[str(given["name"])] = value
    (output,) = node["outputs"]
    written = _value(path, operator, output)
    return Operation(operator, tuple(arguments), options, tuple(written) if isinstance(written, list) else written)


def _value(path: Path, operator: str, argument: dict[str, Any]) -> Any:
    ((kind, content),) = argument.items()
    match kind:
        case "as_tensor":
            return TensorName(content["name"])
        case "as_tensors":
            return [TensorName(tensor["name"]) for tensor in content]
        case "as_optional_tensors":
            return [TensorName(tensor["as_tensor"]["name"]) if "as_tensor" in tensor else None for tensor in content]
        case "as_int" | "as_ints" | "as_float" | "as_floats" | "as_bool" | "as_string":
            return content
        case "as_none":
            return None
        case "as_scalar_type":
            return Constant(_DTYPES[content])
        case "as_memory_format":
            return Constant({1: "contiguous_format", 2: "channels_last"}[content])
        case "as_device":
            return AnyDevice()
    raise BundleError(f"{path}: {operator}: expected tensors, numbers and text, got an argument {kind!r}")


def _check_written(path: Path, written: set[str], values: Any) -> None:
    for name in _names(values):
        if name not in written:
            raise BundleError(
                f"{path}: expected operations to read only what was written before them, got {str(name)!r}"
            )


def _names(value: Any) -> Iterator[TensorName]:
    if isinstance(value, TensorName):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _names(part)
