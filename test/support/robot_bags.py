"""Recordings of robots that are not the demo's: each made as that robot's drivers make them, with what is true of it.

`SHAPES[name]` has the robot file, the messages and the true state and action of a frame, in the dataset's units.
Legend: S state, D action.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import yaml

from ki_vla_ros.messages.decoding import BagMessage, typestore
from ki_vla_ros.messages.type_names import COMPRESSED_IMAGE, IMAGE, JOINT_STATE
from ki_vla_ros.records import NS_PER_S
from support.sample_bags import START_NS, Messages, header, image, jpeg, serialize, text

TASK = "put the cup on the plate"
SECONDS, MS = 1.2, 1_000_000
TRAJECTORY, ARRAY = "trajectory_msgs/msg/JointTrajectory", "std_msgs/msg/Float64MultiArray"
TWIST, TWIST_STAMPED, POSE = (
    "geometry_msgs/msg/Twist",
    "geometry_msgs/msg/TwistStamped",
    "geometry_msgs/msg/PoseStamped",
)
CAMERA = "/camera/color/image_raw"
Motion = Callable[[float], np.ndarray]
_T = typestore().types
_DEG = np.pi / 180.0


# --- messages


def at(topic: str, kind: str, time_s: float, data: Callable[[int], bytes], late_ms: float = 2.0) -> BagMessage:
    """A message stamped `time_s` after the start, and logged a little later."""
    stamp_ns = START_NS + round(time_s * NS_PER_S)
    return BagMessage(topic, kind, stamp_ns + round(late_ms * MS), data(stamp_ns))


def times(rate_hz: float, first_s: float = 0.0, seconds: float = SECONDS) -> list[float]:
    return [first_s + k / rate_hz for k in range(int((seconds - first_s) * rate_hz))]


def cameras(*topics: str, seconds: float = SECONDS) -> Messages:
    found = []
    for topic in topics or (CAMERA,):
        kind, data = (COMPRESSED_IMAGE, jpeg) if topic.endswith("/compressed") else (IMAGE, image)
        found += [at(topic, kind, t, data) for t in times(20, seconds=seconds)]
    return [*found, BagMessage("/policy/instruction", "std_msgs/msg/String", START_NS - 1, text(TASK))]


def joints(
    topic: str,
    names: Sequence[str],
    position: Motion | None,
    rate_hz: float = 100.0,
    velocity: Motion | None = None,
    seconds: float = SECONDS,
) -> Messages:
    def state(time_s: float) -> Callable[[int], bytes]:
        none = np.zeros(0)
        fields = {
            "name": list(names),
            "position": none if position is None else np.array(position(time_s)),
            "velocity": none if velocity is None else np.array(velocity(time_s)),
            "effort": none,
        }
        return lambda stamp_ns: serialize(_T[JOINT_STATE](header=header(stamp_ns), **fields), JOINT_STATE)

    return [at(topic, JOINT_STATE, t, state(t)) for t in times(rate_hz, seconds=seconds)]


def trajectories(
    topic: str, names: Sequence[str], target: Motion, rate_hz: float, after_s: float = 0.0, first_s: float = 0.0
) -> Messages:
    """Trajectories of one point, due `after_s` after they come; stamp 0."""

    def command(time_s: float) -> Callable[[int], bytes]:
        none, ns = np.zeros(0), round(after_s * NS_PER_S)
        duration = _T["builtin_interfaces/msg/Duration"](sec=ns // NS_PER_S, nanosec=ns % NS_PER_S)
        fields = {"velocities": none, "accelerations": none, "effort": none, "time_from_start": duration}
        point = _T["trajectory_msgs/msg/JointTrajectoryPoint"](positions=np.array(target(time_s)), **fields)
        content = _T[TRAJECTORY](header=header(0), joint_names=list(names), points=[point])
        return lambda _: serialize(content, TRAJECTORY)

    return [at(topic, TRAJECTORY, t, command(t), late_ms=0) for t in times(rate_hz, first_s)]


def arrays(topic: str, value: Motion, rate_hz: float, first_s: float = 0.0, seconds: float = SECONDS) -> Messages:
    layout = _T["std_msgs/msg/MultiArrayLayout"](dim=[], data_offset=0)

    def command(time_s: float) -> Callable[[int], bytes]:
        return lambda _: serialize(_T[ARRAY](layout=layout, data=np.array(value(time_s))), ARRAY)

    return [at(topic, ARRAY, t, command(t), late_ms=0) for t in times(rate_hz, first_s, seconds)]


def twists(topic: str, kind: str, value: Motion, rate_hz: float) -> Messages:
    """vx, vy, vz, wx, wy, wz."""

    def command(time_s: float) -> Callable[[int], bytes]:
        value_6 = value(time_s).tolist()
        vectors = [_T["geometry_msgs/msg/Vector3"](*value_6[:3]), _T["geometry_msgs/msg/Vector3"](*value_6[3:])]
        twist = _T[TWIST](linear=vectors[0], angular=vectors[1])
        stamped = kind == TWIST_STAMPED
        return lambda ns: serialize(_T[kind](header=header(ns), twist=twist) if stamped else twist, kind)

    return [at(topic, kind, t, command(t), late_ms=0) for t in times(rate_hz)]


def poses(topic: str, value: Motion, rate_hz: float, late_ms: float = 2.0) -> Messages:
    """x, y, z, qx, qy, qz, qw."""

    def pose(time_s: float) -> Callable[[int], bytes]:
        value_7 = value(time_s).tolist()
        content = _T["geometry_msgs/msg/Pose"](
            position=_T["geometry_msgs/msg/Point"](*value_7[:3]),
            orientation=_T["geometry_msgs/msg/Quaternion"](*value_7[3:]),
        )
        return lambda ns: serialize(_T[POSE](header=header(ns), pose=content), POSE)

    return [at(topic, POSE, t, pose(t), late_ms) for t in times(rate_hz)]


def sort(*parts: Messages) -> Messages:
    return sorted((message for part in parts for message in part), key=lambda message: message.log_ns)


# --- motions


def wave(count: int, size: float = 0.3, middle: Sequence[float] | float = 0.0, phase: float = 0.0) -> Motion:
    """Slow and smooth: between two readings a line is right to 1e-4."""
    return lambda t: np.asarray(middle) + size * np.sin(1.3 * t + phase + 0.7 * np.arange(count))


def held(value: Motion, rate_hz: float, first_s: float = 0.0) -> Motion:
    """What was sent last, of what is sent `rate_hz` times per second."""
    return lambda t: value(first_s + np.floor((t - first_s) * rate_hz + 1e-6) / rate_hz)


def join(*motions: Motion) -> Motion:
    return lambda t: np.concatenate([np.atleast_1d(motion(t)) for motion in motions])


def turning(t: float) -> np.ndarray:
    """x, y, z and a quaternion that turns about an axis that is none of the frame's."""
    axis, angle = np.array([0.6, 0.0, 0.8]), 0.4 * t + 0.3
    return np.concatenate([0.1 * np.array([t, -t, 2.0]), axis * np.sin(angle / 2), [np.cos(angle / 2)]])


# --- robot files


def joint_dimensions(names: Sequence[str], topic: str = "joint_states", **more: Any) -> list[dict[str, Any]]:
    source = {"topic": topic, **more.pop("source", {})}
    return [{"name": n, "kind": "joint_position", "unit": "rad", "source": source, **more} for n in names]


def joint_actions(names: Sequence[str], output: str, **more: Any) -> list[dict[str, Any]]:
    bounds = {"lower": -3.0, "upper": 3.0, "max_velocity": 3.0}
    return [{"name": n, "kind": "joint_position", "unit": "rad", **bounds, "output": output, **more} for n in names]


def robot_file(
    state: Sequence[Mapping[str, Any]], actions: Sequence[Mapping[str, Any]], outputs: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """`outputs`: (topic, type) or more, by name."""
    found = [
        {"name": name, **({"topic": o[0], "type": o[1]} if isinstance(o, tuple) else o)} for name, o in outputs.items()
    ]
    camera = {"name": "front", "topic": "camera/color/image_raw"}
    base = {"name": "robot", "cameras": [camera], "action_period_s": 0.1, "horizon": 8}
    return {**base, "state": list(state), "actions": list(actions), "outputs": found, **more}


@dataclass(frozen=True)
class Shape:
    """`state` and `action` are what is true `t` s after the start, for a frame of that stamp, to `within`.

    `known_s`: from when on actions are known. `said`: what the summary must say.
    """

    robot: Mapping[str, Any]
    messages: Messages
    state: Motion
    action: Motion
    actions: str = "commands"
    within: float = 2e-4
    known_s: float = 0.0
    storage: str = "mcap"
    said: str = ""

    @property
    def yaml(self) -> str:
        return yaml.safe_dump(dict(self.robot), sort_keys=False)


PERIOD = 0.1
UR = [f"{name}_joint" for name in ("shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3")]
KNUCKLE = "robotiq_85_left_knuckle_joint"
GRIPPER = {"kind": "gripper", "unit": "rad", "open": 0.0, "closed": 0.7929}


def later(motion: Motion) -> Motion:
    return lambda t: motion(t + PERIOD)


def shuffled(messages: Messages) -> Messages:
    """Images and joint states are logged up to 15 ms late, so that they come out of order."""
    rng, late = np.random.default_rng(1), (IMAGE, JOINT_STATE)
    return sort(
        [replace(m, log_ns=m.log_ns + int(rng.integers(0, 15)) * MS) if m.type in late else m for m in messages]
    )


def restamped(messages: Messages, stamp: Callable[[int], int], topics: Sequence[str] = ()) -> Messages:
    """The same with other stamps, on the given topics or on all."""
    found = []
    for message in messages:
        if message.type in (IMAGE, COMPRESSED_IMAGE, JOINT_STATE, POSE) and (not topics or message.topic in topics):
            sec, nanosec = np.frombuffer(message.data, "<i4", 2, 4).tolist()
            new = divmod(stamp(sec * NS_PER_S + nanosec), NS_PER_S)
            data = message.data[:4] + np.array(new, "<i4").tobytes() + message.data[12:]
            message = replace(message, data=data)
        found.append(message)
    return found


def _ur5e() -> Shape:
    """The arm's joint states and the gripper's come in messages of their own, on one topic; two controllers."""
    arm, fingers = wave(6), wave(1, 0.2, 0.4)
    arm_told, fingers_told = wave(6, phase=0.2), wave(1, 0.2, 0.4, 0.5)
    state = [*joint_dimensions(UR), {"name": "gripper", **GRIPPER, "source": {"joint": KNUCKLE}}]
    gripper = {"name": "gripper", **GRIPPER, "joint": KNUCKLE, "state": "gripper", "max_velocity": 2.0}
    actions = [*joint_actions(UR, "arm"), {**gripper, "output": "gripper", "dataset": {"open": 1, "closed": 0}}]
    topics = "scaled_joint_trajectory_controller/joint_trajectory", "robotiq_controller/joint_trajectory"
    messages = sort(
        cameras(),
        joints("/joint_states", UR[::-1], lambda t: arm(t)[::-1], 125.0),
        joints("/joint_states", [KNUCKLE], fingers, 30.0),
        trajectories("/" + topics[0], UR, arm_told, 100.0),
        trajectories("/" + topics[1], [KNUCKLE], fingers_told, 50.0),
    )
    outputs = {"arm": (topics[0], TRAJECTORY), "gripper": (topics[1], TRAJECTORY)}
    told = join(later(held(arm_told, 100)), lambda t: 1 - later(held(fingers_told, 50))(t) / 0.7929)
    return Shape(robot_file(state, actions, outputs), messages, join(arm, fingers), told)


PANDA = [f"fr3_joint{i}" for i in range(1, 8)]


def _franka() -> Shape:
    """A stream of points at 50 Hz, each due 100 ms after it comes: none is reached, so the arm lags behind them."""
    arm, target = wave(7, phase=-0.1), wave(7)
    first_s = 0.2
    place, knots = arm(first_s - 0.01), []  # the newest reading that has come by then
    for t in times(50, first_s):
        knots.append(place)
        place = place + 0.2 * (target(t) - place)
    told_at = np.array(times(50, first_s))

    def told(t: float) -> np.ndarray:
        k = int(np.searchsorted(told_at, t + PERIOD + 1e-9)) - 1
        return knots[k] + (t + PERIOD - told_at[k]) / 0.1 * (target(told_at[k]) - knots[k])

    messages = sort(
        cameras(),
        joints("/joint_states", PANDA, arm),
        trajectories("/servo/joint_trajectory", PANDA, target, 50.0, 0.1, first_s),
    )
    robot = robot_file(
        joint_dimensions(PANDA), joint_actions(PANDA, "arm"), {"arm": ("servo/joint_trajectory", TRAJECTORY)}
    )
    return Shape(robot, messages, arm, told, known_s=first_s)


def _moveit_servo() -> Shape:
    arm = wave(6)

    def velocity(t: float) -> np.ndarray:
        return np.array([0.1 * np.sin(t), 0.05, -0.1 * t, 0.2, 0.0, 0.3 * np.cos(2 * t)])

    parts = ("vx", "vy", "vz", "wx", "wy", "wz")
    actions = [{"name": p, "kind": "twist", "component": p, "max_velocity": 1.0, "output": "servo"} for p in parts]
    outputs = {"servo": {"topic": "servo_node/delta_twist_cmds", "type": TWIST_STAMPED, "frame_id": "base_link"}}
    messages = sort(
        cameras(),
        joints("/joint_states", UR, arm),
        twists("/servo_node/delta_twist_cmds", TWIST_STAMPED, velocity, 100.0),
    )
    robot = robot_file(joint_dimensions(UR), actions, outputs)
    return Shape(robot, messages, arm, later(held(velocity, 100)))


ALOHA = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate"]


def _aloha() -> Shape:
    """Two leaders say what two followers are to do; all four have the same names, and grippers of their own scale."""
    state, actions, parts, states, told = [], [], [cameras()], [], []
    for k, side in enumerate(("left", "right")):
        follower, leader = wave(7, 0.2, 0.3, k), wave(7, 0.2, 0.3, k + 0.1)
        names = [*ALOHA, "gripper"]
        parts += [
            joints(f"/follower_{side}/joint_states", names, follower),
            joints(f"/leader_{side}/joint_states", names, leader),
        ]
        topic = f"follower_{side}/joint_states"
        state += joint_dimensions([f"{side}_{n}" for n in ALOHA], topic)
        for d, name in zip(state[-6:], ALOHA, strict=True):
            d["source"] = {"topic": topic, "joint": name}
        grip = {"kind": "gripper", "unit": "m", "open": 0.058, "closed": 0.018}
        source = {"topic": topic, "joint": "gripper", "open": 1.4, "closed": -0.4}
        state.append({"name": f"{side}_gripper", **grip, "source": source, "dataset": {"open": 1, "closed": 0}})
        for name in ALOHA:
            recorded = {"topic": f"leader_{side}/joint_states", "joint": name}
            actions += joint_actions([f"{side}_{name}"], f"{side}_arm", joint=name, recorded=recorded)
            actions[-1]["joint"] = f"{side}_{name}"
        recorded = {"topic": f"leader_{side}/joint_states", "joint": "gripper", "open": 0.8, "closed": -0.2}
        gripper = {"name": f"{side}_gripper", **grip, "max_velocity": 1.0, "output": f"{side}_gripper"}
        actions.append({**gripper, "recorded": recorded, "dataset": {"open": 1, "closed": 0}})
        states.append(lambda t, f=follower: np.append(f(t)[:6], (f(t)[6] + 0.4) / 1.8))
        told.append(lambda t, f=leader: np.append(f(t + PERIOD)[:6], f(t + PERIOD)[6] + 0.2))
    outputs = {
        f"{side}_{part}": (f"follower_{side}/{part}_controller/joint_trajectory", TRAJECTORY)
        for side in ("left", "right")
        for part in ("arm", "gripper")
    }
    return Shape(robot_file(state, actions, outputs), sort(*parts), join(*states), join(*told))


SO101 = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll"]


def _so101() -> Shape:
    """Topics and dataset in degrees, the gripper in percent, LeRobot's names; a leader says the actions."""
    follower, leader = wave(6, 20.0, 30.0), wave(6, 20.0, 30.0, 0.1)
    deg, percent = {"unit": "deg"}, {"range": [0, 100]}
    limits = {"lower": -2.0, "upper": 2.0}
    grip = {"kind": "gripper", "unit": "rad", "open": 1.7, "closed": -0.17, "lower": -0.17, "upper": 1.7}
    state = [
        {"name": n, "kind": "joint_position", "unit": "rad", "source": deg, "dataset": {**deg, "name": f"{n}.pos"}}
        for n in SO101
    ]
    state.append({"name": "gripper", **grip, "source": percent, "dataset": {**percent, "name": "gripper.pos"}})
    actions = joint_actions(SO101, "arm", **limits)
    for a in actions:
        a |= {"dataset": {**deg, "name": f"{a['name']}.pos"}, "recorded": {"topic": "leader/joint_states", **deg}}
    recorded = {"topic": "leader/joint_states", **percent}
    more = {"max_velocity": 4.0, "output": "arm", "dataset": {**percent, "name": "gripper.pos"}}
    actions.append({"name": "gripper", **grip, **more, "recorded": recorded})
    names = [*SO101, "gripper"]
    messages = sort(cameras(), joints("/joint_states", names, follower), joints("/leader/joint_states", names, leader))
    outputs = {"arm": ("arm_controller/joint_trajectory", TRAJECTORY)}
    return Shape(robot_file(state, actions, outputs), messages, follower, later(leader), within=1e-2)


def _plain(**more: Any) -> Shape:
    """Seven joints under one controller, for recordings that are odd otherwise."""
    arm, told = wave(7), wave(7, phase=0.2)
    messages = sort(
        cameras(), joints("/joint_states", PANDA, arm), trajectories("/arm/joint_trajectory", PANDA, told, 100.0)
    )
    robot = robot_file(
        joint_dimensions(PANDA), joint_actions(PANDA, "arm"), {"arm": ("arm/joint_trajectory", TRAJECTORY)}
    )
    return replace(Shape(robot, messages, arm, later(held(told, 100))), **more)


def _turning_wrist() -> Shape:
    """The last joint turns without end; its angles are published, and commanded, from -pi to pi."""

    def arm(t: float) -> np.ndarray:
        return np.append(wave(6)(t), 2.9 + 0.8 * t)

    def wrapped(motion: Motion) -> Motion:
        return lambda t: np.append(motion(t)[:6], (motion(t)[6] + np.pi) % (2 * np.pi) - np.pi)

    def told(t: float) -> np.ndarray:
        return arm(t) + 0.05

    state, actions = joint_dimensions(PANDA), joint_actions(PANDA, "arm")
    state[6]["continuous"] = actions[6]["continuous"] = True
    del actions[6]["lower"], actions[6]["upper"]
    messages = sort(
        cameras(),
        joints("/joint_states", PANDA, wrapped(arm)),
        trajectories("/arm/joint_trajectory", PANDA, wrapped(told), 100.0),
    )
    robot = robot_file(state, actions, {"arm": ("arm/joint_trajectory", TRAJECTORY)})
    return Shape(robot, messages, arm, later(held(told, 100)))


def _mobile() -> Shape:
    """Wheels, which turn without end, and the arm in one joint state; the base takes Twist, the arm a trajectory."""
    arm, told = wave(7), wave(7, phase=0.2)
    wheels = ["wheel_left_joint", "wheel_right_joint"]

    def base(t: float) -> np.ndarray:
        return np.array([0.3 * np.cos(t), 0.0, 0.0, 0.0, 0.0, 0.2 * t])

    state = joint_dimensions(PANDA)
    actions = joint_actions(PANDA, "arm")
    for part in ("vx", "wz"):
        actions.append({"name": part, "kind": "twist", "component": part, "max_velocity": 1.0, "output": "base"})
    outputs = {"base": ("cmd_vel", TWIST), "arm": ("arm/joint_trajectory", TRAJECTORY)}
    messages = sort(
        cameras(),
        joints("/joint_states", [*wheels, *PANDA], lambda t: np.concatenate([[50 * t, -50 * t], arm(t)])),
        trajectories("/arm/joint_trajectory", PANDA, told, 100.0),
        twists("/cmd_vel", TWIST, base, 20.0),
    )
    action = join(later(held(told, 100)), lambda t: later(held(base, 20))(t)[[0, 5]])
    return Shape(robot_file(state, actions, outputs), messages, arm, action)


def _droid() -> Shape:
    """Joint velocities and a gripper as arrays; in the dataset the state is two columns, and velocities are a third."""
    arm, fingers = wave(7), wave(1, 0.2, 0.4)
    speed, grip = wave(7, 0.4, phase=1.0), wave(1, 0.2, 0.4, 0.3)
    state = joint_dimensions(PANDA)
    for k, d in enumerate(state):
        d["dataset"] = {"column": "joint_position", "index": k}
    state.append({"name": "gripper", **GRIPPER, "dataset": {"column": "gripper_position", "open": 0, "closed": 1}})
    actions = [
        {
            "name": f"velocity{k}",
            "kind": "joint_velocity",
            "joint": name,
            "unit": "rad/s",
            "max_velocity": 2.0,
            "output": "arm",
            "dataset": {"column": "actions", "index": k, "scale": 3.0},
        }
        for k, name in enumerate(PANDA)
    ]
    hand = {"name": "gripper", **GRIPPER, "binary": True, "max_velocity": 2.0, "output": "gripper"}
    actions.append({**hand, "dataset": {"column": "actions", "index": 7, "open": 0, "closed": 1}})
    outputs = {"arm": ("velocity_controller/commands", ARRAY), "gripper": ("gripper_controller/commands", ARRAY)}
    messages = sort(
        cameras(),
        joints("/joint_states", [*PANDA, "gripper"], join(arm, fingers)),
        arrays("/velocity_controller/commands", speed, 100.0),
        arrays("/gripper_controller/commands", grip, 25.0),
    )
    told = join(lambda t: later(held(speed, 100))(t) / 3.0, lambda t: later(held(grip, 25))(t) / 0.7929)
    truth = join(arm, lambda t: fingers(t) / 0.7929)
    return Shape(robot_file(state, actions, outputs), messages, truth, told)


def _hand_state(rotation: Sequence[str]) -> list[dict[str, Any]]:
    source = {"topic": "current_pose", "type": POSE}
    return [{"name": p, "kind": "pose", "component": p, "source": source} for p in ("x", "y", "z", *rotation)]


def _hand_outputs(topic: str = "target_pose") -> dict[str, Any]:
    box = {axis: [-2.0, 2.0] for axis in "xyz"}
    speeds = {"max_linear_velocity": 2.0, "max_angular_velocity": 4.0}
    return {"hand": {"topic": topic, "type": POSE, "workspace": box, **speeds}}


QUATERNION, VECTOR = ("qx", "qy", "qz", "qw"), ("rx", "ry", "rz")
SIX_D = ("r1", "r2", "r3", "r4", "r5", "r6")


def six_d(pose_7: np.ndarray) -> np.ndarray:
    """The first two columns of the rotation matrix, by Rodrigues' formula."""
    x, y, z, w = pose_7[3:]
    first = [1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)]
    second = [2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)]
    return np.array([*pose_7[:3], *first, *second])


def _cartesian() -> Shape:
    """A Cartesian controller is told poses; the policy sees a quaternion and says 6-D."""
    parts = ("x", "y", "z", *SIX_D)
    actions = [{"name": f"to_{p}", "kind": "pose", "component": p, "output": "hand"} for p in parts]
    messages = sort(
        cameras(), poses("/current_pose", turning, 100.0), poses("/target_pose", lambda t: turning(t + 0.3), 100.0, 0)
    )
    target = held(lambda t: turning(t + 0.3), 100)
    robot = robot_file(_hand_state(QUATERNION), actions, _hand_outputs())
    return Shape(robot, messages, turning, lambda t: six_d(target(t + PERIOD)))


def pointing_down(t: float) -> np.ndarray:
    """A tool that is turned by half a turn, now a little more, now a little less; its driver's w is never negative."""
    axis, angle = np.array([0.8, 0.6, 0.0]), np.pi + 0.4 * np.sin(3.0 * t + 1.0)
    quaternion = np.concatenate([axis * np.sin(angle / 2), [np.cos(angle / 2)]])
    return np.concatenate([[0.1 * t, 0.0, 0.2], quaternion if quaternion[3] >= 0.0 else -quaternion])


def _down() -> Shape:
    """Rotation vectors go on beyond half a turn, in the state and in the actions."""

    def written(pose_7: np.ndarray) -> np.ndarray:
        quaternion = pose_7[3:] * np.sign(pose_7[3])
        angle = 2.0 * np.arccos(quaternion[3])
        return np.concatenate([pose_7[:3], quaternion[:3] / np.sin(angle / 2) * angle])

    actions = [{"name": f"to_{p}", "kind": "pose", "component": p, "output": "hand"} for p in ("x", "y", "z", *VECTOR)]
    target: Motion = lambda t: pointing_down(t + 0.3)  # noqa: E731
    messages = sort(cameras(), poses("/current_pose", pointing_down, 100.0), poses("/target_pose", target, 100.0, 0))
    robot, told = robot_file(_hand_state(VECTOR), actions, _hand_outputs()), held(target, 100)
    return Shape(robot, messages, lambda t: written(pointing_down(t)), lambda t: written(told(t + PERIOD)), within=2e-3)


def _steps(actions: str) -> Shape:
    """LIBERO's: steps of the hand, in the dataset as shares of the largest; as commanded, or as measured."""
    scale = {**dict.fromkeys(("x", "y", "z"), 0.05), **dict.fromkeys(VECTOR, 0.5)}
    dimensions = [
        {"name": f"d{p}", "kind": "pose_delta", "component": p, "output": "hand", "dataset": {"scale": scale[p]}}
        for p in ("x", "y", "z", *VECTOR)
    ]
    # What is told goes faster than what the hand does.
    faster = 1.5 if actions == "commands" else 1.0
    target: Motion = lambda t: turning(1.5 * t + 0.3)  # noqa: E731
    told = held(target, 100) if actions == "commands" else turning
    messages = sort(cameras(), poses("/current_pose", turning, 100.0), poses("/target_pose", target, 100.0, 0))

    def step(t: float) -> np.ndarray:
        # It turns about one axis, by 0.4 rad per second.
        move = told(t + PERIOD)[:3] - told(t)[:3]
        return np.concatenate([move / 0.05, 0.4 * faster * PERIOD * np.array([0.6, 0.0, 0.8]) / 0.5])

    def state(t: float) -> np.ndarray:
        return np.concatenate([turning(t)[:3], (0.4 * t + 0.3) * np.array([0.6, 0.0, 0.8])])

    robot = robot_file(_hand_state(VECTOR), dimensions, _hand_outputs())
    return Shape(robot, messages, state, step, actions=actions, within=5e-3)


def _gripper_action() -> Shape:
    """The gripper takes goals of an action, which bags do not have: what it did counts."""
    arm, told, fingers = wave(6), wave(6, phase=0.2), wave(1, 0.2, 0.4)
    state = [*joint_dimensions(UR), {"name": KNUCKLE, **GRIPPER}]
    gripper = {"name": KNUCKLE, **GRIPPER, "max_velocity": 2.0, "output": "gripper", "recorded": {}}
    actions = [*joint_actions(UR, "arm"), gripper]
    outputs = {
        "arm": ("arm/joint_trajectory", TRAJECTORY),
        "gripper": ("gripper_controller/gripper_cmd", "control_msgs/action/GripperCommand"),
    }
    messages = sort(
        cameras(),
        joints("/joint_states", [*UR, KNUCKLE], join(arm, fingers)),
        trajectories("/arm/joint_trajectory", UR, told, 100.0),
    )
    action = join(later(held(told, 100)), later(fingers))
    return Shape(robot_file(state, actions, outputs), messages, join(arm, fingers), action)


def _speeds() -> Shape:
    """Speeds as state, from the field of that name; as actions, what they were on average over the period."""
    arm = wave(7)

    def speed(t: float) -> np.ndarray:
        return (arm(t + 1e-4) - arm(t - 1e-4)) / 2e-4

    state = [
        {"name": f"{n}_speed", "kind": "joint_velocity", "unit": "rad/s", "source": {"joint": n, "field": "velocity"}}
        for n in PANDA
    ]
    state += joint_dimensions(PANDA)
    actions = [
        {
            "name": f"{n}_speed",
            "kind": "joint_velocity",
            "joint": n,
            "unit": "rad/s",
            "max_velocity": 2.0,
            "output": "a",
        }
        for n in PANDA
    ]
    messages = sort(cameras(), joints("/joint_states", PANDA, arm, velocity=speed))
    robot = robot_file(state, actions, {"a": ("velocity_controller/commands", ARRAY)})
    mean: Motion = lambda t: (arm(t + PERIOD) - arm(t)) / PERIOD  # noqa: E731
    return Shape(robot, messages, join(speed, arm), mean, actions="states", within=2e-3)


def _two_arms() -> Shape:
    """Both arms in one joint state, and under a controller each; actions are in another order than the outputs."""
    names = [f"{side}/joint{i}" for side in ("left", "right") for i in range(1, 7)]
    arms, told = wave(12), wave(12, phase=0.2)
    actions = joint_actions(names[6:], "right") + joint_actions(names[:6], "left")
    outputs = {side: (f"{side}/forward_position_controller/commands", ARRAY) for side in ("left", "right")}
    messages = sort(
        cameras(),
        joints("/joint_states", names, arms),
        arrays("/left/forward_position_controller/commands", lambda t: told(t)[:6], 100.0),
        arrays("/right/forward_position_controller/commands", lambda t: told(t)[6:], 50.0),
    )
    action = join(lambda t: held(told, 50)(t + PERIOD)[6:], lambda t: held(told, 100)(t + PERIOD)[:6])
    return Shape(robot_file(joint_dimensions(names), actions, outputs), messages, arms, action)


def odd_jpeg(stamp_ns: int) -> bytes:
    pixels = np.full((45, 63, 3), stamp_ns // 10**7 % 251, dtype=np.uint8)
    return jpeg(stamp_ns, cv2.imencode(".jpg", pixels)[1].tobytes())


def depth_image(stamp_ns: int, encoding: str = "16UC1") -> bytes:
    fields = {"height": 32, "width": 32, "encoding": encoding, "is_bigendian": 0, "step": 64}
    return serialize(_T[IMAGE](header=header(stamp_ns), data=np.zeros(2048, np.uint8), **fields), IMAGE)


DEPTH = "/camera/depth/image_rect_raw"


BOOT_NS = START_NS - 4321 * NS_PER_S


def _since_boot() -> Shape:
    """All times are 2 ms later than they are: what the messages took is not known."""
    said = r"stamps are of another clock, 1789995679.002 s behind the log's, which is added to them"
    plain = _plain(said=said, within=3e-3)
    return replace(plain, messages=restamped(plain.messages, lambda ns: ns - BOOT_NS))


def _without_stamps() -> Shape:
    plain = _plain(said="/joint_states: stamps are zero: times of arrival count", within=3e-3)
    return replace(plain, messages=restamped(plain.messages, lambda _: 0, ["/joint_states"]))


def _with_depth() -> Shape:
    plain = _plain()
    return replace(plain, messages=sort(plain.messages, [at(DEPTH, IMAGE, t, depth_image) for t in times(20)]))


def _odd_jpegs() -> Shape:
    plain = _plain()
    odd = [at(f"{CAMERA}/compressed", COMPRESSED_IMAGE, t, odd_jpeg) for t in times(20)]
    return replace(plain, messages=sort([m for m in plain.messages if m.topic != CAMERA], odd))


def _out_of_order() -> Shape:
    plain = _plain()
    return replace(plain, messages=shuffled(plain.messages))


SHAPES: Mapping[str, Callable[[], Shape]] = {
    "UR5e and Robotiq": _ur5e,
    "Franka, servo": _franka,
    "MoveIt Servo": _moveit_servo,
    "ALOHA, leaders": _aloha,
    "SO-101, degrees": _so101,
    "since boot": _since_boot,
    "no stamps": _without_stamps,
    "depth and colour": _with_depth,
    "JPEG of odd size": _odd_jpegs,
    "wheels and arm": _mobile,
    "wrist without end": _turning_wrist,
    "DROID, velocities": _droid,
    "Cartesian": _cartesian,
    "pointing down": _down,
    "LIBERO, told": lambda: _steps("commands"),
    "LIBERO, measured": lambda: _steps("states"),
    "gripper action": _gripper_action,
    "speeds": _speeds,
    "two arms": _two_arms,
    "sqlite3": lambda: _plain(storage="sqlite3"),
    "out of order": _out_of_order,
}
