"""A torch.export program is read as data: anything in it that torch would unpickle, evaluate or run is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ROOT
from support.exported import export

from ki_vla_ros.bundle.folder import EXPERT, MANIFEST, PREFILL, PROGRAMS, Bundle, file_sha256, load_bundle
from ki_vla_ros.bundle.pt2 import read_program
from ki_vla_ros.errors import BundleError
from training.export.bundle import ExportError, check_left_behind
from training.export.formats import save_program
from training.weights.checkpoints import load_checkpoint

Records = dict[str, bytes]
STEP = PROGRAMS[EXPERT]
MODEL, SAMPLES = "expert/models/model.json", "expert/data/sample_inputs/model.pt"
CONFIG, CONSTANTS = (
    "expert/data/weights/model_weights_config.json",
    "expert/data/constants/model_constants_config.json",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    made = export(tmp_path_factory, "token")
    return made.checkpoint, made.bundle


@pytest.fixture
def folder(exported: tuple[Path, Bundle], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported[1].path, tmp_path / "bundle"))


def edit(path: Path, change: Callable[[Records], object], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def rehash(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {path.name: file_sha256(path) for path in folder.iterdir() if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def in_json(record: str, change: Callable[[Any], object]) -> Callable[[Records], None]:
    def apply(records: Records) -> None:
        content = json.loads(records[record])
        change(content)
        records[record] = json.dumps(content).encode()

    return apply


def in_node(change: Callable[[dict[str, Any]], object]) -> Callable[[Records], None]:
    return in_json(MODEL, lambda model: change(model["graph_module"]["graph"]["nodes"][5]))


def first_weight(config: dict[str, Any]) -> dict[str, Any]:
    return next(iter(config["config"].values()))  # type: ignore[no-any-return]


def symbolic(model: Any) -> None:
    values = model["graph_module"]["graph"]["tensor_values"]
    next(iter(values.values()))["sizes"][0] = {"as_expr": {"expr_str": "__import__('os').getcwd()", "hint": None}}


def cut_weight(records: Records) -> None:
    records["expert/data/weights/weight_0"] = records["expert/data/weights/weight_0"][:-4]


PICKLE = pickle.dumps(print)
FAULTS: dict[str, tuple[Callable[[Records], object], str]] = {
    "sample inputs": (lambda r: r.update({SAMPLES: PICKLE}), r"got the record 'expert/data/sample_inputs/model\.pt'"),
    "legacy weights": (lambda r: r.update({"expert/data/weights/model.pt": PICKLE}), r"got the record .*no pickle"),
    "script object": (lambda r: r.update({"expert/data/constants/custom_obj_0": PICKLE}), r"got the record .*_obj_0'"),
    "compiled code": (lambda r: r.update({"expert/data/aotinductor/m/x.so": b"ELF"}), r"got the record .*x\.so'"),
    "second root": (lambda r: r.update({"version": b"8.20"}), r"got the record 'version'"),
    "other root": (lambda r: r.update({"models/model.json": b"{}"}), r"got the record 'models/model\.json'"),
    "pickled weight": (
        in_json(CONFIG, lambda c: first_weight(c).update(use_pickle=True)),
        r"expected raw numbers, got a pickle",
    ),
    "constants": (
        in_json(CONSTANTS, lambda c: c["config"].update(lookup={"path_name": "opaque_obj_0"})),
        r"expected no constants beside the weights, got \['lookup'\]",
    ),
    "operator of torch": (
        in_node(lambda n: n.update(target="torch.os.system")),
        r"only operators that prefill and expert use, got 'torch\.os\.system'",
    ),
    "operator on files": (
        in_node(lambda n: n.update(target="torch.ops.aten.from_file.default")),
        r"prefill and expert use, got 'torch\.ops\.aten\.from_file\.default'",
    ),
    "operator as argument": (
        in_node(lambda n: n["inputs"][0].update(arg={"as_operator": "torch.os.system"})),
        r"expected tensors, numbers and text, got an argument 'as_operator'",
    ),
    "expression": (in_json(MODEL, symbolic), r"expected a torch\.export program of schema 8, got something else"),
    "other schema": (
        in_json(MODEL, lambda m: m["schema_version"].update(major=9)),
        r"expected schema 8 of torch\.export, got 9; export again",
    ),
    "unwritten tensor": (
        in_node(lambda n: n["inputs"][0].update(arg={"as_tensor": {"name": "nowhere"}})),
        r"expected operations to read only what was written before them, got 'nowhere'",
    ),
    "unread weight": (
        in_json(CONFIG, lambda c: c["config"].update(head=first_weight(c))),
        r"expected only weights that the graph reads, got 'head'",
    ),
    "weight cut off": (cut_weight, r"expected \d+ bytes, row after row, got \d+"),
    "weight of another order": (
        in_json(CONFIG, lambda c: first_weight(c)["tensor_meta"].update(storage_offset={"as_int": 1})),
        r"row after row, got \d+ with strides .* from 1 on",
    ),
    "half precision": (
        in_json(CONFIG, lambda c: first_weight(c)["tensor_meta"].update(dtype=6)),
        r"expected one of .*'float32'.*, got torch's 6",
    ),
    "no graph": (lambda r: r.pop(MODEL), r"expected a torch\.export program of schema 8, got something else"),
    "nothing": (lambda r: r.clear(), r"expected a torch\.export program of schema 8, got something else"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_program_with_anything_else_is_refused(folder: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    edit(folder / STEP, change)
    rehash(folder)
    with pytest.raises(BundleError, match=rf"expert\.pt2: .*{message}"):
        load_bundle(folder)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.randoms(use_true_random=False), st.sampled_from([None, -1, 10**12, 0.5, "", "x", [], {}, [[]], {"as_int": {}}])
)
def test_a_damaged_graph_is_refused_or_read(folder: Path, random: Random, junk: Any) -> None:
    """Whatever the graph's JSON holds, the only exception is BundleError."""

    def damage(model: Any) -> None:
        while True:
            keys = [*(model if isinstance(model, dict) else range(len(model)))]
            key = random.choice(keys)
            if not (isinstance(model[key], (dict, list)) and model[key]) or random.random() < 0.1:
                model[key] = junk
                return
            model = model[key]

    path = shutil.copy(folder / STEP, folder / "damaged.pt2")
    edit(path, in_json(MODEL, damage))
    with suppress(BundleError):
        read_program(path)


def test_a_file_of_another_kind_is_refused(folder: Path) -> None:
    (folder / STEP).write_bytes(PICKLE)
    rehash(folder)
    with pytest.raises(BundleError, match=r"expert\.pt2: expected a torch\.export program .*export again with --torch"):
        load_bundle(folder)


def test_compressed_records_are_refused(folder: Path) -> None:
    edit(folder / STEP, lambda records: records, zipfile.ZIP_DEFLATED)
    with pytest.raises(BundleError, match=r"expected members without compression, got '"):
        read_program(folder / STEP)


def test_both_programs_or_none(folder: Path) -> None:
    (folder / STEP).unlink()
    rehash(folder)
    with pytest.raises(BundleError, match=r"expected both of .* or neither, got 'prefill\.pt2'; export again"):
        load_bundle(folder)
    (folder / PROGRAMS[PREFILL]).unlink()
    rehash(folder)
    load_bundle(folder)


def test_a_changed_program_is_refused(folder: Path) -> None:
    edit(folder / STEP, lambda records: records)
    with pytest.raises(BundleError, match=r"expert\.pt2: expected sha256"):
        load_bundle(folder)


def test_a_program_of_another_model_is_refused(folder: Path) -> None:
    shutil.copy(folder / PROGRAMS[PREFILL], folder / STEP)
    rehash(folder)
    with pytest.raises(BundleError, match=r"expert\.pt2: expected inputs .*'x_t'.*, got .*'tokens'"):
        load_bundle(folder)


def test_another_velocity_is_refused(folder: Path) -> None:
    def widen(model: Any) -> None:
        graph = model["graph_module"]["graph"]
        graph["tensor_values"][graph["outputs"][0]["as_tensor"]["name"]]["sizes"][1] = {"as_int": 8}

    edit(folder / STEP, in_json(MODEL, widen))
    rehash(folder)
    with pytest.raises(BundleError, match=r"output 'velocity': expected float32 \[16, 7\], got float32 \[16, 8\]"):
        load_bundle(folder)
    edit(
        folder / STEP,
        in_json(MODEL, lambda m: m["graph_module"]["graph"]["outputs"].append({"as_tensor": {"name": "x_t"}})),
    )
    rehash(folder)
    with pytest.raises(
        BundleError, match=r"expected outputs \['velocity', 'x_next'\], got \['output 2', 'velocity', 'x_next'\]"
    ):
        load_bundle(folder)


def test_another_horizon_is_refused(folder: Path) -> None:
    def lengthen(model: Any) -> None:
        model["graph_module"]["graph"]["tensor_values"]["clean"]["sizes"] = [{"as_int": 17}]

    edit(folder / STEP, in_json(MODEL, lengthen))
    rehash(folder)
    with pytest.raises(BundleError, match=r"expert\.pt2: input 'clean': expected bool \[16\], got bool \[17\]"):
        load_bundle(folder)


def test_it_is_what_torch_itself_reads(exported: tuple[Path, Bundle]) -> None:
    """Another reader sees the same program: weights, inputs, operations and what comes out."""
    _, bundle = exported
    ours, theirs = read_program(bundle.path / STEP), torch.export.load(bundle.path / STEP)
    assert [*ours.inputs] == [*theirs.graph_signature.user_inputs]
    for name, key in theirs.graph_signature.inputs_to_parameters.items():
        np.testing.assert_array_equal(ours.read_weight(name), theirs.state_dict[key].numpy())
    assert len(ours.weights) == len(theirs.state_dict)
    # torch writes the parts of a tuple as separate operations.
    called = [node.target for node in theirs.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert [f"aten.{operation.operator}" for operation in ours.operations] == [str(target) for target in called]


def test_the_programs_hold_no_answers_and_nothing_of_the_trainers_machine(exported: tuple[Path, Bundle]) -> None:
    checkpoint, bundle = exported
    model, rows = load_checkpoint(checkpoint), bundle.manifest.graph.vocab_size
    prefill, expert = (read_program(bundle.path / name) for name in (PROGRAMS[PREFILL], STEP))
    shapes = [weight.shape for program in (prefill, expert) for weight in program.weights.values()]
    assert shapes.count((rows, model.config.backbone.width)) == 1, "one token table, and no head besides it"
    assert not [shape for shape in shapes if model.config.vocab_size in shape]
    assert sum(shape in {(96, 32), (32, 48)} for shape in shapes) == 2, "no MLP of the last backbone layer"
    for name in PROGRAMS.values():
        with zipfile.ZipFile(bundle.path / name) as archive:
            content = b"".join(archive.read(record) for record in archive.namelist())
        for trace in (b".py", b"stack_trace", b"site-packages", b"training.", str(ROOT).encode()):
            assert trace not in content


@pytest.mark.parametrize("name", [PREFILL, EXPERT])
def test_too_many_weights_are_refused(exported: tuple[Path, Bundle], folder: Path, name: str) -> None:
    checkpoint, bundle = exported
    model, rows = load_checkpoint(checkpoint), bundle.manifest.graph.vocab_size
    check_left_behind(model, rows, folder)
    head = torch.nn.Linear(2000, 100).requires_grad_(False)
    save_program(head, {"hidden": torch.zeros(2, 2000)}, folder / PROGRAMS[name])
    with pytest.raises(ExportError, match=rf"{PROGRAMS[name]}: expected at most \d+ weights .*, got 200100"):
        check_left_behind(model, rows, folder)


def test_weights_that_the_graph_does_not_read_are_left_out(tmp_path: Path) -> None:
    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.unread = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

        def forward(self, x_t: torch.Tensor) -> torch.Tensor:
            return self.read(x_t)  # type: ignore[no-any-return]

    save_program(Graph().requires_grad_(False), {"x_t": torch.zeros(2, 3)}, tmp_path / STEP)
    assert [weight.shape for weight in read_program(tmp_path / STEP).weights.values()] == [(3, 3), (3,)]
    with zipfile.ZipFile(tmp_path / STEP) as archive:
        assert sum("weight_" in name for name in archive.namelist()) == 2
        assert b"unread" not in b"".join(archive.read(name) for name in archive.namelist())
