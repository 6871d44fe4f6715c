"""The simulated robot: a six-joint arm with a gripper before a table, two cameras, and the judge of what it touched.

It needs no ROS. Lengths in m, angles in rad, in the frame of the robot's base (x forward, y left, z up, table top at
z = 0). Legend: J joints (seven, in the order of `JOINTS`), S image side in pixels, n objects of the scene.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ki_vla_ros.errors import SimulationError
from ki_vla_ros.sim.rendering import Cameras, mujoco, project
from ki_vla_ros.sim.task import HALF_HEIGHT_M, SIZE_RANGE, Scene, SceneObject

JOINTS: Final = ("shoulder_pan", "shoulder_lift", "elbow", "forearm_roll", "wrist_pitch", "wrist_roll", "gripper")
CAMERAS: Final = ("scene", "wrist")
TIMESTEP_S: Final = 0.002
TIME_LIMIT_S: Final = 8.0

# The tip is at (0.30, 0, 0.25), tool down, gripper a little open; a test checks it against demonstrator.tip_to_joints.
HOME_J: Final = np.array([0.0, -0.0830101436, 1.9181363885, 0.0, 1.3064664088, 0.0, 0.01])

# "point at": the tip must stay this close to the object's axis, in this range of heights above it, for this long.
POINT_RADIUS_M: Final = 0.03
POINT_HEIGHT_M: Final = (0.03, 0.10)
POINT_HOLD_S: Final = 0.5

SLOTS: Final = 5
RGBA: Final = {
    "red": (0.86, 0.10, 0.09, 1.0),
    "green": (0.10, 0.62, 0.18, 1.0),
    "blue": (0.10, 0.26, 0.90, 1.0),
    "yellow": (0.96, 0.80, 0.08, 1.0),
    "purple": (0.58, 0.16, 0.74, 1.0),
    "white": (0.96, 0.96, 0.94, 1.0),
}
# MuJoCo's geom sizes at size 1: half extents of the box, radius of the sphere, radius and half height of the cylinders.
_NOMINAL: Final = {
    "cube": (HALF_HEIGHT_M["cube"],) * 3,
    "ball": (HALF_HEIGHT_M["ball"], 0.0, 0.0),
    "disc": (0.036, HALF_HEIGHT_M["disc"], 0.0),
    "pole": (0.0175, HALF_HEIGHT_M["pole"], 0.0),
}
_OBJECT_BIT, _ALL_BITS = 2, 7
_SHOWN, _HIDDEN = 1, 5
_MASS_KG, _INERTIA_KGM2 = 0.25, 2e-4
# So that a light touch moves nothing far and the ball does not roll away: linear in N s/m, angular in N m s/rad.
_LINEAR_DAMPING, _ANGULAR_DAMPING = 1.0, 0.004
_PARKED_Z_M = -1.0
_LARGEST_PICTURE = 2048


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judge's state: `reached` is the index of the first object touched or pointed at; once `done` it stays."""

    reached: int | None = None
    success: bool = False
    done: bool = False


class Judge:
    """Watches one episode of a scene, step by step."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._pointing = scene.task.verb == "point at"
        self._target = scene.target
        self._half_height_n = np.array([item.top_m / 2.0 for item in scene.objects])
        self._since_n = np.full(len(scene.objects), np.inf)  # when the tip came over each object; inf: it is not
        self.verdict = Verdict()

    @property
    def reached(self) -> int | None:
        return self.verdict.reached

    @property
    def success(self) -> bool:
        return self.verdict.success

    @property
    def done(self) -> bool:
        return self.verdict.done

    def observe(self, time_s: float, touched: set[int], tip: NDArray[np.float64], centres: NDArray[np.float64]) -> None:
        """Judges one physics step: the objects that the gripper touches, the tip [3], the objects' centres [n, 3]."""
        if self.verdict.done:
            return
        if touched:
            # If it touches two at once, the wrong one counts, because the instruction names only one.
            wrong = sorted(touched - {self._target})
            reached = wrong[0] if wrong else self._target
            self.verdict = Verdict(reached, success=reached == self._target and not self._pointing, done=True)
        elif self._pointing and (held := self._held(time_s, tip, centres)) is not None:
            self.verdict = Verdict(held, success=held == self._target, done=True)
        elif time_s >= TIME_LIMIT_S:
            self.verdict = Verdict(done=True)

    def _held(self, time_s: float, tip: NDArray[np.float64], centres: NDArray[np.float64]) -> int | None:
        height_n = tip[2] - centres[:, 2] - self._half_height_n
        near_n = np.hypot(*(tip[:2] - centres[:, :2]).T) <= POINT_RADIUS_M
        over_n = near_n & (height_n >= POINT_HEIGHT_M[0]) & (height_n <= POINT_HEIGHT_M[1])
        self._since_n = np.where(over_n, np.minimum(self._since_n, time_s), np.inf)
        held = np.flatnonzero(time_s - self._since_n >= POINT_HOLD_S)
        return int(held[0]) if held.size else None


class World:
    """Physics, cameras and judge; it steps only when told to, so the caller keeps real time."""

    joints = JOINTS

    def __init__(self, render_size: int = 288, render: bool = True) -> None:
        """With `render` False no GL library is needed, and the methods `render` and `segment` refuse to work."""
        if not 1 <= render_size <= _LARGEST_PICTURE:
            raise SimulationError(f"render_size: expected 1..{_LARGEST_PICTURE} pixels, got {render_size}")
        self._model = _build_model(render_size)
        self._data = mujoco.MjData(self._model)
        self._qpos_J = np.array([self._model.joint(name).qposadr[0] for name in JOINTS])
        self._dof_J = np.array([self._model.joint(name).dofadr[0] for name in JOINTS])
        self._mirror = self._model.joint("gripper_mirror").qposadr[0]
        self._tip_id = self._model.site("tip").id
        bounds = np.array([self._model.joint(name).range for name in JOINTS])
        self.lower_J: NDArray[np.float64] = bounds[:, 0]
        self.upper_J: NDArray[np.float64] = bounds[:, 1]
        self._slots = [_Slot(self._model, index) for index in range(SLOTS)]
        self._bodies = np.array([slot.body for slot in self._slots])
        self._slot_of_geom, self._gripper_geom = _index_geoms(self._model)
        self._render_size = render_size
        self._cameras = Cameras(self._model) if render else None
        self._scene: Scene | None = None
        self._judge: Judge | None = None

    def close(self) -> None:
        """Frees the GL context."""
        if self._cameras is not None:
            self._cameras.close()
            self._cameras = None

    def reset(self, scene: Scene, joint_position_J: ArrayLike | None = None) -> None:
        """Places the scene's objects, puts the arm at rest (at HOME_J by default), resets time and judge."""
        if len(scene.objects) > SLOTS:
            raise SimulationError(f"scene {scene.seed}: expected at most {SLOTS} objects, got {len(scene.objects)}")
        position_J = self._checked(HOME_J if joint_position_J is None else joint_position_J)
        judge = Judge(scene)
        mujoco.mj_resetData(self._model, self._data)
        for index, slot in enumerate(self._slots):
            slot.place(self._model, self._data, scene.objects[index] if index < len(scene.objects) else None)
        self._data.qpos[self._qpos_J] = position_J
        self._data.qpos[self._mirror] = position_J[-1]
        self._data.ctrl[:] = position_J
        mujoco.mj_forward(self._model, self._data)
        self._scene, self._judge = scene, judge

    def step(self, command_J: ArrayLike) -> None:
        """Makes one physics step of TIMESTEP_S towards the commanded positions, clipped to the joints' limits."""
        judge = self.judge
        self._data.ctrl[:] = self._checked(command_J)
        # The two halves of mj_step, second half first: contacts and poses then match the new joint positions.
        mujoco.mj_step2(self._model, self._data)
        mujoco.mj_step1(self._model, self._data)
        judge.observe(self.time_s, self._touched(), self.tip_position, self.object_positions)

    @property
    def scene(self) -> Scene:
        if self._scene is None:
            raise SimulationError("the world has no scene yet; call reset(scene) first")
        return self._scene

    @property
    def judge(self) -> Judge:
        if self._judge is None:
            raise SimulationError("the world has no scene yet; call reset(scene) first")
        return self._judge

    @property
    def time_s(self) -> float:
        """Simulated time since reset."""
        return float(self._data.time)

    @property
    def joint_position_J(self) -> NDArray[np.float64]:
        return self._data.qpos[self._qpos_J].copy()  # type: ignore[no-any-return]

    @property
    def joint_velocity_J(self) -> NDArray[np.float64]:
        return self._data.qvel[self._dof_J].copy()  # type: ignore[no-any-return]

    @property
    def tip_position(self) -> NDArray[np.float64]:
        """The point between the fingertips, [3]."""
        return self._data.site_xpos[self._tip_id].copy()  # type: ignore[no-any-return]

    @property
    def object_positions(self) -> NDArray[np.float64]:
        """Centres of the scene's objects, [n, 3]."""
        return self._data.xpos[self._bodies[: len(self.scene.objects)]]  # type: ignore[no-any-return]

    def render(self, camera: str) -> NDArray[np.uint8]:
        """An RGB image [S, S, 3] of camera "scene" or "wrist"."""
        return self._opened_cameras().render(self._data, camera)

    def segment(self, camera: str) -> NDArray[np.int8]:
        """The index in `scene.objects` of the object in each pixel [S, S]; -1 for arm, table and background."""
        geoms = self._opened_cameras().segment(self._data, camera)
        return self._slot_of_geom[geoms]  # geom -1 reads the last entry, which stands for "nothing"

    @property
    def render_size(self) -> int:
        """Width and height of its images, in pixels."""
        return self._render_size

    def project(self, camera: str, xyz: ArrayLike) -> tuple[float, float]:
        """Where a point appears, in pixels (u right, v down) from the image's upper left corner; maybe outside it.

        SimulationError for a point behind the camera.
        """
        if camera not in CAMERAS:
            raise SimulationError(f"camera {camera!r}: expected one of {', '.join(CAMERAS)}")
        return project(self._model, self._data, camera, xyz, self._render_size, self._render_size)

    def _opened_cameras(self) -> Cameras:
        if self._cameras is None:
            raise SimulationError(
                "no images: this world was made with render=False, or is closed; use World(render=True)"
            )
        return self._cameras

    @staticmethod
    def _checked(position_J: ArrayLike) -> NDArray[np.float64]:
        array_J = np.asarray(position_J, dtype=np.float64)
        if array_J.shape != (len(JOINTS),) or not np.all(np.isfinite(array_J)):
            raise SimulationError(
                f"joint positions: expected finite numbers for {', '.join(JOINTS)}; got {position_J!r}"
            )
        return array_J

    def _touched(self) -> set[int]:
        """Objects in contact with the gripper."""
        pairs = self._data.contact.geom
        of_gripper = self._gripper_geom[pairs]
        if not of_gripper.any():
            return set()
        slots = self._slot_of_geom[pairs[of_gripper[:, ::-1]]]  # of the geoms whose partner belongs to the gripper
        return {int(slot) for slot in slots if slot >= 0}


class _Slot:
    """A free body that can become any object: one geom per shape, all but one switched off.

    An unused slot hangs weightless below the floor, out of sight and touch.
    """

    def __init__(self, model: Any, index: int) -> None:
        self.body = model.body(f"object{index}").id
        joint = model.joint(f"object{index}")
        self._qpos = slice(joint.qposadr[0], joint.qposadr[0] + 7)
        self._geoms = {shape: model.geom(f"object{index}_{shape}").id for shape in _NOMINAL}
        self._parked = (0.3 * index, 0.0, _PARKED_Z_M)

    def place(self, model: Any, data: Any, item: SceneObject | None) -> None:
        for shape, geom in self._geoms.items():
            used = item is not None and shape == item.shape
            model.geom_contype[geom] = _OBJECT_BIT if used else 0
            model.geom_conaffinity[geom] = _ALL_BITS if used else 0
            model.geom_group[geom] = _SHOWN if used else _HIDDEN
        if item is None:
            model.body_gravcomp[self.body] = 1.0
            data.qpos[self._qpos] = (*self._parked, 1.0, 0.0, 0.0, 0.0)
            return
        if not SIZE_RANGE[0] <= item.size <= SIZE_RANGE[1]:
            low, high = SIZE_RANGE
            raise SimulationError(f"size of the {item.colour} {item.shape}: expected {low}..{high}, got {item.size}")
        geom = self._geoms[item.shape]
        model.geom_size[geom] = np.array(_NOMINAL[item.shape]) * item.size
        model.geom_rgba[geom] = RGBA[item.colour]
        model.body_gravcomp[self.body] = 0.0
        half_yaw = item.yaw / 2.0
        data.qpos[self._qpos] = (item.x, item.y, item.top_m / 2.0, np.cos(half_yaw), 0.0, 0.0, np.sin(half_yaw))


def _build_model(render_size: int) -> Any:
    """The arm of arm.xml with SLOTS object slots.

    The off-screen buffer is no larger than the image, because all of it is cleared for every image.
    """
    spec = mujoco.MjSpec.from_file(str(Path(__file__).with_name("arm.xml")))
    spec.option.timestep = TIMESTEP_S
    spec.visual.global_.offwidth = spec.visual.global_.offheight = render_size
    kinds = {
        "cube": mujoco.mjtGeom.mjGEOM_BOX,
        "ball": mujoco.mjtGeom.mjGEOM_SPHERE,
        "disc": mujoco.mjtGeom.mjGEOM_CYLINDER,
        "pole": mujoco.mjtGeom.mjGEOM_CYLINDER,
    }
    for index in range(SLOTS):
        body = spec.worldbody.add_body(name=f"object{index}", pos=[0.0, 0.0, _PARKED_Z_M], gravcomp=1.0)
        body.explicitinertial = True
        body.mass = _MASS_KG
        body.inertia = [_INERTIA_KGM2] * 3
        body.add_freejoint(name=f"object{index}")
        for shape, kind in kinds.items():
            # At the largest size, because MuJoCo computes its broad phase's bounding boxes now and keeps them.
            size = np.array(_NOMINAL[shape]) * SIZE_RANGE[1]
            geom = body.add_geom(name=f"object{index}_{shape}", type=kind, size=size)
            geom.contype, geom.conaffinity, geom.group = _OBJECT_BIT, _ALL_BITS, _SHOWN
            geom.condim, geom.friction = 3, [0.8, 0.005, 0.0001]
    model = spec.compile()
    for index in range(SLOTS):
        dof = model.joint(f"object{index}").dofadr[0]
        model.dof_damping[dof : dof + 3] = _LINEAR_DAMPING
        model.dof_damping[dof + 3 : dof + 6] = _ANGULAR_DAMPING
    return model


def _index_geoms(model: Any) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """For each geom, its object slot or -1 (and one more -1 at the end), and whether it counts as the gripper."""
    slot_of_geom = np.full(model.ngeom + 1, -1, dtype=np.int8)
    gripper_geom = np.zeros(model.ngeom, dtype=np.bool_)
    for geom in range(model.ngeom):
        name = model.geom(geom).name
        if name.startswith("object"):
            slot_of_geom[geom] = int(name.removeprefix("object").split("_")[0])
        gripper_geom[geom] = name in ("palm", "left_tip", "right_tip")
    return slot_of_geom, gripper_geom
