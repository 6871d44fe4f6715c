"""The policy node on rclpy without the names that it has gained since ROS 2 Humble (rclpy 3.3)."""

from __future__ import annotations

import sys

import rclpy.executors
import rclpy.lifecycle
import rclpy.node
import rclpy.qos_event  # Humble's name; here it needs event_handler, so it comes first

GAINED = ("rclpy.event_handler", "rclpy.experimental", "rclpy.experimental.events_executor", "rclpy.clock_type")
sys.modules.update(dict.fromkeys(GAINED))  # type: ignore[arg-type]  # None: importing one raises ImportError
del rclpy.node.Node.add_post_set_parameters_callback

from ki_vla_ros.ros import node  # noqa: E402
from ki_vla_ros.ros.releases import make_executor  # noqa: E402

if __name__ == "__main__":
    rclpy.init()
    assert type(make_executor()) is rclpy.executors.SingleThreadedExecutor
    rclpy.shutdown()
    sys.exit(node.main())
