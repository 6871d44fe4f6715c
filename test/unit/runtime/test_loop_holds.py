"""What brings the arm to rest, and keeps it there: holds, stops, the watchdog, dry runs, an arm that was moved."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.bundles import JOINTS, demo_observation
from support.loop_rig import MS, START, Rig, is_hold

from ki_vla_ros.engines.base import KVCache
from ki_vla_ros.errors import EngineError, SafetyRefusal
from ki_vla_ros.records import NS_PER_S, ActionChunk, JointReading, Motion, MotionInterrupted
from ki_vla_ros.runtime.governor import MOST_PERIODS, MOVED_MOST, START_GAP_S, Bounds, Governor
from ki_vla_ros.runtime.safety import axis_bounds, extremes


def test_a_stale_input_brings_the_arm_to_rest_once_and_it_continues_afterwards(rig: Rig) -> None:
    def before(n: int) -> None:
        if n in (0, 5, 6):
            rig.give_inputs()
        else:
            rig.buffer.add_joints(JointReading(rig.wire.time_ns, JOINTS, rest_J + 0.001 * n))

    rest_J = demo_observation().state_S

    rig.run_ticks(7, before)
    holds = [tick["hold"] for tick in rig.wire.ticks]
    assert [hold is None for hold in holds] == [True, True, True, False, False, True, True]
    assert str(holds[3]).startswith("camera 'scene': newest frame 300 ms old, limit 250 ms")
    # Once for the stale camera, once at the end, when the loop stops.
    held = [motion for motion, _ in rig.wire.commands if is_hold(motion)]
    assert len(rig.wire.commands) == 7 and len(held) == 2
    assert held[0].end_ns < START + 300 * MS + 200 * MS


@pytest.mark.parametrize("joints_lost", [False, True])
def test_a_hold_brakes_on_the_commanded_path(rig: Rig, joints_lost: bool) -> None:
    """Wherever the arm is said to be: a joint state that is wrong must not pull it."""

    def before(n: int) -> None:
        if n == 0:
            rig.give_inputs()
        elif not joints_lost:
            rig.buffer.add_joints(JointReading(rig.wire.time_ns, JOINTS, demo_observation().state_S + 0.01 * n))

    rig.run_ticks(4, before)
    running, _ = rig.wire.commands[2]
    held, now_ns = rig.wire.commands[3]
    assert held.end_ns - now_ns <= 200 * MS  # 0.15 s from full speed, and the lead
    for a, b in zip(running.at(held.from_ns), held.at(held.from_ns), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    speed_NJ = np.abs(held.velocity_NJ[np.searchsorted(held.time_N, held.from_ns) :])
    assert np.all(np.diff(speed_NJ, axis=0) <= 0.0)  # nothing but braking


def test_stopping_holds_a_running_chunk(rig: Rig) -> None:
    rig.run_ticks(1, lambda n: rig.give_inputs())
    assert [is_hold(motion) for motion, _ in rig.wire.commands] == [False, True]
    rig.thread.stop()
    assert len(rig.wire.commands) == 2


def test_stopping_when_nothing_moves_sends_nothing(rig: Rig) -> None:
    rig.run_ticks(2, lambda n: None)
    assert rig.wire.commands == []
    assert str(rig.wire.ticks[0]["hold"]).startswith("camera 'scene': no image yet")


def test_a_stop_is_latched_until_reset(rig: Rig) -> None:
    def before(n: int) -> None:
        rig.give_inputs()
        if n == 2:
            rig.loop.latch("by a test")
        if n == 4:
            assert rig.loop.reset() and not rig.loop.reset()

    rig.run_ticks(6, before)
    holds = [tick["hold"] for tick in rig.wire.ticks]
    assert [hold is None for hold in holds] == [True, True, False, False, True, True]
    assert holds[2] == "stopped: by a test; call ~/reset when it is safe to move again"
    assert [is_hold(motion) for motion, _ in rig.wire.commands] == [False, False, True, False, False, True]


def test_a_stop_during_inference_keeps_the_chunk_off_the_wire(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = rig.policy.decode

    def stop_meanwhile(*arguments: object) -> ActionChunk:
        rig.loop.latch("meanwhile")
        return decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(rig.policy, "decode", stop_meanwhile)
    rig.give_inputs()
    with pytest.raises(SafetyRefusal, match="stopped: meanwhile"):
        rig.tick()
    assert not rig.wire.commands


def test_a_rule_may_stop_until_reset(rig: Rig) -> None:
    rig.change(**{"limits.on_jump": "stop", "limits.max_jump_s": 0.0, "limits.velocity_scale": 0.01})
    rig.run_ticks(2, lambda n: rig.give_inputs())
    holds = [str(tick["hold"]) for tick in rig.wire.ticks]
    assert "from the measured" in holds[0] and holds[1].startswith("stopped: joint")
    assert rig.loop.latched is not None and not rig.wire.commands


def test_the_watchdog_holds_an_arm_without_fresh_chunks(rig: Rig) -> None:
    rig.give_inputs()
    rig.tick()
    rig.loop.watch()
    assert len(rig.wire.commands) == 1
    rig.wire.time_ns += 501 * MS  # hold_after_s is half a second; the chunk's motion lasts longer
    rig.buffer.add_joints(JointReading(rig.wire.time_ns, JOINTS, demo_observation().state_S))
    rig.loop.watch()
    rig.loop.watch()
    assert len(rig.wire.commands) == 2
    assert any("watchdog: no fresh chunk for 501 ms" in line for line in rig.wire.lines)
    assert rig.diagnostics.report("active", "", 0.0).values["refused watchdog"] == "1"


def test_dry_run_computes_and_sends_nothing(rig: Rig) -> None:
    rig.change(dry_run=True)
    rig.run_ticks(3, lambda n: rig.give_inputs())
    assert rig.wire.commands == [] and len(rig.wire.chunks) == 3
    assert [tick["hold"] for tick in rig.wire.ticks] == [None] * 3


def test_a_dry_run_waits_for_no_controller(rig: Rig) -> None:
    """A controller would need longer to get to the start than half of the chunk lasts; here none has to."""
    rig.change(dry_run=True, ramp_in_s=30.0)
    rig.run_ticks(3, lambda n: rig.give_inputs())
    assert [tick["hold"] for tick in rig.wire.ticks] == [None] * 3 and len(rig.wire.chunks) == 3


def test_the_watchdog_holds_an_arm_that_a_dry_run_found_in_motion(rig: Rig) -> None:
    """What a dry run computes is no fresh chunk: nobody sends it."""
    rig.change(hold_after_s=0.2)
    rig.give_inputs()
    rig.tick()
    rig.change(hold_after_s=0.2, dry_run=True)
    for _ in range(3):
        rig.wire.time_ns += 100 * MS
        rig.give_inputs()
        rig.tick()
        rig.loop.watch()
    assert len(rig.wire.commands) == 2 and is_hold(rig.wire.commands[1][0])


def test_the_end_of_a_dry_run_is_a_start(rig: Rig) -> None:
    """The speed limits rise from a tenth again, however long the dry run was."""
    rig.change(ramp_in_s=5.0, dry_run=True)
    for _ in range(60):
        rig.wire.time_ns += 100 * MS
        rig.give_inputs()
        rig.tick()
    rig.change(ramp_in_s=5.0, dry_run=False)
    rig.wire.time_ns += 100 * MS
    rig.give_inputs()
    with pytest.raises(SafetyRefusal, match="start: the controller is being led"):
        rig.tick()
    rig.wire.time_ns += 1_500 * MS
    rig.give_inputs()
    rig.tick()
    _, _, speed_J, _ = extremes(rig.wire.commands[1][0])
    assert (speed_J <= 0.4 * rig.loop._gate.bounds.speed_J).all()


def test_a_dry_run_is_not_what_the_arm_was_told(rig: Rig) -> None:
    """Switched on in motion, the arm can still be held; switched off, no motion starts where the arm never was."""
    rig.give_inputs()
    rig.tick()
    sent = rig.wire.commands[0][0]
    rig.change(dry_run=True)
    for _ in range(3):
        rig.wire.time_ns += 100 * MS
        rig.give_inputs()
        rig.tick()
    assert len(rig.wire.commands) == 1 and rig.loop._governor.running is sent
    rig.loop.latch("in a dry run")
    assert len(rig.wire.commands) == 2 and is_hold(rig.wire.commands[1][0])
    rig.loop.reset()
    rig.wire.time_ns += 2_000 * MS
    rig.give_inputs()
    rig.tick()
    rig.change(dry_run=False)
    rig.wire.time_ns += 100 * MS
    rig.give_inputs()
    rig.tick()
    assert rig.wire.commands[2][0].from_ns > rig.wire.time_ns
    np.testing.assert_allclose(rig.wire.commands[2][0].position_NJ[0], demo_observation().state_S, atol=MOVED_MOST)


@pytest.mark.parametrize("horizon_s", [0.1, 0.8])
def test_speed_limits_rise_after_activation(rig: Rig, horizon_s: float) -> None:
    """From where the first motion begins, and within each motion, however seldom a new one is made."""
    change = {"ramp_in_s": 1.0, "limits.velocity_scale": 0.2, "limits.max_jump_s": 10.0}
    rig.change(**change, execution_horizon_s=horizon_s, hold_after_s=2.0)
    rig.loop.adopt(rig.settings)
    rig.run_ticks(14, lambda n: rig.give_inputs())
    limit_J = 0.2 * np.array([joint.max_velocity for joint in rig.policy.bundle.manifest.axes])
    begins_ns, shares = rig.wire.commands[0][0].time_N[0], []
    for motion, _ in rig.wire.commands[:-1]:
        share_N = (np.abs(motion.velocity_NJ) / limit_J).max(axis=1)
        bound_N = np.minimum(1.0, 0.1 + 0.9 * (motion.time_N - begins_ns) / NS_PER_S)
        assert (share_N <= bound_N * (1 + 1e-9))[motion.time_N >= begins_ns].all()
        shares.append(share_N.max())
    assert shares[1] > 0.5, "the first chunk is not slowed to its end"


def give_state(rig: Rig, state_S: NDArray[np.float64]) -> None:
    for frame in demo_observation(rig.wire.time_ns).frames.values():
        rig.buffer.add_frame(frame)
    rig.buffer.add_joints(JointReading(rig.wire.time_ns, JOINTS, state_S))


ONE = np.array([1, 0, 0, 0, 0, 0, 0])


def limits_of(rig: Rig) -> Bounds:
    return axis_bounds(rig.policy.bundle.manifest.axes, rig.settings.limits)


def assert_reached_within_limits(rig: Rig, controller_J: NDArray[np.float64], motion: Motion, now_ns: int) -> None:
    """From rest at `controller_J`, the cubic to the motion's first point keeps the limits."""
    time_N = np.array([now_ns, motion.time_N[0]])
    way = Motion(JOINTS, now_ns, time_N, np.array([controller_J, motion.position_NJ[0]]), np.zeros((2, len(JOINTS))))
    _, _, speed_J, acceleration_J = extremes(way)
    bounds = limits_of(rig)
    assert np.all(speed_J <= bounds.speed_J * 1.01) and np.all(acceleration_J <= bounds.acceleration_J * 1.01)


@pytest.mark.parametrize("away_rad", [0.02, 0.15, 0.5, 2.0])
def test_an_arm_beside_its_command_starts_within_the_limits_from_both(rig: Rig, away_rad: float) -> None:
    """The controller is where the arm was sent, or where the arm is: nobody can tell."""
    rig.change(**{"limits.max_jump_s": 10.0})
    rig.give_inputs()
    rig.tick()
    rig.wire.time_ns += 3_000 * MS
    sent_J = rig.wire.commands[0][0].position_NJ[-1]
    moved_J = sent_J + away_rad * ONE * (-1 if sent_J[0] > 0 else 1)
    give_state(rig, moved_J)
    with contextlib.suppress(SafetyRefusal):  # far away, a motion of its own leads there first
        rig.tick()
    motion, now_ns = rig.wire.commands[1]
    for controller_J in (sent_J, moved_J):
        assert_reached_within_limits(rig, controller_J, motion, now_ns)
    assert np.allclose(motion.position_NJ[0], moved_J) == (away_rad > 0.1)
    assert any("from where it was sent; continuing from where it is" in line for line in rig.wire.lines) == (
        away_rad > 0.1
    )
    for _ in range(20):
        rig.wire.time_ns += 100 * MS
        give_state(rig, moved_J)
        with contextlib.suppress(SafetyRefusal):
            rig.tick()
    assert rig.wire.commands[-1][0].end_ns > motion.end_ns  # it went on


@pytest.mark.parametrize("mode", ["replace", "stream"])
def test_a_gripper_that_holds_something_does_not_let_go(rig: Rig, mode: str) -> None:
    """It never gets to where it was sent, at rest or in motion, and is still told to go there."""
    rig.change(**{"limits.max_jump_s": 10.0, "publish_mode": mode})
    rig.give_inputs()
    rig.tick()
    rig.wire.time_ns += 3_000 * MS
    sent_J = rig.wire.commands[0][0].position_NJ[-1]
    give_state(rig, sent_J + 0.015 * np.eye(7)[6] * (1 if sent_J[6] < 0.02 else -1))
    rig.tick()
    np.testing.assert_allclose(rig.wire.commands[1][0].position_NJ[0], sent_J, atol=1e-9)


@pytest.mark.parametrize("mode", ["replace", "stream"])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("again", ["activated", "reset", "wet"])
def test_a_gripper_is_left_as_it_is_between_two_starts(rig: Rig, mode: str, moved: bool, again: str) -> None:
    """What it holds since before it goes on to hold; what someone put into it meanwhile it does not let go."""
    rig.change(**{"limits.max_jump_s": 10.0, "publish_mode": mode})
    rig.give_inputs()
    rig.tick()
    rig.wire.time_ns += 3_000 * MS
    sent_J = rig.wire.commands[0][0].position_NJ[-1]
    held_J = sent_J + 0.015 * np.eye(7)[6] * (1 if sent_J[6] < 0.02 else -1)
    give_state(rig, held_J)
    if again == "activated":
        rig.loop.end()
    elif again == "reset":
        rig.loop.latch("test")
    else:
        rig.change(**{"limits.max_jump_s": 10.0, "publish_mode": mode, "dry_run": True})
        rig.tick()
    rig.wire.time_ns += 3_000 * MS
    now_J = held_J + (0.01 * np.eye(7)[6] * np.sign(sent_J - held_J) if moved else 0.0)
    give_state(rig, now_J)
    if again == "activated":
        rig.loop.begin()
    elif again == "reset":
        rig.loop.reset()
    else:
        rig.tick()
        rig.change(**{"limits.max_jump_s": 10.0, "publish_mode": mode, "dry_run": False})
        rig.wire.time_ns += 1_000 * MS
        give_state(rig, now_J)
    count = len(rig.wire.commands)
    rig.tick()
    assert len(rig.wire.commands) == count + 1
    np.testing.assert_allclose(rig.wire.commands[-1][0].position_NJ[0][6], (now_J if moved else sent_J)[6], atol=1e-9)


def test_the_first_motion_waits_for_a_controller_that_is_a_little_elsewhere(rig: Rig) -> None:
    rig.give_inputs()
    rig.tick()
    ((motion, now_ns),) = rig.wire.commands
    state_S = demo_observation().state_S
    np.testing.assert_array_equal(motion.position_NJ[0], state_S)
    off_J = limits_of(rig).speed_J * START_GAP_S
    for sign in (-1, 1):
        assert_reached_within_limits(rig, state_S + sign * off_J, motion, now_ns)


@pytest.mark.parametrize("moved_rad, held", [(0.0, False), (0.8, False), (1.0, True)])
def test_an_arm_in_motion_may_trail_but_not_be_elsewhere(rig: Rig, moved_rad: float, held: bool) -> None:
    """It may trail by 0.3 s at 3 rad/s. Farther off, it brakes on its path, whatever the joint states say."""
    rig.give_inputs()
    rig.tick()
    rig.wire.time_ns += 100 * MS
    running = rig.wire.commands[0][0]
    give_state(rig, running.at(rig.wire.time_ns)[0] + moved_rad * ONE)
    rig.loop.step(rig.settings, rig.wire.time_ns, 0)
    assert ("from where it was sent (limits.max_jump_s)" in str(rig.wire.ticks[0]["hold"])) == held
    command = rig.wire.commands[1][0]
    for a, b in zip(running.at(command.from_ns), command.at(command.from_ns), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    assert is_hold(command) == held


@pytest.mark.parametrize("mode", ["replace", "stream"])
def test_an_arm_put_elsewhere_does_not_start_from_an_old_hold(rig: Rig, mode: str) -> None:
    """A simulator is reset, or an arm is moved by hand, between deactivation and activation."""
    rig.run_ticks(2, lambda n: rig.give_inputs())
    hold, _ = rig.wire.commands[-1]
    elsewhere_J = demo_observation().state_S + 0.3 * ONE
    count, rig.wire.ticks[:] = len(rig.wire.commands), []
    rig.wire.time_ns = hold.end_ns + 1 * MS
    rig.change(**{"limits.max_jump_s": 10.0, "publish_mode": mode})
    rig.run_ticks(1, lambda n: give_state(rig, elsewhere_J))
    np.testing.assert_allclose(rig.wire.commands[count][0].position_NJ[0], elsewhere_J, atol=1e-6)


def test_a_stream_does_not_follow_an_arm_that_was_moved_without_an_order(rig: Rig) -> None:
    """It cannot lead a controller anywhere within limits without knowing where the controller is."""
    rig.change(**{"limits.max_jump_s": 10.0, "publish_mode": "stream"})
    rig.give_inputs()
    rig.tick()
    rig.wire.time_ns += 3_000 * MS
    moved_J = rig.wire.commands[0][0].position_NJ[-1] + 0.3 * ONE
    give_state(rig, moved_J)
    with pytest.raises(SafetyRefusal, match=r"0\.300 rad from where it was sent.*call ~/reset"):
        rig.tick()
    assert len(rig.wire.commands) == 1
    rig.loop.reset()
    rig.tick()
    np.testing.assert_allclose(rig.wire.commands[1][0].position_NJ[0], moved_J)


@pytest.mark.parametrize("error", [EngineError("engine: broken"), ZeroDivisionError("a bug")])
def test_errors_of_the_engine_hold_and_the_next_tick_tries_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    prefill, broken = rig.policy.prefill, threading.Event()

    def sometimes(*arguments: object) -> KVCache:
        if broken.is_set():
            raise error
        return prefill(*arguments)  # type: ignore[arg-type]

    def before(n: int) -> None:
        rig.give_inputs()
        broken.set() if n == 1 else broken.clear()

    monkeypatch.setattr(rig.policy, "prefill", sometimes)
    rig.run_ticks(3, before)
    holds = [tick["hold"] for tick in rig.wire.ticks]
    assert holds[0] is None and holds[2] is None
    assert str(error) in str(holds[1])
    assert [is_hold(motion) for motion, _ in rig.wire.commands] == [False, True, False, True]


def test_a_fault_between_two_ticks_holds_and_the_loop_continues(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    since_burst_ns, calls = rig.buffer.since_burst_ns, []

    def sometimes(now_ns: int) -> int | None:
        calls.append(now_ns)
        if len(calls) == 2:
            raise ZeroDivisionError("a bug")
        return since_burst_ns(now_ns)

    monkeypatch.setattr(rig.buffer, "since_burst_ns", sometimes)
    rig.run_ticks(3, lambda n: rig.give_inputs())
    assert len(rig.wire.ticks) == 3
    assert any("ZeroDivisionError: a bug" in line for line in rig.wire.lines)
    assert [is_hold(motion) for motion, _ in rig.wire.commands][:2] == [False, True]


def test_a_tick_that_is_running_at_the_end_sends_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    denoise = rig.policy.denoise

    def end_meanwhile(*given: Any) -> Any:
        rig.loop.end()
        return denoise(*given)

    rig.loop.begin()
    rig.give_inputs()
    monkeypatch.setattr(rig.policy, "denoise", end_meanwhile)
    assert rig.tick()[0] is None
    assert rig.wire.commands == [] and rig.wire.chunks == []
    monkeypatch.setattr(rig.policy, "denoise", denoise)
    rig.loop.begin()
    assert rig.tick()[0] == 0 and len(rig.wire.commands) == 1


def test_a_wire_that_fails_ends_neither_ticks_nor_stops_nor_watchdog(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("failed to publish")

    rig.change(hold_after_s=0.2)
    rig.give_inputs()
    rig.tick()
    with monkeypatch.context() as broken:
        broken.setattr(rig.wire, "send_command", fail)
        for _ in range(3):
            rig.wire.time_ns += 100 * MS
            rig.give_inputs()
            rig.loop.step(rig.settings, rig.wire.time_ns, 0)
            rig.loop.watch()
        rig.loop.latch("while it fails")
        rig.loop.end()
    assert [tick["hold"] for tick in rig.wire.ticks] == ["internal error: RuntimeError('failed to publish')"] * 3
    assert len(rig.wire.commands) == 1
    rig.loop.watch()
    assert len(rig.wire.commands) == 2 and is_hold(rig.wire.commands[1][0])


# --- clocks, lateness, limits


@pytest.mark.parametrize("step_ms", [10, 50, -150, 240, -3_600_000, 3_600_000])
def test_a_step_of_the_nodes_clock_is_no_step_of_the_arm(rig: Rig, step_ms: int) -> None:
    rig.give_inputs()
    rig.tick()
    before, _ = rig.wire.commands[0]
    rig.wire.time_ns += (300 + step_ms) * MS
    rig.wire.stepped_ns = step_ms * MS
    rig.loop.clock_stepped(back=step_ms < 0)
    rig.give_inputs()
    rig.tick()
    after, sent_ns = rig.wire.commands[1]
    assert sent_ns == START + 300 * MS and after.from_ns <= sent_ns + (10 + 20) * MS
    for a, b in zip(before.at(after.from_ns), after.at(after.from_ns), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    chunk = rig.wire.chunks[1]  # dated by the node's clock, executed by the other
    ahead_ns = rig.wire.stepped_ns
    np.testing.assert_allclose(after.at(chunk.due_ns(12) - ahead_ns)[0], chunk.position_HJ[12], atol=2e-3)


def test_a_motion_that_was_finished_too_late_is_made_again(rig: Rig) -> None:
    rig.give_inputs()
    rig.tick()
    running, _ = rig.wire.commands[0]
    rig.wire.time_ns += 300 * MS
    rig.give_inputs()
    rig.wire.computing_ns = [0] * 6 + [60 * MS]
    rig.tick()
    after, sent_ns = rig.wire.commands[1]
    assert sent_ns == START + 360 * MS and after.from_ns >= sent_ns
    for a, b in zip(running.at(after.from_ns), after.at(after.from_ns), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


def test_motions_that_are_always_too_late_are_never_sent(rig: Rig) -> None:
    rig.give_inputs()
    rig.tick()
    rig.wire.time_ns += 300 * MS
    rig.give_inputs()
    # Each one takes longer than the time that the one before it makes it take into account.
    rig.wire.computing_ns = [0] * 7 + [40 * MS, 0, 200 * MS, 0, 900 * MS]
    with pytest.raises(SafetyRefusal, match=r"motion: finished .* after it had to be sent, 3 times running"):
        rig.tick()
    assert len(rig.wire.commands) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"limits.joints.shoulder_pan.acceleration": 0.35},  # 9 s to stop from full speed
        {"limits.time_to_speed_s": 10.0},
        {"limits.velocity_scale": 0.01},
        {"limits.joints.shoulder_pan.velocity": 1e-6},
    ],
)
def test_limits_that_become_tighter_than_the_motion_stop_it_first(rig: Rig, changes: dict[str, float]) -> None:
    """Within the limits that it was made within: with the new ones it might never come to rest."""
    bounds = limits_of(rig)
    rig.give_inputs()
    rig.tick()
    rig.wire.time_ns += 400 * MS
    rig.give_inputs()
    running, _ = rig.wire.commands[0]
    assert np.abs(running.at(rig.wire.time_ns)[1][0]) > 0.0
    rig.change(**changes)
    rig.loop.step(rig.settings, rig.wire.time_ns, 0)
    assert str(rig.wire.ticks[0]["hold"]).startswith("limits: became tighter than the running motion")
    hold, sent_ns = rig.wire.commands[1]
    assert hold.end_ns - sent_ns < 200 * MS
    _, _, _, acceleration_J = extremes(hold)
    assert np.all(acceleration_J <= bounds.acceleration_J * (1 + 1e-6))


def test_a_change_of_limits_that_is_no_range_holds_the_arm(rig: Rig) -> None:
    """The node refuses such a parameter; should one get here all the same, it must not count as in force."""
    rig.give_inputs()
    rig.tick()
    joint = rig.policy.bundle.manifest.axis_names[0]
    rig.change(**{f"limits.joints.{joint}.lower": 5.0})
    for n in range(3):
        rig.wire.time_ns += 100 * MS
        rig.give_inputs()
        rig.loop.step(rig.settings, rig.wire.time_ns, 0)
        assert "leave no range" in str(rig.wire.ticks[n]["hold"])
    assert [is_hold(motion) for motion, _ in rig.wire.commands] == [False, True]


def test_a_hold_is_small_whatever_the_limits_are() -> None:
    """A joint that turns for ever, slowly braking: the motion has as many pieces as braking takes periods."""
    wide = Bounds(np.array([-1e9]), np.array([1e9]), np.array([3.0]), np.array([0.3]))
    governor = Governor(("wheel",), 0.002)
    target = ActionChunk(START, 3600 * NS_PER_S, ("wheel",), np.array([[1e8], [2e8]]), np.array([[3.0], [3.0]]))
    motion = governor.follow(target, np.zeros(1), START, START, wide)
    assert len(motion.time_N) <= 2 * MOST_PERIODS + 2
    governor.commit(motion, wide)
    at_ns = START + 9 * NS_PER_S
    speed = float(motion.at(at_ns)[1][0])
    assert speed > 2.0
    for limit, brakes in ((1e-3, 0.3), (0.3, 0.3), (3.0, 3.0)):  # the present limit, where it is the higher one
        brake, within = governor.brake(at_ns, at_ns, np.array([limit]))
        assert within.acceleration_J[0] == brakes and within.speed_J is wide.speed_J
        assert (brake.end_ns - at_ns) / NS_PER_S == pytest.approx(speed / brakes, abs=0.01)


# --- some axes do not do what they were told

FIRST_THREE = np.arange(7) < 3


def moving(rig: Rig) -> Motion:
    """What the arm has been told; it has been under way for a while."""
    rig.change(**{"limits.max_jump_s": 10.0})
    rig.give_inputs()
    rig.tick()
    rig.wire.time_ns += 500 * MS
    return rig.wire.commands[0][0]


def standing(rig: Rig, position_J: NDArray[np.float64]) -> Motion:
    at_ns, still = rig.wire.motion_ns(), np.zeros((1, 7))
    return Motion(JOINTS, at_ns, np.array([at_ns]), position_J[None], still)


def assert_the_others_brake(running: Motion, held: Motion, acceleration_J: NDArray[np.float64]) -> None:
    """The axes from 3 on go on from where they are to rest, and no axis brakes harder than it may."""
    position_J, velocity_J = held.at(held.from_ns)
    np.testing.assert_allclose(position_J[3:], running.at(held.from_ns)[0][3:], atol=1e-9)
    np.testing.assert_allclose(velocity_J[3:], running.at(held.from_ns)[1][3:], atol=1e-9)
    assert is_hold(held) and np.abs(velocity_J[3:]).max() > 0.0
    after = slice(int(np.searchsorted(held.time_N, held.from_ns)), None)
    speeds_NJ, times_N = held.velocity_NJ[after], held.time_N[after] / NS_PER_S
    assert np.all(np.abs(np.diff(speeds_NJ, axis=0)) <= acceleration_J * np.diff(times_N)[:, None] * (1 + 1e-6))
    np.testing.assert_array_equal(speeds_NJ[-1], 0.0)


def bounds_of(rig: Rig) -> Bounds:
    return axis_bounds(rig.policy.bundle.manifest.axes, rig.settings.limits)


def test_where_some_axes_stand_still_all_the_others_brake_at_once(rig: Rig) -> None:
    running = moving(rig)
    stood_J = running.at(rig.wire.time_ns - 40 * MS)[0]
    rig.loop.watch(lambda: MotionInterrupted("stream: no position", standing(rig, stood_J), FIRST_THREE))
    (held, _) = rig.wire.commands[1]
    assert_the_others_brake(running, held, bounds_of(rig).acceleration_J)
    np.testing.assert_allclose(held.position_NJ[1:, :3], np.tile(stood_J[:3], (len(held.time_N) - 1, 1)))
    assert any("holding: stream: no position" in line for line in rig.wire.lines)
    assert rig.diagnostics.report("active", "", 1.0).values["refused stream"] == "1"
    # From there it starts again.
    rig.wire.time_ns = held.end_ns + 200 * MS
    observation = demo_observation(rig.wire.time_ns)
    for frame in observation.frames.values():
        rig.buffer.add_frame(frame)
    rig.buffer.add_joints(JointReading(rig.wire.time_ns, JOINTS, held.position_NJ[-1]))
    rig.loop.step(rig.settings, rig.wire.time_ns, 0)
    assert rig.wire.ticks[-1]["hold"] is None
    np.testing.assert_allclose(rig.wire.commands[2][0].position_NJ[0], held.position_NJ[-1])


def test_if_a_motion_reaches_some_outputs_only_these_brake_from_it_and_the_others_from_the_one_before(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = moving(rig)
    send, told = rig.wire.send_command, []

    def fail_once(motion: Motion, now_ns: int, hold: bool = False) -> None:
        if not told:
            told.append(motion)
            raise MotionInterrupted("output 'hand': not told", motion, FIRST_THREE)
        send(motion, now_ns, hold)

    monkeypatch.setattr(rig.wire, "send_command", fail_once)
    give_state(rig, running.at(rig.wire.time_ns)[0])
    rig.loop.step(rig.settings, rig.wire.time_ns, 0)
    assert rig.wire.ticks[-1]["hold"] == "output 'hand': not told"
    (held, _) = rig.wire.commands[1]
    assert_the_others_brake(running, held, bounds_of(rig).acceleration_J)
    for a, b in zip(told[0].at(held.from_ns), held.at(held.from_ns), strict=True):
        np.testing.assert_allclose(a[:3], b[:3], atol=1e-9)


def test_axes_that_stopped_nobody_knows_where_are_held_where_they_are_measured(rig: Rig) -> None:
    running = moving(rig)
    stood_J = running.at(rig.wire.time_ns - 200 * MS)[0]
    assert np.abs(stood_J - running.position_NJ[-1])[:3].max() > 0.05
    give_state(rig, stood_J)
    rig.loop.watch(lambda: MotionInterrupted("aborted", standing(rig, np.full(7, np.nan)), FIRST_THREE))
    (held, _) = rig.wire.commands[1]
    assert_the_others_brake(running, held, bounds_of(rig).acceleration_J)
    np.testing.assert_allclose(held.position_NJ[1:, :3], np.tile(stood_J[:3], (len(held.time_N) - 1, 1)), atol=1e-6)
    # Without a reading, where they had been told to be by now.
    rig.wire.time_ns += 1
    rig.buffer.clear()
    rig.loop.watch(lambda: MotionInterrupted("aborted", standing(rig, np.full(7, np.nan)), FIRST_THREE))
    np.testing.assert_allclose(rig.wire.commands[2][0].position_NJ[-1, :3], stood_J[:3], atol=1e-6)


def test_a_motion_that_is_cut_short_while_the_arm_comes_to_rest_is_held_too(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = moving(rig)
    rig.loop.rest()
    rig.loop.rest()
    assert len(rig.wire.commands) == 2  # once is enough
    send, told = rig.wire.send_command, []

    def fail_once(motion: Motion, now_ns: int, hold: bool = False) -> None:
        if not told:
            told.append(motion)
            raise MotionInterrupted("output 'hand': not told", motion, FIRST_THREE)
        send(motion, now_ns, hold)

    monkeypatch.setattr(rig.wire, "send_command", fail_once)
    rig.wire.time_ns += 20 * MS
    give_state(rig, running.at(rig.wire.time_ns)[0])
    rig.loop.step(rig.settings, rig.wire.time_ns, 0)
    assert rig.wire.ticks[-1]["hold"] == "output 'hand': not told"
    assert len(rig.wire.commands) == 3 and is_hold(rig.wire.commands[2][0])


def test_after_an_interruption_speed_limits_rise_anew(rig: Rig) -> None:
    """A controller that refuses all would otherwise let a base drive on in steps."""
    rig.change(**{"limits.max_jump_s": 10.0, "ramp_in_s": 0.5})
    rig.give_inputs()
    rig.tick()
    rig.wire.time_ns += 700 * MS
    for _ in range(5):
        running = rig.wire.commands[-1][0]
        rig.loop.watch(lambda: MotionInterrupted("goal rejected", running, FIRST_THREE))  # noqa: B023
        rig.wire.time_ns += 100 * MS
        give_state(rig, rig.wire.commands[-1][0].at(rig.wire.time_ns)[0])
        rig.loop.step(rig.settings, rig.wire.time_ns, 0)
        assert rig.wire.ticks[-1]["hold"] is None
    motion = rig.wire.commands[-1][0]
    speed_J = np.abs(motion.velocity_NJ).max(axis=0)
    assert np.all(speed_J <= 0.1 * bounds_of(rig).speed_J * (1 + 1e-9))


def test_a_stop_that_learns_of_an_interruption_is_sent_all_the_same(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    running = moving(rig)
    send, told = rig.wire.send_command, []

    def fail_once(motion: Motion, now_ns: int, hold: bool = False) -> None:
        assert hold
        if not told:
            told.append(motion)
            raise MotionInterrupted("output 'arm': goal rejected", running, FIRST_THREE)
        send(motion, now_ns, hold)

    monkeypatch.setattr(rig.wire, "send_command", fail_once)
    rig.loop.latch("by hand")
    assert len(rig.wire.commands) == 2 and is_hold(rig.wire.commands[1][0])


def test_the_first_motion_that_reaches_only_some_outputs_leaves_the_others_where_they_are(rig: Rig) -> None:
    governor, bounds = Governor(JOINTS, 0.02), bounds_of(rig)
    running = moving(rig)
    governor.interrupt(running, FIRST_THREE, bounds)
    held, _ = governor.brake(rig.wire.time_ns + 20 * MS, rig.wire.time_ns, bounds.acceleration_J)
    np.testing.assert_allclose(held.position_NJ[:, 3:], np.tile(running.position_NJ[0, 3:], (len(held.time_N), 1)))
    np.testing.assert_allclose(held.at(held.from_ns)[1][:3], running.at(held.from_ns)[1][:3], atol=1e-9)
