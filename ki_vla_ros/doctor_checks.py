"""Judges what came in (doctor_inputs.py). Limits are the settings', the bundle's, or stand here by name."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bags import COMPRESSED_IMAGE, IMAGE
from ki_vla_ros.doctor_findings import Findings
from ki_vla_ros.doctor_inputs import JOINT_STATE, InputWatch, Stream, command_type
from ki_vla_ros.records import NS_PER_S

# Share of the images that may be missing between the first and the last.
LOSS = 0.05
# Share of anything else that is passed over: single events are the node's to refuse.
RARE = 0.01
# Stamps farther from the time of arrival were not taken by this clock at all.
OTHER_CLOCK_S = 3600.0
# Correlation of where a joint was told to be and where it was, below which it goes the wrong way.
OPPOSED = -0.5
# A joint that moved by less than this share of its range says nothing about its direction.
MOVED = 0.05
PROFILE_FIX = (
    "start the camera drivers and the node with FASTDDS_DEFAULT_PROFILES_FILE=<share>/ki_vla_ros/config/fastdds.xml "
    "(the default shared memory is smaller than an image), or use compressed transport"
)


def check_inputs(watch: InputWatch, findings: Findings, others: Collection[str] = ()) -> None:
    """`others`: all topics that exist, to name the likely one where one is missing."""
    for name, stream in watch.cameras.items():
        optional = next(camera.optional for camera in watch.manifest.cameras if camera.name == name)
        expected = watch.image_types[name]
        if _present(stream, f"camera {name!r}", f"cameras.{name}.topic", expected, others, findings, optional):
            _check_camera(watch, name, stream, findings)
    if _present(watch.joints, "joint state", "joint_states_topic", JOINT_STATE, others, findings):
        _check_stamps(watch, watch.joints, watch.settings.joint_max_age_s or watch.settings.max_age_s, findings)
        _check_joints(watch, findings)
    _check_command_type(watch, findings)
    if not watch.settings.use_receive_time:
        _check_skew(watch, findings)
    _check_direction(watch, findings)


def _present(
    stream: Stream,
    subject: str,
    parameter: str,
    expected: str,
    others: Collection[str],
    findings: Findings,
    optional: bool = False,
) -> bool:
    kinds = [kind for kind in stream.kinds if kind != expected]
    if {expected, *kinds} == {IMAGE, COMPRESSED_IMAGE}:
        transport = "compressed" if kinds[0] == COMPRESSED_IMAGE else "raw"
        findings.error(
            "transport",
            stream.topic,
            f"{subject} has {kinds[0]} here, expected {expected}: raw and compressed are mixed up",
            f"set {parameter.replace('.topic', '.transport')}: {transport}, or choose the other topic",
        )
    elif kinds:
        findings.error(
            "type",
            stream.topic,
            f"{stream.kinds[kinds[0]]} of {stream.count} messages are {kinds[0]}, expected {expected}",
            f"set {parameter} to the right topic; if two programs publish on this one, rename one of them",
        )
    elif not stream.count and not optional:
        near = difflib.get_close_matches(stream.topic, others, n=1, cutoff=0.6)
        hint = f"; there is {near[0]}" if near else ""
        findings.error(
            "missing",
            stream.topic,
            f"no message for {subject}{hint}",
            f"start the driver, or set {parameter} to its topic" + ("" if not near else f" (perhaps {near[0]})"),
        )
    for kind, count in stream.refused.most_common(3):
        findings.error(
            "unreadable",
            stream.topic,
            f"{count} of {stream.count} messages were refused, the first one: {stream.reasons[kind]}",
            "the node holds while its newest input is refused: " + _refusal_fix(stream.reasons[kind]),
        )
    return bool(stream.stamps)


def _refusal_fix(reason: str) -> str:
    for sign, fix in (
        ("degrees", "publish radians (and metres), as REP 103 says"),
        (
            "missing among",
            "set joint_states_topic to this arm's joint states, or take the bundle that was trained on it",
        ),
        ("more than once", "let one program publish each joint"),
        ("as in training", "bring the unit, zero and sign of this joint to those of the training data"),
        ("jpeg", "check the camera's cable and driver, and lower its rate or quality"),
        ("encoding", "set the camera driver to rgb8 or bgr8"),
    ):
        if sign in reason:
            return fix
    return "look at the publisher of this topic"


def _check_camera(watch: InputWatch, name: str, stream: Stream, findings: Findings) -> None:
    settings = watch.settings
    limit_s = settings.camera(name).max_age_s or settings.max_age_s
    _check_stamps(watch, stream, limit_s, findings)
    if len(stream.encodings) > 1:
        findings.warning(
            "encoding",
            stream.topic,
            f"images come in {', '.join(sorted(stream.encodings))}",
            "colours are right in each, but something reconfigures the camera, or two drivers publish here: find out",
        )
    period_s = _period_s(stream.received)
    if period_s is None:
        return
    if 1.0 / period_s < settings.rate_hz * (1.0 - LOSS):
        findings.warning(
            "camera rate",
            stream.topic,
            f"{1.0 / period_s:.1f} images per second, fewer than rate_hz ({settings.rate_hz:g})",
            "raise the camera's rate, or lower rate_hz",
        )
    lost = _lost(stream.received if settings.use_receive_time else stream.stamps)
    if lost > LOSS:
        findings.error("image loss", stream.topic, f"{100 * lost:.0f} % of the images are missing", PROFILE_FIX)


def _check_stamps(watch: InputWatch, stream: Stream, limit_s: float, findings: Findings) -> None:
    settings = watch.settings
    stamps, received = np.array(stream.stamps, dtype=np.int64), np.array(stream.received, dtype=np.int64)
    if len(received) > 1:
        gaps_s = np.diff(received) / NS_PER_S
        if gaps_s.max() > max(limit_s, settings.hold_after_s):
            at_s = (received[int(gaps_s.argmax())] - received[0]) / NS_PER_S
            findings.warning(
                "gap",
                stream.topic,
                f"{(gaps_s > limit_s).sum()} gaps longer than {limit_s:g} s, the longest {gaps_s.max():.1f} s after "
                f"{at_s:.1f} s",
                "the arm is held meanwhile; see whether driver, network or recorder stalled",
            )
    if settings.use_receive_time or not len(stamps):
        return
    if (stamps == 0).mean() > RARE:
        findings.error(
            "stamps",
            stream.topic,
            f"{(stamps == 0).sum()} of {len(stamps)} messages have no stamp",
            "let the driver stamp its messages, or set use_receive_time: true",
        )
        return
    age_s = (received - stamps) / NS_PER_S
    median_s = float(np.median(age_s))
    if abs(median_s) > OTHER_CLOCK_S:
        findings.error(
            "clock",
            stream.topic,
            f"stamps are {median_s:+.0f} s from the time of arrival: two clocks, one of them perhaps simulated",
            "run all nodes with the same use_sim_time (record a simulation with --use-sim-time)",
        )
        return
    if median_s < -settings.sync_slop_s:
        findings.error(
            "stamps",
            stream.topic,
            f"stamps lie {-median_s:.3f} s in the future",
            "synchronise the clocks of the two machines (chrony, PTP)",
        )
    elif median_s > limit_s:
        findings.error(
            "stamps",
            stream.topic,
            f"messages are {median_s:.3f} s old when they arrive, limit {limit_s:g} s",
            "synchronise the clocks of the two machines (chrony, PTP); if they are, shorten the driver's queue or "
            "raise max_age_s",
        )
    steps = np.diff(stamps)
    if len(steps) and (steps == 0).mean() > RARE:
        findings.error(
            "stamps",
            stream.topic,
            f"{(steps == 0).sum()} of {len(stamps)} messages repeat the stamp of the one before",
            "frozen driver, or one that stamps once: restart or mend it, or set use_receive_time: true",
        )
    back_s = -steps.min() / NS_PER_S if len(steps) else 0.0
    if back_s > settings.sync_slop_s:
        findings.warning(
            "stamps",
            stream.topic,
            f"{(steps < 0).sum()} stamps go backwards, by up to {back_s:.3f} s",
            "the driver's clock was set while it ran, or two drivers publish here",
        )


def _check_skew(watch: InputWatch, findings: Findings) -> None:
    """Stamps of any two required cameras, by the distance to the nearest of the other one."""
    optional = {camera.name for camera in watch.manifest.cameras if camera.optional}
    required = [(name, stream) for name, stream in watch.cameras.items() if name not in optional and stream.stamps]
    limit_s = watch.settings.sync_slop_s
    for (one, first), (two, second) in combinations(required, 2):
        a, b = np.sort(np.array(first.stamps)), np.sort(np.array(second.stamps))
        after = np.clip(np.searchsorted(b, a), 1, max(1, len(b) - 1))
        distance_s = np.minimum(np.abs(a - b[after - 1]), np.abs(a - b[np.minimum(after, len(b) - 1)])) / NS_PER_S
        apart_s = float(np.median(distance_s))
        if limit_s < apart_s < OTHER_CLOCK_S:
            findings.error(
                "camera skew",
                f"{first.topic}, {second.topic}",
                f"stamps of {one!r} and {two!r} are {apart_s * 1e3:.0f} ms apart, limit {limit_s * 1e3:.0f} ms "
                "(sync_slop_s)",
                "trigger the cameras together, raise their rates, or raise sync_slop_s by what the task can bear",
            )


def _check_joints(watch: InputWatch, findings: Findings) -> None:
    manifest, settings, topic = watch.manifest, watch.settings, watch.joints.topic
    period_s = _period_s(watch.joints.received)
    if period_s is not None and 1.0 / period_s < settings.rate_hz:
        findings.error(
            "joint rate",
            topic,
            f"{1.0 / period_s:.1f} joint states per second, fewer than rate_hz ({settings.rate_hz:g})",
            "raise the rate of joint_state_broadcaster (controller_manager's update_rate)",
        )
    if len(watch.orders) > 1:
        orders = [names for names, _ in watch.orders.most_common(2)]
        findings.warning(
            "joint order",
            topic,
            f"names change: {', '.join(orders[0])}; then {', '.join(orders[1])}",
            "joints are found by name, but each message must have all of this arm's: let one program publish them",
        )
    times, position_NJ = watch.positions.arrays()
    if not len(times):
        return
    for j, joint in enumerate(manifest.joints):
        own = settings.limits.of(joint.name)
        lower, upper = max(joint.lower, own.lower), min(joint.upper, own.upper)
        low, high = float(position_NJ[:, j].min()), float(position_NJ[:, j].max())
        tolerance = settings.limits.position_margin * (joint.upper - joint.lower)
        if low < lower - tolerance or high > upper + tolerance:
            findings.error(
                "limits",
                joint.name,
                f"was at {low:.3f} to {high:.3f} {joint.unit}, commands may only go from {lower:.3f} to {upper:.3f}",
                f"correct limits.joints.{joint.name}, or the joint's zero; the arm cannot be held where it is",
            )
        trained_low, trained_high = manifest.state.low[j], manifest.state.high[j]
        outside = float(((position_NJ[:, j] < trained_low) | (position_NJ[:, j] > trained_high)).mean())
        if outside > 0.5:
            findings.warning(
                "trained range",
                joint.name,
                f"was outside of the range of training ({trained_low:.3f} to {trained_high:.3f} {joint.unit}) "
                f"{100 * outside:.0f} % of the time",
                "compare this joint's zero, sign and unit with the training data's; or train on data from here",
            )
    _check_speed(watch, times, position_NJ, findings)


def _check_speed(
    watch: InputWatch, times: NDArray[np.int64], position_NJ: NDArray[np.float64], findings: Findings
) -> None:
    """Speeds over at least 50 ms against the limits that commands have."""
    limits, manifest = watch.settings.limits, watch.manifest
    later = np.searchsorted(times, times + NS_PER_S // 20)
    first = np.flatnonzero(later < len(times))
    last = later[first]
    elapsed_N = (times[last] - times[first]) / NS_PER_S
    usable = elapsed_N < 0.2
    if not usable.any():
        return
    speed_NJ = np.abs(position_NJ[last] - position_NJ[first])[usable] / elapsed_N[usable, None]
    fast_J = np.percentile(speed_NJ, 95, axis=0)  # an arm that is put back jumps
    for j, joint in enumerate(manifest.joints):
        limit = min(joint.max_velocity * limits.velocity_scale, limits.of(joint.name).velocity)
        if fast_J[j] > limit * limits.max_overspeed:
            findings.warning(
                "limits",
                joint.name,
                f"moved at {fast_J[j]:.3f} {joint.unit}/s (95th percentile), commands may use {limit:.3f}",
                "chunks that go on like this are refused: raise limits.velocity_scale or this joint's own limit",
            )


def _check_command_type(watch: InputWatch, findings: Findings) -> None:
    expected = command_type(watch.settings)
    for kind in watch.command.kinds:
        if kind != expected:
            findings.error(
                "type",
                watch.command.topic,
                f"commands are {kind}, publish_mode {watch.settings.publish_mode} sends {expected}",
                "set publish_mode (stream for forward_command_controller), or command_topic",
            )


def _check_direction(watch: InputWatch, findings: Findings) -> None:
    """Where each joint was told to be against where it was then."""
    due, wanted_NJ = watch.commands.arrays()
    times, position_NJ = watch.positions.arrays()
    if len(due) < 10 or len(times) < 10:
        return
    inside = (due >= times[0]) & (due <= times[-1])
    for j, joint in enumerate(watch.manifest.joints):
        was_N = np.interp(due[inside], times, position_NJ[:, j])
        wanted_N = wanted_NJ[inside, j]
        moved = min(np.ptp(was_N), np.ptp(wanted_N)) if inside.sum() >= 10 else 0.0
        if moved < MOVED * (joint.upper - joint.lower):
            continue
        together = float(np.corrcoef(was_N, wanted_N)[0, 1])
        if together < OPPOSED:
            gripper = joint.unit == "m" or "grip" in joint.name or "finger" in joint.name
            findings.error(
                "direction",
                joint.name,
                f"moves against its commands (correlation {together:.2f})" + (": open is closed" if gripper else ""),
                "turn the sign in the controller or in the joint state publisher, so that both count the same way",
            )


def _period_s(received: object) -> float | None:
    times = np.array(received, dtype=np.int64)
    if len(times) < 10:
        return None
    return max(float(np.median(np.diff(times))) / NS_PER_S, 1e-6)


def _lost(times: object) -> float:
    """Share of the messages that are missing between others.

    Steps are counted in the shortest usual one, so that also every second message may be missing; steps of more than
    ten are a stall, not a loss.
    """
    steps = np.diff(np.sort(np.array(times, dtype=np.int64)))
    steps = steps[steps > 0]
    if len(steps) < 10:
        return 0.0
    periods = np.round(steps / np.percentile(steps, 10))
    periods = periods[periods <= 10]
    return float(1.0 - len(periods) / periods.sum())
