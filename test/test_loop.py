"""The line from inputs to command without ROS: a real bundle, a clock in our hand, a wire that remembers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
from bundles import CAMERAS, JOINTS, demo_observation, write_test_bundle

from ki_vla_ros.bundle import Bundle
from ki_vla_ros.diagnostics import Diagnostics, Level, Stopwatch
from ki_vla_ros.engines.base import KVCache
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.errors import EngineError, InstructionError, SafetyRefusal, StaleInput
from ki_vla_ros.loop import PolicyLoop
from ki_vla_ros.observation import CameraSource, ObservationBuffer
from ki_vla_ros.pacing import Pacer
from ki_vla_ros.policy import Policy
from ki_vla_ros.records import NS_PER_S, ActionChunk, JointReading
from ki_vla_ros.settings import Settings, settings_from_parameters

MS = 1_000_000
START = 1_000 * NS_PER_S
STAGES = ["observation", "preprocess", "prefill", "denoise", "chunking", "safety", "publish"]
TASK = "touch the red cube"


class FakeWire:
    """Remembers what went out. `now_ns` stands still unless told otherwise."""

    def __init__(self) -> None:
        self.time_ns = START
        self.commands: list[tuple[ActionChunk, int]] = []
        self.chunks: list[ActionChunk] = []
        self.ticks: list[Mapping[str, object]] = []
        self.lines: list[str] = []
        self.on_tick: Callable[[], None] = lambda: None

    def now_ns(self) -> int:
        return self.time_ns

    def simulated_clock(self) -> bool:
        return True

    def send_command(self, command: ActionChunk, now_ns: int) -> None:
        self.commands.append((command, now_ns))

    def report_chunk(self, chunk: ActionChunk) -> None:
        self.chunks.append(chunk)

    def report_tick(self, fields: Mapping[str, object]) -> None:
        self.ticks.append(fields)
        self.on_tick()

    def log(self, message: str, cause: str) -> None:
        self.lines.append(message)


class Bench:
    """A loop with everything that it needs; `give_inputs` makes an observation of the present moment."""

    def __init__(self, bundle: Bundle) -> None:
        self.engine = OnnxEngine(bundle)
        self.policy = Policy(bundle, self.engine)
        self.wire = FakeWire()
        self.settings = settings_from_parameters({})
        self.diagnostics = Diagnostics()
        self.buffer = ObservationBuffer([CameraSource(c, f"/{c}") for c in CAMERAS], JOINTS, "/joint_states")
        self.loop = PolicyLoop(self.policy, self.buffer, self.wire, self.diagnostics, lambda: self.settings)
        self.loop.instruction = TASK

    def give_inputs(self, age_ms: int = 0) -> None:
        observation = demo_observation(self.wire.time_ns - age_ms * MS)
        for frame in observation.frames.values():
            self.buffer.add_frame(frame)
        self.buffer.add_joints(JointReading(observation.stamp_ns, JOINTS, observation.state_J))

    def change(self, **changes: object) -> Settings:
        self.settings = settings_from_parameters({**self.settings.model_dump(exclude={"limits", "cameras"}), **changes})
        return self.settings

    def tick(self) -> tuple[int | None, Stopwatch]:
        watch = Stopwatch()
        return self.loop.tick(self.settings, self.wire.time_ns, watch), watch

    def run_ticks(self, count: int, before: Callable[[int], None]) -> None:
        """Through the thread: after each tick time goes on by one period, and `before(n)` sets the stage for tick n."""
        done = threading.Event()

        def next_tick() -> None:
            if len(self.wire.ticks) >= count:
                done.set()
                self.wire.on_tick = lambda: None
                return
            self.wire.time_ns += round(NS_PER_S / self.settings.rate_hz)
            before(len(self.wire.ticks))

        self.wire.on_tick = next_tick
        before(0)
        self.loop.start()
        try:
            assert done.wait(60.0)
        finally:
            self.loop.stop()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("bundle") / "test")


@pytest.fixture
def bench(bundle: Bundle) -> Iterator[Bench]:
    bench = Bench(bundle)
    yield bench
    bench.engine.close()


def test_a_tick_sends_what_is_left_of_the_policys_chunk(bench: Bench) -> None:
    bench.give_inputs(age_ms=60)
    index, watch = bench.tick()
    assert index == 0
    assert list(watch.stage_ms) == STAGES
    ((command, sent_ns),) = bench.wire.commands
    (chunk,) = bench.wire.chunks
    expected = bench.policy.infer(demo_observation(START - 60 * MS), TASK, 0)
    np.testing.assert_array_equal(chunk.position_HJ, expected.position_HJ)
    assert chunk.start_ns == START - 60 * MS
    # 60 ms have gone: the first action (due after 50 ms) is consumed; one is added, to come to rest.
    assert (sent_ns, command.horizon, command.due_ns(0)) == (START, 16, START + 40 * MS)
    np.testing.assert_array_equal(command.position_HJ[:-1], chunk.position_HJ[1:])


def test_each_chunk_has_its_own_noise_and_index(bench: Bench) -> None:
    for n in range(3):
        bench.give_inputs()
        assert bench.tick()[0] == n
        bench.wire.time_ns += 100 * MS
    assert len(bench.wire.chunks) == 3


def test_no_inference_before_the_execution_horizon_is_over(bench: Bench) -> None:
    bench.change(execution_horizon_s=0.3)
    indices = []
    for _ in range(7):
        bench.give_inputs()
        indices.append(bench.tick()[0])
        bench.wire.time_ns += 100 * MS
    assert indices == [0, None, None, 1, None, None, 2]


def test_stale_inputs_are_refused_even_when_no_chunk_is_due(bench: Bench) -> None:
    bench.change(execution_horizon_s=0.7)
    bench.give_inputs()
    bench.tick()
    bench.wire.time_ns += 300 * MS
    with pytest.raises(StaleInput, match="camera 'scene': newest frame 300 ms old"):
        bench.tick()


def test_without_instruction_nothing_is_sent(bench: Bench) -> None:
    bench.loop.instruction = ""
    bench.give_inputs()
    with pytest.raises(InstructionError, match="instruction: none yet"):
        bench.tick()
    assert not bench.wire.commands


def test_inference_slower_than_the_chunk_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = bench.policy.decode

    def slow(*arguments: object) -> ActionChunk:
        bench.wire.time_ns += 900 * MS
        bench.buffer.add_joints(JointReading(bench.wire.time_ns, JOINTS, demo_observation().state_J))
        return decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(bench.policy, "decode", slow)
    bench.give_inputs()
    with pytest.raises(SafetyRefusal, match="inference is slower than the chunk lasts"):
        bench.tick()
    assert not bench.wire.commands


def test_ticks_are_paced_and_reported(bench: Bench) -> None:
    bench.run_ticks(5, lambda n: bench.give_inputs())
    assert [tick["stamp_ns"] for tick in bench.wire.ticks] == [START + n * 100 * MS for n in range(5)]
    assert [tick["chunk_index"] for tick in bench.wire.ticks] == list(range(5))
    last = bench.wire.ticks[-1]
    assert (last["instruction"], last["hold"], last["deadline_misses"]) == (TASK, None, 0)
    stages = last["stage_ms"]
    assert isinstance(stages, dict) and list(stages) == [*STAGES, "total"]
    assert stages["total"] == pytest.approx(sum(stages[name] for name in STAGES))


def test_a_stale_input_brings_the_arm_to_rest_once_and_it_goes_on_afterwards(bench: Bench) -> None:
    def before(n: int) -> None:
        if n in (0, 5, 6):
            bench.give_inputs()
        else:
            bench.buffer.add_joints(JointReading(bench.wire.time_ns, JOINTS, rest_J + 0.001 * n))

    rest_J = demo_observation().state_J

    bench.run_ticks(7, before)
    holds = [tick["hold"] for tick in bench.wire.ticks]
    assert [hold is None for hold in holds] == [True, True, True, False, False, True, True]
    assert str(holds[3]).startswith("camera 'scene': newest frame 300 ms old, limit 250 ms")
    held = [command for command, _ in bench.wire.commands if command.horizon == 1]
    assert len(held) == 2  # once for the stale camera, once at the end, when the loop stops
    np.testing.assert_allclose(held[0].position_HJ[0], rest_J + 0.003)
    assert held[0].due_ns(0) == START + 300 * MS + 200 * MS


def test_when_the_joints_are_lost_too_the_arm_is_held_where_the_chunk_is(bench: Bench) -> None:
    bench.run_ticks(4, lambda n: bench.give_inputs() if n == 0 else None)
    running, _ = bench.wire.commands[2]
    held, now_ns = bench.wire.commands[3]
    assert held.horizon == 1
    due_ns = [running.due_ns(k) for k in range(running.horizon)]
    expected = [np.interp(now_ns, due_ns, running.position_HJ[:, j]) for j in range(7)]
    np.testing.assert_allclose(held.position_HJ[0], expected)
    assert any("at the commanded position" in line for line in bench.wire.lines)


def test_stopping_holds_a_running_chunk(bench: Bench) -> None:
    bench.run_ticks(1, lambda n: bench.give_inputs())
    assert [command.horizon for command, _ in bench.wire.commands] == [17, 1]
    bench.loop.stop()
    assert len(bench.wire.commands) == 2


def test_stopping_when_nothing_moves_sends_nothing(bench: Bench) -> None:
    bench.run_ticks(2, lambda n: None)
    assert bench.wire.commands == []
    assert str(bench.wire.ticks[0]["hold"]).startswith("camera 'scene': no image yet")


@pytest.mark.parametrize("error", [EngineError("engine: broken"), ZeroDivisionError("a bug")])
def test_errors_of_the_engine_hold_and_the_next_tick_tries_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    prefill, broken = bench.policy.prefill, threading.Event()

    def sometimes(*arguments: object) -> KVCache:
        if broken.is_set():
            raise error
        return prefill(*arguments)  # type: ignore[arg-type]

    def before(n: int) -> None:
        bench.give_inputs()
        broken.set() if n == 1 else broken.clear()

    monkeypatch.setattr(bench.policy, "prefill", sometimes)
    bench.run_ticks(3, before)
    holds = [tick["hold"] for tick in bench.wire.ticks]
    assert holds[0] is None and holds[2] is None
    assert str(error) in str(holds[1])
    assert [command.horizon for command, _ in bench.wire.commands] == [17, 1, 17, 1]


def test_changed_settings_apply_from_the_next_tick_on(bench: Bench) -> None:
    def before(n: int) -> None:
        bench.give_inputs()
        if n == 2:
            bench.change(**{"limits.velocity_scale": 0.02, "flow_steps": 3, "noise_seed": 9, "rate_hz": 20.0})

    bench.run_ticks(4, before)
    assert (bench.policy.flow_steps, bench.policy.noise_seed) == (3, 9)
    holds = [tick["hold"] for tick in bench.wire.ticks]
    assert holds[:2] == [None, None]
    assert all("too fast for limits.max_slowdown" in str(hold) for hold in holds[2:])
    stamps = [int(str(tick["stamp_ns"])) for tick in bench.wire.ticks]
    assert stamps[3] - stamps[2] == 50 * MS


def test_a_clock_that_is_set_back_drops_buffers_and_the_running_chunk(bench: Bench) -> None:
    def before(n: int) -> None:
        if n == 2:
            bench.wire.time_ns -= 100 * NS_PER_S
        if n < 2:
            bench.give_inputs()

    bench.run_ticks(3, before)
    assert str(bench.wire.ticks[2]["hold"]).startswith("camera 'scene': no image yet")
    assert [command.horizon for command, _ in bench.wire.commands] == [17, 17]
    assert any("set back" in line for line in bench.wire.lines)


def test_without_a_clock_the_loop_waits(bench: Bench) -> None:
    bench.wire.time_ns = 0
    bench.loop.start()
    bench.loop.stop()
    assert bench.wire.ticks == []


def test_pacer_keeps_to_its_grid_and_counts_missed_deadlines() -> None:
    pacer = Pacer(1000)
    pacer.advance(1030, 100)
    assert (pacer.due_ns, pacer.missed) == (1100, 0)
    pacer.advance(1200, 100)  # exactly in time
    assert (pacer.due_ns, pacer.missed) == (1200, 0)
    pacer.advance(1301, 100)  # a little late: the next one is lost
    assert (pacer.due_ns, pacer.missed) == (1400, 1)
    pacer.advance(1850, 100)
    assert (pacer.due_ns, pacer.missed) == (1900, 5)
    assert not pacer.set_back(1850)
    assert pacer.set_back(900)
    assert pacer.due_ns == 900


def test_diagnostics_report(bench: Bench) -> None:
    diagnostics = Diagnostics()
    assert diagnostics.report("inactive", "", 0.0).level is Level.OK
    for n in range(41):
        diagnostics.record_chunk({"prefill": 2.0, "denoise": 1.0 + (n == 40)}, ("clamped elbow",), 10.0 + 0.1 * n)
        diagnostics.record_tick(None, TASK, 0)
    diagnostics.record_refusal("instruction: too long")
    report = diagnostics.report("active", "an engine", 14.0)
    assert report.level is Level.OK and report.summary == "10.0 chunks per second"
    assert report.values["chunk_rate_hz"] == "10.00"
    assert (report.values["total_ms_p50"], report.values["denoise_ms_p99"]) == ("3.00", "1.60")
    assert report.values["corrected clamped"] == "41" and report.values["refused instruction"] == "1"
    diagnostics.record_tick("camera 'scene': newest frame 300 ms old", TASK, 7)
    diagnostics.record_tick("camera 'scene': newest frame 400 ms old", TASK, 8)
    report = diagnostics.report("active", "an engine", 14.0)
    assert report.level is Level.WARNING and report.summary.startswith("holding: camera 'scene'")
    assert report.values["refused camera 'scene'"] == "2" and report.values["deadline_misses"] == "8"
