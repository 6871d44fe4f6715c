"""Shadow mode's figures, against made-up arms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.bundles import TASK, demo_policy, robot_of

from ki_vla_ros.errors import InputError
from ki_vla_ros.records import ActionChunk, SignalReading
from ki_vla_ros.replay.figures import Figures
from ki_vla_ros.replay.ticks import Prediction, Tick
from ki_vla_ros.robot.axes import Axis
from ki_vla_ros.robot.commands import CommandSpace
from ki_vla_ros.runtime.shadow import ShadowComparison
from ki_vla_ros.settings.settings import ReferenceName

MS = 1_000_000
NAMES = ("shoulder", "slide")


def compare(reference: ReferenceName = "joint_states") -> ShadowComparison:
    limits: dict[str, Any] = {"lower": -3.0, "upper": 3.0, "max_velocity": 1.0, "relative": False}
    units = dict(zip(NAMES, ("rad", "m"), strict=True))
    axes = [Axis(kind="joint", name=name, unit=unit, **limits) for name, unit in units.items()]
    return ShadowComparison(CommandSpace(robot_of(axes)), reference)


def chunk(start_ns: int, position_HJ: Any) -> ActionChunk:
    position_HJ = np.asarray(position_HJ, dtype=np.float64)
    return ActionChunk(start_ns, 100 * MS, NAMES, position_HJ, np.zeros_like(position_HJ))


def reading(stamp_ns: int, *position: float) -> list[SignalReading]:
    """Each joint in a message of its own."""
    return [SignalReading(stamp_ns, (m,), np.array([value])) for m, value in enumerate(position)]


def test_errors_by_joint_and_by_step_against_joint_states() -> None:
    shadow = compare()
    for k in range(101):  # shoulder rises by 1 rad per second
        shadow.add_readings(reading(k * 10 * MS, k * 0.01, 2.0))
    # Due at 0.1, 0.2 and 0.3 s, when the shoulder is at 0.1, 0.2 and 0.3 rad.
    shadow.add_chunk(chunk(0, [[0.1, 2.0], [0.3, 2.0], [0.5, 2.5]]))
    assert shadow.values(500 * MS)["shadow chunks compared"] == "0"  # the reference is not complete yet
    assert shadow.values(600 * MS) == {
        "shadow reference": "joint_states",
        "shadow chunks compared": "1",
        "shadow chunks without reference": "0",
        "shadow rms shoulder": f"{np.sqrt((0.1**2 + 0.2**2) / 3):.4f}",
        "shadow rms slide": f"{np.sqrt(0.5**2 / 3):.4f}",
        "shadow rms": f"{np.sqrt((0.1**2 + 0.2**2) / 3):.4f}",
        "shadow rms action 1": "0.0000",
        "shadow rms action 2": "0.1000",
        "shadow rms action 3": "0.2000",
    }


def test_errors_against_someone_elses_commands() -> None:
    shadow = compare("command")
    nothing: dict[str, Any] = {"velocities": [], "accelerations": [], "effort": []}
    after = SimpleNamespace(sec=0, nanosec=100 * MS)
    point = SimpleNamespace(positions=[2.0, 1.0], time_from_start=after, **nothing)
    header = SimpleNamespace(stamp=SimpleNamespace(sec=0, nanosec=0))
    shadow.add_command("arm", 0, SimpleNamespace(header=header, joint_names=NAMES[::-1], points=[point]))
    shadow.add_readings(reading(0, 9.0, 9.0))
    shadow.add_chunk(chunk(0, [[1.0, 2.0], [1.25, 2.0]]))
    shadow.add_chunk(chunk(1000 * MS, [[1.5, 2.0], [1.5, 2.0]]))
    values = shadow.values(2000 * MS)
    assert values["shadow chunks compared"] == "2"
    assert (
        values["shadow rms"] == f"{np.sqrt((0.25**2 + 2 * 0.5**2) / 4):.4f}" and values["shadow rms slide"] == "0.0000"
    )
    shadow.add_command("arm", 2000 * MS, SimpleNamespace(data=[1.0, 2.0]))
    with pytest.raises(InputError, match="command: expected 2 positions, got 3"):
        shadow.add_command("arm", 2000 * MS, SimpleNamespace(data=[1.0, 2.0, 3.0]))


def test_without_a_reference_there_is_no_figure() -> None:
    shadow = compare()
    shadow.add_chunk(chunk(0, [[0.0, 0.0]]))
    values = shadow.values(1000 * MS)
    assert (values["shadow chunks compared"], values["shadow chunks without reference"]) == ("0", "1")
    assert values["shadow rms"] == values["shadow rms shoulder"] == ""


def test_a_clock_that_is_set_back_starts_again() -> None:
    shadow = compare()
    for start_ns in (5000 * MS, 0):
        for k in range(50):
            shadow.add_readings(reading(start_ns + k * 10 * MS, 1.0, 1.0))
        shadow.add_chunk(chunk(start_ns, [[2.0, 1.0]]))
        if start_ns:
            assert shadow.values(start_ns + 1000 * MS)["shadow rms"] == "1.0000"
            assert shadow.values(0)["shadow chunks compared"] == "0"
    assert shadow.values(1000 * MS)["shadow chunks compared"] == "1"


def test_the_figures_equal_those_of_a_replay() -> None:
    manifest, horizon = demo_policy(), 16
    rng = np.random.default_rng(0)
    shadow = ShadowComparison(CommandSpace(manifest.robot), "joint_states")
    figures = Figures(manifest, "", 0.0, seed=0)
    names = tuple(joint.name for joint in manifest.axes)
    for k in range(600):
        shadow.add_readings(reading(k * 10 * MS, *[k * 0.01] * len(names)))
    for n in range(4):
        start_ns, wanted_HJ = n * 1000 * MS, rng.normal(0.0, 1.0, (horizon, len(names)))
        due_s = (start_ns + (np.arange(horizon) + 1) * 50 * MS) / 1e9
        shadow.add_chunk(ActionChunk(start_ns, 50 * MS, names, wanted_HJ, np.zeros_like(wanted_HJ)))
        reference_HJ = np.repeat(due_s[:, None], len(names), axis=1)
        prediction = Prediction(
            n,
            start_ns,
            50 * MS,
            wanted_HJ,
            reference_HJ,
            wanted_HJ[0],
            {"scene": start_ns},
            (),
            0,
            None,
            (),
            0,
            None,
            {},
        )
        figures.add(Tick(n, start_ns, TASK, None, {}, 0, 0, {"total": 1.0}, (), prediction))
    error = figures.summary("asynchronous", 0.1, "joint_states", None)["error"]
    values = shadow.values(10_000 * MS)
    assert values["shadow rms"] == f"{error['rms']:.4f}" and values["shadow chunks compared"] == "4"
    assert {name: values[f"shadow rms {name}"] for name in names} == {
        name: f"{of_joint['rms']:.4f}" for name, of_joint in error["by_joint"].items()
    }
    for k in (1, horizon // 2 + 1, horizon):
        assert values[f"shadow rms action {k}"] == f"{error['by_step'][k - 1]['rms']:.4f}"
