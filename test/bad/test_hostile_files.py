"""Files made to hang, to fill the memory or to mean two things: each is refused in moments, by a line that says why."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.bundles import write_test_bundle
from support.sample_bags import record as mcap_record
from support.sample_bags import recording, sized, write_bag, write_mcap
from zstandard import ZstdCompressor

from ki_vla_ros.bags import open_bag
from ki_vla_ros.bench.__main__ import main as bench
from ki_vla_ros.bundle import MANIFEST, PREFILL, TOKENIZER, TimeTable, file_sha256, load_bundle, read_header
from ki_vla_ros.bundle.tokenizer import encode
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.errors import BundleError, ConfigurationError, InputError, InstructionError, KiVlaError, printable
from ki_vla_ros.files import parse_json, read_file
from ki_vla_ros.policy import check_instruction
from ki_vla_ros.replay.__main__ import main as replay
from ki_vla_ros.replay.latency import parse_latency
from ki_vla_ros.replay.recorded import read_tick
from ki_vla_ros.robot import find_robot, read_robot
from ki_vla_ros.settings import load_settings, read_session
from ki_vla_ros.share import find_bundle
from training.config import load_config
from training.data.lerobot import tables
from training.data.lerobot.layout import fill_path, read_info
from training.storage import whole_folder
from training.tokens.fast import read_processor
from training.tokens.paligemma import merges
from training.weights import find_weights, newest_checkpoint, read_ranges
from training.weights.checkpoints import read_config


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_test_bundle(tmp_path_factory.mktemp("bundles") / "valid").path


@pytest.fixture
def folder(valid: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(valid, tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Each of these takes moments, where it once took minutes; test/system/fuzz_files.py bounds the memory as well."""
    began_s = time.process_time()
    yield
    assert time.process_time() - began_s < 10.0


def rehash(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {path.name: file_sha256(path) for path in folder.iterdir() if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(manifest))


# --- what is no file


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "robot file": ("r.yaml", read_robot),
    "parameters": ("p.yaml", load_settings),
    "training": ("t.yaml", load_config),
    "latency": ("l.json", lambda path: parse_latency(str(path))),
    "statistics": ("stats.json", lambda path: read_ranges(path, "mean_std", 7, 7)),
    "weights": ("w.safetensors", find_weights),
    "index": ("w.index.json", find_weights),
    "arrays": ("time.npz", lambda path: TimeTable(path, 1)),
    "graph": ("prefill.onnx", read_header),
    "dataset": ("meta/info.json", lambda path: read_info(path.parent.parent)),
}


@pytest.mark.parametrize("what", READERS)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, what: str, kind: str) -> None:
    name, read = READERS[what]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(KiVlaError, match=r"got a (named pipe|folder|device)|expected model\.safetensors"):
        read(path)


@pytest.mark.parametrize("suffix", ["mcap", "db3", "mcap.zstd"])
def test_a_bag_that_is_a_pipe_is_a_fault(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"b.{suffix}")
    with open_bag(tmp_path / f"b.{suffix}") as bag:
        assert [str(fault) for fault in bag.faults] == [
            f"b.{suffix}: cannot be opened: expected a file, got a named pipe"
        ]
        assert list(bag.messages()) == []


def test_a_file_larger_than_it_should_be_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "r.yaml").open("wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(ConfigurationError, match="expected at most 2097152 bytes, got 10737418240"):
        read_robot(tmp_path / "r.yaml")
    with pytest.raises(OSError, match="expected at most 16777216 bytes"):
        read_file(tmp_path / "r.yaml")


@pytest.mark.parametrize("path", ["~nobody-has-this-name/x", "a" * 5000, "a\0b", "\x1b[2J" * 2000])
def test_a_path_that_no_file_can_have(path: str) -> None:
    for read in (find_bundle, load_bundle, open_bag, find_robot):
        with pytest.raises(ConfigurationError, match="expected a path, got one that no file can have here") as caught:
            read(path)
        assert str(caught.value).isprintable()


def test_a_link_to_itself(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for arguments in ([loop], [tmp_path / "bag", "--out", loop]):
        assert replay([str(argument) for argument in arguments]) == ExitCode.FAILED
    with (
        pytest.raises(ConfigurationError, match="expected a path, got one that no file can have here"),
        whole_folder(loop),
    ):
        pass


# --- JSON and YAML


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "expected each key once, got 'a' again"),
        ("[" * 1_000_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[" + "[]," * 3_000_000, "expected at most 16777216 characters and 2000000 objects and lists"),
        ('{"a": ' + "9" * 10_000 + "}", "integer string conversion"),
    ],
)
def test_json_that_means_two_things_or_fills_the_memory(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_json(text)
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"--latency .*got"):
        parse_latency(str(tmp_path / "l.json"))
    with pytest.raises(InputError, match="tick: expected what the node writes there"):
        read_tick(text)
    with pytest.raises(InputError, match="session: expected JSON"):
        read_session(text)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (BOMB, "expected at most 200000 values with all aliases written out"),
        ("name: &a [*a]", "expected at most 200000 values with all aliases written out"),
        ("name: " + "[" * 5000, "expected at most 50 levels"),
        ("name: " + "1:" * 100_000 + "1", "line 1: expected a shorter number"),
        ("name: 0x" + "f" * 50_000, "line 1: expected a shorter number"),
        ("? [a, b]\n: 1", "line 1: expected plain keys"),
        ("name: a\nname: b", "line 2: expected each key once, got 'name' again"),
        ("name: !!timestamp 2001-99-99", "expected YAML, got something else"),
    ],
)
def test_yaml_that_does_not_end(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    for read in (read_robot, load_config):
        with pytest.raises(ConfigurationError, match=fault):
            read(path)


def test_a_bags_metadata_is_read_as_strictly(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", recording(seconds=0.2))
    (bag / "metadata.yaml").write_text(BOMB + "rosbag2_bagfile_information: {relative_file_paths: *a29}\n")
    with open_bag(bag) as opened:
        assert "metadata.yaml: cannot be read" in str(opened.faults[0])
        assert list(opened.messages())  # all files of the folder are read


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("/**:\n  ros__parameters:\n    a: " + "{a: " * 200, "expected tables at most 100 deep"),
        ("/**:\n  ros__parameters:\n" + "".join(f"    p{n}: 1\n" for n in range(6000)), "at most 5000 parameters"),
        ("/**: {ros__parameters: {a: &x 1, b: *x}}", "which ROS does not follow"),
        ("a" * 2_000_000, "cannot be read: expected at most 1048576 bytes"),
    ],
)  # fmt: skip
def test_parameters_that_take_for_ever(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=fault):
        load_settings(tmp_path / "p.yaml")


# --- ONNX: what two protobuf readers could see differently


def varint(value: int, extra: int = 0) -> bytes:
    """As protobuf writes it, or with `extra` bytes that add nothing."""
    out = []
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value | 0x80, *([0x80] * (extra - 1)), 0]) if extra else bytes([*out, value])


def external(tag_bits: int = 0) -> bytes:
    """Fields of a tensor: its data is in /etc/hostname; with `tag_bits` in the tag of external_data."""
    entry = b"".join(
        varint(tag) + varint(len(text)) + text for tag, text in ((10, b"location"), (18, b"/etc/hostname"))
    )
    return varint(13 << 3 | 2 | tag_bits) + varint(len(entry)) + entry + varint(14 << 3) + varint(1)


def graph_field(content: bytes, number: int, tag_bits: int = 0) -> bytes:
    return varint(number << 3 | 2 | tag_bits) + varint(len(content)) + content


def in_graph(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """The model with other bytes as its graph."""

    def apply(content: bytes) -> bytes:
        model = onnx.load_model_from_string(content)
        graph = model.graph.SerializeToString()
        model.ClearField("graph")
        return model.SerializeToString() + graph_field(change(graph), 7)

    return apply


def in_tensor(more: bytes) -> Callable[[bytes], bytes]:
    """The model with more fields in one of its weights."""

    def change(graph: bytes) -> bytes:
        tensor = onnx.GraphProto.FromString(graph).initializer[0].SerializeToString()
        before = graph_field(tensor, 5)
        assert graph.count(before) == 1
        return graph.replace(before, graph_field(tensor + more, 5))

    return in_graph(change)


TENSOR = b"\x08\x01\x10\x01\x42\x01w"  # dims 1, float, name "w"
ESCAPES: dict[str, Callable[[bytes], bytes]] = {
    "external data, tag beyond 32 bits": in_tensor(external(1 << 32)),
    "external data that nothing else says": in_tensor(external()),
    "initializer, tag beyond 32 bits": in_graph(lambda g: g + graph_field(TENSOR + external(), 5, 1 << 35)),
    "sparse initializer": in_graph(lambda g: g + graph_field(graph_field(TENSOR + external(), 1), 15)),
    "a second graph, which protobuf merges": lambda m: m + graph_field(graph_field(TENSOR + external(), 5), 7),
    "a tag that is longer than it must be": lambda m: m + varint(8 << 3 | 2, extra=1) + b"\x00",
    "a length that is longer than it must be": lambda m: m + b"\x42" + varint(0, extra=2),
    "a number of eleven bytes": lambda m: m + b"\x28" + b"\xff" * 10 + b"\x01",
    "ir_version twice": lambda m: m + b"\x08\x0a",
    "a group": lambda m: m + b"\x3b\x3c",
    "field 0": lambda m: m + b"\x02\x00",
    "graph as a number": lambda m: m + b"\x38\x01",
    "functions": lambda m: m + graph_field(b"\x0a\x01f", 25),
    "training information": lambda m: m + graph_field(b"", 20),
    "a field that nobody knows": lambda m: m + graph_field(b"x", 100),
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_graph_that_two_readers_see_differently_is_refused(folder: Path, escape: str) -> None:
    path = folder / PREFILL
    path.write_bytes(ESCAPES[escape](path.read_bytes()))
    rehash(folder)
    with pytest.raises(BundleError, match=r"prefill\.onnx: expected an ONNX model, got other bytes"):
        load_bundle(folder)


def test_external_data_is_one_place_in_one_file(folder: Path) -> None:
    model = onnx.load(str(folder / PREFILL))
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
    raw = tensor.raw_data

    def entries(*pairs: tuple[str, str], keep: bool = False, location: int = 1) -> None:
        del tensor.external_data[:]
        tensor.raw_data = raw
        if not keep:
            tensor.ClearField("raw_data")
        tensor.data_location = location
        for key, value in pairs:
            tensor.external_data.add(key=key, value=value)
        (folder / "x.onnx").write_bytes(model.SerializeToString())

    entries(("location", "w.data"), ("offset", "0"), ("length", "16"))
    assert read_header(folder / "x.onnx").external_files == {"w.data"}
    for pairs, more in (
        ((("location", "a"), ("location", "b")), {}),
        ((("offset", "0"),), {}),
        ((), {}),
        ((("location", "a"),), {"keep": True}),
        ((("location", "a"),), {"location": 0}),
        ((("location", "a"), ("offset", "-1")), {}),
        ((("location", "a"), ("basepath", "/")), {}),
    ):
        entries(*pairs, **more)
        with pytest.raises(BundleError, match="weight 'table': expected"):
            read_header(folder / "x.onnx")


def test_a_graph_of_millions_of_fields_is_not_walked(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(graph_field(b"\x0a\x00" * 600_000, 7))
    with pytest.raises(BundleError, match="more than 500000 fields"):
        read_header(tmp_path / "x.onnx")


# --- archives


def npz(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy(shape: object, descr: str = "<f4", content: bytes = b"") -> bytes:
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + content


def deflated() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, periods=np.zeros(20_000_000))
    return buffer.getvalue()


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, periods=np.array([print], dtype=object))
    return buffer.getvalue()


def twice() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("periods.npy", npy((1,), content=bytes(4)))
        archive.writestr("periods.npy", npy((1,), content=bytes(4)))
    return buffer.getvalue()


def patched(at: int, value: bytes, record: bytes = b"PK\1\2") -> bytes:
    """The directory says something else about the first member."""
    content = bytearray(npz(periods=npy((1,), content=bytes(4))))
    start = content.find(record) + at
    content[start : start + len(value)] = value
    return bytes(content)


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "compressed": (deflated, "without compression, got 'periods.npy'"),
    "a pickle": (pickled, r"'periods.npy' of \d+ bytes as object"),
    "a name twice": (twice, "expected each name once"),
    "10 TB declared": (lambda: npz(periods=npy((10**13,))), r"'periods.npy' of 0 bytes as float32 \[10000000000000\]"),
    "a negative size": (lambda: npz(periods=npy((-1,))), "'periods.npy' of 0 bytes"),
    "a size that overflows": (lambda: npz(periods=npy((2**62, 4, 0, 2**62))), "expected weights|arrays"),
    "text": (lambda: npz(periods=npy((1,), "<U4", bytes(16))), "'periods.npy' of 16 bytes as <U4"),
    "no header": (lambda: npz(periods=b"\x93NUMPY\x01\x00\x02\x00(("), "without a header"),
    "encrypted": (lambda: patched(8, b"\1"), "without encryption"),
    "4 GB in the directory": (lambda: patched(24, b"\xf0\xff\xff\xff"), "without compression"),
    "a cut name": (lambda: npz(**{"periods": npy((1,))}).replace(b"periods.npy", b"peri\0ds.npy"), "plain names"),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_arrays_in_another_archive_than_ours(tmp_path: Path, what: str) -> None:
    make, fault = ARCHIVES[what]
    (tmp_path / "time.npz").write_bytes(make())
    with pytest.raises(BundleError, match=fault):
        TimeTable(tmp_path / "time.npz", 1)


# --- manifests


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda m: m["robot"].update(horizon=10**9), "horizon: expected <= 1000"),
        (lambda m: m["image"].update(size=10**6), "expected graphs with at most 268435456 numbers"),
        (lambda m: m["graph"].update(head_dim=2**40), "expected graphs with at most 268435456 numbers"),
        (lambda m: m["graph"].update(layers=10**300), "graph.layers: "),
        (
            lambda m: m["robot"].update(action_period_s=1e-300),
            "action_period_s: expected >= 0.001",
        ),
        (lambda m: m["state"].update(low=[-1e308] * 7, high=[1e308] * 7), "a range that a number can hold"),
        (lambda m: m["prompt"].update(template="{task}" + "x" * 10**6), "prompt.template: "),
        (lambda m: m["prompt"].update(max_instruction_chars=10**9), "prompt.max_instruction_chars: "),
        (lambda m: m["files"].update({"a" * 5000: "0" * 64}), "expected plain names of files beside the manifest"),
        (lambda m: m["files"].update({"\x1b[2J": "0" * 64}), r"got '\\x1b\[2J'"),
        (lambda m: m["files"].update({"\udc80": "0" * 64}), r"files"),
        (lambda m: m.update(name="x" * 10**6), "name: expected at most 128 characters"),
    ],
)
def test_a_manifest_of_sizes_that_cannot_be(
    folder: Path, change: Callable[[dict[str, Any]], object], fault: str
) -> None:
    change_manifest(folder, change)
    with pytest.raises(BundleError, match=fault) as caught:
        load_bundle(folder)
    assert len(str(caught.value)) < 4000 and str(caught.value).isprintable()


def test_a_manifest_with_a_key_twice(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace("{", '{"robot": 2,', 1))
    with pytest.raises(BundleError, match="expected each key once, got 'robot' again"):
        load_bundle(folder)


# --- tokenizers


def change_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / TOKENIZER).read_text())
    change(content)
    (folder / TOKENIZER).write_text(json.dumps(content))
    rehash(folder)


def split(pattern: object) -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": "Removed", "invert": True}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda c: c.update(pre_tokenizer=split({"Regex": r"(\w+\w+)+x"})), "pre_tokenizer: expected a plain text"),
        (lambda c: c.update(pre_tokenizer=split({"Regex": "(?<!a)(a*)*b"})), "pre_tokenizer: expected a plain text"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "expected ByteLevel or Split, got 'Whitespace'"),
        (lambda c: c.update(normalizer={"type": "Sequence", "normalizers": []}), "expected Replace, got 'Sequence'"),
        (lambda c: c.update(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}), "expected Replace, got"),
        (
            lambda c: c.update(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**6}),
            "normalizer: expected a short replacement",
        ),
        (
            lambda c: c.update(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "a"}),
            "normalizer: expected a plain text",
        ),
        (lambda c: c["model"].update(type="Unigram"), "model: expected BPE or WordLevel, got 'Unigram'"),
        (lambda c: c.update(model={"type": "BPE", "dropout": 0.5, "vocab": {}, "merges": []}), "the same tokens each"),
        (lambda c: c.update(model=[]), "model: expected BPE or WordLevel"),
        (lambda c: c["model"]["vocab"].update({"a": -1}), "expected a tokenizers file, got something else"),
    ],
)  # fmt: skip
def test_a_tokenizer_of_other_parts_than_ours(
    folder: Path, change: Callable[[dict[str, Any]], object], fault: str
) -> None:
    change_tokenizer(folder, change)
    with pytest.raises(BundleError, match=fault):
        load_bundle(folder)


def test_a_tokenizer_that_fails_at_its_first_text_is_named(folder: Path) -> None:
    """It adds a token that it does not have, which the library finds out when it encodes."""

    def change(content: dict[str, Any]) -> None:
        single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "no", "type_id": 0}}]
        content["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}

    change_tokenizer(folder, change)
    with pytest.raises(BundleError, match=r"tokenizer\.json: expected a tokenizer for the prompt, got one that fails"):
        load_bundle(folder)


class Panic(BaseException):
    """As the library's: no Exception."""


Panic.__name__ = "PanicException"


class Panicking:
    def encode(self, text: str, add_special_tokens: bool) -> None:
        raise Panic("backtracking limit")


def test_a_panic_of_the_library_is_an_error_about_the_text() -> None:
    with pytest.raises(
        InstructionError, match="prompt: expected text that the tokenizer reads, got 'touch': backtrack"
    ):
        encode(Panicking(), "touch")  # type: ignore[arg-type]


@pytest.mark.parametrize("instruction", ["\ud83d\ude00", "touch\x1b[2J", "touch \u202e red", "a" * 10**7, "touch\x00"])
def test_an_instruction_that_is_no_text_is_refused(valid: Path, instruction: str) -> None:
    with pytest.raises(InstructionError, match="instruction: expected") as caught:
        check_instruction(load_bundle(valid), instruction)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 4000


# --- bags


def database(path: Path, *statements: str) -> Path:
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()
    return path


TOPICS = "CREATE TABLE topics (id INTEGER PRIMARY KEY, name TEXT, type TEXT, serialization_format TEXT)"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT"


@pytest.mark.parametrize(
    "statements",
    [
        (TOPICS, f"CREATE VIEW messages AS {ENDLESS} i AS id, 1 AS topic_id, i AS timestamp, 'x' AS data FROM n"),
        (TOPICS, f"CREATE VIEW messages AS {ENDLESS} 1 AS id, 1 AS topic_id, 1 AS timestamp, 1 AS data FROM n WHERE 0"),
        (f"CREATE VIEW topics AS {ENDLESS} i AS id, 'x' AS name, 'y' AS type, 'cdr' AS serialization_format FROM n",),
        (TOPICS, "CREATE TABLE messages (id INTEGER PRIMARY KEY, topic_id, timestamp, data AS (zeroblob(900000000)))"),
    ],
)  # fmt: skip
def test_a_database_that_is_a_program(tmp_path: Path, statements: tuple[str, ...]) -> None:
    with open_bag(database(tmp_path / "b.db3", *statements)) as bag:
        assert [str(fault) for fault in bag.faults] == [
            "b.db3: cannot be read: expected a table "
            + ("messages" if statements[1:] else "topics")
            + ", got a view or "
            "computed columns"
        ]


def test_a_compressed_bag_that_is_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ki_vla_ros.bags.bag.LARGEST_UNPACKED", 1 << 24)
    (tmp_path / "b.mcap.zstd").write_bytes(ZstdCompressor(19).compress(bytes(256 << 20)))
    with open_bag(tmp_path / "b.mcap.zstd") as bag:
        assert "is more than 16777216 bytes when decompressed; its beginning is read" in str(bag.faults[0])


def test_a_chunk_that_is_a_bomb(tmp_path: Path) -> None:
    packed = ZstdCompressor(19).compress(bytes(100 << 20))
    chunk = struct.pack("<QQQI", 1, 2, 100 << 20, 0) + sized("zstd") + struct.pack("<Q", len(packed)) + packed
    content = b"\x89MCAP0\r\n" + mcap_record(1, sized("ros2") + sized("test")) + mcap_record(6, chunk)
    (tmp_path / "b.mcap").write_bytes(content)
    with open_bag(tmp_path / "b.mcap") as bag:
        assert list(bag.messages()) == []
        assert f"a chunk of {len(packed)} bytes that are {100 << 20}" in str(bag.faults[0])


def test_a_chunk_of_millions_of_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ki_vla_ros.bags.mcap.MOST_MESSAGES", 100)
    with open_bag(write_mcap(tmp_path / "b.mcap", recording(seconds=2.0), per_chunk=200)) as bag:
        messages = list(bag.messages())
        assert len(messages) == sum(min(100, count) for count in (200, 102))
        assert any("more than 100 messages in this chunk are left out" in str(fault) for fault in bag.faults)


def test_names_in_a_bag_cannot_write_on_a_terminal(tmp_path: Path) -> None:
    messages = recording(seconds=0.1)
    named = [type(m)("/a\x1b]0;owned\x07\nERROR: all fine", m.type, m.log_ns, m.data) for m in messages]
    with open_bag(write_mcap(tmp_path / "b.mcap", named, encoding="protobuf\x1b[2J")) as bag:
        assert bag.faults
        for fault in bag.faults:
            assert str(fault).isprintable()


# --- datasets and weights


@pytest.mark.parametrize(
    "pattern",
    ["{chunk_index.__class__.__mro__}", "{chunk_index:>9999999999}", "{chunk_index!r:03d}", "{other}", "{0}", "{"],
)
def test_a_datasets_path_is_no_program(pattern: str) -> None:
    with pytest.raises(ConfigurationError, match=r"meta/info\.json: expected a path with chunk_index in braces"):
        fill_path(pattern, chunk_index=3)
    assert fill_path("data/chunk-{chunk_index:03d}/{chunk_index}", chunk_index=3) == "data/chunk-003/3"


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_checkpoint_that_is_no_folder_of_the_run(tmp_path: Path, kind: str) -> None:
    (tmp_path / "checkpoint-000001").mkdir()
    if kind == "link":
        (tmp_path / "checkpoint-000002").symlink_to("checkpoint-000001")
    else:
        (tmp_path / "checkpoint-000002").write_text("")
    with pytest.raises(ConfigurationError, match=rf"checkpoint-000002: expected a checkpoint's folder, got a {kind}"):
        newest_checkpoint(tmp_path)


def test_a_tensor_that_is_there_twice(tmp_path: Path) -> None:
    """safetensors takes the last."""
    entries = (f'"a": {{"dtype": "F32", "shape": [1], "data_offsets": [{at}, {at + 4}]}}' for at in (4, 0))
    header = f"{{{', '.join(entries)}}}".encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ConfigurationError, match="expected each key once, got 'a' again"):
        find_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", [3, "..", "", ".", "a/b", "a\0b", "\x1b[2J"])
def test_an_index_of_no_files(tmp_path: Path, name: object) -> None:
    (tmp_path / "w.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConfigurationError, match="expected names of files beside the index, got"):
        find_weights(tmp_path / "w.index.json")


@pytest.mark.parametrize(
    ("mean", "fault"),
    [
        ('["1", "2"]', "expected a list of numbers"),
        ("[true, false]", "expected a list of numbers"),
        ("[null, 1]", "expected a list of numbers"),
        ("[1e308, 1]", r"expected finite numbers of at most 1e\+09"),
        ("[NaN, 1]", "expected finite numbers"),
    ],
)
def test_statistics_that_are_no_numbers(tmp_path: Path, mean: str, fault: str) -> None:
    side = f'{{"mean": {mean}, "std": [1, 1]}}'
    (tmp_path / "norm_stats.json").write_text(f'{{"norm_stats": {{"state": {side}, "actions": {side}}}}}')
    with pytest.raises(ConfigurationError, match=fault):
        read_ranges(tmp_path / "norm_stats.json", "mean_std", 2, 2)


def test_statistics_of_gigabytes(tmp_path: Path) -> None:
    header = json.dumps({"action.mean": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 4 << 30]}}).encode()
    with (tmp_path / "stats.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + (4 << 30))
    with pytest.raises(ConfigurationError, match="statistics of at most 16777216 bytes, got 4294967"):
        read_ranges(tmp_path / "stats.safetensors", "mean_std", 1, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("scale", "NaN"), ("scale", "Infinity"), ("scale", "1" + "0" * 400), ("min_token", "1" + "0" * 30)],
)
def test_a_fast_configuration_of_numbers_that_cannot_be(tmp_path: Path, key: str, value: str) -> None:
    fields = {"scale": "10", "min_token": "-354"} | {key: value}
    text = ", ".join(f'"{name}": {number}' for name, number in fields.items())
    (tmp_path / "processor_config.json").write_text(f"{{{text}}}")
    with pytest.raises(ConfigurationError, match=rf"processor_config\.json: {key}: expected a (whole )?number from"):
        read_processor(tmp_path / "processor_config.json")


def test_a_table_of_one_text_in_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kB on disk, and 200 MB once they are read."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * 100_000]))
    pq.write_table(pa.table({"task": text}), tmp_path / "tasks.parquet", store_schema=False)
    assert (tmp_path / "tasks.parquet").stat().st_size < 10_000
    monkeypatch.setattr(tables, "LARGEST_TABLE", 1 << 24)
    with pytest.raises(
        ConfigurationError, match=r"tasks\.parquet: not a whole parquet file: it has more than 16777216 b"
    ):
        tables.read_parquet(tmp_path / "tasks.parquet")


def test_a_piece_of_a_tokenizer_that_has_thousands_of_cuts() -> None:
    with pytest.raises(ConfigurationError, match="expected pieces of at most 1000 characters"):
        list(merges([("a" * 100_000, 0.0)]))


@pytest.mark.parametrize(("name", "value"), [("depth", 10**9), ("width", 10**12), ("heads", 0), ("mlp", "x")])
def test_a_checkpoint_of_sizes_that_cannot_be(tmp_path: Path, name: str, value: object) -> None:
    sizes = {"width": 16, "depth": 1, "mlp": 32, "heads": 2, "kv_heads": 1, "head_dim": 16}
    vision = {"image_size": 24, "patch_size": 12, "width": 16, "depth": 1, "heads": 2, "mlp": 32}
    fields = {"vision": vision | {name: value}, "backbone": sizes, "expert": sizes}
    fields |= {"vocab_size": 99, "action_dim": 7, "horizon": 16}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigurationError, match=r"config\.json: not the config of a model|vision: "):
        read_config(tmp_path)


# --- terminals


def test_errors_are_safe_to_print(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b[2J\x1b]0;x\x07 \u202e\u2066 \x85\x9b \ud800 \r\x00 \t"
    assert printable(hostile).isprintable() and printable("two\nlines") == "two\nlines"
    assert str(KiVlaError(hostile)).isprintable() and printable("käse \u2581") == "käse \u2581"
    long = str(KiVlaError("x" * 10**7 + "; do this"))
    assert len(long) < 4000 and long.endswith("; do this")

    def fail(error: Exception) -> Callable[[], int]:
        def work() -> int:
            raise error

        return work

    assert run_command("test", fail(OSError(36, "File name too long", "a" * 10**6))) == ExitCode.FAILED
    assert len(capsys.readouterr().err) < 4000
    for error in (KiVlaError(hostile), OSError(2, "no such file", f"/tmp/{hostile}"), ZeroDivisionError(hostile)):
        assert run_command("test", fail(error)) == ExitCode.FAILED
        said = capsys.readouterr().err
        assert all(line.isprintable() for line in said.split("\n")), said


def test_a_name_that_is_no_text_can_be_printed(tmp_path: Path) -> None:
    """As os.fsdecode gives it; UTF-8 cannot write it."""
    code = "from ki_vla_ros.console import run_command; exit(run_command('t', lambda: print('a\\udcff') or 0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONUTF8": "1"})
    assert (done.returncode, done.stdout) == (0, b"a\\udcff\n"), done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_to_a_full_disk(unbuffered: str) -> None:
    """Python writes out what is buffered at exit, and would end with 120."""
    code = "from ki_vla_ros.console import run_command; exit(run_command('t', lambda: print('a') or 0))"
    variables = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, env=variables)
    said = done.stderr.decode().splitlines()
    assert done.returncode == ExitCode.FAILED and len(said) == 1 and "No space left on device" in said[0], said


def test_figures_of_a_bench_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (tmp_path / "no" / "f.json", tmp_path):
        assert bench(["model", "--bundle", "bench", "--json", str(place)]) == ExitCode.FAILED
        assert capsys.readouterr().err.startswith(f"bench: {place} cannot be written: ")
