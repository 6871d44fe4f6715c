"""The line from inputs to command without ROS, tick by tick."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.bundles import CAMERAS, JOINTS, TASK, both_ways_policy, demo_observation, write_test_bundle
from support.loop_rig import MS, START, Rig, is_hold
from support.waiting import PATIENCE_S

from ki_vla_ros.errors import InstructionError, SafetyRefusal, StaleInput
from ki_vla_ros.policy.preprocess import make_model_input, state_token
from ki_vla_ros.records import NS_PER_S, ActionChunk, CameraFrame, JointReading
from ki_vla_ros.robot import plain_joints
from ki_vla_ros.runtime.observation import CameraSource, ObservationBuffer
from ki_vla_ros.runtime.pacing import ClockWatch, Pacer, alignment_ns

STAGES = ["observation", "preprocess", "prefill", "denoise", "decode", "safety", "chunking", "verify", "publish"]


def test_a_tick_sends_what_is_left_of_the_policys_chunk(rig: Rig) -> None:
    rig.give_inputs(age_ms=60)
    index, watch = rig.tick()
    assert index == 0
    assert list(watch.stage_ms) == STAGES
    ((command, sent_ns),) = rig.wire.commands
    (chunk,) = rig.wire.chunks
    expected = rig.policy.infer(demo_observation(START - 60 * MS), TASK, 0)
    np.testing.assert_array_equal(chunk.position_HJ, expected.position_HJ)
    assert chunk.start_ns == START - 60 * MS
    # It takes over, from where the arm is, when the controller has had the time to get there.
    assert sent_ns == START and START + 160 * MS < command.from_ns < START + 190 * MS
    np.testing.assert_array_equal(command.position_NJ[0], demo_observation().state_S)
    # The arm has rested since before it was observed, so the chunk begins when the arm does.
    for k in range(14, 16):
        due_ns = command.from_ns + (k + 1) * chunk.period_ns
        np.testing.assert_allclose(command.at(due_ns)[0], chunk.position_HJ[k], atol=5e-3)
    np.testing.assert_array_equal(command.velocity_NJ[-1], 0.0)


def test_a_chunk_of_a_resting_arm_begins_with_its_first_action(rig: Rig) -> None:
    """Also one that replaces another before that; of a moving arm it keeps its times, and where others move the arm."""

    def start_of_the_target(age_ms: int) -> int:
        rig.give_inputs(age_ms)
        rig.tick()
        assert rig.loop.executing is not None
        return rig.loop.executing.start_ns

    begins_ns = start_of_the_target(60)
    ((first, _),) = rig.wire.commands
    assert first.time_N[0] - 2 * MS <= begins_ns <= first.time_N[0]
    rig.wire.time_ns += 100 * MS  # the controller is still on its way to the start
    assert rig.wire.time_ns < first.time_N[0]
    assert start_of_the_target(60) == first.time_N[0]
    rig.wire.time_ns = first.time_N[0] + 100 * MS
    assert start_of_the_target(60) == rig.wire.time_ns - 60 * MS
    rig.wire.time_ns = rig.wire.commands[-1][0].end_ns + 50 * MS
    assert start_of_the_target(60) == rig.wire.time_ns - 60 * MS, "it still moved when it was observed"
    rig.wire.moves_arm = lambda: False  # type: ignore[method-assign]
    rig.wire.time_ns = rig.wire.commands[-1][0].end_ns + 500 * MS
    assert start_of_the_target(60) == rig.wire.time_ns - 60 * MS


def test_each_chunk_has_its_own_noise_and_index(rig: Rig) -> None:
    for n in range(3):
        rig.give_inputs()
        assert rig.tick()[0] == n
        rig.wire.time_ns += 100 * MS
    assert len(rig.wire.chunks) == 3


def test_no_inference_before_the_execution_horizon_has_passed(rig: Rig) -> None:
    rig.change(execution_horizon_s=0.3)
    indices = []
    for _ in range(7):
        rig.give_inputs()
        indices.append(rig.tick()[0])
        rig.wire.time_ns += 100 * MS
    assert indices == [0, None, None, 1, None, None, 2]


def test_stale_inputs_are_refused_even_when_no_chunk_is_due(rig: Rig) -> None:
    rig.change(execution_horizon_s=0.7)
    rig.give_inputs()
    rig.tick()
    rig.wire.time_ns += 300 * MS
    with pytest.raises(StaleInput, match="camera 'scene': newest frame 300 ms old"):
        rig.tick()


def test_without_instruction_nothing_is_sent(rig: Rig) -> None:
    rig.loop.instruction = ""
    rig.give_inputs()
    with pytest.raises(InstructionError, match="instruction: none yet"):
        rig.tick()
    assert not rig.wire.commands


def test_inference_slower_than_the_chunk_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = rig.policy.decode

    def slow(*arguments: object) -> ActionChunk:
        rig.wire.time_ns += 900 * MS
        rig.buffer.add_joints(JointReading(rig.wire.time_ns, JOINTS, demo_observation().state_S))
        return decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(rig.policy, "decode", slow)
    rig.give_inputs()
    with pytest.raises(SafetyRefusal, match="its observation is 900 ms old"):
        rig.tick()
    rig.give_inputs()
    rig.change(**{"limits.max_chunk_age_s": 5.0})
    rig.loop.adopt(rig.settings)
    with pytest.raises(SafetyRefusal, match="inference takes longer than the chunk lasts"):
        rig.tick()
    assert not rig.wire.commands


def test_ticks_are_paced_and_reported(rig: Rig) -> None:
    rig.run_ticks(5, lambda n: rig.give_inputs())
    assert [tick["stamp_ns"] for tick in rig.wire.ticks] == [START + n * 100 * MS for n in range(5)]
    assert [tick["chunk_index"] for tick in rig.wire.ticks] == list(range(5))
    last = rig.wire.ticks[-1]
    assert (last["instruction"], last["hold"], last["deadline_misses"]) == (TASK, None, 0)
    stages = last["stage_ms"]
    assert isinstance(stages, dict) and list(stages) == [*STAGES, "total"]
    assert stages["total"] == pytest.approx(sum(stages[name] for name in STAGES))


def test_changed_settings_apply_from_the_next_tick_on(rig: Rig) -> None:
    def before(n: int) -> None:
        rig.give_inputs()
        if n == 2:
            changes = {"limits.velocity_scale": 0.01, "limits.max_overspeed": 1.0, "limits.max_jump_s": 10.0}
            rig.change(**changes, flow_steps=3, noise_seed=9, rate_hz=20.0)

    rig.run_ticks(8, before)
    assert (rig.policy.flow_steps, rig.policy.noise_seed) == (3, 9)
    holds = [tick["hold"] for tick in rig.wire.ticks]
    assert holds[:2] == [None, None]
    assert str(holds[2]).startswith("limits: became tighter than the running motion")
    assert all("more than limits.max_overspeed" in str(hold) for hold in holds[5:])
    stamps = [int(str(tick["stamp_ns"])) for tick in rig.wire.ticks]
    assert stamps[3] - stamps[2] == 50 * MS


def test_a_clock_that_is_set_back_drops_buffers_and_the_running_chunk(rig: Rig) -> None:
    def before(n: int) -> None:
        if n == 2:
            rig.wire.time_ns -= 100 * NS_PER_S
        if n < 2:
            rig.give_inputs()

    rig.run_ticks(3, before)
    assert str(rig.wire.ticks[2]["hold"]).startswith("camera 'scene': no image yet")
    assert len(rig.wire.commands) == 2 and not any(is_hold(motion) for motion, _ in rig.wire.commands)
    assert any("set back" in line for line in rig.wire.lines)


def test_a_clock_that_is_set_back_between_two_activations_is_noticed(rig: Rig) -> None:
    """Otherwise what came before would seem newer than what comes after."""
    rig.run_ticks(2, lambda n: rig.give_inputs())
    rig.wire.time_ns -= 100 * MS
    rig.wire.ticks.clear()
    rig.run_ticks(1, lambda n: None)
    assert str(rig.wire.ticks[0]["hold"]).startswith("camera 'scene': no image yet")


def test_without_a_clock_the_loop_waits(rig: Rig) -> None:
    rig.wire.time_ns = 0
    rig.thread.start()
    rig.thread.stop()
    assert rig.wire.ticks == []


def test_pacer_keeps_to_its_grid_and_counts_missed_deadlines() -> None:
    pacer = Pacer(1000)
    pacer.advance(1030, 100)
    assert (pacer.due_ns, pacer.missed) == (1100, 0)
    pacer.advance(1200, 100)  # exactly on time
    assert (pacer.due_ns, pacer.missed) == (1200, 0)
    pacer.advance(1301, 100)  # a little late: the next one is lost
    assert (pacer.due_ns, pacer.missed) == (1400, 1)
    pacer.advance(1850, 100)
    assert (pacer.due_ns, pacer.missed) == (1900, 5)
    pacer.restart(900)
    assert (pacer.due_ns, pacer.missed) == (900, 5)


@pytest.mark.parametrize("step_ms, noticed", [(0, False), (5, False), (50, True), (-50, True), (3_600_000, True)])
def test_a_step_of_the_clock_is_noticed(monkeypatch: pytest.MonkeyPatch, step_ms: int, noticed: bool) -> None:
    steady_ns = [START]
    monkeypatch.setattr(time, "monotonic_ns", lambda: steady_ns[0])
    ahead_ns = [7 * NS_PER_S]
    clock = ClockWatch(lambda: steady_ns[0] + ahead_ns[0], simulated=False)
    assert clock.step_ns() == 0
    steady_ns[0] += 100 * MS
    assert clock.step_ns() == 0
    ahead_ns[0] += step_ms * MS
    steady_ns[0] += 100 * MS
    assert clock.step_ns() == (step_ms * MS if noticed else 0)
    steady_ns[0] += 100 * MS
    assert clock.step_ns() == 0


@pytest.mark.parametrize("moved_ms, noticed", [(0, False), (500, False), (1_900, False), (-1, True), (2_100, True)])
def test_simulated_time_may_run_fast_or_stand_but_not_jump(
    monkeypatch: pytest.MonkeyPatch, moved_ms: int, noticed: bool
) -> None:
    steady_ns, simulated_ns = [START], [NS_PER_S]
    monkeypatch.setattr(time, "monotonic_ns", lambda: steady_ns[0])
    clock = ClockWatch(lambda: simulated_ns[0], simulated=True)
    clock.step_ns()
    steady_ns[0] += 100 * MS
    simulated_ns[0] += moved_ms * MS
    assert clock.step_ns() == (moved_ms * MS if noticed else 0)


def test_readings_that_do_not_belong_together_are_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process stands still between reading one clock and the other."""
    steady_ns, pause_ns = [START], [0]

    def node_ns() -> int:
        now_ns = steady_ns[0]
        steady_ns[0] += pause_ns[0]
        return now_ns

    monkeypatch.setattr(time, "monotonic_ns", lambda: steady_ns[0])
    clock = ClockWatch(node_ns, simulated=False)
    clock.step_ns()
    pause_ns[0] = 300 * MS
    assert clock.step_ns() == 0
    pause_ns[0] = 0
    assert clock.step_ns() == 0


@pytest.fixture
def dual_rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(write_test_bundle(tmp_path / "bundle", both_ways_policy()))
    rig.change(prefill_period_s=0.3)
    yield rig
    rig.engine.close()


def test_the_backbone_may_run_less_often_than_the_expert(dual_rig: Rig) -> None:
    """Between two prefills a tick needs no images, and its chunk is anchored at the newest joint state."""
    rig, ran = dual_rig, ""
    step_J = np.array([0.02] * 6 + [0.0])
    for n in range(7):
        if n % 3 == 0:
            rig.give_inputs()
        moved_J = demo_observation().state_S + n * step_J
        rig.buffer.add_joints(JointReading(rig.wire.time_ns, JOINTS, moved_J))
        _, watch = rig.tick()
        ran += "P" if "prefill" in watch.stage_ms else "-"
        assert rig.wire.chunks[n].start_ns == rig.wire.time_ns
        rig.wire.time_ns += 100 * MS
    assert ran == "P--P--P"
    spec = rig.policy.bundle.manifest
    given = make_model_input(spec, rig.policy.bundle.tokenizer, demo_observation(), TASK)
    token_J = state_token(spec, demo_observation().state_S + 5 * step_J)
    actions_HA = rig.policy.denoise(rig.policy.prefill(given), rig.policy.noise(5), token_J)
    moved = dataclasses.replace(demo_observation(), state_S=demo_observation().state_S + 5 * step_J)
    np.testing.assert_array_equal(rig.wire.chunks[5].position_HJ, rig.policy.decode(actions_HA, moved).position_HJ)


def test_a_new_instruction_or_a_hold_or_old_images_need_a_new_prefill(dual_rig: Rig) -> None:
    rig = dual_rig
    rig.change(prefill_period_s=0.5)

    def tick() -> bool:
        rig.wire.time_ns += 100 * MS
        rig.give_inputs()
        rig.loop.step(rig.settings, rig.wire.time_ns, 0)
        stages = rig.wire.ticks[-1]["stage_ms"]
        assert isinstance(stages, dict)
        return "prefill" in stages

    assert [tick(), tick()] == [True, False]
    rig.loop.instruction = "touch the blue ball"
    assert [tick(), tick()] == [True, False]
    rig.loop.latch("a test")
    rig.wire.time_ns += 100 * MS
    rig.loop.step(rig.settings, rig.wire.time_ns, 0)
    rig.loop.reset()
    assert tick()
    rig.loop._prefix = dataclasses.replace(rig.loop._prefix, observation=demo_observation(rig.wire.time_ns - 450 * MS))
    assert tick()


@pytest.mark.parametrize(
    ("before_ms", "behind_ms", "moves_ms"),
    [
        (20, 20, -2.0),
        (2, 2, -1.0),
        (0, 0, 0.0),
        (-2, -2, 1.0),
        (2, 30, 0.0),
        (None, 20, 0.0),
        (20, None, 0.0),
    ],
)
def test_ticks_move_to_the_frames_in_small_steps_and_only_while_the_offset_is_steady(
    before_ms: float | None, behind_ms: float | None, moves_ms: float
) -> None:
    before_ns, behind_ns = (None if ms is None else round(ms * MS) for ms in (before_ms, behind_ms))
    assert alignment_ns(before_ns, behind_ns) == round(moves_ms * MS)


@pytest.mark.parametrize(("camera_ms", "aligned"), [(33.34, True), (33.4, True), (33.3, True), (66.7, False)])
def test_ticks_align_to_the_end_of_a_burst_if_the_periods_fit(camera_ms: float, aligned: bool) -> None:
    """Two cameras 2 ms apart, at about 30 Hz, and at 15 Hz, where every other 10 Hz tick has another offset."""
    buffer = ObservationBuffer([CameraSource(name, name) for name in CAMERAS], plain_joints(JOINTS, "joint_states"))
    arrivals = [(START + round((n * camera_ms + 2 * c) * MS), CAMERAS[c]) for n in range(800) for c in (0, 1)]
    pacer, before_ns, ticks_ns, since_end_ms = Pacer(START + 20 * MS), None, [], []
    for _ in range(100):
        ticks_ns.append(pacer.due_ns)
        while arrivals[0][0] <= pacer.due_ns:
            arrived_ns, camera = arrivals.pop(0)
            buffer.add_frame(CameraFrame(camera, arrived_ns, np.zeros((1, 1, 3), np.uint8)), arrived_ns)
        since_end_ms.append((pacer.due_ns - START - 2 * MS) / MS % camera_ms)
        behind_ns = buffer.since_burst_ns(pacer.due_ns)
        pacer.advance(pacer.due_ns + 20 * MS, 100 * MS)
        pacer.shift(alignment_ns(before_ns, behind_ns))
        before_ns = behind_ns
    periods_ms = np.diff(ticks_ns) / MS
    assert periods_ms.min() >= 98.0 and periods_ms.max() <= 102.0 and pacer.missed == 0
    if aligned:
        # The cameras' period drifts by 2 ms per second against the ticks', and the offset shows it.
        assert all(since < 0.6 or since > camera_ms - 0.6 for since in since_end_ms[-20:])
    else:
        assert np.all(periods_ms == 100.0)


@pytest.mark.parametrize("align", [True, False])
def test_ticks_are_aligned_unless_told_otherwise(rig: Rig, monkeypatch: pytest.MonkeyPatch, align: bool) -> None:
    moves: list[int] = []
    monkeypatch.setattr(Pacer, "shift", lambda _self, by_ns: moves.append(by_ns))

    def before(n: int) -> None:
        rig.give_inputs()
        for back in (3, 2, 1):
            arrived_ns = rig.wire.time_ns + (23 - 33 * back) * MS
            frame = CameraFrame("scene", arrived_ns, np.zeros((1, 1, 3), np.uint8))
            rig.buffer.add_frame(frame, arrived_ns)

    rig.change(align_to_cameras=align)
    rig.run_ticks(3, before)
    assert moves[:3] == ([0, -2 * MS, -2 * MS] if align else [])


def test_a_burst_that_is_about_to_end_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = ObservationBuffer([CameraSource(name, name) for name in CAMERAS], plain_joints(JOINTS, "joint_states"))

    def add(camera: str, arrived_ns: int) -> None:
        buffer.add_frame(CameraFrame(camera, arrived_ns, np.zeros((1, 1, 3), np.uint8)), arrived_ns)

    for n in range(3):
        for c, camera in enumerate(CAMERAS):
            add(camera, START + (33 * n + 2 * c) * MS)
    due_ns = START + 100 * MS
    add(CAMERAS[0], due_ns - 1 * MS)
    waits_s: list[float] = []
    wait_for = buffer._frame_came.wait_for

    def patient(condition: Callable[[], bool], limit_s: float) -> bool:
        """Waits as long as a busy machine needs to start the thread that brings the frame."""
        waits_s.append(limit_s)
        return wait_for(condition, PATIENCE_S)

    monkeypatch.setattr(buffer._frame_came, "wait_for", patient)
    late = threading.Timer(0.001, add, (CAMERAS[1], due_ns + 1 * MS))
    late.start()
    buffer.await_burst(due_ns, -1 * MS)
    assert buffer.status(due_ns)[CAMERAS[1]].count == 4 and waits_s == [0.003]
    late.join()
    for since_ns in (None, 5 * MS):
        buffer.await_burst(due_ns + 50 * MS, since_ns)
    assert len(waits_s) == 1, "where no burst is about to end nothing is waited for"
    monkeypatch.undo()  # a frame that never comes ends the wait too:
    buffer.await_burst(due_ns + 33 * MS, 0)
    assert buffer.status(due_ns)[CAMERAS[1]].count == 4
