"""`bench model` and `bench compare`: what they count, and their errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from support import ROOT
from support.bundles import demo_policy

from ki_vla_ros.bench import __main__ as bench
from ki_vla_ros.bench.compare import parse_set_up
from ki_vla_ros.bench.model import (
    PARTS,
    EngineSetUp,
    graph_figures,
    roofline_figures,
    time_parts,
    weights_read,
)
from ki_vla_ros.bench.roofline import Ceiling
from ki_vla_ros.bundle.folder import load_bundle
from ki_vla_ros.bundle.onnx_header import GraphHeader, read_header
from ki_vla_ros.engines.base import KVCache
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.records import ModelInput
from training.export.tiny import write_tiny_bundle

DEMO = ROOT / "models" / "demo"


def test_weights_and_bytes_are_those_of_the_files() -> None:
    bundle = load_bundle(DEMO)
    found, graph = graph_figures(bundle), bundle.manifest.graph
    kv_bytes = 2 * 4 * graph.layers * graph.kv_heads * graph.prefix_length * graph.head_dim
    for name, file, flops in (
        ("prefill", "prefill.onnx", graph.prefill_flops),
        ("step", "expert.onnx", graph.step_flops),
    ):
        tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(DEMO / file)).graph.initializer}
        assert found[name]["parameters"] == sum(tensor.size for tensor in tensors.values())
        assert found[name]["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
        assert found[name]["flops"] == flops
        table_bytes = sum(t.nbytes for t in tensors.values() if t.shape[:1] == (graph.vocab_size,))
        rows_bytes = table_bytes * bundle.manifest.prompt.length // graph.vocab_size
        assert (name == "prefill") == (table_bytes > 0)
        # Other looked-up weights are a handful of indices.
        assert found[name]["bytes_read"] == pytest.approx(
            found[name]["bytes"] - table_bytes + rows_bytes + kv_bytes, abs=4096
        )


def test_only_the_looked_up_rows_of_a_table_are_read() -> None:
    header = GraphHeader(
        weights={"table": (1000, 8), "few": (5, 8), "matrix": (8, 8), "number": ()},
        weight_bytes={"table": 32_000, "few": 160, "matrix": 256, "number": 4},
        looked_up={"table", "few", "number", "computed"},
    )
    assert weights_read(header, 10) == 320 + 160 + 256 + 4


def test_half_precision_weights_have_two_bytes(tmp_path: Path) -> None:
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.BFLOAT16, [3, 5], np.zeros(15))
    graph = onnx.helper.make_graph([], "g", [], [], [weight])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "g.onnx"))
    assert read_header(tmp_path / "g.onnx").weight_bytes == {"w": 30}


def test_the_roofline_of_parts() -> None:
    graphs = {
        "prefill": {"flops": 4_000_000_000, "bytes_read": 1_000_000},
        "step": {"flops": 1_000_000, "bytes_read": 20_000_000},
    }
    parts = {name: np.array([8.0, 9.0, 7.0]) for name in PARTS}
    found = roofline_figures(Ceiling(1e12, {0: 10e9}, "made up"), graphs, 5, parts)
    assert found["ms"] == pytest.approx({"prefill": 4.0, "one step": 2.0, "all steps": 10.0, "chunk": 14.0})
    assert found["ratio"] == pytest.approx({"prefill": 2.0, "one step": 4.0, "all steps": 0.8, "chunk": 8 / 14})
    assert found["bound"] == {"prefill": "compute", "step": "bytes"}
    assert found["gflops_per_s"] == pytest.approx(1000.0) and found["gb_per_s"] == pytest.approx({"0": 10.0})


class DeferringDouble:
    """Stands in for an engine whose prefill returns early, as on a GPU; records what it is asked to do."""

    description = "a double"

    def __init__(self, action_dim: int) -> None:
        self.asked: list[str] = []
        self._action_dim = action_dim

    def prefill(self, model_input: ModelInput) -> KVCache:
        self.asked.append("prefill")
        return KVCache(self, len(self.asked))

    def velocity(self, cache: KVCache, state_S: Any, x_t_HA: NDArray[np.float32], *_: Any) -> NDArray[np.float32]:
        assert cache.generation <= len(self.asked)
        self.asked.append("step")
        return np.zeros_like(x_t_HA)

    def synchronize(self) -> None:
        self.asked.append("wait")

    def close(self) -> None: ...


def test_only_a_prefill_alone_waits_for_the_device(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "b", demo_policy())
    engine = DeferringDouble(bundle.manifest.graph.action_dim)
    taken_ms = time_parts(Policy(bundle, engine, flow_steps=2), 1, lambda line: None)
    assert set(taken_ms) == set(PARTS) and all(len(values) == 1 for values in taken_ms.values())
    forwards = ["prefill", "wait", "step", "step", "step", "prefill", "step", "step"]
    backwards = ["prefill", "step", "step", "step", "step", "step", "prefill", "wait"]
    assert engine.asked[:17] == ["prefill", *forwards, *backwards]


def test_set_ups_are_read_and_refused() -> None:
    defaults = EngineSetUp(bundle="b", provider="cuda", threads=3)
    assert parse_set_up("torch", defaults) == EngineSetUp("b", "torch", "cuda", 3)
    assert parse_set_up("onnx:threads=2,provider=cpu,bundle=/x", defaults) == EngineSetUp("/x", "onnx", "cpu", 2)
    for text, message in (
        ("onnx:threads=two", "threads: expected a whole number, got 'two'"),
        ("onnx:thread=2", "expected name=value with a name of .*'threads'.*, got 'thread=2'"),
        ("onnx:threads", "got 'threads'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            parse_set_up(text, defaults)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--bundle", "nothing"], "nothing"),
        (["model", "--calls", "0"], "--calls: expected at least 1, got 0"),
        (["model", "--engine", "torch"], "expert.pt2|prefill.pt2"),
        (["model", "--threads", "0"], "threads"),
        (["model", "--provider", "cuda"], "CUDAExecutionProvider"),
        (["model", "--processor-time", "--threads", "2"], "--processor-time: expected one thread, got 2"),
        (["model", "--processor-time", "--provider", "cuda"], "--processor-time: expected provider cpu, got cuda"),
        (["model", "--engine", "tensorrt"], "expected cuda for engine tensorrt"),
        (["compare", "onnx", "tensorflow"], "tensorflow"),
    ],
)
def test_what_cannot_run_says_why(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert bench.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("bench: ") and any(part in said for part in message.split("|"))
