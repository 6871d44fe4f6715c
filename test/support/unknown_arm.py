"""A bag of an arm that nobody here has a robot file of: seven joints, and a gripper with its own controller.

python -m support.unknown_arm FOLDER     (in test/) writes the bag, and arm.urdf beside it
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ki_vla_ros.messages import BagMessage, typestore
from ki_vla_ros.records import NS_PER_S
from support.sample_bags import (
    JOINT_STATE,
    START_NS,
    STRING,
    TRAJECTORY,
    Messages,
    command,
    header,
    joint_state,
    jpeg,
    serialize,
    text,
    write_bag,
)

ARM = tuple(f"iiwa_joint_{j}" for j in range(1, 8))
FINGER = "gripper_finger_joint"
LIMITS = (2.96, 2.09, 2.96, 2.09, 2.96, 2.09, 3.05)
ARRAY = "std_msgs/msg/Float64MultiArray"
IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
ARM_TOPIC, FRONT, WRIST = "/arm_controller/joint_trajectory", "/front_camera/color/image_raw", "/wrist/image_raw"


def place(time_s: float) -> np.ndarray:
    """Of the arm [7], in rad."""
    return 0.6 * np.sin(1.5 * time_s + np.arange(7)) + 0.1 * np.arange(7)


def opening(time_s: float) -> float:
    """Of the gripper, in m: it begins open."""
    return float(0.02 + 0.02 * np.cos(2.0 * time_s))


def urdf() -> str:
    joints = [
        f'<joint name="{name}" type="revolute"><limit lower="-{most}" upper="{most}" velocity="1.7"/></joint>'
        for name, most in zip(ARM, LIMITS, strict=True)
    ]
    joints.append(f'<joint name="{FINGER}" type="prismatic"><limit lower="0" upper="0.04" velocity="0.1"/></joint>')
    mimic = f'<limit lower="0" upper="0.04" velocity="0.1"/><mimic joint="{FINGER}"/>'
    joints.append(f'<joint name="other_finger_joint" type="prismatic">{mimic}</joint>')
    return f'<robot name="iiwa7">{"".join(joints)}</robot>'


def array(values: np.ndarray) -> bytes:
    types = typestore().types
    layout: Any = types["std_msgs/msg/MultiArrayLayout"](dim=[], data_offset=0)
    return serialize(types[ARRAY](layout=layout, data=np.asarray(values, dtype=np.float64)), ARRAY)


def recording(seconds: float = 4.0, *, degrees: bool = False, mirrored: bool = False, arrays: bool = False) -> Messages:
    """Joint states in parts, 50 Hz; commands of the arm 25 Hz, of the gripper 10 Hz; two cameras, 20 Hz.

    `arrays`: the gripper is commanded by a Float64MultiArray; `mirrored`: its state says closed for open.
    """
    found: Messages = [BagMessage("/task", STRING, START_NS, text("put the cup on the shelf"))]
    unit = np.degrees(1.0) if degrees else 1.0
    for k in range(round(seconds * 50)):
        at_ns, t = START_NS + k * NS_PER_S // 50, k / 50
        finger = 0.04 - opening(t) if mirrored else opening(t)
        found.append(BagMessage("/joint_states", JOINT_STATE, at_ns, joint_state(at_ns, unit * place(t), ARM)))
        parts = joint_state(at_ns, np.array([finger, finger]), (FINGER, "other_finger_joint"))
        found.append(BagMessage("/gripper/joint_states", JOINT_STATE, at_ns + 1_000_000, parts))
    for k in range(round(seconds * 25)):
        at_ns, t = START_NS + k * NS_PER_S // 25, k / 25
        found.append(BagMessage(ARM_TOPIC, TRAJECTORY, at_ns, command(place(t + 0.1), ARM)))
    for k in range(round(seconds * 10)):
        at_ns, wanted = START_NS + k * NS_PER_S // 10, np.array([opening(k / 10 + 0.1)])
        if arrays:
            found.append(BagMessage("/gripper_controller/commands", ARRAY, at_ns, array(wanted)))
        else:
            sent = command(wanted, (FINGER,))
            found.append(BagMessage("/gripper_controller/joint_trajectory", TRAJECTORY, at_ns, sent))
    for k in range(round(seconds * 20)):
        at_ns = START_NS + k * NS_PER_S // 20
        grey = np.full((32, 32, 3), 60 + k % 150, dtype=np.uint8)
        packed = jpeg(at_ns, cv2.imencode(".jpg", grey)[1].tobytes())
        found.append(BagMessage(FRONT, IMAGE, at_ns + 2_000_000, raw(at_ns, "rgb8", grey)))
        found.append(BagMessage(f"{WRIST}/compressed", COMPRESSED, at_ns + 3_000_000, packed))
    return sorted(found, key=lambda message: message.log_ns)


def raw(stamp_ns: int, encoding: str, pixels: np.ndarray) -> bytes:
    height, width = pixels.shape[:2]
    data = pixels.view(np.uint8).reshape(-1)
    fields = {"height": height, "width": width, "encoding": encoding, "is_bigendian": 0, "step": len(data) // height}
    return serialize(typestore().types[IMAGE](header=header(stamp_ns), data=data, **fields), IMAGE)


def depth(stamp_ns: int) -> bytes:
    """A depth image, which no policy here takes."""
    return raw(stamp_ns, "16UC1", np.zeros((4, 4), dtype=np.uint16))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write_bag(folder / "bag", recording(20.0))
    (folder / "arm.urdf").write_text(urdf())
