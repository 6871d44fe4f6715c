"""Numbers of a dataset or a topic to the robot's own, and back: value -> scale * value + offset, per dimension.

Inside our system every number is in the robot's units: rad, m, rad/s, m/s, and `ratio` for what has none. A dataset may
have degrees, percent or -100..100 instead, with another sign and another zero. This is the only place that knows.

Legend: D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Finite = Annotated[float, Field(allow_inf_nan=False)]
RobotUnit = Literal["rad", "m", "rad/s", "m/s", "ratio"]
ForeignUnit = Literal["rad", "deg", "m", "mm", "rad/s", "deg/s", "m/s", "mm/s", "ratio", "percent"]

# What one of a unit is in the robot's unit of the same kind.
SCALES: dict[str, tuple[str, float]] = {
    "rad": ("rad", 1.0),
    "deg": ("rad", math.pi / 180.0),
    "m": ("m", 1.0),
    "mm": ("m", 1e-3),
    "rad/s": ("rad/s", 1.0),
    "deg/s": ("rad/s", math.pi / 180.0),
    "m/s": ("m/s", 1.0),
    "mm/s": ("m/s", 1e-3),
    "ratio": ("ratio", 1.0),
    "percent": ("ratio", 1e-2),
}
# Beyond these a mapping loses digits, and is a mistake.
LEAST_SCALE, LARGEST_SCALE, LARGEST_OFFSET = 1e-6, 1e6, 1e6


class Frozen(BaseModel):
    """A record that cannot change once it is validated, and that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Mapping(Frozen):
    """How a value from elsewhere becomes the robot's: by unit, by the values at two known places, or by numbers.

    robot value = sign * scale * value + offset, with the unit's own factor in it. `range` says instead what the value
    is at the dimension's lower and upper limit (-100 and 100, say); `open` and `closed` say it for a gripper.
    """

    unit: ForeignUnit | None = Field(
        default=None,
        description="the value's unit; left out: the dimension's own; percent or ratio of a dimension in rad or m: the "
        "share of the way from lower to upper",
    )
    scale: Finite = Field(default=1.0, description="factor, beside that of the unit")
    offset: Finite = Field(default=0.0, description="added after scaling, in the robot's unit")
    sign: Literal[1, -1] = Field(default=1, description="-1 where the value counts the other way round")
    range: tuple[Finite, Finite] | None = Field(
        default=None, description="the values at the dimension's lower and upper limit, such as [-100, 100]"
    )
    open: Finite | None = Field(default=None, description="gripper: the value when it is open")
    closed: Finite | None = Field(default=None, description="gripper: the value when it is closed")

    @property
    def says_nothing(self) -> bool:
        """Whether values are the robot's own."""
        numbers = (self.scale, self.offset, self.sign) == (1.0, 0.0, 1)
        return numbers and (self.unit, self.range, self.open, self.closed) == (None,) * 4

    def _check_one_way(self) -> None:
        by_numbers = self.unit is not None or (self.scale, self.offset, self.sign) != (1.0, 0.0, 1)
        by_ends = self.open is not None or self.closed is not None
        if by_numbers + (self.range is not None) + by_ends > 1:
            raise ValueError("expected either unit, scale, offset and sign, or range, or open and closed; got several")
        if by_ends and (self.open is None or self.closed is None):
            raise ValueError("expected both open and closed, got one of them")
        for what, ends in (("range", self.range), ("open and closed", (self.open, self.closed) if by_ends else None)):
            if ends is not None and ends[0] == ends[1]:
                raise ValueError(f"{what}: expected two values, got {ends[0]} twice")

    def line(
        self, unit: RobotUnit, limits: tuple[float, float] | None, gripper: tuple[float, float] | None
    ) -> tuple[float, float]:
        """Scale and offset into `unit`; `limits` are the dimension's lower and upper, `gripper` its open and closed.

        ValueError if the mapping says several things, needs what the dimension does not have, or if no useful line
        comes of it.
        """
        self._check_one_way()
        if self.open is not None and self.closed is not None:
            if gripper is None:
                raise ValueError("open and closed: expected a gripper that names its own open and closed")
            scale, offset = _through((self.closed, gripper[1]), (self.open, gripper[0]))
        elif self.range is not None or (self.unit in ("percent", "ratio") and unit != "ratio"):
            if limits is None:
                raise ValueError("range: expected lower and upper of the dimension, which has none")
            if (self.scale, self.offset, self.sign) != (1.0, 0.0, 1):
                raise ValueError(
                    f"scale, offset and sign: expected none for {self.unit}, which is the share of the way from lower "
                    "to upper; a share that counts otherwise is a range, such as [100, 0]"
                )
            ends = self.range or ((0.0, 100.0) if self.unit == "percent" else (0.0, 1.0))
            scale, offset = _through((ends[0], limits[0]), (ends[1], limits[1]))
        else:
            base, factor = SCALES[self.unit or unit]
            if base != unit:
                raise ValueError(f"unit: expected one for {unit}, got {self.unit}")
            scale, offset = self.sign * self.scale * factor, self.offset
        if not LEAST_SCALE <= abs(scale) <= LARGEST_SCALE or abs(offset) > LARGEST_OFFSET:
            raise ValueError(
                f"expected a scale from {LEAST_SCALE:g} to {LARGEST_SCALE:g} and an offset to {LARGEST_OFFSET:g}, got "
                f"{scale:g} and {offset:g}"
            )
        return scale, offset


def _through(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Scale and offset of the line through two points."""
    scale = (second[1] - first[1]) / (second[0] - first[0])
    return scale, first[1] - scale * first[0]


@dataclass(frozen=True, slots=True, eq=False)
class Lines:
    """The mapping of several dimensions at once; values may be [..., D] of any shape.

    Both directions are computed in float64: float32 values come back as they were.
    """

    scale_D: NDArray[np.float64]
    offset_D: NDArray[np.float64]

    @classmethod
    def of(cls, lines: Sequence[tuple[float, float]]) -> Lines:
        scale_D, offset_D = np.array(lines, dtype=np.float64).reshape(-1, 2).T.copy()
        return cls(scale_D, offset_D)

    @property
    def is_identity(self) -> bool:
        return bool((self.scale_D == 1.0).all() and (self.offset_D == 0.0).all())

    def to_robot(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        """Values as the dataset or the topic has them -> in the robot's units."""
        return np.asarray(values, dtype=np.float64) * self.scale_D + self.offset_D

    def to_foreign(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        """The inverse of `to_robot`."""
        return (np.asarray(values, dtype=np.float64) - self.offset_D) / self.scale_D
