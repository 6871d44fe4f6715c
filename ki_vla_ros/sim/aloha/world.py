"""ALOHA in simulation: two ViperX arms with grippers at a table, three cameras, and the judge of a handed-over cube.

The model and its meshes are those of the package gym-aloha (Apache-2.0), of which nothing is imported: only MuJoCo is
needed beside it. Positions in rad, of a gripper in m: how far its left finger stands from the middle. Lengths in m, in
the model's frame (x from the left arm to the right one, z up, table top at z = 0).
Legend: J joints (fourteen, in the order of `JOINTS`), H and W the size of an image.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ki_vla_ros.errors import SimulationError
from ki_vla_ros.sim.rendering import Cameras, mujoco
from ki_vla_ros.sim.world import TIMESTEP_S

PACKAGE: Final = "gym_aloha"
MODEL: Final = "assets/bimanual_viperx_transfer_cube.xml"

SIDES: Final = ("left", "right")
ARM_JOINTS: Final = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
JOINTS: Final = tuple(f"{side}_{joint}" for side in SIDES for joint in (*ARM_JOINTS, "gripper"))
CAMERAS: Final = ("top", "left_wrist", "right_wrist")
INSTRUCTION: Final = "Pick up the cube with the right arm and transfer it to the left arm."
TIME_LIMIT_S: Final = 10.0

# The fingers as far apart as they go, as close as they go (past touching, so that they press), and as at the start.
OPEN_M: Final = 0.057
CLOSED_M: Final = 0.021
HOME_ARM: Final = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0)
HOME_J: Final = np.array([*HOME_ARM, 0.02239] * 2)

# Where the cube's centre may lie, and the seeds there are: gym-aloha's, which draws the same place for the same seed.
X_RANGE_M: Final = (0.0, 0.2)
Y_RANGE_M: Final = (0.4, 0.6)
LARGEST_SEED: Final = 2**32 - 1
CUBE_HALF_M: Final = 0.02
# The left gripper alone must have held the cube for this long.
HOLD_S: Final = 0.2
_LARGEST_PICTURE: Final = 2048


@dataclass(frozen=True, slots=True)
class Scene:
    """Where the cube lies; `seed` is the one it was drawn with."""

    seed: int
    x: float
    y: float


def sample_scene(seed: int) -> Scene:
    """The scene that gym-aloha draws with this seed; SimulationError if there is none."""
    if not 0 <= seed <= LARGEST_SEED:
        raise SimulationError(f"scene_seed: expected 0 to {LARGEST_SEED}, got {seed}")
    (low_x, high_x), (low_y, high_y) = X_RANGE_M, Y_RANGE_M
    x, y = np.random.RandomState(seed).uniform([low_x, low_y], [high_x, high_y])
    return Scene(seed, float(x), float(y))


@dataclass(frozen=True, slots=True)
class Touching:
    """What the cube touches."""

    left: bool = False
    right: bool = False
    table: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reward`: the best so far of 1 the right gripper touches the cube, 2 and it is lifted, 3 the left one touches it,
    4 and it is lifted; as in gym-aloha, where 4 is success.

    Here it is a success only once the left gripper alone has held it for HOLD_S; a verdict that is `done` stays.
    """

    reward: int = 0
    success: bool = False
    done: bool = False


class Judge:
    """Watches one episode, step by step."""

    def __init__(self) -> None:
        self.verdict = Verdict()
        self._since_s = np.inf  # since when the left gripper alone holds the cube

    def observe(self, time_s: float, touching: Touching) -> None:
        if self.verdict.done:
            return
        lifted = not touching.table
        now = 3 + lifted if touching.left else (1 + lifted if touching.right else 0)
        held = touching.left and lifted and not touching.right
        self._since_s = min(self._since_s, time_s) if held else np.inf
        success = time_s - self._since_s >= HOLD_S
        self.verdict = Verdict(max(self.verdict.reward, now), success, success or time_s >= TIME_LIMIT_S)


class AlohaWorld:
    """Physics, cameras and judge; it steps only when told to, so the caller keeps real time."""

    joints = JOINTS

    def __init__(self, width: int = 320, height: int = 240, render: bool = True) -> None:
        """With `render` False no GL library is needed, and `render` refuses to work.

        SimulationError if gym-aloha's files are not installed.
        """
        for name, value in (("width", width), ("height", height)):
            if not 1 <= value <= _LARGEST_PICTURE:
                raise SimulationError(f"{name}: expected 1..{_LARGEST_PICTURE} pixels, got {value}")
        self._model = load_model(width, height)
        self._data = mujoco.MjData(self._model)
        names = [model_joint(joint) for joint in JOINTS]
        self._qpos_J = np.array([self._model.joint(name).qposadr[0] for name in names])
        self._dof_J = np.array([self._model.joint(name).dofadr[0] for name in names])
        # Each gripper's right finger is the mirror image of its left one.
        self._mirror = np.array([self._model.joint(f"vx300s_{side}/right_finger").qposadr[0] for side in SIDES])
        self._grippers = np.array([JOINTS.index(f"{side}_gripper") for side in SIDES])
        # The model has one actuator per joint, in the order of the joints.
        self._actuators = np.array([*self._qpos_J, *self._mirror])
        bounds = self._model.actuator_ctrlrange[self._qpos_J]
        self.lower_J: NDArray[np.float64] = bounds[:, 0].copy()
        self.upper_J: NDArray[np.float64] = bounds[:, 1].copy()
        cube = self._model.joint("red_box_joint")
        self._cube = slice(cube.qposadr[0], cube.qposadr[0] + 7)
        self._touched = _index_geoms(self._model)
        self._cameras = Cameras(self._model) if render else None
        self._scene: Scene | None = None
        self._judge = Judge()

    def close(self) -> None:
        """Frees the GL context."""
        if self._cameras is not None:
            self._cameras.close()
            self._cameras = None

    def reset(self, scene: Scene) -> None:
        """Lays the cube where the scene has it, puts the arms at rest at HOME_J, resets time and judge."""
        mujoco.mj_resetData(self._model, self._data)
        self._data.qpos[self._qpos_J] = HOME_J
        self._data.qpos[self._mirror] = -HOME_J[self._grippers]
        self._data.qpos[self._cube] = (scene.x, scene.y, CUBE_HALF_M, 1.0, 0.0, 0.0, 0.0)
        self._command(HOME_J)
        mujoco.mj_forward(self._model, self._data)
        self._scene, self._judge = scene, Judge()

    def step(self, command_J: ArrayLike) -> None:
        """Makes one physics step of TIMESTEP_S towards the commanded positions, clipped to the joints' limits."""
        position_J = np.asarray(command_J, dtype=np.float64)
        if position_J.shape != (len(JOINTS),) or not np.all(np.isfinite(position_J)):
            raise SimulationError(
                f"joint positions: expected finite numbers for {', '.join(JOINTS)}; got {command_J!r}"
            )
        judge = self.judge
        self._command(position_J)
        # The two halves of mj_step, second half first: contacts and poses then match the new joint positions.
        mujoco.mj_step2(self._model, self._data)
        mujoco.mj_step1(self._model, self._data)
        judge.observe(self.time_s, self._touching())

    @property
    def scene(self) -> Scene:
        if self._scene is None:
            raise SimulationError("the world has no scene yet; call reset(scene) first")
        return self._scene

    @property
    def judge(self) -> Judge:
        assert self.scene is not None
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
    def cube_position(self) -> NDArray[np.float64]:
        """The cube's centre, [3]."""
        return self._data.qpos[self._cube][:3].copy()  # type: ignore[no-any-return]

    def render(self, camera: str) -> NDArray[np.uint8]:
        """An RGB image [H, W, 3] of one of the model's cameras; `CAMERAS` are those of the robot."""
        if self._cameras is None:
            raise SimulationError(
                "no images: this world was made with render=False, or is closed; use AlohaWorld(render=True)"
            )
        return self._cameras.render(self._data, camera)

    def _command(self, position_J: NDArray[np.float64]) -> None:
        self._data.ctrl[self._actuators] = (*position_J, *-position_J[self._grippers])

    def _touching(self) -> Touching:
        cube, left, right, table = self._touched
        pairs = self._data.contact.geom
        partners = set(pairs[(pairs == cube).any(axis=1)].ravel().tolist())
        return Touching(*(not partners.isdisjoint(geoms) for geoms in (left, right, table)))


def model_joint(joint: str) -> str:
    """The model's name of a joint; a gripper is its left finger."""
    side, _, name = joint.partition("_")
    return f"vx300s_{side}/{'left_finger' if name == 'gripper' else name}"


def load_model(width: int, height: int) -> Any:
    """The model, for images of this size. Without multisampling and shadows it draws ten times as fast in software."""
    spec = mujoco.MjSpec.from_file(str(find_model()))
    spec.option.timestep = TIMESTEP_S
    spec.visual.quality.offsamples = spec.visual.quality.shadowsize = 0
    spec.visual.global_.offwidth, spec.visual.global_.offheight = width, height
    return spec.compile()


def find_model() -> Path:
    """The model's file in the installed package gym-aloha, which is not imported; SimulationError if it is missing."""
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder) / MODEL
        if path.is_file():
            return path
    fault = "which is not installed" if found is None else f"and found it without {MODEL}"
    raise SimulationError(
        f"the simulated ALOHA needs the model of the package 'gym-aloha', {fault}; run "
        "'pip install --no-deps gym-aloha' (what it depends on is not needed)"
    )


def _index_geoms(model: Any) -> tuple[int, set[int], set[int], set[int]]:
    """The cube's geom, and those of the left gripper's fingers, the right one's and the table."""
    names = {model.geom(geom).name: geom for geom in range(model.ngeom)}
    left, right = ({names[f"vx300s_{side}/10_{finger}_gripper_finger"] for finger in SIDES} for side in SIDES)
    return names["red_box"], left, right, {names["table"]}
