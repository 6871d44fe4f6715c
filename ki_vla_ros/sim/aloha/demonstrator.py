"""Hands the cube over: the right arm picks it up, the left arm takes it out of the air and carries it away.

Each arm follows waypoints: a place between its fingertips, how far the fingers point down, how far they are turned
about their own axis, and how far they are open. Between two waypoints all of these change by a minimum-jerk curve, and
inverse kinematics over the model's Jacobian makes joint positions of them. The forearm does not roll: with the other
five joints an arm reaches every pose whose heading is that of its waist.
Legend: A joints of one arm without its gripper (six), J all joints, N instants.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ki_vla_ros.errors import SimulationError
from ki_vla_ros.sim.aloha.world import (
    ARM_JOINTS,
    CLOSED_M,
    CUBE_HALF_M,
    HOME_ARM,
    HOME_J,
    JOINTS,
    OPEN_M,
    SIDES,
    AnyScene,
    Scene,
    load_model,
    model_joint,
)
from ki_vla_ros.sim.rendering import mujoco

Array = NDArray[np.float64]

PERIOD_S: Final = 0.02
"""Time between the positions of a demonstration, as between the frames of ALOHA's datasets."""

# From the wrist to the point between the fingertips; the fingers are 14 mm longer.
_TIP_M: Final = np.array([0.14, 0.0, 0.0])
# Where the arms meet; the left one waits _APART_M before it, and the right one leaves by as much.
_MEETING: Final = np.array([0.0, 0.5, 0.25])
_APART_M: Final = 0.13
# Above the cube before and after the grasp, and at it: a little above its middle, clear of the table.
_ABOVE_M, _GRASP_M = 0.10, 0.01
_DOWN: Final = np.pi / 2
_DAMPING: Final = 1e-4
_MOST_ITERATIONS, _EXACT = 100, 1e-6


@dataclass(frozen=True, slots=True)
class Waypoint:
    """Where one arm is `at_s`: tip [3], fingers pointing down by `pitch` and turned about their axis by `roll`."""

    at_s: float
    tip: Array
    pitch: float
    roll: float
    gripper_m: float

    def towards(self, other: Waypoint, t_s: float) -> Waypoint:
        """On the way to `other`, at `t_s`."""
        phase = min(max((t_s - self.at_s) / (other.at_s - self.at_s), 0.0), 1.0)
        share = phase**3 * (10.0 - 15.0 * phase + 6.0 * phase**2)

        def blend(before: Any, after: Any) -> Any:
            return before + share * (after - before)

        return Waypoint(
            t_s,
            blend(self.tip, other.tip),
            blend(self.pitch, other.pitch),
            blend(self.roll, other.roll),
            blend(self.gripper_m, other.gripper_m),
        )


class ArmKinematics:
    """Forward and inverse kinematics of one arm, on data of its own."""

    def __init__(self, model: Any, side: str) -> None:
        self._model, self._data, self._side = model, mujoco.MjData(model), side
        joints = [model.joint(model_joint(f"{side}_{name}")) for name in ARM_JOINTS]
        self._qpos_A = np.array([joint.qposadr[0] for joint in joints])
        self._dof_A = np.array([joint.dofadr[0] for joint in joints])
        self._range_A2 = np.array([joint.range for joint in joints])
        self._wrist = model.body(f"vx300s_{side}/gripper_link").id
        self._base: Array = model.body(f"vx300s_{side}").pos.copy()
        self._jacobian = np.zeros((6, model.nv))

    def heading(self, tip: Array) -> float:
        """The direction [rad] from the arm's waist to a point, about z from the model's x."""
        along, across = (tip - self._base)[:2]
        return float(np.arctan2(across, along))

    def pose(self, position_A: Array) -> tuple[Array, Array]:
        """The tip [3] and the gripper's axes [3, 3]: columns forward, left, up."""
        self._data.qpos[self._qpos_A] = position_A
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        axes: Array = self._data.xmat[self._wrist].reshape(3, 3).copy()
        return self._data.xpos[self._wrist] + axes @ _TIP_M, axes

    def reach(self, waypoint: Waypoint, near_A: ArrayLike) -> Array:
        """Positions [A] for a waypoint, by damped least squares from `near_A`; SimulationError if out of reach."""
        wanted = _turn(2, self.heading(waypoint.tip)) @ _turn(1, waypoint.pitch) @ _turn(0, waypoint.roll)
        position_A = np.array(near_A, dtype=np.float64)
        error, quaternion = np.empty(6), np.empty(4)
        for _ in range(_MOST_ITERATIONS):
            tip, axes = self.pose(position_A)
            mujoco.mju_mat2Quat(quaternion, (wanted @ axes.T).ravel())
            error[:3] = waypoint.tip - tip
            mujoco.mju_quat2Vel(error[3:], quaternion, 1.0)
            if np.abs(error).max() < _EXACT:
                return position_A
            mujoco.mj_jac(self._model, self._data, self._jacobian[:3], self._jacobian[3:], tip, self._wrist)
            jacobian = self._jacobian[:, self._dof_A]
            jacobian[:, ARM_JOINTS.index("forearm_roll")] = 0.0
            step_A = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + _DAMPING * np.eye(6), error)
            position_A = np.clip(position_A + step_A, *self._range_A2.T)
        raise SimulationError(
            f"{self._side} arm: tip {np.round(waypoint.tip, 3).tolist()} with the fingers pitched by "
            f"{waypoint.pitch:.2f} and rolled by {waypoint.roll:.2f} rad is out of reach (still "
            f"{np.abs(error).max():.3f} m or rad away)"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Demonstration:
    """Joint positions, PERIOD_S apart: the first PERIOD_S after the start, the last where the arms stay."""

    position_NJ: Array

    @property
    def duration_s(self) -> float:
        return len(self.position_NJ) * PERIOD_S

    def sample(self, t_s: float) -> Array:
        """Positions [J] at `t_s`, on straight lines between those given; before them from HOME_J on."""
        number, share = divmod(max(t_s, 0.0) / PERIOD_S, 1.0)
        if number >= len(self.position_NJ):
            number, share = len(self.position_NJ) - 1, 1.0
        after_J: Array = self.position_NJ[int(number)]
        before_J = HOME_J if number == 0 else self.position_NJ[int(number) - 1]
        position_J: Array = before_J + share * (after_J - before_J)
        return position_J


class Planner(ABC, Generic[AnyScene]):
    """Plans what both arms do in a scene, from HOME_J."""

    def __init__(self) -> None:
        model = load_model(1, 1)
        self._arms = {side: ArmKinematics(model, side) for side in SIDES}

    @abstractmethod
    def paths(self, scene: AnyScene) -> dict[str, list[Waypoint]]:
        """By side; each begins at home."""
        ...

    def plan(self, scene: AnyScene) -> Demonstration:
        """SimulationError if a waypoint is out of reach: none is, where a scene was sampled."""
        waypoints = self.paths(scene)
        count = round(max(path[-1].at_s for path in waypoints.values()) / PERIOD_S)
        position_NJ = np.empty((count, len(JOINTS)))
        for side, path in waypoints.items():
            first = JOINTS.index(f"{side}_{ARM_JOINTS[0]}")
            position_NJ[:, first : first + len(ARM_JOINTS) + 1] = self._follow(side, path, count)
        return Demonstration(position_NJ)

    def _follow(self, side: str, path: Sequence[Waypoint], count: int) -> Array:
        """Positions [N, A + 1] of an arm and its gripper."""
        position_A = np.array(HOME_ARM)
        rows, leg = [], 0
        for t_s in PERIOD_S * np.arange(1, count + 1):
            while leg < len(path) - 2 and t_s > path[leg + 1].at_s:
                leg += 1
            waypoint = path[leg].towards(path[leg + 1], float(t_s))
            position_A = self._arms[side].reach(waypoint, position_A)
            rows.append([*position_A, min(max(waypoint.gripper_m, CLOSED_M), OPEN_M)])  # not a rounding error beyond
        return np.array(rows)

    def home(self, side: str) -> Waypoint:
        tip, axes = self._arms[side].pose(np.array(HOME_ARM))
        return Waypoint(0.0, tip, float(np.arcsin(-axes[2, 0])), 0.0, float(HOME_J[len(ARM_JOINTS)]))

    def aligned(self, side: str, place: Array) -> float:
        """The roll with which fingers that point down at a place close along the model's y."""
        return _remainder(self._arms[side].heading(place) - (np.pi if side == "right" else 0.0))


class Demonstrator(Planner[Scene]):
    """Plans hand-overs of a cube that lies where a scene has it."""

    def paths(self, scene: Scene) -> dict[str, list[Waypoint]]:
        return {"left": self._take(), "right": self._pick_and_offer(scene)}

    def _pick_and_offer(self, scene: Scene) -> list[Waypoint]:
        cube = np.array([scene.x, scene.y, CUBE_HALF_M])
        above, grasp = cube + np.array([[0.0, 0.0, _ABOVE_M], [0.0, 0.0, _GRASP_M]])
        aligned = self.aligned("right", cube)  # onto two faces of the cube
        away = _MEETING + np.array([_APART_M, 0.0, 0.0])
        return [
            self.home("right"),
            Waypoint(1.4, above, _DOWN, aligned, OPEN_M),
            Waypoint(2.2, grasp, _DOWN, aligned, OPEN_M),
            Waypoint(2.6, grasp, _DOWN, aligned, CLOSED_M),
            Waypoint(3.3, above, _DOWN, aligned, CLOSED_M),
            Waypoint(4.8, _MEETING, 0.0, 0.0, CLOSED_M),
            Waypoint(5.9, _MEETING, 0.0, 0.0, CLOSED_M),
            Waypoint(6.3, _MEETING, 0.0, 0.0, OPEN_M),
            Waypoint(7.1, away, 0.0, 0.0, OPEN_M),
        ]

    def _take(self) -> list[Waypoint]:
        home = self.home("left")
        waiting = _MEETING - np.array([_APART_M, 0.0, 0.0])
        across = np.pi / 2  # the right fingers hold two sides of the cube, the left ones take top and bottom
        return [
            home,
            Waypoint(1.4, home.tip, home.pitch, 0.0, OPEN_M),
            Waypoint(4.2, waiting, 0.0, across, OPEN_M),
            Waypoint(4.9, waiting, 0.0, across, OPEN_M),
            Waypoint(5.5, _MEETING, 0.0, across, OPEN_M),
            Waypoint(5.9, _MEETING, 0.0, across, CLOSED_M),
            Waypoint(7.1, _MEETING, 0.0, across, CLOSED_M),
            Waypoint(7.9, waiting, 0.0, across, CLOSED_M),
        ]


def _turn(axis: int, angle: float) -> Array:
    """The rotation [3, 3] about x, y or z."""
    matrix, quaternion = np.empty(9), np.empty(4)
    mujoco.mju_axisAngle2Quat(quaternion, np.eye(3)[axis], angle)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


def _remainder(angle: float) -> float:
    """The same direction within half a turn of 0."""
    return float(np.remainder(angle + np.pi, 2.0 * np.pi) - np.pi)
