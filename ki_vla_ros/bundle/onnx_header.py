"""Inputs, outputs, weights and external files of an ONNX file, read from its bytes without building a session.

The robot has no `onnx` package, and the bundle is checked before any engine opens it. An engine reads the same bytes
with another protobuf reader, so this one accepts only what all of them understand in the same way: fields that
`_MESSAGES` knows, each with its own wire type, singular ones once (protobuf would merge them), tags and numbers not
longer than they must be. Whatever is left out of the table is refused: functions, branches and loops, sparse tensors,
training information, types that are no tensors. Weights are skipped over, so a large file costs little more.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from ki_vla_ros.errors import BundleError
from ki_vla_ros.files import open_file

_ELEMENT_TYPES = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64", 16: "bfloat16"}
_ELEMENT_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_STANDARD_DOMAINS = {"", "ai.onnx"}
# More than any graph of a policy; so a file of millions of empty fields is not walked for minutes.
_MOST_FIELDS: Final = 500_000

# Fields by number, from onnx.proto: name, kind, and "*" where there may be several. Kinds: int (varint), int32 (one
# that fits), f32 and f64 (fixed size), text, bytes, packed (f32, f64 or ints in one field), or a message.
_MESSAGES: Final[dict[str, dict[int, str]]] = {
    "Model": {
        1: "ir_version int",
        2: "producer_name text",
        3: "producer_version text",
        4: "domain text",
        5: "model_version int",
        6: "doc_string text",
        7: "graph Graph",
        8: "opset_import* Opset",
        14: "metadata_props* Entry",
    },
    "Opset": {1: "domain text", 2: "version int"},
    "Entry": {1: "key text", 2: "value text"},
    "Graph": {
        1: "node* Node",
        2: "name text",
        5: "initializer* Tensor",
        10: "doc_string text",
        11: "input* Value",
        12: "output* Value",
        13: "value_info* Value",
        16: "metadata_props* Entry",
    },
    "Node": {
        1: "input* text",
        2: "output* text",
        3: "name text",
        4: "op_type text",
        5: "attribute* Attribute",
        6: "doc_string text",
        7: "domain text",
        9: "metadata_props* Entry",
    },
    "Attribute": {
        1: "name text",
        2: "f f32",
        3: "i int",
        4: "s bytes",
        5: "t Tensor",
        7: "floats* f32",
        8: "ints* int",
        9: "strings* bytes",
        13: "doc_string text",
        20: "type int32",
    },
    "Tensor": {
        1: "dims* int",
        2: "data_type int32",
        4: "float_data packed f32",
        5: "int32_data packed ints",
        6: "string_data* bytes",
        7: "int64_data packed ints",
        8: "name text",
        9: "raw_data bytes",
        10: "double_data packed f64",
        11: "uint64_data packed ints",
        12: "doc_string text",
        13: "external_data* Entry",
        14: "data_location int32",
        16: "metadata_props* Entry",
    },
    "Value": {1: "name text", 2: "type Type", 3: "doc_string text", 4: "metadata_props* Entry"},
    "Type": {1: "tensor_type TensorType", 6: "denotation text"},
    "TensorType": {1: "elem_type int32", 2: "shape Shape"},
    "Shape": {1: "dim* Dimension"},
    "Dimension": {1: "dim_value int", 2: "dim_param text", 3: "denotation text"},
}
_WIRES: Final = {"int": 0, "int32": 0, "f64": 1, "f32": 5}  # all others: 2
_ITEM_BYTES: Final = {"f32": 4, "f64": 8}
_IN_PLACE: Final = ("float_data", "int32_data", "string_data", "int64_data", "raw_data", "double_data", "uint64_data")
_EXTERNAL: Final = 1
_EXTERNAL_KEYS: Final = {"location", "offset", "length", "checksum"}


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
    """Read the header of an ONNX file; BundleError if its bytes are not an ONNX model, or more than one reader's."""
    try:
        with open_file(path) as file:
            # Left to the garbage collector: an exception's frames may still hold slices, and close() would then fail.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        model = _Reader().message("Model", memoryview(mapped))
        if "graph" not in model:
            raise ValueError("no graph in it")
        return _header(model["graph"])
    except (OSError, ValueError, IndexError) as error:
        raise BundleError(f"{path}: expected an ONNX model, got other bytes ({error}); export again") from error


def _header(graph: dict[str, Any]) -> GraphHeader:
    header = GraphHeader()
    for tensor in graph.get("initializer", ()):
        name = tensor.get("name", "")
        if name in header.weights:
            raise ValueError(f"expected each weight once, got {name!r} again")
        _note_tensor(tensor, header)
    for side, values in (("input", header.inputs), ("output", header.outputs)):
        for value in graph.get(side, ()):
            name = value.get("name", "")
            if name in values or (side == "input" and name in header.weights):
                raise ValueError(f"expected each name once, got the {side} {name!r} again")
            values[name] = _tensor_type(value)
    for node in graph.get("node", ()):
        if (domain := node.get("domain", "")) not in _STANDARD_DOMAINS:
            header.foreign_domains.add(domain)
        for attribute in node.get("attribute", ()):
            if "t" in attribute:
                _note_tensor(attribute["t"], header)
        if node.get("op_type") == "Gather" and "input" in node:
            header.looked_up.add(node["input"][0])
    return header


def _note_tensor(tensor: dict[str, Any], header: GraphHeader) -> None:
    name, dims, element = tensor.get("name", ""), tuple(tensor.get("dims", ())), tensor.get("data_type", 0)
    entries = [(entry.get("key", ""), entry.get("value", "")) for entry in tensor.get("external_data", ())]
    location = tensor.get("data_location", 0)
    if (location, bool(entries)) not in ((0, False), (_EXTERNAL, True)):
        raise ValueError(f"weight {name!r}: expected its data here or in a file, got {location} and {len(entries)}")
    if entries:
        found = dict(entries)
        if len(found) != len(entries) or not {"location"} <= found.keys() <= _EXTERNAL_KEYS:
            raise ValueError(f"weight {name!r}: expected one place of its data, got {entries}")
        if not all(found.get(key, "0").isdecimal() for key in ("offset", "length")):
            raise ValueError(f"weight {name!r}: expected a place in a file, got {entries}")
        if any(key in tensor for key in _IN_PLACE):
            raise ValueError(f"weight {name!r}: expected its data here or in a file, got both")
        header.external_files.add(found["location"])
    header.weights[name] = dims
    if element in _ELEMENT_BYTES:  # strings have no fixed size, and our graphs have no elements below a byte
        header.weight_bytes[name] = math.prod(dims) * _ELEMENT_BYTES[element]


def _tensor_type(value: dict[str, Any]) -> TensorType:
    tensor = value.get("type", {}).get("tensor_type")
    if tensor is None:
        raise ValueError(f"{value.get('name', '')!r} is not a tensor")
    shape = []
    for dimension in tensor.get("shape", {}).get("dim", ()):
        if "dim_value" in dimension and "dim_param" in dimension:
            raise ValueError(f"{value.get('name', '')!r} has a dimension with a size and a name")
        shape.append(dimension.get("dim_value", dimension.get("dim_param", "?")))
    return TensorType(_ELEMENT_TYPES.get(tensor.get("elem_type", 0), "?"), tuple(shape))


class _Reader:
    """Turns messages into dictionaries, and counts the fields that this takes."""

    def __init__(self) -> None:
        self._count = 0
        self._schemas = {
            message: {
                number: (name.removesuffix("*"), name.endswith("*"), kinds)
                for number, text in fields.items()
                for name, *kinds in [text.split()]
            }
            for message, fields in _MESSAGES.items()
        }

    def message(self, message: str, content: memoryview) -> dict[str, Any]:
        schema, found = self._schemas[message], dict[str, Any]()
        for number, wire, value in _fields(content):
            self._count += 1
            if self._count > _MOST_FIELDS:
                raise ValueError(f"more than {_MOST_FIELDS} fields")
            if number not in schema:
                raise ValueError(
                    f"field {number} in {message}, which no graph of a policy has: no functions, branches, loops"
                )
            name, several, (kind, *items) = schema[number]
            if wire == 2 and several and kind in ("int", "f32"):
                found.setdefault(name, []).extend(_packed(value, kind))
                continue
            if wire != _WIRES.get(kind, 2):
                raise ValueError(f"{message}.{name} of wire type {wire}")
            if several:
                found.setdefault(name, []).append(self._value(kind, value))
            elif name in found:
                raise ValueError(f"{message}.{name} twice")
            elif kind == "packed":
                _check_packed(value, items[0])
                found[name] = value
            else:
                found[name] = self._value(kind, value)
        return found

    def _value(self, kind: str, value: Any) -> Any:
        match kind:
            case "text":
                return bytes(value).decode()
            case "int32" if value > 0x7FFFFFFF:
                raise ValueError(f"{value} where a smaller number belongs")
            case _:
                return self.message(kind, value) if kind in self._schemas else value


def _fields(content: memoryview) -> Iterator[tuple[int, int, Any]]:
    """Number, wire type and value (an integer or bytes) of each field of a protobuf message."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at, 5)
        number, wire = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise ValueError(f"field number {number} at byte {at}")
        if wire == 0:
            value, at = _varint(content, at)
            yield number, wire, value
            continue
        if wire == 2:
            size, at = _varint(content, at, 5)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(content):
            raise ValueError("it ends in the middle of a field")
        yield number, wire, content[at : at + size]
        at += size


def _varint(content: memoryview, at: int, most: int = 10) -> tuple[int, int]:
    """The number that begins there, of at most `most` bytes, none of them superfluous, and where it ends."""
    value = shift = 0
    for _ in range(most):
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            if (byte == 0 and shift > 7) or value >= 1 << (64 if most == 10 else 32):
                break
            return value, at
    raise ValueError(f"an overlong integer before byte {at}")


def _packed(content: memoryview, kind: str) -> list[int]:
    _check_packed(content, kind)
    if kind == "f32":
        return [0] * (len(content) // 4)  # nothing asks for their values
    numbers, at = [], 0
    while at < len(content):
        number, at = _varint(content, at)
        numbers.append(number)
    return numbers


def _check_packed(content: memoryview, kind: str) -> None:
    if kind in _ITEM_BYTES:
        if len(content) % _ITEM_BYTES[kind]:
            raise ValueError("it ends in the middle of a number")
        return
    ends = np.flatnonzero(np.frombuffer(content, dtype=np.uint8) < 0x80)
    if len(content) and (not len(ends) or ends[-1] != len(content) - 1 or np.diff(ends, prepend=-1).max() > 10):
        raise ValueError("an overlong integer among packed ones")
