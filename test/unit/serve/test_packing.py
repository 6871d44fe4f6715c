"""Messages as bytes: what openpi's client writes, and what nobody should."""

from __future__ import annotations

import re
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest

from ki_vla_ros.errors import InputError
from ki_vla_ros.serve.packing import LARGEST_MAP, LONGEST_LIST, LONGEST_TEXT, MOST_CONTAINERS, TYPES, pack, unpack


def array(**changes: Any) -> dict[bytes, Any]:
    """An array of six numbers as openpi writes it."""
    return {b"__ndarray__": True, b"data": bytes(24), b"dtype": "<f4", b"shape": [2, 3], **changes}


def test_messages_come_back_as_they_were() -> None:
    values_HD = np.random.default_rng(0).normal(size=(4, 3))
    message = {"actions": values_HD, "timing": {"ms": 1.5}, "names": ["a", "b"], "many": 7, "on": True, "none": None}
    back = unpack(pack(message))
    assert np.array_equal(back.pop("actions"), values_HD) and values_HD.dtype == np.float64
    assert back == {key: value for key, value in message.items() if key != "actions"}


@pytest.mark.parametrize("name", TYPES)
def test_arrays_of_every_type_come_back(name: str) -> None:
    values = np.arange(12).reshape(3, 1, 4).astype(TYPES[name])
    back = unpack(pack(values))
    assert (back.dtype, back.shape) == (values.dtype, values.shape) and np.array_equal(back, values)


def test_arrays_without_values_and_in_another_order_in_memory() -> None:
    assert unpack(pack(np.zeros((0, 3), np.float32))).shape == (0, 3)
    turned = np.arange(6.0).reshape(2, 3).T
    assert np.array_equal(unpack(pack(turned)), turned)


def test_a_number_of_numpys() -> None:
    packed = msgpack.packb({b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f4"})
    assert unpack(packed) == np.float32(0.5) and unpack(packed).dtype == np.float32
    assert pack(np.float32(0.5)) == packed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({b"dtype": "|O"}, "expected a dtype of"),
        ({b"dtype": "<U3"}, "expected a dtype of"),
        ({b"dtype": "<c8"}, "expected a dtype of"),
        ({b"dtype": "i4,f8"}, "expected a dtype of"),
        ({b"dtype": ["f4"]}, "expected a dtype of"),
        ({b"dtype": None}, "expected a dtype of"),
        ({b"shape": [2, 4]}, "expected 32 bytes for float32 [2, 4], got 24"),
        ({b"shape": [2**40, 2**40]}, "got 24"),
        ({b"shape": [-2, -3]}, "sizes, got [-2, -3]"),
        ({b"shape": [True, 6]}, "sizes, got [True, 6]"),
        ({b"shape": [1] * 9}, "a shape of at most 8 sizes"),
        ({b"shape": 6}, "sizes, got 6"),
        ({b"data": "x" * 24}, "got 'str'"),
        ({b"data": None}, "got 'NoneType'"),
    ],
)
def test_arrays_that_are_none_are_refused(changes: dict[bytes, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        unpack(msgpack.packb(array(**{}) | changes))


@pytest.mark.parametrize("value", [None, "1", [1], 2**40, b"1"])
def test_numbers_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match="number: expected uint8"):
        unpack(msgpack.packb({b"__npgeneric__": True, b"data": value, b"dtype": "|u1"}))


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (b"", "got 0 bytes that are none"),
        (b"\xc1", "that are none"),
        (b"\x81\xa1a", "that are none"),
        (b"\x01\x02", "that are none"),
        (b"\xa1\xff", "that are none"),
        (b"\xd6\xff\x00\x00\x00\x01", "that are none"),  # a time
        (b"\xc7\x01\x05x", "that are none"),  # a type of somebody's own
        (b"\x81\x01\x02", "that are none"),  # a key that is a number
        (b"\x82\xa1a\x01\xa1a\x02", "expected each key once"),
        (b"\x91" * 100_000, "that are none"),
        (b"\xdd\xff\xff\xff\xff", "that are none"),
        (b"\xdf\xff\xff\xff\xff", "that are none"),
        (b"\xc6\xff\xff\xff\xff", "that are none"),
        (msgpack.packb([0] * (LONGEST_LIST + 1)), "that are none"),
        (msgpack.packb({str(n): n for n in range(LARGEST_MAP + 1)}), "that are none"),
        (msgpack.packb("x" * (LONGEST_TEXT + 1)), "that are none"),
        (msgpack.packb([[]] * MOST_CONTAINERS), "expected at most"),
        (msgpack.packb([{}] * MOST_CONTAINERS), "expected at most"),
    ],
)
def test_bytes_that_are_no_message_are_refused(frame: bytes, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        unpack(frame)


def test_what_a_message_becomes_in_memory_is_bounded() -> None:
    """Eight MiB of empty maps would be half a gigabyte."""
    inner = msgpack.packb([{}] * LONGEST_LIST)
    frame = b"\xdc" + (2048).to_bytes(2, "big") + inner * 2048
    assert len(frame) > 8e6
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="at most"):
            unpack(frame)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def test_only_what_a_message_may_have_is_written() -> None:
    with pytest.raises(TypeError, match="got object"):
        pack({"a": object()})
