"""Requests that are answered although ROS 2 may lose an answer.

A service may hear a request before it has met the asker's other half, to which it would answer: rmw_fastrtps waits for
that for 0.1 s, then drops the answer (https://github.com/ros2/rmw_fastrtps/issues/842), and the asker waits in vain. On
a busy machine, where several nodes start at once, this happens. So what does no harm twice is asked again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.client import Client

# Returns when the condition is true, or after so many seconds; it may raise. The caller's, who spins in his own way.
Wait = Callable[[Callable[[], bool], float], object]
AGAIN_S: Final = 3.0
GOALS: Final = {
    Transition.TRANSITION_CONFIGURE: State.PRIMARY_STATE_INACTIVE,
    Transition.TRANSITION_ACTIVATE: State.PRIMARY_STATE_ACTIVE,
    Transition.TRANSITION_DEACTIVATE: State.PRIMARY_STATE_INACTIVE,
}


def ask(client: Client[Any, Any], request: Any, limit_s: float, wait: Wait, again_s: float = AGAIN_S) -> Any | None:
    """The answer to a request that may come twice, again after `again_s` each; None if there is none in `limit_s`."""
    deadline_s = time.monotonic() + limit_s
    asked: list[Any] = []
    try:
        while (left_s := deadline_s - time.monotonic()) > 0.0:
            asked.append(client.call_async(request))
            wait(lambda: any(future.done() for future in asked), min(again_s, left_s))
            for future in asked:
                if future.done():
                    return future.result()
        return None
    finally:
        for future in asked:
            client.remove_pending_request(future)


def change_state(
    change: Client[Any, Any], get: Client[Any, Any], transition: int, limit_s: float, wait: Wait
) -> bool | None:
    """Whether a lifecycle node made the transition; None if it does not answer within `limit_s`.

    A transition is not asked for again before the node's state says that it was not made.
    """
    deadline_s = time.monotonic() + limit_s

    def state() -> int | None:
        answer = ask(get, GetState.Request(), deadline_s - time.monotonic(), wait)
        return None if answer is None else int(answer.current_state.id)

    before = now = state()
    asked: list[Any] = []
    try:
        while now is not None and (left_s := deadline_s - time.monotonic()) > 0.0:
            if now == before:
                asked.append(change.call_async(ChangeState.Request(transition=Transition(id=transition))))
            wait(lambda: any(future.done() for future in asked), min(AGAIN_S, left_s))
            answers = [future.result().success for future in asked if future.done()]
            if any(answers) or (answers and len(asked) == 1):
                return any(answers)
            now = state()
            if now == GOALS[transition]:
                return True
            if answers:  # the last of several was refused, and the first not made
                return False
        return None
    finally:
        for future in asked:
            change.remove_pending_request(future)
