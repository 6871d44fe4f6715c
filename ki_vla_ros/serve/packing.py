"""Messages as bytes: msgpack, with arrays as openpi's client writes them.

An array is a map with four keys, which are bytes: `__ndarray__` (true), `data` (its bytes, C order), `dtype` (as numpy
writes it, such as `<f4`) and `shape`. A numpy number is one with three: `__npgeneric__`, `data` (the number), `dtype`.

Whoever may send a message is not trusted: its size is bounded before it comes here, and what it may become in memory
is bounded here.
"""

from __future__ import annotations

import math
from typing import Any, Final

import msgpack
import numpy as np

from ki_vla_ros.errors import InputError, short_repr

LONGEST_TEXT: Final = 1 << 16
LONGEST_LIST: Final = 4096
LARGEST_MAP: Final = 256
MOST_CONTAINERS: Final = 1024  # lists and maps of a message: 64 MiB of empty ones would become gigabytes
MOST_DIMENSIONS: Final = 8
# No objects, no text, no records: nothing that is more than numbers.
TYPES: Final[dict[str, np.dtype[Any]]] = {
    np.dtype(name).str: np.dtype(name) for name in ("?", "i1", "u1", "f2", "f4", "f8")
} | {np.dtype(name).str: np.dtype(name) for name in ("i2", "u2", "i4", "u4", "i8", "u8")}
ARRAY, NUMBER = b"__ndarray__", b"__npgeneric__"


def pack(message: Any) -> bytes:
    """Numbers, texts, lists, maps and arrays of numbers as bytes."""
    packed = msgpack.packb(message, default=_as_map)
    assert isinstance(packed, bytes)
    return packed


def unpack(frame: bytes) -> Any:
    """The inverse of `pack`; arrays are read-only views of the frame. InputError for anything else."""
    containers = 0

    def count(_: object = None) -> None:
        nonlocal containers
        containers += 1
        if containers > MOST_CONTAINERS:
            raise InputError(f"message: expected at most {MOST_CONTAINERS} lists and maps, got more")

    def take_list(values: list[Any]) -> list[Any]:
        count()
        return values

    def take_map(pairs: list[tuple[Any, Any]]) -> Any:
        count()
        return _from_pairs(pairs)

    try:
        return msgpack.unpackb(
            frame,
            list_hook=take_list,
            object_pairs_hook=take_map,
            max_str_len=LONGEST_TEXT,
            max_array_len=LONGEST_LIST,
            max_map_len=LARGEST_MAP,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        why = str(error) or type(error).__name__
        raise InputError(f"message: expected msgpack, got {len(frame)} bytes that are none ({why})") from None


def _as_map(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {NUMBER: True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"expected numbers, texts, lists, maps and arrays, got {type(value).__name__}")


def _from_pairs(pairs: list[tuple[Any, Any]]) -> Any:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InputError(f"message: expected each key once, got {short_repr([key for key, _ in pairs])}")
    if ARRAY in found:
        return _array(found)
    if NUMBER in found:
        return _number(found)
    return found


def _array(parts: dict[Any, Any]) -> np.ndarray:
    dtype = _dtype(parts)
    data, shape = parts.get(b"data"), parts.get(b"shape")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(_is_size(size) for size in shape):
        raise InputError(f"array: expected a shape of at most {MOST_DIMENSIONS} sizes, got {short_repr(shape)}")
    size = math.prod(shape) * dtype.itemsize
    if not isinstance(data, bytes) or len(data) != size:
        got = len(data) if isinstance(data, bytes) else type(data).__name__
        raise InputError(f"array: expected {size} bytes for {dtype} {short_repr(shape)}, got {short_repr(got)}")
    return np.frombuffer(data, dtype).reshape(shape)


def _number(parts: dict[Any, Any]) -> Any:
    dtype, value = _dtype(parts), parts.get(b"data")
    try:
        if not isinstance(value, bool | int | float):
            raise TypeError
        return dtype.type(value)
    except (OverflowError, TypeError, ValueError):
        raise InputError(f"number: expected {dtype}, got {short_repr(value)}") from None


def _dtype(parts: dict[Any, Any]) -> np.dtype[Any]:
    name = parts.get(b"dtype")
    if not isinstance(name, str) or name not in TYPES:
        raise InputError(f"array: expected a dtype of {', '.join(TYPES)}, got {short_repr(name)}")
    return TYPES[name]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
