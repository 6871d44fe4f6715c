"""Topic names resolved without ROS are those that rclpy resolves."""

from __future__ import annotations

import pytest
from rclpy.exceptions import InvalidTopicNameException
from rclpy.expand_topic_name import expand_topic_name
from rclpy.validate_full_topic_name import validate_full_topic_name

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.settings.session import resolve

TOPICS = (
    "joint_states",
    "camera/scene/image_raw",
    "/joint_states",
    "/a/b_2/C",
    "~",
    "~/chunk",
    "~/a/b",
    "~chunk",
    "_x",
)
SUBSTITUTED = ("{node}/x", "{ns}/x", "{namespace}/x", "a_{node}", "/{node}/x", "~/{node}")
REFUSED = (
    "",
    "/",
    "x/",
    "/x/",
    "a//b",
    "a b",
    "a-b",
    "1x",
    "a/1x",
    "x/~",
    "~/~/x",
    "{bad}",
    "{node",
    "ä",
    "x\n",
    "~chunk",
)


def by_ros(topic: str, namespace: str) -> str | None:
    """The name that rclpy resolves; None if it refuses."""
    try:
        full = expand_topic_name(topic, "policy", namespace)
        return full if validate_full_topic_name(full) else None
    except (ValueError, InvalidTopicNameException):
        return None


@pytest.mark.parametrize("namespace", ["/", "/left", "/cell_1/left"])
@pytest.mark.parametrize("topic", TOPICS + SUBSTITUTED + REFUSED)
def test_a_name_is_resolved_or_refused_as_by_rclpy(topic: str, namespace: str) -> None:
    node = f"{namespace.rstrip('/')}/policy"
    expected = by_ros(topic, namespace)
    if topic not in SUBSTITUTED:  # in the root namespace `{ns}/x` begins with two slashes, which ROS refuses
        assert (expected is None) == (topic in REFUSED)
    if expected is None:
        with pytest.raises(ConfigurationError, match="expected a ROS name"):
            resolve(topic, node)
    else:
        assert resolve(topic, node) == expected
