"""Quality of service: one profile for each kind of topic, and for readers that must not miss a message."""

from __future__ import annotations

from typing import Final

from rclpy.qos import DurabilityPolicy, QoSPolicyKind, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rclpy.qos_overriding_options import QoSOverridingOptions

# Images and joint states. A subscription with it fits every publisher. A late image is not sent again: the next one
# comes soon.
SENSOR: Final = qos_profile_sensor_data
# Commands, instructions, stops and diagnostics: each must arrive, and none may reach a node that subscribes later. Ten
# can wait while a reader is busy; a controller follows the newest command anyway.
EVENT: Final = QoSProfile(depth=10)
# Values that hold until they change (session, status): a node that subscribes later gets the last message. Only that
# one counts, so none before it is kept.
LATCHED: Final = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
# For a reader that must miss nothing (recorder, demo, bench) although the disk or a busy processor may stop it for a
# while: fifty seconds of ticks at 10 Hz, or five of joint states at 100 Hz.
EVERYTHING: Final = QoSProfile(depth=500)
# The same for what sensors send without waiting for anyone. An image takes a megabyte, so only ten of those.
EVERY_READING: Final = QoSProfile(depth=500, reliability=ReliabilityPolicy.BEST_EFFORT)
EVERY_IMAGE: Final = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)

# What the parameters qos_overrides.TOPIC.publisher.POLICY may change of a topic (settings/names.py checks the values).
# Give rclpy a copy of the profile with it: rclpy writes the overrides into the profile.
OVERRIDABLE: Final = QoSOverridingOptions(
    (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)
)
