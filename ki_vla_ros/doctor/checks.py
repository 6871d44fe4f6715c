"""Judges what came in (doctor/inputs.py) by the limits of settings and bundle, and by the constants below."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.doctor.ages import Limit, check_period, check_skew, check_stamps, longest_gap_s, period_s
from ki_vla_ros.doctor.findings import Findings
from ki_vla_ros.doctor.inputs import InputWatch, Traffic
from ki_vla_ros.messages import COMPRESSED_IMAGE, IMAGE, JOINT_STATE
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.robot import continuous, nearest_turn

# Share of the images that may be missing between the first and the last.
LOSS = 0.05
# A longer gap is no loss of single images.
STALL_S = 0.5
# A joint goes the wrong way if the correlation of where it was told to be and where it was is below this.
OPPOSED = -0.5
# A joint that moved by less than this share of its range says nothing about its direction.
MOVED = 0.05
JOINTS_FIX = "set joint_states_topic to this arm's joint states, or take the bundle that was trained on it"
POSES_FIX = "remap the robot file's topic"
PROFILE_FIX = (
    "start the camera drivers and the node with FASTDDS_DEFAULT_PROFILES_FILE=<share>/ki_vla_ros/config/fastdds.xml "
    "(the default shared memory is smaller than an image), or use compressed transport"
)


def check_inputs(watch: InputWatch, findings: Findings, others: Mapping[str, Sequence[str]]) -> None:
    """Judges all inputs; `others` holds the types of all topics with messages, to suggest some for a missing one."""
    for name, traffic in watch.cameras.items():
        optional = watch.expected.optional_cameras[name]
        expected = watch.image_types[name]
        limit = camera_limit(watch, name)
        if _present(traffic, f"camera {name!r}", f"cameras.{name}.topic", expected, others, findings, limit, optional):
            check_camera(watch, name, findings)
    limit = Limit.of("joint_max_age_s", watch.settings.joint_max_age_s, watch.settings)
    for topic, expected in watch.expected.topics.items():
        traffic = watch.states[topic]
        _check_other_joints(watch, traffic, findings)
        subject, parameter = ("joint state", "joint_states_topic") if expected == JOINT_STATE else ("pose", POSES_FIX)
        if _present(traffic, subject, parameter, expected, others, findings, limit=limit):
            for part in watch.parts(topic):
                check_period(watch, part, limit, findings)
                check_stamps(watch, part, limit, findings)
                _check_joint_rate(watch, part, findings)
            _check_order(watch, topic, findings)
    _check_missing(watch, findings)
    for m, signal in enumerate(watch.expected.signals):
        times, value_N = watch.signal(m)
        if len(times) and signal.type == JOINT_STATE:
            _check_joint(watch, m, value_N, findings)
            if signal.field == "position":
                _check_speed(watch, m, times, value_N, findings)
    _check_command_type(watch, findings)
    if not watch.settings.use_receive_time:
        check_skew(watch, findings)
    _check_direction(watch, findings)


def _present(
    traffic: Traffic,
    subject: str,
    parameter: str,
    expected: str,
    others: Mapping[str, Sequence[str]],
    findings: Findings,
    limit: Limit,
    optional: bool = False,
) -> bool:
    kinds = [kind for kind in traffic.kinds if kind != expected]
    choose = f"set {parameter}" if parameter != POSES_FIX else POSES_FIX
    if {expected, *kinds} == {IMAGE, COMPRESSED_IMAGE}:
        transport = "compressed" if kinds[0] == COMPRESSED_IMAGE else "raw"
        findings.error(
            "transport",
            traffic.topic,
            f"{subject} has {kinds[0]} here, expected {expected}: raw and compressed are mixed up",
            f"set {parameter.replace('.topic', '.transport')}: {transport}, or choose the other topic",
        )
    elif kinds:
        findings.error(
            "type",
            traffic.topic,
            f"{traffic.kinds[kinds[0]]} of {traffic.count} messages are {kinds[0]}, expected {expected}",
            f"{choose} to the right topic; if two programs publish on this one, rename one of them",
        )
    elif not traffic.count and not optional:
        family = (IMAGE, COMPRESSED_IMAGE) if expected in (IMAGE, COMPRESSED_IMAGE) else (expected,)
        fitting = sorted(name for name, types in others.items() if not set(family).isdisjoint(types))
        near = difflib.get_close_matches(traffic.topic, fitting, n=1, cutoff=0.6)
        noun = "image" if IMAGE in family else subject
        findings.error(
            "missing",
            traffic.topic,
            f"no message for {subject}; {noun} topics present: {', '.join(fitting) or 'none'}",
            f"start the driver, or {choose} to its topic" + ("" if not near else f" (perhaps {near[0]})"),
        )
    check_refused(traffic, limit, findings)
    return bool(traffic.stamps)


def check_refused(traffic: Traffic, limit: Limit, findings: Findings) -> None:
    """Messages that the node could not read."""
    holds = longest_gap_s(traffic.received) > limit.value_s
    for kind, count in traffic.refused.most_common(3):
        found = f"{count} of {traffic.count} messages were refused, the first one: {traffic.reasons[kind]}"
        if holds:
            effect = "the node holds once the last usable one is too old: "
            findings.error("unreadable", traffic.topic, found, effect + _refusal_fix(traffic.reasons[kind]))
        else:
            effect = "the node goes by the others, which come often enough: "
            findings.warning("unreadable", traffic.topic, found, effect + _refusal_fix(traffic.reasons[kind]))


def _check_other_joints(watch: InputWatch, traffic: Traffic, findings: Findings) -> None:
    """Messages with none of the arm's joints: another robot's if there are no others, else a base beside the arm."""
    others = watch.other_joints[traffic.topic]
    if not others:
        return
    names = sorted({name for names in others for name in names})
    found = f"{others.total()} of {traffic.count} messages have none of the bundle's joints, but {', '.join(names)}"
    if not traffic.stamps:
        findings.error("unreadable", traffic.topic, found, JOINTS_FIX)
    else:
        findings.warning("other joints", traffic.topic, found, "nothing to do if they belong to a base or another arm")


def _check_missing(watch: InputWatch, findings: Findings) -> None:
    """Joints that never came on a topic from which others came."""
    for topic, traffic in watch.states.items():
        missing = [
            s.name for m, s in enumerate(watch.expected.signals) if s.topic == topic and not len(watch.signal(m)[0])
        ]
        came = sorted({name for names in watch.orders[topic] for name in names})
        if missing and traffic.stamps:
            findings.error(
                "unreadable", topic, f"{', '.join(missing)} missing among {', '.join(came)} in all messages", JOINTS_FIX
            )


def _refusal_fix(reason: str) -> str:
    for sign, fix in (
        ("degrees", "publish radians (and metres), as REP 103 says"),
        ("more than once", "let one program publish each joint"),
        ("as in training", "make the unit, zero and sign of this joint those of the training data"),
        ("jpeg", "check the camera's cable and driver, and lower its rate or quality"),
        ("encoding", "set the camera driver to rgb8 or bgr8"),
    ):
        if sign in reason:
            return fix
    return "look at the publisher of this topic"


def camera_limit(watch: InputWatch, name: str) -> Limit:
    return Limit.of(f"cameras.{name}.max_age_s", watch.settings.camera(name).max_age_s, watch.settings)


def check_camera(watch: InputWatch, name: str, findings: Findings) -> None:
    """Rate, stamps and losses of a camera that has images."""
    settings, limit, traffic = watch.settings, camera_limit(watch, name), watch.cameras[name]
    if not watch.expected.optional_cameras[name]:  # without an optional camera's image the node goes on
        check_period(watch, traffic, limit, findings)
    check_stamps(watch, traffic, limit, findings)
    if len(traffic.encodings) > 1:
        findings.warning(
            "encoding",
            traffic.topic,
            f"images come in {', '.join(sorted(traffic.encodings))}",
            "colours are right in each, but something reconfigures the camera, or two drivers publish here",
        )
    every_s = period_s(traffic.received)
    if every_s is None:
        return
    if 1.0 / every_s < settings.rate_hz * (1.0 - LOSS):
        findings.warning(
            "camera rate",
            traffic.topic,
            f"{1.0 / every_s:.1f} images per second, fewer than rate_hz ({settings.rate_hz:g})",
            "raise the camera's rate, or lower rate_hz",
        )
    lost = _lost(traffic.received if settings.use_receive_time else traffic.stamps)
    if lost > LOSS:
        findings.error("image loss", traffic.topic, f"{100 * lost:.0f} % of the images are missing", PROFILE_FIX)


def _check_joint_rate(watch: InputWatch, part: Traffic, findings: Findings) -> None:
    settings, every_s = watch.settings, period_s(part.received)
    if every_s is not None and 1.0 / every_s < settings.rate_hz:
        findings.error(
            "joint rate",
            part.topic,
            f"{1.0 / every_s:.1f} joint states per second, fewer than rate_hz ({settings.rate_hz:g})",
            "raise the rate of joint_state_broadcaster (controller_manager's update_rate)",
        )


def _check_order(watch: InputWatch, topic: str, findings: Findings) -> None:
    """The same joints in two orders: the node finds them by name, but two programs may have sent them."""
    orders = [names for names, _ in watch.orders[topic].most_common()]
    for first, second in combinations(orders, 2):
        if set(first) == set(second):
            findings.warning(
                "joint order",
                topic,
                f"names change: {', '.join(first)}; then {', '.join(second)}",
                "joints are found by name, in any order; but let one program publish them",
            )
            return


def _check_joint(watch: InputWatch, m: int, value_N: NDArray[np.float64], findings: Findings) -> None:
    """One signal of a joint against its limits, and against the range of training."""
    settings, joint = watch.settings, watch.expected.signals[m]
    own = settings.limits.of(joint.name)
    lower, upper = joint.lower, joint.upper
    if joint.field == "position":
        lower, upper = max(lower, own.lower), min(upper, own.upper)
    low, high = float(value_N.min()), float(value_N.max())
    tolerance = settings.limits.position_margin * (joint.upper - joint.lower)
    if low < lower - tolerance or high > upper + tolerance:
        findings.error(
            "limits",
            joint.name,
            f"was at {low:.3f} to {high:.3f} {joint.unit}, commands may only go from {lower:.3f} to {upper:.3f}",
            f"correct limits.joints.{joint.name}, or the joint's zero; the arm cannot be held where it is",
        )
    if m not in watch.expected.trained:
        return
    trained_low, trained_high = watch.expected.trained[m]
    middle = np.array([(trained_low + trained_high) / 2.0])
    trained_N = nearest_turn(value_N[:, None], middle, continuous([joint]))[:, 0]
    outside = float(((trained_N < trained_low) | (trained_N > trained_high)).mean())
    if outside > 0.5:
        findings.warning(
            "trained range",
            joint.name,
            f"was outside the range of training ({trained_low:.3f} to {trained_high:.3f} {joint.unit}) "
            f"{100 * outside:.0f} % of the time",
            "compare this joint's zero, sign and unit with the training data's; or train on data from here",
        )


def _check_speed(
    watch: InputWatch, m: int, times: NDArray[np.int64], value_N: NDArray[np.float64], findings: Findings
) -> None:
    """Compares a joint's speed, over at least 50 ms, with the limit of commands."""
    limits, joint = watch.settings.limits, watch.expected.signals[m]
    later = np.searchsorted(times, times + NS_PER_S // 20)
    first = np.flatnonzero(later < len(times))
    last = later[first]
    elapsed_N = (times[last] - times[first]) / NS_PER_S
    usable = elapsed_N < 0.2
    if not usable.any():
        return
    speed_N = np.abs(value_N[last] - value_N[first])[usable] / elapsed_N[usable]
    # Not the maximum: an arm that is put back by hand or simulator jumps.
    fast = float(np.percentile(speed_N, 95))
    limit = min(joint.max_velocity * limits.velocity_scale, limits.of(joint.name).velocity)
    if fast > limit * limits.max_overspeed:
        findings.warning(
            "limits",
            joint.name,
            f"moved at {fast:.3f} {joint.unit}/s (95th percentile), commands may use {limit:.3f}",
            "chunks that go on like this are refused: raise limits.velocity_scale or this joint's own limit",
        )


def _check_command_type(watch: InputWatch, findings: Findings) -> None:
    for output in watch.outputs.values():
        traffic = watch.commands.get(output.topic)
        for kind in traffic.kinds if traffic is not None else ():
            if kind != output.type:
                findings.error(
                    "type",
                    output.topic,
                    f"commands are {kind}, publish_mode {watch.settings.publish_mode} sends {output.type}",
                    "set publish_mode (stream for forward_command_controller), or command_topic",
                )


def _check_direction(watch: InputWatch, findings: Findings) -> None:
    """Compares where each joint was told to be with where it was at that time."""
    told = [(m, rows.arrays(), place) for (_, index), rows in watch.told.items() for place, m in enumerate(index)]
    for m, (due, wanted_NJ), j in told:
        joint, (times, position_N) = watch.expected.signals[m], watch.signal(m)
        if len(due) < 10 or len(times) < 10:
            continue
        inside = (due >= times[0]) & (due <= times[-1])
        was_N = np.interp(due[inside], times, position_N)
        wanted_N = nearest_turn(wanted_NJ[inside, j, None], was_N[:, None], continuous([joint]))[:, 0]
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
                "flip the sign in the controller or in the joint state publisher, so that both count the same way",
            )


def _lost(times: object) -> float:
    """Share of the messages that are missing between others.

    Gaps are measured in the shortest usual one, so that a loss of every second message shows. Longer ones than STALL_S,
    or than ten of those, are a stall or a pause between two episodes, not a loss.
    """
    steps = np.diff(np.sort(np.array(times, dtype=np.int64)))
    steps = steps[steps > 0]
    if len(steps) < 10:
        return 0.0
    usual = float(np.percentile(steps, 10))
    periods = np.round(steps.astype(np.float64) / usual)
    periods = periods[periods <= np.clip(STALL_S * NS_PER_S / usual, 2.0, 10.0)]
    return float(1.0 - len(periods) / periods.sum())
