"""Inputs, outputs, weights and external files of an ONNX file, read from its bytes without building a session.

The robot has no `onnx` package, and the bundle is checked before any engine opens it. Only the fields needed are walked
(field numbers from onnx.proto3); weights are skipped over, so a large file costs little more.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ki_vla_ros.errors import BundleError

_ELEMENT_TYPES = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64", 16: "bfloat16"}
_ELEMENT_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_STANDARD_DOMAINS = {"", "ai.onnx"}


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and shape of a graph's input or output; a free dimension is written as its name, or "?"."""

    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(slots=True)
class GraphHeader:
    """What `read_header` finds in a file.

    `weights` maps initialisers to their dimensions, `weight_bytes` to their size; `external_files` are the files that
    are said to hold their data. Of the weights in `looked_up` a run reads only single rows (operator Gather).
    """

    inputs: dict[str, TensorType] = field(default_factory=dict)
    outputs: dict[str, TensorType] = field(default_factory=dict)
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    weight_bytes: dict[str, int] = field(default_factory=dict)
    looked_up: set[str] = field(default_factory=set)
    external_files: set[str] = field(default_factory=set)
    foreign_domains: set[str] = field(default_factory=set)


def read_header(path: Path) -> GraphHeader:
    """Read the header of an ONNX file; BundleError if its bytes are not an ONNX model."""
    header = GraphHeader()
    try:
        with path.open("rb") as file:
            # Left to the garbage collector: an exception's frames may still hold slices, and close() would then fail.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        _read_model(memoryview(mapped), header)
    except (ValueError, IndexError, RecursionError) as error:
        raise BundleError(f"{path}: expected an ONNX model, got other bytes ({error}); export again") from error
    return header


def _read_model(model: memoryview, header: GraphHeader) -> None:
    seen_graph = False
    for number, value in _fields(model):  # 7 graph, 25 functions
        if number == 7:
            seen_graph = True
            _read_graph(_message(value), header, outermost=True)
        elif number == 25:
            for inner, part in _fields(_message(value)):  # 7 node
                if inner == 7:
                    _read_node(_message(part), header)
    if not seen_graph:
        raise ValueError("no graph in it")


def _read_graph(graph: memoryview, header: GraphHeader, outermost: bool) -> None:
    for number, value in _fields(graph):  # 1 node, 5 initializer, 11 input, 12 output, 15 sparse_initializer
        if number == 1:
            _read_node(_message(value), header)
        elif number == 5:
            _read_tensor(_message(value), header)
        elif number == 15:
            for inner, part in _fields(_message(value)):  # 1 values, 2 indices
                if inner in (1, 2):
                    _read_tensor(_message(part), header)
        elif number in (11, 12) and outermost:
            name, tensor_type = _read_value_info(_message(value))
            (header.inputs if number == 11 else header.outputs)[name] = tensor_type


def _read_node(node: memoryview, header: GraphHeader) -> None:
    inputs, operator = [], ""
    for number, value in _fields(node):  # 1 input, 4 op_type, 5 attribute, 7 domain
        if number == 1:
            inputs.append(_text(value))
        elif number == 4:
            operator = _text(value)
        elif number == 7 and (domain := _text(value)) not in _STANDARD_DOMAINS:
            header.foreign_domains.add(domain)
        elif number == 5:
            for inner, part in _fields(_message(value)):  # 5 t, 6 g, 10 tensors, 11 graphs
                if inner in (5, 10):
                    _read_tensor(_message(part), header)
                elif inner in (6, 11):
                    _read_graph(_message(part), header, outermost=False)
    if operator == "Gather" and inputs:
        header.looked_up.add(inputs[0])


def _read_tensor(tensor: memoryview, header: GraphHeader) -> None:
    name, dims, element = "", [], 0
    for number, value in _fields(tensor):  # 1 dims, 2 data_type, 8 name, 13 external_data (1 key, 2 value)
        if number == 1:
            dims.extend([value] if isinstance(value, int) else _packed(value))
        elif number == 2 and isinstance(value, int):
            element = value
        elif number == 8:
            name = _text(value)
        elif number == 13:
            entry = {inner: _text(part) for inner, part in _fields(_message(value))}
            if entry.get(1) == "location":
                header.external_files.add(entry.get(2, ""))
    header.weights[name] = tuple(dims)
    if element in _ELEMENT_BYTES:  # strings have no fixed size, and our graphs have no elements below a byte
        header.weight_bytes[name] = math.prod(dims) * _ELEMENT_BYTES[element]


def _read_value_info(info: memoryview) -> tuple[str, TensorType]:
    name, dtype, shape = "", "?", []
    for number, value in _fields(info):  # 1 name, 2 type (1 tensor_type: 1 elem_type, 2 shape)
        if number == 1:
            name = _text(value)
        elif number == 2:
            for kind, tensor in _fields(_message(value)):
                if kind != 1:
                    raise ValueError(f"{name!r} is not a tensor")
                for inner, part in _fields(_message(tensor)):
                    if inner == 1:
                        dtype = _ELEMENT_TYPES.get(part, "?") if isinstance(part, int) else "?"
                    elif inner == 2:
                        shape = [_dimension(_message(dim)) for _, dim in _fields(_message(part))]
    return name, TensorType(dtype, tuple(shape))


def _dimension(dim: memoryview) -> int | str:
    for number, value in _fields(dim):  # 1 dim_value, 2 dim_param
        if number == 1 and isinstance(value, int):
            return value
        if number == 2:
            return _text(value)
    return "?"


def _fields(buffer: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value, an integer or bytes, of a protobuf message."""
    at = 0
    while at < len(buffer):
        key, at = _varint(buffer, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(buffer, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(buffer, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(buffer):
            raise ValueError("it ends in the middle of a field")
        yield number, buffer[at : at + size]
        at += size


def _varint(buffer: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"overlong integer at byte {at}")


def _packed(value: memoryview) -> list[int]:
    numbers, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        numbers.append(number)
    return numbers


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("an integer where a message belongs")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode()
