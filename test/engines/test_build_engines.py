"""ONNX graphs through NVIDIA's own parser and builder (TensorRT for RTX, ahead of time), and what stops it.

None of it needs a GPU: whether the plans run is not tested here.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx
import torch
from onnx import TensorProto, helper

from ki_vla_ros.bundle.folder import EXPERT, PREFILL, Bundle, graph_interface, load_bundle
from ki_vla_ros.bundle.onnx_header import TensorType, read_header
from ki_vla_ros.console import Progress
from ki_vla_ros.engines import build as build_engines
from ki_vla_ros.engines import tensorrt_builder
from ki_vla_ros.engines.plans import PlanCache, PlanKey, graph_sha256
from ki_vla_ros.engines.tensorrt_builder import (
    BuildOptions,
    BuildPhases,
    check_network,
    check_tensors,
    find_or_build,
    gpu_of,
    parse,
    plan_key,
)
from ki_vla_ros.engines.tensorrt_library import Library
from ki_vla_ros.errors import ConfigurationError, EngineError
from ki_vla_ros.share import find_bundle
from training.export.bundle import export_bundle
from training.export.random_weights import PROMPT_LENGTH, pi05_slice, policy_spec, write_checkpoint

pytestmark = pytest.mark.slow  # the export of the slice takes half a minute of a core
RTX = Library("tensorrt_rtx", tensorrt_rtx)
GPUS = ("sm86", "sm89", "sm120")
BUNDLES = ("demo", "pi05-slice")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(find_bundle("demo"))


@pytest.fixture(scope="module", params=BUNDLES)
def any_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """The shipped bundle, and two layers of pi0.5 at full width: bfloat16, with weights in files beside the graphs."""
    if request.param == "demo":
        yield load_bundle(find_bundle("demo"))
        return
    folder = tmp_path_factory.mktemp(request.param)
    config = pi05_slice()
    policy = policy_spec(config, request.param, 3, PROMPT_LENGTH[request.param], seed=0)
    write_checkpoint(folder / "checkpoint", config, policy, dtype=torch.bfloat16)
    yield export_bundle(folder / "checkpoint", folder / "bundle", dtype="bfloat16")
    shutil.rmtree(folder)  # a GB, which pytest would keep


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "engines")


@pytest.fixture
def said() -> list[str]:
    return []


def parsed(path: Path) -> Any:
    log = RTX.new_log()
    builder = RTX.new_builder(log)
    # The network must not outlive these.
    return SimpleNamespace(network=parse(RTX, builder, log, path), kept=(log, builder))


# --- both graphs of every bundle, for three GPUs


def test_both_graphs_are_built_for_absent_gpus(any_bundle: Bundle, cache: PlanCache, said: list[str]) -> None:
    bundle = any_bundle
    paths = build_engines.build_engines(bundle, RTX, GPUS, cache, BuildOptions(), said.append)
    assert len({path.read_bytes() for path in paths}) == len(paths) == 6
    for graph in (PREFILL, EXPERT):
        files = {graph, *read_header(bundle.path / graph).external_files}
        weights = sum((bundle.path / name).stat().st_size for name in files)
        for path in paths:
            if path.name.startswith(Path(graph).stem):
                assert path.stat().st_size > 0.9 * weights
                record = json.loads(path.with_name(path.name + ".json").read_text())
                assert record["size"] == path.stat().st_size and record["gpu"] in path.name
    assert sum("building it" in line for line in said) == 6

    said.clear()
    again = build_engines.build_engines(bundle, RTX, GPUS, cache, BuildOptions(), said.append)
    assert again == paths and said == []
    shutil.rmtree(cache.folder)


@pytest.mark.parametrize("graph", [PREFILL, EXPERT])
def test_the_parsed_network_matches_the_manifest(any_bundle: Bundle, graph: str) -> None:
    bundle = any_bundle
    inputs, outputs = graph_interface(bundle.manifest)[graph]
    seen = parsed(bundle.path / graph)
    check_network(bundle.path / graph, RTX, seen.network, inputs, outputs)
    for side, tensors in (("input", inputs), ("output", outputs)):
        name = next(iter(tensors))
        for wrong in (
            {**tensors, name: TensorType("float16", tensors[name].shape)},
            {**tensors, "further": tensors[name]},
        ):
            changed = {"inputs": inputs, "outputs": outputs} | {f"{side}s": wrong}
            with pytest.raises(
                EngineError, match=rf"{graph}: {side} '({name}|further)': expected .* from tensorrt_rtx"
            ):
                check_network(bundle.path / graph, RTX, seen.network, **changed)


def test_a_graph_that_differs_from_the_manifest_is_not_built(bundle: Bundle, cache: PlanCache, said: list[str]) -> None:
    robot = bundle.manifest.robot.model_copy(update={"horizon": bundle.manifest.horizon + 1})
    manifest = bundle.manifest.model_copy(update={"robot": robot})
    changed = dataclasses.replace(bundle, manifest=manifest)
    with pytest.raises(EngineError, match=rf"{EXPERT}: input 'clean': expected bool \[{manifest.horizon}\], got bool"):
        find_or_build(changed, plan_key(changed, EXPERT, RTX, "sm89"), RTX, cache, said.append)
    assert not list(cache.folder.glob("*.plan"))


# --- small graphs with what the bundles have, or must not have


def save_graph(path: Path, nodes: Sequence[Any], inputs: Any, outputs: Any, weights: Sequence[Any] = ()) -> Path:
    def infos(tensors: dict[str, tuple[int, list[int]]]) -> list[Any]:
        return [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in tensors.items()]

    graph = helper.make_graph(list(nodes), "graph", infos(inputs), infos(outputs), list(weights))
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()
    )
    return path


def test_element_types_survive(tmp_path: Path) -> None:
    types = {"b": TensorProto.BFLOAT16, "i": TensorProto.INT64, "f": TensorProto.FLOAT, "m": TensorProto.BOOL}
    inputs = {name: (dtype, [4]) for name, dtype in types.items()}
    outputs = {f"{name}_out": (dtype, [4]) for name, dtype in types.items() if name != "m"}
    nodes = [helper.make_node("Add", [name, name], [f"{name}_out"]) for name in "bif"]
    nodes += [helper.make_node("Not", ["m"], ["m_out"])]
    seen = parsed(save_graph(tmp_path / "g.onnx", nodes, inputs, outputs | {"m_out": (TensorProto.BOOL, [4])}))
    for side, count, get in (("input", 4, seen.network.get_input), ("output", 4, seen.network.get_output)):
        suffix = "" if side == "input" else "_out"
        expected = {"b": "bfloat16", "i": "int64", "f": "float32", "m": "bool"}
        wanted = {name + suffix: TensorType(dtype, (4,)) for name, dtype in expected.items()}
        check_tensors("g.onnx", "it", side, wanted, [get(i) for i in range(count)])


def write_external(folder: Path, size: int = 64) -> Path:
    """y = x @ w in bfloat16, with w in a separate file."""
    (folder / "g.onnx.data").write_bytes(np.zeros((size, size), np.uint16).tobytes())
    weight = TensorProto(
        name="w", data_type=TensorProto.BFLOAT16, dims=[size, size], data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", "g.onnx.data"), ("offset", "0"), ("length", str(2 * size * size))):
        weight.external_data.add(key=key, value=value)
    shape = (TensorProto.BFLOAT16, [1, size])
    return save_graph(
        folder / "g.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": shape}, {"y": shape}, [weight]
    )


def test_weights_beside_the_graph_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_external(tmp_path)
    monkeypatch.chdir("/")
    assert parsed(path).network.num_inputs == 1
    (tmp_path / "g.onnx.data").unlink()
    with pytest.raises(EngineError, match=r"g\.onnx: expected operators .* got 1 fault"):
        parsed(path)


def test_every_fault_of_the_parser_is_reported_with_its_node(tmp_path: Path) -> None:
    flat = (TensorProto.FLOAT, [4])
    nodes = [
        helper.make_node("Unheard", ["x"], ["a"], name="first_fault"),
        helper.make_node("Relu", ["a"], ["b"], name="sound"),
        helper.make_node("Unknown", ["b"], ["y"], name="second_fault"),
    ]
    with pytest.raises(EngineError) as caught:
        parsed(save_graph(tmp_path / "g.onnx", nodes, {"x": flat}, {"y": flat}))
    text = str(caught.value)
    assert "2 faults" in text and "node 0 Unheard 'first_fault'" in text and "node 2 Unknown 'second_fault'" in text
    assert "sound" not in text


def test_bytes_that_are_not_a_graph_are_refused(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"g\.onnx: expected operators"):
        parsed(tmp_path / "g.onnx")


# --- memory


def test_a_build_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_external(tmp_path, 4096)  # 33.6 MB
    monkeypatch.setattr(tensorrt_builder, "_available_memory", lambda: 400_000_000)
    with pytest.raises(EngineError, match=r"expected about 0\.4 GB of free memory .* got 0\.4 GB .*--no-memory-check"):
        tensorrt_builder.check_memory(path)
    monkeypatch.setattr(tensorrt_builder, "_available_memory", lambda: 402_000_000)
    tensorrt_builder.check_memory(path)


def test_the_free_memory_is_the_kernels_figure(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:   2048 kB\n")
    assert tensorrt_builder._available_memory(tmp_path / "meminfo") == 2048 * 1024
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\n")
    with pytest.raises(EngineError, match="expected a line MemAvailable, got none"):
        tensorrt_builder._available_memory(tmp_path / "meminfo")


def test_the_check_of_memory_can_be_left_out(
    bundle: Bundle, cache: PlanCache, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_builder, "_available_memory", lambda: 0)
    key = plan_key(bundle, EXPERT, RTX, "sm89")
    with pytest.raises(EngineError, match="of free memory"):
        find_or_build(bundle, key, RTX, cache, said.append)
    find_or_build(bundle, key, RTX, cache, said.append, BuildOptions(workspace_mb=64, check_memory=False))


# --- what goes with a graph into the cache


def test_external_weights_are_part_of_the_key(bundle: Bundle, tmp_path: Path) -> None:
    write_external(tmp_path)
    keys = []
    for data in ("a", "b"):
        files = {"g.onnx": "1" * 64, "g.onnx.data": data * 64}
        given: Any = SimpleNamespace(path=tmp_path, manifest=SimpleNamespace(files=files))
        keys.append(graph_sha256(given, "g.onnx"))
    assert keys[0] != keys[1]


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_timings_are_kept_from_build_to_build(bundle: Bundle, cache: PlanCache, said: list[str]) -> None:
    """`tensorrt` is not installed here: its calls are made on tensorrt_rtx, whose timing caches are empty."""
    library = Library("tensorrt", tensorrt_rtx)
    key = plan_key(bundle, EXPERT, library, "sm89")
    path = cache.timing_path(key.library, key.version, key.gpu)
    for earlier in (None, b"damaged"):
        if earlier is not None:
            path.write_bytes(earlier)
        tensorrt_builder.build_plan(bundle, key, library, cache, BuildOptions(), said.append)
        assert len(path.read_bytes()) > len(b"damaged")


def test_timings_that_the_library_refuses_are_measured_again(cache: PlanCache) -> None:
    """As `tensorrt` refuses those of another driver; tensorrt_rtx takes anything, so this is a stand-in."""
    key = PlanKey(graph="g.onnx", graph_sha256="0" * 64, library="tensorrt", version="10.3.0", gpu="sm87 Orin")
    cache.timing_path(key.library, key.version, key.gpu).write_bytes(b"of another driver")
    attached: list[bytes] = []

    class Config:
        def create_timing_cache(self, content: bytes) -> Any:
            return SimpleNamespace(content=content, serialize=lambda: content + b"+")

        def set_timing_cache(self, timings: Any, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            attached.append(timings.content)
            return not timings.content

    config: Any = Config()
    timing = tensorrt_builder._attach_timings(Library("tensorrt", None), config, cache, key)
    assert attached == [b"of another driver", b""] and timing is not None
    assert bytes(timing()[1]) == b"+"


def test_plans_of_tensorrt_are_for_a_product_those_of_rtx_for_a_compute_capability() -> None:
    device: Any = SimpleNamespace(name="Orin", compute_capability="sm87")
    assert gpu_of(device, Library("tensorrt", None)) == "sm87 Orin"
    assert gpu_of(device, RTX) == "sm87"
    with pytest.raises(
        ConfigurationError, match=r"expected one that tensorrt_rtx .* \(sm75, .*\), got 'sm87'; for another"
    ):
        tensorrt_builder.check_gpu(RTX, "sm87")
    tensorrt_builder.check_gpu(Library("tensorrt", SimpleNamespace()), "sm87 Orin")


# --- progress


def test_progress_is_the_share_of_nested_phases(said: list[str]) -> None:
    phases = BuildPhases("g", Progress(say=said.append, line_every_s=0.0))
    phases.start("whole", 2)
    phases.start("part", 4)
    for step in range(4):
        phases.step("part", step)
    phases.finish("part")
    phases.step("whole", 1)
    assert said == [
        *(f"g: {percent} % built, part" for percent in (12, 25, 37, 50)),
        "g: 100 % built, whole",
    ]


def test_ctrl_c_ends_a_build_and_leaves_nothing(
    bundle: Bundle, cache: PlanCache, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: BuildPhases) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BuildPhases, "_show", interrupted)
    key = plan_key(bundle, EXPERT, RTX, "sm89")
    with pytest.raises(KeyboardInterrupt):
        find_or_build(bundle, key, RTX, cache, said.append)
    assert [path.name for path in cache.folder.iterdir()] == ["lock"]


# --- the command


def test_the_command_prints_where_the_plans_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--bundle", "demo", "--library", "tensorrt_rtx", "--compute", "SM89", "--out", str(tmp_path)]
    assert build_engines.main(arguments) == 0
    printed = capsys.readouterr()
    assert [Path(line).exists() for line in printed.out.splitlines()] == [True, True]
    assert "building it" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compute", "sm89"], "--compute: expected none with tensorrt, which builds for the GPU that it runs on"),
        (["--library", "tensorrt_rtx", "--compute", "sm89,sm90"], "got 'sm90'; for another GPU build with tensorrt"),
        (["--library", "tensorrt_rtx", "--compute", "sm89", "--workspace", "0"], "--workspace: expected at least 1 MB"),
        (["--bundle", "nothing"], "models/nothing: expected the folder of a bundle, or one of "),
    ],
)
def test_the_command_names_what_is_wrong(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_engines.main(["--bundle", "demo", "--out", str(tmp_path), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("build_engines: ") and message in printed.err
    assert printed.out == "" and list(tmp_path.iterdir()) == []
