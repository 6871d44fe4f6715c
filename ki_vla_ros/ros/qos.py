"""How messages travel: one profile for each kind of topic, and for those who must miss none."""

from __future__ import annotations

from typing import Final

from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data

# Images and joint states. As a reader it fits every publisher, and an image that is late is worth nothing: the next one
# comes soon.
SENSOR: Final = qos_profile_sensor_data
# Commands, instructions, stops and diagnostics: each must arrive, and none may reach someone who subscribes later. Ten
# wait where a reader is busy for a moment; of commands a controller follows the newest anyway.
EVENT: Final = QoSProfile(depth=10)
# What is so until it changes (session, status): whoever subscribes later gets the last message. Only that one counts,
# so none before it is kept.
LATCHED: Final = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
# For a reader that must miss nothing (recorder, demo, bench), though it may be stopped by the disk or by a busy
# processor: so many are fifty seconds of ticks at 10 Hz, or five of joint states at 100 Hz.
EVERYTHING: Final = QoSProfile(depth=500)
# The same of what sensors send without waiting for anyone. An image takes a megabyte: ten of them, no more.
EVERY_READING: Final = QoSProfile(depth=500, reliability=ReliabilityPolicy.BEST_EFFORT)
EVERY_IMAGE: Final = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)
