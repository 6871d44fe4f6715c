"""The scripted demonstrator: inverse kinematics and minimum-jerk motions that solve the simulated tasks.

A demonstration is planned for the fingertip point: horizontal motion and height are piecewise quintics, and the descent
starts as early as possible without passing low over other objects. Whatever the starting joints have beyond that tip
motion (a tilted tool, a turned wrist, their speeds) fades out as a quintic in joint space. A demonstration can thus
start from any joint position, velocity and acceleration.

Legend: J joints (seven), n samples, K segments, D coordinates. Lengths in m, angles in rad, times in s from the
demonstration's start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ki_vla_ros.errors import SimulationError
from ki_vla_ros.sim.task import Scene
from ki_vla_ros.sim.world import JOINTS, World

Array = NDArray[np.float64]

# Lengths of arm.xml: shoulder above the table, upper arm, forearm with tube (elbow to wrist), wrist to fingertip point.
_SHOULDER_M, _UPPER_M, _FOREARM_M, _TOOL_M = 0.18, 0.34, 0.34, 0.18

# A touch leaves the fingers a little open: a policy that imitates this errs to both sides, and 0 is the joint's limit.
_GRIPPER_END_M = {"touch": 0.004, "point at": 0.02}
_POINT_HEIGHT_M = 0.06
# A touch is planned to end this deep inside the object, so that the tip arrives with some speed and despite small
# errors. The flattest object is 14 mm high.
_PRESS_M = 0.01
# Far from the target the tip travels _CLEARANCE_M above the tallest object; it starts across once it has risen to
# within _ALMOST_CLEAR_M of that height.
_CLEARANCE_M = 0.06
_ALMOST_CLEAR_M = 0.03
# Below the clear height it stays within _NEAR_M of the target's axis, or _CORRECT_M if it is already on its way down.
_NEAR_M, _CORRECT_M = 0.02, 0.03

# A minimum-jerk move of length d from rest to rest lasts (60 d / jerk)^(1/3): the jerk at its end sets the pace.
_TIP_JERK = 4.0
_JOINT_JERK = 40.0
_GRIPPER_JERK = 2.5
_SHORTEST_S, _LONGEST_S = 0.05, 4.0
_DIFFERENCE_S = 3e-4


def tip_to_joints(xyz: ArrayLike, gripper_m: float = 0.0) -> Array:
    """Joints [J] that bring the fingertip point to `xyz`, tool pointing down, fingers opening along the world's y.

    SimulationError if the point is out of the arm's reach.
    """
    tips = np.asarray(xyz, dtype=np.float64).reshape(1, 3)
    return _solve(tips, np.array([gripper_m])).reshape(len(JOINTS))


def joints_to_tip(position_nJ: ArrayLike) -> Array:
    """Fingertip points [n, 3] of joint positions [n, J], any forearm roll and tool direction."""
    pan, lift, elbow, roll, pitch = np.asarray(position_nJ, dtype=np.float64)[:, :5].T
    # In the arm's plane turned by pan, upper arm and forearm lean by lift and lift + elbow. The tool leaves the
    # forearm's direction by pitch, in a plane turned about the forearm by roll. The wrist's roll moves no tip.
    lean = lift + elbow
    along = _FOREARM_M + _TOOL_M * np.cos(pitch)
    across = _TOOL_M * np.sin(pitch) * np.cos(roll)
    aside = _TOOL_M * np.sin(pitch) * np.sin(roll)
    radius = _UPPER_M * np.sin(lift) + along * np.sin(lean) + across * np.cos(lean)
    height = _SHOULDER_M + _UPPER_M * np.cos(lift) + along * np.cos(lean) - across * np.sin(lean)
    tip_n3: Array = np.stack(
        [radius * np.cos(pan) - aside * np.sin(pan), radius * np.sin(pan) + aside * np.cos(pan), height], axis=1
    )
    return tip_n3


def _solve(tips_n3: Array, gripper_n: Array) -> Array:
    """Inverse kinematics [n, J]; forearm_roll = 0, elbow up."""
    x, y, z = tips_n3.T
    radius, height = np.hypot(x, y), z + _TOOL_M - _SHOULDER_M
    cos_elbow = (radius**2 + height**2 - _UPPER_M**2 - _FOREARM_M**2) / (2.0 * _UPPER_M * _FOREARM_M)
    outside = ~((np.abs(cos_elbow) <= 0.995) & (radius >= 0.1))
    if outside.any():
        raise SimulationError(
            f"tip position {np.round(tips_n3[np.argmax(outside)], 3).tolist()} is out of the arm's reach: expected the "
            f"wrist within {_UPPER_M + _FOREARM_M:.2f} m of the shoulder and at least 0.10 m from the base's axis"
        )
    elbow = np.arccos(cos_elbow)
    lift = np.arctan2(radius, height) - np.arctan2(_FOREARM_M * np.sin(elbow), _UPPER_M + _FOREARM_M * np.cos(elbow))
    pan = np.arctan2(y, x)
    return np.stack([pan, lift, elbow, np.zeros_like(pan), np.pi - lift - elbow, pan, gripper_n], axis=1)


@dataclass(frozen=True, slots=True)
class _Spline:
    """Quintic segments: `coefficients_K6D[k]` in powers of the time since `starts_K[k]`; at rest after `end_s`."""

    starts_K: Array
    coefficients_K6D: Array
    end_s: float

    def __call__(self, times_n: Array) -> Array:
        times_n = np.minimum(times_n, self.end_s)
        segment_n = np.maximum(np.searchsorted(self.starts_K, times_n, side="right") - 1, 0)
        local_n = times_n - self.starts_K[segment_n]
        x_nD: Array = np.einsum("np,npd->nd", local_n[:, None] ** np.arange(6), self.coefficients_K6D[segment_n])
        return x_nD


@dataclass(frozen=True, slots=True)
class _State:
    """One end of a motion: position, velocity, acceleration, each [D]."""

    x: Array
    v: Array
    a: Array


class _Motion:
    """Collects quintic segments; `state` is where the last one ends."""

    def __init__(self, start: _State) -> None:
        self.state = start
        self.end_s = 0.0
        self._starts: list[float] = []
        self._coefficients: list[Array] = []

    def go(self, x: Array, duration_s: float, v: Array | None = None) -> None:
        """Adds a segment to `x` that ends with velocity `v` (default: at rest) and no acceleration."""
        if duration_s <= 0.0:
            return
        end = _State(x, np.zeros_like(x) if v is None else v, np.zeros_like(x))
        self._starts.append(self.end_s)
        self._coefficients.append(_quintic(self.state, end, duration_s))
        self.state = end
        self.end_s += duration_s

    def spline(self) -> _Spline:
        if not self._starts:
            still = np.concatenate([self.state.x[None], np.zeros((5, self.state.x.size))])
            return _Spline(np.zeros(1), still[None], 0.0)
        return _Spline(np.array(self._starts), np.stack(self._coefficients), self.end_s)


def _quintic(start: _State, end: _State, duration_s: float) -> Array:
    """Coefficients [6, D] of the minimum-jerk polynomial between two states."""
    t = duration_s
    gap_x = end.x - start.x - start.v * t - start.a * t**2 / 2.0
    gap_v = (end.v - start.v - start.a * t) * t
    gap_a = (end.a - start.a) * t**2
    return np.stack(
        [
            start.x,
            start.v,
            start.a / 2.0,
            (10.0 * gap_x - 4.0 * gap_v + gap_a / 2.0) / t**3,
            (-15.0 * gap_x + 7.0 * gap_v - gap_a) / t**4,
            (6.0 * gap_x - 3.0 * gap_v + gap_a / 2.0) / t**5,
        ]
    )


def _duration(start: _State, goal: Array, jerk: float) -> float:
    """Time to come to rest at `goal` such that the jerk at the end is `jerk`.

    If a minimum-jerk motion is planned again on its way, with the same end time, it does not change, and neither does
    the jerk at its end. So the longest time with that jerk continues a running motion unchanged; from rest it follows
    the cube-root law above.
    """
    times = np.geomspace(_SHORTEST_S, _LONGEST_S, 300)
    t = times[:, None]
    final = np.linalg.norm(60.0 * (start.x - goal) + 24.0 * start.v * t + 3.0 * start.a * t**2, axis=1) / times**3
    above = np.flatnonzero(final > jerk)
    if above.size == 0:
        settled = max(np.abs(start.x - goal).max(), np.abs(start.v).max(), np.abs(start.a).max()) < 1e-9
        return 0.0 if settled else _SHORTEST_S
    last = int(above[-1])
    if last == len(times) - 1:
        return _LONGEST_S
    # Between two grid points the logarithm is nearly straight.
    share = np.log(final[last] / jerk) / np.log(final[last] / final[last + 1])
    return float(times[last] * (times[last + 1] / times[last]) ** share)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """Joint positions over time; holds its last position after `duration_s`."""

    duration_s: float
    _across: _Spline
    _height: _Spline
    _gripper: _Spline
    _fading: _Spline
    _lower_J: Array
    _upper_J: Array

    def sample(self, times_n: ArrayLike) -> Array:
        """Positions [n, J] at `times_n`."""
        times = np.asarray(times_n, dtype=np.float64)
        path_nJ = _solve(np.concatenate([self._across(times), self._height(times)], axis=1), self._gripper(times)[:, 0])
        return np.clip(path_nJ + self._fading(times), self._lower_J, self._upper_J)

    def position(self, t_s: float) -> Array:
        return self.sample(np.array([t_s])).reshape(len(JOINTS))

    def velocity(self, t_s: float) -> Array:
        return self._differences(t_s)[1]

    def acceleration(self, t_s: float) -> Array:
        return self._differences(t_s)[2]

    def _differences(self, t_s: float) -> tuple[Array, Array, Array]:
        return _derivatives(self.sample(t_s + _DIFFERENCE_S * np.array([-1.0, 0.0, 1.0])))


def _derivatives(x_3D: Array) -> tuple[Array, Array, Array]:
    """Value, velocity and acceleration in the middle of three samples _DIFFERENCE_S apart."""
    before, now, after = x_3D
    return now, (after - before) / (2.0 * _DIFFERENCE_S), (after - 2.0 * now + before) / _DIFFERENCE_S**2


class Demonstrator:
    """Plans demonstrations that carry out a scene's task on the arm of `world`."""

    def __init__(self, world: World) -> None:
        self._lower_J, self._upper_J = world.lower_J, world.upper_J

    def plan(
        self,
        joint_J: ArrayLike,
        joint_velocity_J: ArrayLike | None,
        scene: Scene,
        object_positions: ArrayLike | None = None,
        via_tip_xyz: ArrayLike | None = None,
        joint_acceleration_J: ArrayLike | None = None,
    ) -> Demonstration:
        """A demonstration from the given motion (None: at rest, not accelerating) to the end of the scene's task.

        `object_positions` [n, 3]: the objects' present centres, by default where the scene put them. `via_tip_xyz`: a
        point that the tip passes without stopping before it turns to the target. SimulationError if the path leaves the
        arm's reach.
        """
        still_J = np.zeros(len(JOINTS))
        q = _State(
            np.asarray(joint_J, dtype=np.float64),
            still_J if joint_velocity_J is None else np.asarray(joint_velocity_J, dtype=np.float64),
            still_J if joint_acceleration_J is None else np.asarray(joint_acceleration_J, dtype=np.float64),
        )
        moments = _DIFFERENCE_S * np.array([[-1.0], [0.0], [1.0]])
        around_3J = q.x + q.v * moments + q.a * moments**2 / 2.0
        tip_33 = joints_to_tip(around_3J)
        tip = _State(*_derivatives(tip_33))
        path = _State(*_derivatives(_solve(tip_33, around_3J[:, -1])))

        fading = _Motion(_State(q.x - path.x, q.v - path.v, q.a - path.a))
        fading.go(still_J, _duration(fading.state, still_J, _JOINT_JERK))
        gripper = _Motion(_State(q.x[-1:], q.v[-1:], q.a[-1:]))
        opening = np.array([_GRIPPER_END_M[scene.task.verb]])
        gripper.go(opening, _duration(gripper.state, opening, _GRIPPER_JERK))
        across = _Motion(_State(tip.x[:2], tip.v[:2], tip.a[:2]))
        height = _Motion(_State(tip.x[2:], tip.v[2:], tip.a[2:]))
        goal, clear_m = _goal(scene, object_positions)
        if via_tip_xyz is not None:
            _pass_through(across, height, np.asarray(via_tip_xyz, dtype=np.float64), goal)
        _approach(across, height, goal, clear_m)

        duration_s = max(motion.end_s for motion in (across, height, gripper, fading))
        demonstration = Demonstration(
            duration_s,
            across.spline(),
            height.spline(),
            gripper.spline(),
            fading.spline(),
            self._lower_J,
            self._upper_J,
        )
        demonstration.sample(np.linspace(0.0, duration_s, 50))  # refuses a path out of reach now, not halfway
        return demonstration


def _goal(scene: Scene, object_positions: ArrayLike | None) -> tuple[Array, float]:
    """Where the tip ends [3], and the height at which it passes over every object."""
    tops = np.array([item.top_m for item in scene.objects])
    if object_positions is None:
        centres = np.array([(item.x, item.y, item.top_m / 2.0) for item in scene.objects])
    else:
        centres = np.asarray(object_positions, dtype=np.float64)
        if centres.shape != (len(tops), 3):
            raise SimulationError(f"object_positions: expected shape {(len(tops), 3)}, got {centres.shape}")
    top_n = centres[:, 2] + tops / 2.0
    goal = centres[scene.target].copy()
    goal[2] = top_n[scene.target] + (-_PRESS_M if scene.task.verb == "touch" else _POINT_HEIGHT_M)
    return goal, float(top_n.max()) + _CLEARANCE_M


def _pass_through(across: _Motion, height: _Motion, via: Array, goal: Array) -> None:
    """Adds the leg to `via`, passed level, heading for the goal at about the mean speed of the whole path."""
    start = across.state.x
    leg_s = _duration(across.state, via[:2], _TIP_JERK)
    leg_s = max(leg_s, _duration(height.state, via[2:], _TIP_JERK))
    rest_s = _duration(_State(via[:2], np.zeros(2), np.zeros(2)), goal[:2], _TIP_JERK)
    across.go(via[:2], leg_s, (goal[:2] - start) / max(leg_s + rest_s, _SHORTEST_S))
    height.go(via[2:], leg_s)


def _approach(across: _Motion, height: _Motion, goal: Array, clear_m: float) -> None:
    """Adds the motion over the target and down; far from it, never below `clear_m` except to rise from a low start."""
    begin_s = height.end_s
    z, goal_z = height.state, goal[2:]
    far = np.hypot(*(across.state.x - goal[:2])) > _CORRECT_M
    # Beside something low: up first, then across.
    if z.x[0] < clear_m - _ALMOST_CLEAR_M and (far or z.x[0] < goal_z[0] - _PRESS_M):
        target_z = np.array([clear_m])
        height.go(target_z, _duration(z, target_z, _TIP_JERK))
        stop_s = _first(height.spline(), clear_m - _ALMOST_CLEAR_M, begin_s, above=True) - begin_s
        across.go(across.state.x + across.state.v * stop_s / 3.0, stop_s)
    across.go(goal[:2], _duration(across.state, goal[:2], _TIP_JERK))

    moving_down = z.v[0] < -1e-3 or z.a[0] < -1e-2
    direct = _Motion(height.state)
    direct.go(goal_z, _duration(direct.state, goal_z, _TIP_JERK))
    low_s = height.end_s + _first(direct.spline(), clear_m, 0.0, above=False)
    corrected_s = _first_near(across.spline(), goal[:2], _CORRECT_M if moving_down or z.x[0] < clear_m else _NEAR_M)
    if low_s < corrected_s:
        level = np.maximum(height.state.x + 0.2 * height.state.v, clear_m)
        height.go(level, _duration(height.state, level, _TIP_JERK))
        fall = _Motion(height.state)
        fall.go(goal_z, _duration(fall.state, goal_z, _TIP_JERK))
        low_s = height.end_s + _first(fall.spline(), clear_m, 0.0, above=False)
        height.go(height.state.x, _first_near(across.spline(), goal[:2], _NEAR_M) - low_s)
    height.go(goal_z, _duration(height.state, goal_z, _TIP_JERK))


def _first(height: _Spline, level_m: float, after_s: float, *, above: bool) -> float:
    """The first time from `after_s` on at which the height passes `level_m`; the end if it never does."""
    times = np.linspace(after_s, height.end_s, 200)
    z = height(times)[:, 0]
    passed = np.flatnonzero(z >= level_m if above else z < level_m - 1e-6)
    return float(times[passed[0]]) if passed.size else height.end_s


def _first_near(across: _Spline, goal: Array, radius_m: float) -> float:
    """The time from which on the path stays within `radius_m` of the goal."""
    times = np.linspace(0.0, across.end_s, 400)
    outside = np.flatnonzero(np.linalg.norm(across(times) - goal, axis=1) > radius_m)
    return float(times[outside[-1]]) if outside.size else 0.0
