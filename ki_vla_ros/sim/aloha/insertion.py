"""ALOHA's second task: the right arm picks a peg up, the left one a socket, and the peg goes into the socket.

Peg and socket lie along the model's x. The socket is a square tube of 36 mm inside, the peg is 20 mm thick, and a pin
inside the tube says how deep the peg is: gym-aloha's success is that they touch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import SimulationError
from ki_vla_ros.sim.aloha.demonstrator import Planner, Waypoint
from ki_vla_ros.sim.aloha.world import CLOSED_M, LARGEST_SEED, OPEN_M, TwoArms

INSERTION: Final = "Insert the peg into the socket."
Place = tuple[float, float]
Array = NDArray[np.float64]

# Where gym-aloha lays them, by their centres; and how far these are above the table.
PEG_X_M, SOCKET_X_M, Y_M = (0.1, 0.2), (-0.2, -0.1), (0.4, 0.6)
PEG_HALF_M, SOCKET_HALF_M = 0.01, 0.022
_WALLS = tuple(f"socket-{n}" for n in range(1, 5))

_DOWN: Final = np.pi / 2
_ABOVE_M: Final = 0.12
# Each is held this far outwards of its middle, which keeps the grippers apart, and this high above its axis.
_OUTWARDS_M: Final = 0.02
_PEG_GRASP_M, _SOCKET_GRASP_M = 0.008, 0.008
# The axis along which the peg goes in; and how far the two middles are from each other before, and in the end.
_MEETING: Final = np.array([0.0, 0.5, 0.15])
_APART_M, _TOGETHER_M = 0.19, 0.09


@dataclass(frozen=True, slots=True)
class InsertionScene:
    """Where the middles of peg and socket lie (x, y); `seed` is the one they were drawn with."""

    seed: int
    peg: Place
    socket: Place


def sample_insertion(seed: int) -> InsertionScene:
    """The scene that gym-aloha draws with this seed; SimulationError if there is none."""
    if not 0 <= seed <= LARGEST_SEED:
        raise SimulationError(f"scene_seed: expected 0 to {LARGEST_SEED}, got {seed}")
    rng = np.random.RandomState(seed)
    places = []
    for (low_x, high_x), (low_y, high_y) in ((PEG_X_M, Y_M), (SOCKET_X_M, Y_M)):
        x, y, _ = rng.uniform([low_x, low_y, 0.0], [high_x, high_y, 0.0])  # the third number is a height of no range
        places.append((float(x), float(y)))
    return InsertionScene(seed, *places)


@dataclass(frozen=True, slots=True)
class Mating:
    """What peg and socket touch.

    The reward is 1 where each gripper touches its own, 2 if both are lifted, 3 where the two touch in the air, 4 where
    the peg touches the pin.
    """

    peg_held: bool = False
    socket_held: bool = False
    on_table: bool = False
    each_other: bool = False
    pin: bool = False

    @property
    def reward(self) -> int:
        if self.pin:
            return 4
        if self.each_other and not self.on_table:
            return 3
        return (2 - self.on_table) if self.peg_held and self.socket_held else 0

    @property
    def done(self) -> bool:
        return self.pin and not self.on_table


class InsertionWorld(TwoArms[InsertionScene]):
    """A peg is to be inserted into a socket."""

    model_file = "assets/bimanual_viperx_insertion.xml"
    hold_s = 0.0  # peg and pin that touch may part again by a hair

    def __init__(self, width: int = 320, height: int = 240, render: bool = True) -> None:
        super().__init__(width, height, render)
        self._peg, self._socket = self._geoms("red_peg"), self._geoms(*_WALLS)
        self._pin, self._table = self._geoms("pin"), self._geoms("table")
        self._right, self._left = self._fingers("right"), self._fingers("left")

    def _lay(self, scene: InsertionScene) -> None:
        self._place("red_peg_joint", *scene.peg, PEG_HALF_M)
        self._place("blue_socket_joint", *scene.socket, SOCKET_HALF_M)

    def _contacts(self) -> Mating:
        of_peg, of_socket = self._partners(self._peg), self._partners(self._socket)
        return Mating(
            peg_held=not of_peg.isdisjoint(self._right),
            socket_held=not of_socket.isdisjoint(self._left),
            on_table=not (of_peg | of_socket).isdisjoint(self._table),
            each_other=not of_peg.isdisjoint(self._socket),
            pin=not of_peg.isdisjoint(self._pin),
        )


class Inserter(Planner[InsertionScene]):
    """Picks both up, holds them in one line, and pushes the peg in."""

    def paths(self, scene: InsertionScene) -> dict[str, list[Waypoint]]:
        peg = np.array([*scene.peg, PEG_HALF_M + _PEG_GRASP_M])
        socket = np.array([*scene.socket, SOCKET_HALF_M + _SOCKET_GRASP_M])
        return {
            "right": self._path("right", peg, _PEG_GRASP_M, 1.0),
            "left": self._path("left", socket, _SOCKET_GRASP_M, -1.0),
        }

    def _path(self, side: str, middle: Array, grasp_m: float, outwards: float) -> list[Waypoint]:
        """`outwards`: the direction along x in which this arm stands."""
        grasp = middle + np.array([outwards * _OUTWARDS_M, 0.0, 0.0])
        above = grasp + np.array([0.0, 0.0, _ABOVE_M])
        before, inside = (
            _MEETING + np.array([outwards * (between_m / 2.0 + _OUTWARDS_M), 0.0, grasp_m])
            for between_m in (_APART_M, _TOGETHER_M)
        )
        roll = self.aligned(side, grasp)
        return [
            self.home(side),
            Waypoint(1.4, above, _DOWN, roll, OPEN_M),
            Waypoint(2.2, grasp, _DOWN, roll, OPEN_M),
            Waypoint(2.6, grasp, _DOWN, roll, CLOSED_M),
            Waypoint(3.3, above, _DOWN, roll, CLOSED_M),
            Waypoint(4.8, before, _DOWN, self.aligned(side, before), CLOSED_M),
            Waypoint(6.3, inside, _DOWN, self.aligned(side, inside), CLOSED_M),
            Waypoint(7.3, inside, _DOWN, self.aligned(side, inside), CLOSED_M),
        ]
