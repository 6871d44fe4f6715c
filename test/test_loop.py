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
from ki_vla_ros.records import NS_PER_S, ActionChunk, JointReading, Motion
from ki_vla_ros.settings import Settings, settings_from_parameters

MS = 1_000_000
START = 1_000 * NS_PER_S
STAGES = ["observation", "preprocess", "prefill", "denoise", "safety", "chunking", "verify", "publish"]
TASK = "touch the red cube"


class FakeWire:
    """Remembers what went out. `now_ns` stands still unless told otherwise."""

    def __init__(self) -> None:
        self.time_ns = START
        self.commands: list[tuple[Motion, int]] = []
        self.chunks: list[ActionChunk] = []
        self.ticks: list[Mapping[str, object]] = []
        self.lines: list[str] = []
        self.on_tick: Callable[[], None] = lambda: None

    def now_ns(self) -> int:
        return self.time_ns

    def simulated_clock(self) -> bool:
        return True

    def send_command(self, motion: Motion, now_ns: int) -> None:
        self.commands.append((motion, now_ns))

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
        self.settings = settings_from_parameters({"ramp_in_s": 0.0})
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
    # It takes over after the lead, from where the arm is; 60 ms have gone, so the first action is in the past.
    assert (sent_ns, command.from_ns) == (START, START + 10 * MS)
    np.testing.assert_array_equal(command.position_NJ[0], demo_observation().state_J)
    for k in range(8, 16):
        np.testing.assert_allclose(command.at(chunk.due_ns(k))[0], chunk.position_HJ[k], atol=2e-3)
    np.testing.assert_array_equal(command.velocity_NJ[-1], 0.0)


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
    with pytest.raises(SafetyRefusal, match="its observation is 900 ms old"):
        bench.tick()
    bench.give_inputs()
    bench.change(**{"limits.max_chunk_age_s": 5.0})
    bench.loop._adopt(bench.settings)
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
    # Once for the stale camera, once at the end, when the loop stops.
    held = [motion for motion, _ in bench.wire.commands if is_hold(motion)]
    assert len(bench.wire.commands) == 7 and len(held) == 2
    np.testing.assert_allclose(held[0].position_NJ[-1], rest_J + 0.003, atol=1e-6)
    assert held[0].end_ns < START + 300 * MS + 600 * MS


def is_hold(motion: Motion) -> bool:
    """The last quarter of a second of a chunk's motion moves; a hold is over by then."""
    return bool(motion.end_ns - motion.from_ns < 550 * MS)


def test_when_the_joints_are_lost_too_the_arm_brakes_on_its_path(bench: Bench) -> None:
    bench.run_ticks(4, lambda n: bench.give_inputs() if n == 0 else None)
    running, _ = bench.wire.commands[2]
    held, now_ns = bench.wire.commands[3]
    assert held.end_ns - now_ns <= 200 * MS  # 0.15 s from full speed, and the lead
    for a, b in zip(running.at(held.from_ns), held.at(held.from_ns), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    assert any("braking on the commanded path" in line for line in bench.wire.lines)


def test_stopping_holds_a_running_chunk(bench: Bench) -> None:
    bench.run_ticks(1, lambda n: bench.give_inputs())
    assert [is_hold(motion) for motion, _ in bench.wire.commands] == [False, True]
    bench.loop.stop()
    assert len(bench.wire.commands) == 2


def test_stopping_when_nothing_moves_sends_nothing(bench: Bench) -> None:
    bench.run_ticks(2, lambda n: None)
    assert bench.wire.commands == []
    assert str(bench.wire.ticks[0]["hold"]).startswith("camera 'scene': no image yet")


def test_a_stop_is_latched_until_reset(bench: Bench) -> None:
    def before(n: int) -> None:
        bench.give_inputs()
        if n == 2:
            bench.loop.latch("by a test")
        if n == 4:
            assert bench.loop.reset() and not bench.loop.reset()

    bench.run_ticks(6, before)
    holds = [tick["hold"] for tick in bench.wire.ticks]
    assert [hold is None for hold in holds] == [True, True, False, False, True, True]
    assert holds[2] == "stopped: by a test; call ~/reset when nothing stands in the way"
    assert [is_hold(motion) for motion, _ in bench.wire.commands] == [False, False, True, False, False, True]


def test_a_stop_during_inference_keeps_the_chunk_off_the_wire(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = bench.policy.decode

    def stop_meanwhile(*arguments: object) -> ActionChunk:
        bench.loop.latch("meanwhile")
        return decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(bench.policy, "decode", stop_meanwhile)
    bench.give_inputs()
    with pytest.raises(SafetyRefusal, match="stopped: meanwhile"):
        bench.tick()
    assert not bench.wire.commands


def test_a_rule_may_stop_for_good(bench: Bench) -> None:
    bench.change(**{"limits.on_jump": "stop", "limits.max_jump_s": 0.0, "limits.velocity_scale": 0.01})
    bench.run_ticks(2, lambda n: bench.give_inputs())
    holds = [str(tick["hold"]) for tick in bench.wire.ticks]
    assert "from the measured" in holds[0] and holds[1].startswith("stopped: joint")
    assert bench.loop.latched is not None and not bench.wire.commands


def test_the_watchdog_holds_an_arm_without_fresh_chunks(bench: Bench) -> None:
    bench.give_inputs()
    bench.tick()
    bench.loop.watch()
    assert len(bench.wire.commands) == 1
    bench.wire.time_ns += 501 * MS  # hold_after_s is half a second; the chunk's motion lasts longer
    bench.buffer.add_joints(JointReading(bench.wire.time_ns, JOINTS, demo_observation().state_J))
    bench.loop.watch()
    bench.loop.watch()
    assert len(bench.wire.commands) == 2
    assert any("watchdog: no fresh chunk for 501 ms" in line for line in bench.wire.lines)
    assert bench.diagnostics.report("active", "", 0.0).values["refused watchdog"] == "1"


def test_dry_run_computes_and_sends_nothing(bench: Bench) -> None:
    bench.change(dry_run=True)
    bench.run_ticks(3, lambda n: bench.give_inputs())
    assert bench.wire.commands == [] and len(bench.wire.chunks) == 3
    assert [tick["hold"] for tick in bench.wire.ticks] == [None] * 3


def test_a_dry_run_is_not_what_the_arm_was_told(bench: Bench) -> None:
    """Switched on in motion, the arm can still be held; switched off, nothing begins where the arm never was."""
    bench.give_inputs()
    bench.tick()
    sent = bench.wire.commands[0][0]
    bench.change(dry_run=True)
    for _ in range(3):
        bench.wire.time_ns += 100 * MS
        bench.give_inputs()
        bench.tick()
    assert len(bench.wire.commands) == 1 and bench.loop._governor.running is sent
    bench.loop.latch("in a dry run")
    assert len(bench.wire.commands) == 2 and is_hold(bench.wire.commands[1][0])
    bench.loop.reset()
    bench.wire.time_ns += 2_000 * MS
    bench.give_inputs()
    bench.tick()
    bench.change(dry_run=False)
    bench.wire.time_ns += 100 * MS
    bench.give_inputs()
    bench.tick()
    np.testing.assert_allclose(bench.wire.commands[2][0].position_NJ[0], demo_observation().state_J, atol=1e-6)


def test_speed_limits_rise_after_activation(bench: Bench) -> None:
    bench.change(**{"ramp_in_s": 1.0, "limits.velocity_scale": 0.2, "limits.max_jump_s": 10.0})
    bench.loop._adopt(bench.settings)
    bench.run_ticks(12, lambda n: bench.give_inputs())
    speeds = [np.abs(motion.velocity_NJ).max(axis=0) for motion, _ in bench.wire.commands[:-1]]
    limit_J = 0.2 * np.array([joint.max_velocity for joint in bench.policy.bundle.manifest.joints])
    assert np.all(speeds[0] <= 0.1 * limit_J * (1 + 1e-9))
    assert np.all(speeds[5] <= 0.55 * limit_J * (1 + 1e-9))
    assert np.any(speeds[-1] > 0.55 * limit_J)


def test_an_arm_moved_by_others_goes_on_from_where_it_is(bench: Bench) -> None:
    bench.give_inputs()
    bench.tick()
    bench.wire.time_ns += 3_000 * MS
    moved = demo_observation(bench.wire.time_ns)
    for frame in moved.frames.values():
        bench.buffer.add_frame(frame)
    bench.buffer.add_joints(
        JointReading(bench.wire.time_ns, JOINTS, moved.state_J + 0.2 * np.array([1, 0, 0, 0, 0, 0, 0]))
    )
    bench.tick()
    np.testing.assert_allclose(bench.wire.commands[1][0].position_NJ[0, 0], moved.state_J[0] + 0.2)
    assert any("not where it was sent" in line for line in bench.wire.lines)


@pytest.mark.parametrize("moved, starts_where_it_is", [(0.0, False), (0.8, False), (1.0, True)])
def test_an_arm_in_motion_may_trail_but_not_be_elsewhere(bench: Bench, moved: float, starts_where_it_is: bool) -> None:
    """The room is 0.3 s at 3 rad/s."""
    bench.give_inputs()
    bench.tick()
    bench.wire.time_ns += 100 * MS
    running = bench.wire.commands[0][0].at(bench.wire.time_ns)[0]
    observation = demo_observation(bench.wire.time_ns)
    for frame in observation.frames.values():
        bench.buffer.add_frame(frame)
    elsewhere_J = running + moved * np.array([1, 0, 0, 0, 0, 0, 0])
    bench.buffer.add_joints(JointReading(bench.wire.time_ns, JOINTS, elsewhere_J))
    bench.tick()
    said = any("not where it was sent" in line for line in bench.wire.lines)
    assert said == starts_where_it_is
    if starts_where_it_is:
        np.testing.assert_allclose(bench.wire.commands[1][0].position_NJ[0], elsewhere_J, atol=1e-9)


def test_a_hold_that_seems_to_run_still_is_no_start_for_an_arm_put_elsewhere(bench: Bench) -> None:
    """As when a simulator is reset, or an arm is moved by hand, between deactivation and activation."""
    bench.run_ticks(2, lambda n: bench.give_inputs())
    hold, now_ns = bench.wire.commands[-1]
    assert hold.end_ns > now_ns
    elsewhere_J = demo_observation().state_J + 0.3 * np.array([1, 0, 0, 0, 0, 0, 0])

    def before(n: int) -> None:
        for frame in demo_observation(bench.wire.time_ns).frames.values():
            bench.buffer.add_frame(frame)
        bench.buffer.add_joints(JointReading(bench.wire.time_ns, JOINTS, elsewhere_J))

    count, bench.wire.ticks[:] = len(bench.wire.commands), []
    bench.wire.time_ns = now_ns + 1 * MS
    bench.change(**{"limits.max_jump_s": 10.0})
    bench.run_ticks(1, before)
    np.testing.assert_allclose(bench.wire.commands[count][0].position_NJ[0], elsewhere_J, atol=1e-6)


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
    assert [is_hold(motion) for motion, _ in bench.wire.commands] == [False, True, False, True]


def test_changed_settings_apply_from_the_next_tick_on(bench: Bench) -> None:
    def before(n: int) -> None:
        bench.give_inputs()
        if n == 2:
            changes = {"limits.velocity_scale": 0.01, "limits.max_overspeed": 1.0, "limits.max_jump_s": 10.0}
            bench.change(**changes, flow_steps=3, noise_seed=9, rate_hz=20.0)

    bench.run_ticks(4, before)
    assert (bench.policy.flow_steps, bench.policy.noise_seed) == (3, 9)
    holds = [tick["hold"] for tick in bench.wire.ticks]
    assert holds[:2] == [None, None]
    assert all("more than limits.max_overspeed" in str(hold) for hold in holds[2:])
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
    assert len(bench.wire.commands) == 2 and not any(is_hold(motion) for motion, _ in bench.wire.commands)
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
