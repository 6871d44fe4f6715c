"""Compares bags/mcap.py with another reader of the same interface, for instance one of its former versions.

    git show COMMIT:ki_vla_ros/bags/mcap.py > OTHER.py
    PYTHONPATH=.:test python -m support.mcap_readers OTHER.py [--seed 0] [--count 200]

Prints a table: files by kind of damage, messages that each reader reads, files from which one reads more than the
other, messages that differ from the recording (some cases change them), and the ratio of processor time; then both
readers' lines of code.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import io
import random
import struct
import sys
import tempfile
import time
import tokenize
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import ki_vla_ros.bags.mcap
from ki_vla_ros.bags import bag
from ki_vla_ros.bags.bag import open_bag
from support.bad_bags import CASES
from support.sample_bags import recording, write_bag, write_mcap

MESSAGES = recording()
KNOWN = {(message.topic, message.log_ns): message.data for message in MESSAGES}
TOPICS = sorted({message.topic for message in MESSAGES})
DATA_END = 15
Reader = Callable[..., Any]


def bags(folder: Path) -> list[bytes]:
    """The recording as recorders write it. That of the rosbags library has channels with metadata and no checksums."""
    written = [write_mcap(folder / f"{name}.mcap", MESSAGES, name) for name in ("", "zstd", "lz4")]
    written.append(write_mcap(folder / "loose.mcap", MESSAGES, per_chunk=0))
    written.append(write_mcap(folder / "no_index.mcap", MESSAGES, index=False))
    written.append(write_mcap(folder / "no_summary.mcap", MESSAGES, index=False, summary=False))
    written.append(next(write_bag(folder / "rosbags", MESSAGES).glob("*.mcap")))
    return [path.read_bytes() for path in written]


def cut(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(8, len(content)) :]


def flip(content: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 8)):
        content[chance.randrange(8, len(content))] ^= 1 << chance.randrange(8)


def flip_definition(content: bytearray, chance: random.Random) -> None:
    """In or next to a topic's name, where it is not compressed; in every second file no summary repeats it."""
    if chance.random() < 0.5:
        del content[next(at for at, kind, _ in records(content) if kind == DATA_END) :]
    names = [at for topic in TOPICS if (at := content.find(topic.encode())) > 0]
    at = chance.choice(names) + chance.randrange(-40, 60) if names else chance.randrange(8, len(content))
    content[at] ^= 1 << chance.randrange(8)


def replace_length(content: bytearray, chance: random.Random) -> None:
    at = chance.choice([at for at, _, _ in records(content)])
    struct.pack_into("<Q", content, at + 1, chance.choice([0, 1, chance.randrange(1 << 16), chance.randrange(1 << 63)]))


def lose_end(content: bytearray, chance: random.Random) -> None:
    del content[len(content) - chance.randint(1, 60) :]


DAMAGES = (cut, flip, flip_definition, replace_length, lose_end)


def records(content: bytearray) -> list[tuple[int, int, int]]:
    """(place, kind, size) of a whole file."""
    at, found = 8, []
    while at < len(content) - 8:
        kind, size = struct.unpack_from("<BQ", content, at)
        found.append((at, kind, size))
        at += 9 + size
    return found


def read(path: Path, reader: Reader) -> tuple[Counter[tuple[str, int]], int, float]:
    """Messages, how many of them are not as recorded, processor time in seconds."""
    began_s = time.process_time()
    with mock.patch.dict(bag.STORAGES, {".mcap": reader}), open_bag(path) as opened:
        found = list(opened.messages())
    took_s = time.process_time() - began_s
    wrong = sum(KNOWN.get((message.topic, message.log_ns), message.data) != message.data for message in found)
    return Counter((message.topic, message.log_ns) for message in found), wrong, took_s


def compare(kind: str, paths: list[Path], readers: Mapping[str, Reader]) -> None:
    totals, more, wrong, took_s = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for path in paths:
        found = {}
        for name, reader in readers.items():
            found[name], changed, seconds = read(path, reader)
            totals[name] += found[name].total()
            wrong[name] += changed
            took_s[name] += seconds  # type: ignore[assignment]
        for name, other in zip(readers, reversed(readers), strict=True):
            more[name] += bool(found[name] - found[other])
    figures = [f"{counts['ours']} / {counts['other']}" for counts in (totals, more, wrong)]
    print("|", " | ".join([kind, str(len(paths)), *figures, f"{took_s['ours'] / took_s['other']:.1f}"]), "|")


def lines_of_code(source: str) -> int:
    """Without blank lines, comments and docstrings."""
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in ignored]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="compares bags/mcap.py with another reader of mcap files")
    parser.add_argument("other", type=Path, help="the other reader's file; it has a class McapFile")
    parser.add_argument("--seed", type=int, default=0, help="of the damages")
    parser.add_argument("--count", type=int, default=200, help="files with each kind of damage")
    given = parser.parse_args()
    spec = importlib.util.spec_from_file_location("other_reader", given.other)
    assert spec is not None and spec.loader is not None
    sys.modules["other_reader"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readers = {"ours": ki_vla_ros.bags.mcap.McapFile, "other": module.McapFile}
    print("| damage | files | messages: ours / other | reads more: ours / other | changed | time: ours / other |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cases = []
        for number, case in enumerate(CASES.values()):
            (folder / str(number)).mkdir()
            cases.append(case.make(folder / str(number)))
        compare("cases of `bad_bags.py`", cases, readers)
        (folder / "whole").mkdir()
        whole = bags(folder / "whole")
        for damage in DAMAGES:
            chance, paths = random.Random(f"{given.seed} {damage.__name__}"), []
            for number in range(given.count):
                content = bytearray(whole[number % len(whole)])
                damage(content, chance)
                paths.append(folder / f"{damage.__name__}_{number}.mcap")
                paths[-1].write_bytes(content)
            compare(damage.__name__.replace("_", " "), paths, readers)
    for name, path in (("ours", Path(ki_vla_ros.bags.mcap.__file__)), ("other", given.other)):
        print(f"{name}: {lines_of_code(path.read_text())} lines of code")


if __name__ == "__main__":
    main()
