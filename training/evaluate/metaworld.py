"""MetaWorld's fifty tasks of a Sawyer arm (package `metaworld`), as LeRobot's datasets and evaluation have them.

The state is the hand's place and the gripper's opening, the action a step of the hand and the gripper's, the picture
that of the camera `corner2` where LeRobot puts it, the right way up. Shadows and reflections are not drawn: with them a
picture takes ten times as long. The robot file is config/robots/metaworld.yaml.

`metaworld` pins a MuJoCo of its own, so it lives in an environment of its own (`make metaworld`) and is imported when
the first task is opened.

Legend: S state, D actions, both as the robot file has them (m); the package's own are called raw.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError, SimulationError
from ki_vla_ros.policy import resize_with_pad
from ki_vla_ros.robot import find_robot, read_robot

if TYPE_CHECKING:
    from ki_vla_ros.sim import Cameras

CAMERA: Final = "corner2"
SMALLEST, LARGEST = 16, 1024
MOST_OPEN: Final = 12
# LeRobot moves the camera here, which is nearer than where the package has it (it calls the place corner4).
CAMERA_POSITION_M: Final = (0.75, 0.075, 0.7)
TIME_LIMIT_S: Final = 5.0  # 400 steps; MT50's protocol has more

# What each task is called in LeRobot's metaworld_mt50.
INSTRUCTIONS: Final[Mapping[str, str]] = {
    "assembly-v3": "Pick up a nut and place it onto a peg",
    "basketball-v3": "Dunk the basketball into the basket",
    "bin-picking-v3": "Grasp the puck from one bin and place it into another bin",
    "box-close-v3": "Grasp the cover and close the box with it",
    "button-press-topdown-v3": "Press a button from the top",
    "button-press-topdown-wall-v3": "Bypass a wall and press a button from the top",
    "button-press-v3": "Press a button",
    "button-press-wall-v3": "Bypass a wall and press a button",
    "coffee-button-v3": "Push a button on the coffee machine",
    "coffee-pull-v3": "Pull a mug from a coffee machine",
    "coffee-push-v3": "Push a mug under a coffee machine",
    "dial-turn-v3": "Rotate a dial 180 degrees",
    "disassemble-v3": "Pick a nut out of a peg",
    "door-close-v3": "Close a door with a revolving joint",
    "door-lock-v3": "Lock the door by rotating the lock clockwise",
    "door-open-v3": "Open a door with a revolving joint",
    "door-unlock-v3": "Unlock the door by rotating the lock counter-clockwise",
    "drawer-close-v3": "Push and close a drawer",
    "drawer-open-v3": "Open a drawer",
    "faucet-close-v3": "Rotate the faucet clockwise",
    "faucet-open-v3": "Rotate the faucet counter-clockwise",
    "hammer-v3": "Hammer a screw on the wall",
    "hand-insert-v3": "Insert the gripper into a hole",
    "handle-press-side-v3": "Press a handle down sideways",
    "handle-press-v3": "Press a handle down",
    "handle-pull-side-v3": "Pull a handle up sideways",
    "handle-pull-v3": "Pull a handle up",
    "lever-pull-v3": "Pull a lever down 90 degrees",
    "peg-insert-side-v3": "Insert a peg sideways",
    "peg-unplug-side-v3": "Unplug a peg sideways",
    "pick-out-of-hole-v3": "Pick up a puck from a hole",
    "pick-place-v3": "Pick and place a puck to a goal",
    "pick-place-wall-v3": "Pick a puck, bypass a wall and place the puck",
    "plate-slide-back-side-v3": "Get a plate from the cabinet sideways",
    "plate-slide-back-v3": "Get a plate from the cabinet",
    "plate-slide-side-v3": "Slide a plate into a cabinet sideways",
    "plate-slide-v3": "Slide a plate into a cabinet",
    "push-back-v3": "Push the puck to a goal",
    "push-v3": "Push the puck to a goal",
    "push-wall-v3": "Bypass a wall and push a puck to a goal",
    "reach-v3": "Reach a goal position",
    "reach-wall-v3": "Bypass a wall and reach a goal",
    "shelf-place-v3": "Pick and place a puck onto a shelf",
    "soccer-v3": "Kick a soccer into the goal",
    "stick-pull-v3": "Grasp a stick and pull a box with the stick",
    "stick-push-v3": "Grasp a stick and push a box using the stick",
    "sweep-into-v3": "Sweep a puck into a hole",
    "sweep-v3": "Sweep a puck off the table",
    "window-close-v3": "Push and close a window",
    "window-open-v3": "Push and open a window",
}
# MetaWorld's own ten, and LeRobot's levels of difficulty.
SETS: Final[Mapping[str, tuple[str, ...]]] = {
    "mt10": (
        "reach-v3",
        "push-v3",
        "pick-place-v3",
        "door-open-v3",
        "drawer-open-v3",
        "drawer-close-v3",
        "button-press-topdown-v3",
        "peg-insert-side-v3",
        "window-open-v3",
        "window-close-v3",
    ),
    "mt50": tuple(INSTRUCTIONS),
    "medium": (
        "basketball-v3",
        "bin-picking-v3",
        "box-close-v3",
        "coffee-pull-v3",
        "coffee-push-v3",
        "hammer-v3",
        "peg-insert-side-v3",
        "push-wall-v3",
        "soccer-v3",
        "sweep-into-v3",
        "sweep-v3",
    ),
    "hard": (
        "assembly-v3",
        "hand-insert-v3",
        "pick-out-of-hole-v3",
        "pick-place-v3",
        "push-back-v3",
        "push-v3",
    ),
    "very_hard": (
        "disassemble-v3",
        "pick-place-wall-v3",
        "shelf-place-v3",
        "stick-pull-v3",
        "stick-push-v3",
    ),
}
# One scripted expert is not called after its task.
_EXPERTS: Final = {"peg-insert-side-v3": "SawyerPegInsertionSideV3Policy"}


def tasks_of(name: str) -> tuple[str, ...]:
    """The tasks that a name means: one of them, several with commas, or a set; ConfigurationError if it means none."""
    if name == "easy":
        harder = {task for level in ("medium", "hard", "very_hard") for task in SETS[level]}
        return tuple(task for task in INSTRUCTIONS if task not in harder)
    if name in SETS:
        return SETS[name]
    tasks = tuple(name.split(","))
    for task in tasks:
        if task not in INSTRUCTIONS:
            raise ConfigurationError(
                f"environment metaworld/{name}: expected a task such as drawer-open-v3, several with commas, or one of "
                f"easy, {', '.join(SETS)}; got {task!r}; the tasks are {', '.join(INSTRUCTIONS)}"
            )
    if len(set(tasks)) < len(tasks):
        raise ConfigurationError(f"environment metaworld/{name}: expected each task once")
    return tasks


class MetaWorld:
    """One task of MetaWorld, or several in turn: seed n is of task n modulo their number, with a variation of its own.

    So consecutive seeds have all tasks equally often. The last `MOST_OPEN` tasks stay in memory, at 140 MB each.
    """

    time_limit_s = TIME_LIMIT_S

    def __init__(self, name: str, image_size: int = 480, cameras: Sequence[str] = (CAMERA,)) -> None:
        """`name` as in `tasks_of`; images are [image_size, image_size, 3], and none where `cameras` is empty.

        SimulationError if the package is missing, or nothing renders here.
        """
        self.tasks = tasks_of(name)
        if unknown := [camera for camera in cameras if camera != CAMERA]:
            raise ConfigurationError(f"MetaWorld: cameras: expected {CAMERA}, got {unknown[0]!r}")
        if not SMALLEST <= image_size <= LARGEST:
            raise ConfigurationError(
                f"MetaWorld: image_size: expected {SMALLEST} to {LARGEST} pixels, got {image_size}"
            )
        self.robot = read_robot(find_robot("metaworld"))
        self._image_size = image_size if cameras else None
        self._simulations: dict[str, _Simulation] = {}
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Begin an episode; the same seed begins the same one, whatever came before. Seeds count from 0."""
        task = self.tasks[seed % len(self.tasks)]
        if task not in self._simulations:
            if len(self._simulations) == MOST_OPEN:
                self._simulations.pop(next(iter(self._simulations))).close()
            self._simulations[task] = _Simulation(task, self._image_size)
        self.instruction = INSTRUCTIONS[task]
        self._now = self._simulations[task]
        self._now.reset(seed)

    def observe(self) -> tuple[Mapping[str, NDArray[np.uint8]], NDArray[np.float64]]:
        image = self._now.render()
        state_S = self.robot.state_lines.to_robot(self._now.observation[: len(self.robot.state)])
        return {} if image is None else {CAMERA: image}, state_S

    def step(self, action_D: NDArray[np.float64]) -> None:
        """One step of 1/80 s. The hand's target moves 0.01 m along each axis at most, whatever is asked."""
        width = len(self.robot.actions)
        if np.shape(action_D) != (width,) or not np.isfinite(action_D).all():
            raise SimulationError(f"MetaWorld: action: expected {width} finite numbers, got {action_D}")
        self._now.step(self.robot.action_lines.to_foreign(action_D))

    @property
    def success(self) -> bool:
        return self._now.success

    @property
    def followed(self) -> bool:
        return self.success

    @property
    def over(self) -> bool:
        return self.success

    def place(self, camera: str) -> None:
        """Each task is about other things."""
        return None

    def demonstrate(self) -> NDArray[np.float64]:
        return self.robot.action_lines.to_robot(self._now.ask_expert())

    def close(self) -> None:
        for simulation in self._simulations.values():
            simulation.close()
        self._simulations.clear()


class _Simulation:
    """The package's environment of one task, its scripted expert, and its camera."""

    def __init__(self, task: str, image_size: int | None) -> None:
        Environment, Expert = _find(task)
        environment, self._expert = Environment(), Expert()
        # As the package's own wrapper for goals that are seen, but that the variation comes from a seed.
        environment._partially_observable = False
        environment.__dict__.pop("sawyer_observation_space", None)
        environment._freeze_rand_vec = False
        environment.seeded_rand_vec = True
        environment._set_task_called = True
        environment.max_path_length = np.inf  # who steps keeps the time
        self._environment, self._size = environment, image_size
        self._cameras: Cameras | None = None
        if image_size is not None:
            from ki_vla_ros.sim import Cameras

            model = environment.model
            model.camera(CAMERA).pos[:] = CAMERA_POSITION_M
            # Drawn twice as large without multisampling, and averaged: as smooth, in half the time without a card.
            model.vis.quality.offsamples = 0
            model.vis.global_.offwidth = model.vis.global_.offheight = 2 * image_size
            self._cameras = Cameras(model)

    def reset(self, seed: int) -> None:
        environment = self._environment
        environment.seed(seed)
        self.observation: NDArray[np.float64] = environment.reset()[0]
        # The package moves goals and objects last: an image would show them where they were, without this.
        environment.set_state(*environment.get_env_state())
        self.success = False

    def step(self, raw_D: NDArray[np.float64]) -> None:
        self.observation, *_, info = self._environment.step(np.clip(raw_D, -1.0, 1.0))
        self.success |= bool(info["success"])

    def ask_expert(self) -> NDArray[np.float64]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # actions beyond -1 to 1, which are cut off here
            return np.clip(self._expert.get_action(self.observation).astype(np.float64), -1.0, 1.0)

    def render(self) -> NDArray[np.uint8] | None:
        """[image_size, image_size, 3]; the camera hangs upside down."""
        if self._cameras is None or self._size is None:
            return None
        upright = self._cameras.render(self._environment.data, CAMERA)[::-1, ::-1]
        return resize_with_pad(np.ascontiguousarray(upright), self._size)

    def close(self) -> None:
        if self._cameras is not None:
            self._cameras.close()


def _find(task: str) -> tuple[Any, Any]:
    """The package's classes of a task, and of its expert."""
    import ki_vla_ros.sim  # noqa: F401 - imports MuJoCo, and chooses no renderer

    try:
        from metaworld import policies
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    except ImportError as error:
        raise SimulationError(
            f"environment metaworld/{task}: expected the package metaworld, got {error}; run 'make metaworld', and "
            "then this command with .venv-metaworld/bin/python"
        ) from error
    words = "".join(word.capitalize() for word in task.split("-"))
    return ALL_V3_ENVIRONMENTS[task], getattr(policies, _EXPERTS.get(task, f"Sawyer{words}Policy"))
