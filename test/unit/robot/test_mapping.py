"""The mapping between a dataset's or a topic's numbers and the robot's: both ways, in each form.

Exact where float32 can be: a value comes back as it was unless it is smaller than a 2^-24th of the offset that it is
counted from, in its own unit; below that, float64 has no digits left for it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ki_vla_ros.robot import ActionDimension, Lines, StateDimension
from ki_vla_ros.robot.mapping import LARGEST_OFFSET, LARGEST_SCALE, LEAST_SCALE, SCALES

DEGREE = math.pi / 180.0
EXACT = 2.0**-24
numbers = st.floats(-100.0, 100.0, allow_nan=False).map(lambda value: round(value, 6))
scales = st.floats(1e-3, 1e3).map(lambda value: round(value, 6))


@st.composite
def two(draw: st.DrawFn) -> tuple[float, float]:
    """Two numbers that are not nearly the same."""
    first, second = draw(numbers), draw(numbers)
    return (first, second) if abs(first - second) > 1e-2 else (first, first + 1.0)


@st.composite
def dimensions(draw: st.DrawFn) -> tuple[StateDimension, list[tuple[float, float]]]:
    """A dimension with a mapping in any form, and pairs of (value there, value here) that it must have."""
    form = draw(st.sampled_from(["nothing", "unit", "numbers", "share", "range", "ends"]))
    unit = draw(st.sampled_from(["rad", "m"]))
    own: dict[str, Any] = {"name": "joint", "kind": "joint_position", "unit": unit}
    low, high = sorted(draw(two()))
    if form == "nothing":
        return _state(own, {}), [(1.5, 1.5)]
    if form == "unit":
        foreign = draw(st.sampled_from([name for name, (base, _) in SCALES.items() if base == unit]))
        return _state(own, {"unit": foreign}), [(1.0, SCALES[foreign][1]), (0.0, 0.0)]
    if form == "numbers":
        scale, offset, sign = draw(scales), draw(numbers), draw(st.sampled_from([1, -1]))
        mapping = {"scale": scale, "offset": offset, "sign": sign}
        return _state(own, mapping), [(0.0, offset), (2.0, sign * scale * 2.0 + offset)]
    if form == "share":
        whole = draw(st.sampled_from([("percent", 100.0), ("ratio", 1.0)]))
        limited = own | {"lower": low, "upper": high}
        return _state(limited, {"unit": whole[0]}), [(0.0, low), (whole[1], high)]
    if form == "range":
        ends = draw(two())
        return _state(own | {"lower": low, "upper": high}, {"range": ends}), [(ends[0], low), (ends[1], high)]
    (opened, closed), (there_open, there_closed) = draw(two()), draw(two())
    gripper = own | {"kind": "gripper", "open": opened, "closed": closed}
    mapping = {"open": there_open, "closed": there_closed}
    return _state(gripper, mapping), [(there_open, opened), (there_closed, closed)]


def _state(fields: dict[str, Any], dataset: dict[str, Any]) -> StateDimension:
    return StateDimension.model_validate(fields | {"dataset": dataset})


@settings(max_examples=300, deadline=None)
@given(dimensions(), st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_a_float32_comes_back_as_it_was(
    mapped: tuple[StateDimension, list[tuple[float, float]]], values: list[float]
) -> None:
    dimension, _ = mapped
    lines = Lines.of([dimension.lines()[1]])
    value_N1 = np.array(values, dtype=np.float32)[:, np.newaxis]
    least = EXACT * abs(lines.offset_D[0] / lines.scale_D[0])
    exact_N1 = (value_N1 == 0.0) | ((np.abs(value_N1) >= least) & (np.abs(value_N1) > 1e-30))
    back_N1 = lines.to_foreign(lines.to_robot(value_N1))
    np.testing.assert_array_equal(back_N1.astype(np.float32)[exact_N1], value_N1[exact_N1])
    # And nowhere is it off by more than that.
    np.testing.assert_allclose(back_N1, value_N1.astype(np.float64), rtol=1e-7, atol=least)


@settings(max_examples=300, deadline=None)
@given(dimensions(), numbers)
def test_known_places_are_met_and_the_way_back_is_the_inverse(
    mapped: tuple[StateDimension, list[tuple[float, float]]], value: float
) -> None:
    dimension, pairs = mapped
    lines = Lines.of([dimension.lines()[1]])
    for there, here in pairs:
        scale = 1.0 + abs(here) + abs(there * lines.scale_D[0])
        assert float(lines.to_robot(np.array([there]))[0]) == pytest.approx(here, abs=1e-12 * scale)
        assert float(lines.to_foreign(np.array([here]))[0]) == pytest.approx(there, abs=1e-9 * (1 + abs(there)))
    offset = float(lines.offset_D[0])
    assert float(lines.to_robot(lines.to_foreign(np.array([value])))[0]) == pytest.approx(
        value, abs=1e-12 * (1.0 + abs(value) + abs(offset))
    )


def test_many_dimensions_at_once_in_any_shape() -> None:
    lines = Lines.of([(DEGREE, 0.0), (-0.01, 0.5), (1.0, 0.0)])
    value_D = np.array([90.0, 20.0, 3.0])
    np.testing.assert_allclose(lines.to_robot(value_D), [math.pi / 2, 0.3, 3.0])
    assert lines.to_robot(np.broadcast_to(value_D, (4, 5, 3))).shape == (4, 5, 3)
    assert not lines.is_identity and Lines.of([(1.0, 0.0)] * 3).is_identity
    assert Lines.of([]).to_robot(np.zeros((2, 0))).shape == (2, 0)


JOINT = {"name": "wrist", "kind": "joint_position", "unit": "rad"}
LIMITED = JOINT | {"lower": -1.0, "upper": 1.0}
GRIPPER = {"name": "wrist", "kind": "gripper", "unit": "m", "open": 0.08, "closed": 0.0}


@pytest.mark.parametrize("where", ["source", "dataset"])
@pytest.mark.parametrize(
    ("fields", "mapping", "fault"),
    [
        (LIMITED, {"unit": "deg", "range": [0, 1]}, "expected either unit, scale, offset and sign, or range, or open"),
        (GRIPPER, {"scale": 2.0, "open": 1, "closed": 0}, "got several"),
        (GRIPPER, {"open": 1}, "expected both open and closed, got one of them"),
        (LIMITED, {"range": [1, 1]}, "range: expected two values, got 1.0 twice"),
        (GRIPPER, {"open": 1, "closed": 1}, "open and closed: expected two values, got 1.0 twice"),
        (LIMITED, {"open": 1, "closed": 0}, "open and closed: expected a gripper that names its own"),
        (JOINT, {"range": [-100, 100]}, "range: expected lower and upper of the dimension, which has none"),
        (JOINT, {"unit": "percent"}, "range: expected lower and upper of the dimension, which has none"),
        (LIMITED, {"unit": "percent", "sign": -1}, r"a share that counts otherwise is a range, such as \[100, 0\]"),
        (LIMITED, {"unit": "ratio", "scale": 2.0}, "scale, offset and sign: expected none for ratio"),
        (JOINT, {"unit": "mm"}, "unit: expected one for rad, got mm"),
        (JOINT, {"scale": 0.0}, "expected a scale from 1e-06 to 1e.06"),
        (JOINT, {"scale": 1e7}, "expected a scale from 1e-06 to 1e.06"),
        (JOINT, {"offset": 1e7}, "an offset to 1e.06, got 1 and 1e.07"),
    ],
)
def test_every_refusal_names_the_dimension_and_the_mapping(
    where: str, fields: dict[str, Any], mapping: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ValidationError, match=f"'wrist': {where}: .*{fault}"):
        StateDimension.model_validate(fields | {where: mapping})
    if where == "dataset":
        action = {"max_velocity": 1.0, "output": "arm"} | (
            {} if "lower" in fields or "open" in fields else {"continuous": True}
        )
        with pytest.raises(ValidationError, match=f"'wrist': dataset: .*{fault}"):
            ActionDimension.model_validate(fields | action | {where: mapping})


def test_velocities_are_mapped_by_their_greatest_value() -> None:
    action = ActionDimension.model_validate(
        {
            "name": "v",
            "kind": "joint_velocity",
            "unit": "rad/s",
            "max_velocity": 2.0,
            "output": "arm",
            "dataset": {"range": [-1, 1]},
        }
    )
    assert action.line() == pytest.approx((2.0, 0.0))


def test_the_bounds_are_those_of_the_text() -> None:
    assert (LEAST_SCALE, LARGEST_SCALE, LARGEST_OFFSET) == (1e-6, 1e6, 1e6)
