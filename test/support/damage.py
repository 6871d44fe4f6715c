"""Ways to damage a file: as a disk or a network does it, and as someone does who has read the format.

Everything is drawn from a `random.Random`, so a seed gives the same damage again.
"""

from __future__ import annotations

import copy
import io
import json
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

ESCAPE = "\x1b[2J\x1b]0;title\x07\u202e"
# What stands in a text where something else was: too large, too deep, too long, not printable, not what it seems.
WORDS: tuple[str, ...] = (
    "9" * 5000, "1e999", "-1", "0", "1e308", "nan", ".inf", "null", "true", "0x" + "f" * 3000, "1:" * 2000 + "1",
    "[" * 3000, "{" * 3000, "[[[[]]]]", "a" * 5000, "", " ", "\x00", "\t", "\n", '"', "'", "#", "&a [*a]", "*a",
    "<<: *a", "!!python/object/apply:os.system [echo]", "!!binary /w==", "!!timestamp 2001-99-99", "? [a, b]\n: c",
    "- - - -", "../../etc/passwd", "/dev/zero", "/dev/stdin", "~", "{0.__class__}", "{:>999999999}", "%s%n", "<script>",
    ESCAPE,
    "&a [x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c,*c,*c,*c,*c]",
)  # fmt: skip
# The same where a format has values.
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**12, 10**4000, 1e308, -1e-308, float("nan"), float("inf"), 0.5, "", "x",
    ESCAPE, "\ud800", "\x00", "a" * 5000, "../x", "/dev/zero", "{0.__class__.__mro__}", "{chunk_index:>999999999}", [],
    {}, [[]], [1] * 5000, ["x"] * 300, {"a": {}}, {"type": "Sequence"}, {"Regex": "(a*)*b"},
)  # fmt: skip


def damage(content: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, taken out, put in or repeated; perhaps the end cut off."""
    damaged = bytearray(content or b"\0")
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(len(damaged))
        size = chance.choice([1, 1, 1, 4, 8, 64, 4096])
        kind = chance.randrange(5)
        if kind == 0:
            damaged[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            damaged[at : at + size] = chance.randbytes(min(size, len(damaged) - at))
        elif kind == 2:
            damaged[at : at + size] = bytes([chance.choice([0, 255])]) * min(size, len(damaged) - at)
        elif kind == 3 and len(damaged) > 2 * size:
            del damaged[at : at + size]
        else:
            damaged[at:at] = damaged[:size]
    return bytes(damaged[: chance.randrange(len(damaged))] if chance.random() < 0.3 else damaged)


def damage_text(content: bytes, chance: random.Random) -> bytes:
    """Lines and words taken out, repeated or replaced."""
    lines = content.decode(errors="replace").split("\n")
    for _ in range(chance.randint(1, 4)):
        k, word = chance.randrange(len(lines)), chance.choice(WORDS)
        match chance.randrange(6):
            case 0:
                lines.insert(k, chance.choice(lines))
            case 1:
                del lines[k]
            case 2:
                lines.insert(k, " " * chance.randint(0, 8) + word)
            case 3:
                key, colon, _ = lines[k].partition(":")
                lines[k] = f"{key}{colon} {word}"
            case 4:
                lines[k] = lines[k].replace(chance.choice(lines[k].split() or [" "]), word, 1)
            case _:
                lines[k] += word
        lines = lines or [""]
    return "\n".join(lines).encode(errors="surrogatepass")


def damage_json(content: bytes, chance: random.Random) -> bytes:
    """A value, a key or a part of the document replaced, repeated, nested or taken out."""
    try:
        document = [json.loads(content)]
    except (RecursionError, ValueError):
        return damage(content, chance)
    for _ in range(chance.randint(1, 3)):
        owner, key = chance.choice(list(_places(document)))
        match chance.randrange(6):
            case 0 | 1:
                owner[key] = copy.deepcopy(chance.choice(VALUES))
            case 2 if isinstance(owner, dict):
                owner[str(chance.choice(VALUES))] = owner.pop(key)
            case 3 if owner is not document:
                del owner[key]
            case 4:
                other, its_key = chance.choice(list(_places(document)))
                owner[key] = copy.deepcopy(other[its_key])
            case _:
                owner[key] = [owner[key]] if chance.random() < 0.5 else {"a": owner[key]}
        document = document or [None]
    text = json.dumps(document[0], ensure_ascii=chance.random() < 0.5)
    if chance.random() < 0.1:
        text = "[" * 50_000 + text
    if chance.random() < 0.1 and text.startswith("{"):  # each key twice
        text = text[:-1] + ("," if len(text) > 2 else "") + text[1:]
    return text.encode(errors="surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def damage_zip(content: bytes, chance: random.Random) -> bytes:
    """Members damaged, renamed, repeated, compressed, or described otherwise in the directory than they are."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    for _ in range(chance.randint(1, 2)):
        k = chance.randrange(len(members))
        name, data = members[k]
        match chance.randrange(6):
            case 0:
                members[k] = name, (damage_json if data.startswith((b"{", b"[")) else damage)(data, chance)
            case 1:
                members.append((name, damage(data, chance)))
            case 2:
                members[k] = chance.choice(["", "../x", "a" * 5000, ESCAPE, name + "\x00", "x.npy"]) + name, data
            case 3:
                members[k] = name, bytes(chance.choice([0, 1 << 20, 64 << 20]))
            case 4 if len(members) > 1:
                del members[k]
            case _:
                members[k] = name, data + data
    methods = [zipfile.ZIP_STORED] * 3 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", chance.choice(methods)) as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = archive.compression
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a name that is there twice
                archive.writestr(info, data)
    packed = bytearray(buffer.getvalue())
    if chance.random() < 0.3:  # a field of one of the headers: flags, method, sizes
        starts = [at for mark in (b"PK\1\2", b"PK\3\4") for at in _all(packed, mark)]
        at = chance.choice(starts) + chance.randrange(4, 42)
        packed[at : at + 4] = chance.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\1\0\0\0", b"\0\0\0\x7f"])
    return bytes(packed)


def _all(content: bytes | bytearray, mark: bytes) -> Iterator[int]:
    at = content.find(mark)
    while at >= 0:
        yield at
        at = content.find(mark, at + 1)


# --- protobuf: a model file as a tree, written again with fields that no writer writes

# Field numbers of messages inside messages (onnx.proto), by the name of the message.
_INSIDE: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 8: "Leaf", 14: "Leaf", 20: "Training", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 11: "Value", 12: "Value", 13: "Value", 14: "Leaf", 15: "Sparse", 16: "Leaf"},
    "Node": {5: "Attribute", 9: "Leaf"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 14: "Type", 22: "Sparse", 23: "Sparse"},
    "Tensor": {13: "Leaf", 16: "Leaf"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Value": {2: "Type", 4: "Leaf"},
    "Type": {1: "TensorType", 4: "TensorType", 8: "TensorType"},
    "TensorType": {2: "Shape"},
    "Shape": {1: "Leaf"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 9: "Leaf"},
}
Field = list[Any]  # key, and an integer, bytes, or (name of the message, its fields)


def damage_onnx(content: bytes, chance: random.Random) -> bytes:
    """Fields repeated, moved, and put in with tags, lengths, wire types and numbers of every kind."""
    root = ("Model", _parse(content, "Model"))
    for _ in range(chance.randint(1, 3)):
        messages = [root, *_messages(root)]
        _, fields = chance.choice(messages)
        k = chance.randint(0, len(fields))
        match chance.randrange(5):
            case 0:
                _, others = chance.choice(messages)
                fields.insert(k, copy.deepcopy(chance.choice(others or [[8, 1]])))
            case 1 if fields:
                fields[k % len(fields)][0] ^= chance.choice([1, 2, 4, 8, 16, 1 << 35, 1 << 40, 1 << 62])
            case 2 if fields:
                del fields[k % len(fields)]
            case 3:
                key = chance.randrange(1, 27) << 3 | chance.choice([0, 2, 2, 2, 1, 3, 4, 5, 7])
                fields.insert(k, [key | chance.choice([0, 0, 1 << 32, 1 << 36]), chance.choice(_CONTENTS)])
            case _:
                where = _entry("location", "nowhere.bin")
                _, fields = chance.choice([m for m in messages if m[0] in ("Tensor", "Attribute")])
                fields += [[(13 << 3 | 2) | chance.choice([0, 1 << 32]), where], [14 << 3, 1]]
    return _write(root, chance)


def _entry(key: str, value: str) -> bytes:
    return b"".join(bytes([tag, len(text)]) + text.encode() for tag, text in ((10, key), (18, value)))


_CONTENTS: tuple[Any, ...] = (
    0, 1, 2, 2**31, 2**63, 2**64 - 1, b"", b"x", b"\x80\x80\x00", bytes(8), b"\xff" * 9,
    _entry("location", "nowhere.bin"), b"\x0a\x04name", b"ai.other", b"images", b"\x12\x00", b"\x38\x01",
)  # fmt: skip


def _parse(content: bytes, name: str) -> list[Field]:
    at, fields = 0, []
    while at < len(content):
        key, at = _varint(content, at)
        if key & 7 == 0:
            value, at = _varint(content, at)
            fields.append([key, value])
            continue
        size, at = _varint(content, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        part, at = content[at : at + size], at + size
        inner = _INSIDE.get(name, {}).get(key >> 3)
        fields.append([key, (inner, _parse(part, inner)) if inner else part])
    return fields


def _messages(message: tuple[str, list[Field]]) -> Iterator[tuple[str, list[Field]]]:
    for _, value in message[1]:
        if isinstance(value, tuple):
            yield value
            yield from _messages(value)


def _write(value: Any, chance: random.Random) -> bytes:
    out = b""
    for key, content in value[1]:
        wire, part = key & 7, _write(content, chance) if isinstance(content, tuple) else content
        if isinstance(part, int):
            part = _varint_bytes(part, chance) if wire in (0, 3, 4) else part.to_bytes(8, "little")
        if wire == 2:
            part = _varint_bytes(len(part), chance) + part
        out += _varint_bytes(key, chance) + part
    return out


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (content[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if content[at - 1] < 0x80:
            return value, at


def _varint_bytes(value: int, chance: random.Random) -> bytes:
    """Now and then longer than it needs to be."""
    out = []
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    if chance.random() < 0.0005:
        return bytes([*out, value | 0x80, *([0x80] * chance.randint(0, 9)), chance.choice([0, 0, 1])])
    return bytes([*out, value])


Damage = Callable[[bytes, random.Random], bytes]
