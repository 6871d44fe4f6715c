"""Requests whose answer, or which themselves, are lost on the way; losing them is the only thing that is acted here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import rclpy
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.task import Future
from std_srvs.srv import Trigger
from support.waiting import PATIENCE_S, until

from ki_vla_ros.ros import services
from ki_vla_ros.ros.services import ask, change_state

CONFIGURE = Transition.TRANSITION_CONFIGURE


class Asked(LifecycleNode):
    """Counts what it was asked; a transition takes `takes_s` and may be refused."""

    def __init__(self, context: rclpy.Context) -> None:
        super().__init__("asked", context=context)
        self.triggered = self.configured = 0
        self.takes_s, self.answer = 0.0, TransitionCallbackReturn.SUCCESS
        self.create_service(Trigger, "trigger", self._on_trigger)

    def _on_trigger(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.triggered += 1
        response.success, response.message = True, f"answer {self.triggered}"
        return response

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.configured += 1
        time.sleep(self.takes_s)
        return self.answer


class Lossy:
    """A client whose first requests, or their answers, are lost."""

    def __init__(self, client: Any, *, requests: int = 0, answers: int = 0) -> None:
        self.client, self.requests, self.answers = client, requests, answers
        self.sent = 0

    def call_async(self, request: Any) -> Any:
        self.sent += 1
        if self.sent > self.requests:
            future = self.client.call_async(request)
        return Future() if self.sent <= self.requests + self.answers else future

    def remove_pending_request(self, future: Any) -> None:
        self.client.remove_pending_request(future)


class Rig:
    def __init__(self, domain: int) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.asked = Asked(self.context)
        self.asker = rclpy.create_node("asker", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.asked)
        self.executor.add_node(self.asker)
        self.trigger = self.client(Trigger, "trigger")
        self.change = self.client(ChangeState, "asked/change_state")
        self.get = self.client(GetState, "asked/get_state")

    def client(self, kind: Any, name: str) -> Any:
        client: Any = self.asker.create_client(kind, name)
        until(client.service_is_ready)
        return client

    def wait(self, condition: Callable[[], bool], limit_s: float) -> None:
        end_s = time.monotonic() + limit_s
        while not condition() and time.monotonic() < end_s:
            self.executor.spin_once(timeout_sec=0.05)

    def close(self) -> None:
        self.executor.shutdown()
        self.asker.destroy_node()
        self.asked.destroy_node()
        rclpy.shutdown(context=self.context)


@pytest.fixture
def rig(ros_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(services, "AGAIN_S", 0.3)
    rig = Rig(int(ros_environment["ROS_DOMAIN_ID"]))
    yield rig
    rig.close()


@pytest.mark.parametrize(("lost", "heard"), [({}, 1), ({"answers": 1}, 2), ({"requests": 1}, 1), ({"answers": 2}, 3)])
def test_a_request_is_asked_again_until_it_is_answered(rig: Rig, lost: dict[str, int], heard: int) -> None:
    client = Lossy(rig.trigger, **lost)
    answer = ask(client, Trigger.Request(), PATIENCE_S, rig.wait, again_s=0.3)
    assert answer is not None and answer.message == f"answer {heard}" and rig.asked.triggered == heard


def test_without_any_answer_there_is_none(rig: Rig) -> None:
    client = Lossy(rig.trigger, requests=1000)
    assert ask(client, Trigger.Request(), 1.0, rig.wait, again_s=0.3) is None
    assert 3 <= client.sent <= 4
    assert change_state(rig.change, Lossy(rig.get, requests=1000), CONFIGURE, 1.0, rig.wait) is None
    assert rig.asked.configured == 0, "of an unknown state"
    assert change_state(Lossy(rig.change, requests=1000), rig.get, CONFIGURE, 1.0, rig.wait) is None


@pytest.mark.parametrize("lost", [{}, {"answers": 1}, {"requests": 1}, {"requests": 2}])
@pytest.mark.parametrize("takes_s", [0.0, 1.0])
def test_a_transition_is_made_once(rig: Rig, lost: dict[str, int], takes_s: float) -> None:
    """However long it takes, and whatever is lost of it."""
    rig.asked.takes_s = takes_s
    assert change_state(Lossy(rig.change, **lost), rig.get, CONFIGURE, PATIENCE_S, rig.wait) is True
    assert rig.asked.configured == 1
    assert ask(rig.get, GetState.Request(), PATIENCE_S, rig.wait).current_state.id == State.PRIMARY_STATE_INACTIVE


@pytest.mark.parametrize(("lost", "tried"), [({}, 1), ({"answers": 1}, 2), ({"requests": 1}, 1)])
def test_a_transition_that_the_node_refuses_is_refused(rig: Rig, lost: dict[str, int], tried: int) -> None:
    """Where the refusal itself is lost, the node looks as if it had not heard, and is asked once more."""
    rig.asked.answer = TransitionCallbackReturn.FAILURE
    assert change_state(Lossy(rig.change, **lost), rig.get, CONFIGURE, PATIENCE_S, rig.wait) is False
    assert rig.asked.configured == tried


def test_a_transition_that_there_is_not_is_refused(rig: Rig) -> None:
    assert change_state(rig.change, rig.get, Transition.TRANSITION_ACTIVATE, PATIENCE_S, rig.wait) is False
