"""What rclpy of older ROS 2 releases has by other names, or not at all.

Humble has rclpy 3.3, Jazzy 7.1, Kilted 9.1. Everything else that this package takes from rclpy is in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.executors import Executor, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter

try:
    from rclpy.event_handler import SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks

__all__ = ["SubscriptionEventCallbacks", "call_after_set", "make_executor"]


def make_executor() -> Executor:
    """The events executor; where rclpy has none (Humble, Jazzy before 7.1.4), the single-threaded one.

    That one builds a wait set for every message, so it takes more of the processor (docs/install.md).
    """
    try:
        from rclpy.experimental.events_executor import EventsExecutor
    except ImportError:
        return SingleThreadedExecutor()
    return EventsExecutor()


def call_after_set(node: Node, callback: Callable[[list[Parameter[Any]]], None]) -> None:
    """Calls `callback` with parameters when they have been set together, and not if they were refused."""
    if hasattr(node, "add_post_set_parameters_callback"):
        node.add_post_set_parameters_callback(callback)
        return
    # Humble: whichever way parameters are set leads through this method, after which they are stored.
    set_atomically = node._set_parameters_atomically

    def set_and_call(parameters: list[Parameter[Any]], *given: Any, **named: Any) -> Any:
        result = set_atomically(parameters, *given, **named)
        if result.successful:
            callback(parameters)
        return result

    node._set_parameters_atomically = set_and_call  # type: ignore[method-assign, assignment]
