"""ALOHA in simulation: two ViperX arms with grippers at a table, three cameras, and the judge of what they do.

The model and its meshes are those of the package gym-aloha (Apache-2.0), of which nothing is imported: only MuJoCo is
needed beside it. Positions in rad, of a gripper in m: how far its left finger stands from the middle. Lengths in m, in
the model's frame (x from the left arm to the right one, z up, table top at z = 0).
Legend: J joints (fourteen, in the order of `JOINTS`), H and W the size of an image.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ki_vla_ros.errors import SimulationError
from ki_vla_ros.sim.rendering import Cameras, mujoco, project
from ki_vla_ros.sim.world import TIMESTEP_S

PACKAGE: Final = "gym_aloha"
MODEL: Final = "assets/bimanual_viperx_transfer_cube.xml"

SIDES: Final = ("left", "right")
ARM_JOINTS: Final = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
JOINTS: Final = tuple(f"{side}_{joint}" for side in SIDES for joint in (*ARM_JOINTS, "gripper"))
CAMERAS: Final = ("top", "left_wrist", "right_wrist")
INSTRUCTION: Final = "Pick up the cube with the right arm and transfer it to the left arm."
TIME_LIMIT_S: Final = 10.0
HIGHEST_REWARD: Final = 4

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
# A task must have been done for this long.
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


class Contacts(Protocol):
    """What touches what, as a judge needs it."""

    @property
    def reward(self) -> int:
        """0 to 4, as gym-aloha counts."""
        ...

    @property
    def done(self) -> bool:
        """Whether the task is done, if it stays so."""
        ...


@dataclass(frozen=True, slots=True)
class Touching:
    """What the cube touches.

    The reward is 1 where the right gripper touches it, 2 if it is lifted, 3 where the left one touches it, 4 if it is
    lifted. The left gripper alone must have it in the end.
    """

    left: bool = False
    right: bool = False
    table: bool = False

    @property
    def reward(self) -> int:
        lifted = not self.table
        return 3 + lifted if self.left else (1 + lifted if self.right else 0)

    @property
    def done(self) -> bool:
        return self.left and not self.right and not self.table


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reward`: the best so far; HIGHEST_REWARD is success in gym-aloha.

    Here it is a success only once the task has been done for a while; a verdict that is `done` stays.
    """

    reward: int = 0
    success: bool = False
    done: bool = False


class Judge:
    """Watches one episode, step by step."""

    def __init__(self, hold_s: float = HOLD_S) -> None:
        self.verdict = Verdict()
        self._hold_s = hold_s
        self._since_s = np.inf  # since when the task is done

    def observe(self, time_s: float, contacts: Contacts) -> None:
        if self.verdict.done:
            return
        self._since_s = min(self._since_s, time_s) if contacts.done else np.inf
        success = time_s - self._since_s >= self._hold_s
        reward = max(self.verdict.reward, contacts.reward)
        self.verdict = Verdict(reward, success, success or time_s >= TIME_LIMIT_S)


AnyScene = TypeVar("AnyScene")


class TwoArms(ABC, Generic[AnyScene]):
    """Physics, cameras and judge; it steps only when told to, so the caller keeps real time."""

    joints = JOINTS
    model_file: ClassVar[str]
    hold_s: ClassVar[float] = HOLD_S

    def __init__(self, width: int = 320, height: int = 240, render: bool = True) -> None:
        """With `render` False no GL library is needed, and `render` refuses to work.

        SimulationError if gym-aloha's files are not installed.
        """
        for name, value in (("width", width), ("height", height)):
            if not 1 <= value <= _LARGEST_PICTURE:
                raise SimulationError(f"{name}: expected 1..{_LARGEST_PICTURE} pixels, got {value}")
        self._model = load_model(width, height, self.model_file)
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
        self._cameras = Cameras(self._model) if render else None
        self._scene: AnyScene | None = None
        self._judge = Judge()

    def close(self) -> None:
        """Frees the GL context."""
        if self._cameras is not None:
            self._cameras.close()
            self._cameras = None

    def reset(self, scene: AnyScene) -> None:
        """Lays the objects where the scene has them, puts the arms at rest at HOME_J, resets time and judge."""
        mujoco.mj_resetData(self._model, self._data)
        self._data.qpos[self._qpos_J] = HOME_J
        self._data.qpos[self._mirror] = -HOME_J[self._grippers]
        self._lay(scene)
        self._command(HOME_J)
        mujoco.mj_forward(self._model, self._data)
        self._scene, self._judge = scene, Judge(self.hold_s)

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
        judge.observe(self.time_s, self._contacts())

    @property
    def scene(self) -> AnyScene:
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

    def render(self, camera: str) -> NDArray[np.uint8]:
        """An RGB image [H, W, 3] of one of the model's cameras; `CAMERAS` are those of the robot."""
        if self._cameras is None:
            raise SimulationError(
                "no images: this world was made with render=False, or is closed; use AlohaWorld(render=True)"
            )
        return self._cameras.render(self._data, camera)

    def place(self, camera: str) -> tuple[float, float] | None:
        """Where a camera's image shows what the task is about, in 0..1, to the right and down; None: of two things."""
        return None

    def _command(self, position_J: NDArray[np.float64]) -> None:
        self._data.ctrl[self._actuators] = (*position_J, *-position_J[self._grippers])

    def _place(self, joint: str, *position: float) -> None:
        """Puts an object, by its free joint, to x, y, z."""
        self._data.qpos[self._places(joint)] = (*position, 1.0, 0.0, 0.0, 0.0)

    def _places(self, joint: str) -> slice:
        first = self._model.joint(joint).qposadr[0]
        return slice(first, first + 7)

    def _geoms(self, *names: str) -> set[int]:
        return {self._model.geom(name).id for name in names}

    def _fingers(self, side: str) -> set[int]:
        return self._geoms(*(f"vx300s_{side}/10_{finger}_gripper_finger" for finger in SIDES))

    def _partners(self, geoms: set[int]) -> set[int]:
        """The geoms that touch one of these."""
        pairs = self._data.contact.geom
        return set(pairs[np.isin(pairs, list(geoms)).any(axis=1)].ravel().tolist())

    @abstractmethod
    def _lay(self, scene: AnyScene) -> None: ...

    @abstractmethod
    def _contacts(self) -> Contacts: ...


class AlohaWorld(TwoArms[Scene]):
    """A cube is to be handed over."""

    model_file = MODEL

    def __init__(self, width: int = 320, height: int = 240, render: bool = True) -> None:
        super().__init__(width, height, render)
        self._cube = self._geoms("red_box")
        self._touched = self._fingers("left"), self._fingers("right"), self._geoms("table")

    @property
    def cube_position(self) -> NDArray[np.float64]:
        """The cube's centre, [3]."""
        return self._data.qpos[self._places("red_box_joint")][:3].copy()  # type: ignore[no-any-return]

    def place(self, camera: str) -> tuple[float, float] | None:
        size = self._model.vis.global_
        u, v = project(self._model, self._data, camera, self.cube_position, size.offwidth, size.offheight)
        return u / size.offwidth, v / size.offheight

    def _lay(self, scene: Scene) -> None:
        self._place("red_box_joint", scene.x, scene.y, CUBE_HALF_M)

    def _contacts(self) -> Touching:
        partners = self._partners(self._cube)
        return Touching(*(not partners.isdisjoint(geoms) for geoms in self._touched))


def model_joint(joint: str) -> str:
    """The model's name of a joint; a gripper is its left finger."""
    side, _, name = joint.partition("_")
    return f"vx300s_{side}/{'left_finger' if name == 'gripper' else name}"


def load_model(width: int, height: int, file: str = MODEL) -> Any:
    """The model, for images of this size. Without multisampling and shadows it draws ten times as fast in software."""
    spec = mujoco.MjSpec.from_file(str(find_model(file)))
    spec.option.timestep = TIMESTEP_S
    spec.visual.quality.offsamples = spec.visual.quality.shadowsize = 0
    spec.visual.global_.offwidth, spec.visual.global_.offheight = width, height
    return spec.compile()


def find_model(file: str = MODEL) -> Path:
    """The model's file in the installed package gym-aloha, which is not imported; SimulationError if it is missing."""
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder) / file
        if path.is_file():
            return path
    fault = "which is not installed" if found is None else f"and found it without {file}"
    raise SimulationError(
        f"the simulated ALOHA needs the model of the package 'gym-aloha', {fault}; run "
        "'pip install --no-deps gym-aloha' (what it depends on is not needed)"
    )
