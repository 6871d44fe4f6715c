"""Limits from a URDF: the tighter ones count, and what cannot be read as a limit is refused and named."""

from __future__ import annotations

import math
import time

import pytest

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot import UrdfJoint, read_urdf

LIMIT = '<limit lower="-1.5" upper="3" velocity="0.8" effort="nonsense"/>'


def arm(inside: str = LIMIT, kind: str = "revolute", around: str = "{}") -> str:
    return around.format(f'<robot name="r"><joint name="arm" type="{kind}">{inside}</joint></robot>')


@pytest.mark.parametrize(
    "urdf, expected",
    [
        (arm(), UrdfJoint(-1.5, 3.0, 0.8, False)),
        (arm('<limit lower=" -1e0 " upper=".5" velocity="inf"/>'), UrdfJoint(-1.0, 0.5, math.inf, False)),
        (arm('<limit lower="-1" upper="1"/>'), UrdfJoint(-1.0, 1.0, math.inf, False)),
        (arm('<limit upper="1" velocity="1"/>'), UrdfJoint(0.0, 1.0, 1.0, False)),
        # The tighter of hard and soft limits, on each side; one that is not given is none.
        (
            arm(LIMIT + '<safety_controller soft_lower_limit="-1.2" soft_upper_limit="4" k_velocity="10"/>'),
            UrdfJoint(-1.2, 3.0, 0.8, False),
        ),
        (arm(LIMIT + '<safety_controller soft_upper_limit="2.5"/>'), UrdfJoint(-1.5, 2.5, 0.8, False)),
        (arm(LIMIT + '<safety_controller k_velocity="nan"/>'), UrdfJoint(-1.5, 3.0, 0.8, False)),
        (arm('<mimic joint="other" multiplier="2"/>' + LIMIT), UrdfJoint(-1.5, 3.0, 0.8, False)),
        # A joint that turns without end has no position limits, whatever is written there.
        (arm(LIMIT + '<safety_controller k_velocity="1"/>', "continuous"), UrdfJoint(-math.inf, math.inf, 0.8, True)),
        (arm("", "continuous"), UrdfJoint(-math.inf, math.inf, math.inf, True)),
        # A default namespace, and joints of the same name that are not the robot's own.
        (arm().replace("<robot", '<robot xmlns="http://example.org/urdf"'), UrdfJoint(-1.5, 3.0, 0.8, False)),
        (
            arm().replace("</robot>", '<transmission name="t"><joint name="arm"/></transmission></robot>'),
            UrdfJoint(-1.5, 3.0, 0.8, False),
        ),
    ],
)
def test_the_tighter_limit_counts(urdf: str, expected: UrdfJoint) -> None:
    assert read_urdf(urdf, ["arm", "gripper"]) == {"arm": expected}


def velocity(text: str) -> str:
    return arm(f'<limit lower="-1" upper="1" velocity="{text}"/>')


@pytest.mark.parametrize(
    "urdf, fault",
    [
        *((velocity(text), "joint 'arm': expected a number as velocity, got") for text in ("nan", "", "fast", "1,5")),
        *((velocity(text), "joint 'arm': expected a number as velocity, got") for text in ("1_0", "0x1", "٣", "1 2")),
        *((velocity(text), "joint 'arm': expected a number as velocity, got") for text in ("1e400", "Infinity", "1d0")),
        (arm('<limit lower="-1e400" upper="1" velocity="1"/>'), "expected a number as lower, got '-1e400'"),
        (arm(LIMIT + LIMIT.replace("3", "2")), "joint 'arm': expected <limit> once, got it 2 times"),
        (arm(LIMIT + "<safety_controller/>" * 3), "expected <safety_controller> once, got it 3 times"),
        (velocity("${speed}"), "got '${speed}'; expand it with xacro first"),
        (velocity("0"), "joint 'arm': expected velocity > 0, got 0"),
        (velocity("-1"), "joint 'arm': expected velocity > 0, got -1"),
        (arm('<limit lower="low" upper="1" velocity="1"/>'), "expected a number as lower, got 'low'"),
        (arm('<limit lower="-1" upper="nan" velocity="1"/>'), "expected a number as upper, got 'nan'"),
        (arm('<limit lower="1" upper="-1" velocity="1"/>'), "joint 'arm': expected lower < upper, got 1 and -1"),
        (arm('<limit velocity="1"/>'), "joint 'arm': expected lower < upper, got 0 and 0"),
        (arm(LIMIT + '<safety_controller soft_lower_limit="x"/>'), "expected a number as soft_lower_limit, got 'x'"),
        (
            arm(LIMIT + '<safety_controller soft_lower_limit="5" soft_upper_limit="2"/>'),
            "joint 'arm': expected lower < upper, got 5 and 2",
        ),
        (arm(""), "joint 'arm': expected <limit>, which a revolute joint must have, got none"),
        (arm(kind="fixed"), "joint 'arm': expected type revolute, prismatic or continuous, got 'fixed'"),
        (arm().replace(' type="revolute"', ""), "expected type revolute, prismatic or continuous, got ''"),
        (arm().replace("</robot>", '<joint name="arm" type="fixed"/></robot>'), "expected it once, got it twice"),
        (arm().replace("arm", "arms"), "expected joints arm, gripper, got arms; is it this robot's?; did you mean"),
        ("<robot/>", "expected joints arm, gripper, got none"),
        ("<robot>", "expected a URDF, got no element found"),
        ("/opt/arm.urdf", "in '/opt/arm.urdf'; give its content, not its path"),
        ("\ud800", "expected a URDF"),
        ('<sdf><joint name="arm"/></sdf>', "expected a URDF, whose root is <robot>, got <sdf>"),
        ('<robot xmlns:xacro="http://www.ros.org/wiki/xacro"><xacro:macro/></robot>', "got xacro (<xacro:macro>)"),
        (arm().replace("<robot", "<xacro:arm/><robot"), "expected a URDF, got unbound prefix"),
        ("<robot>" + " " * 10_000_000 + "</robot>", "expected at most 10000000 characters, got 10000015"),
    ],
)  # fmt: skip
def test_what_is_no_limit_is_refused_and_named(urdf: str, fault: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        read_urdf(urdf, ["arm", "gripper"])
    assert str(refused.value).startswith("parameter 'robot_description': ") and fault in str(refused.value)


def test_entities_are_refused_before_they_expand() -> None:
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))
    urdf = f'<!DOCTYPE robot [<!ENTITY l0 "lol">{laughs}]>' + arm("&l11;")
    began_s = time.monotonic()
    with pytest.raises(ConfigurationError, match="expected no document type and no entities"):
        read_urdf(urdf, ["arm"])
    assert time.monotonic() - began_s < 1.0


def test_depth_is_no_danger() -> None:
    deep = 300_000
    assert read_urdf(arm("<x>" * deep + "</x>" * deep + LIMIT), ["arm"]) == {"arm": UrdfJoint(-1.5, 3.0, 0.8, False)}


def test_nothing_is_said_without_a_urdf() -> None:
    assert read_urdf("", ["arm"]) == {}
