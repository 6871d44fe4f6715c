"""The simulated robot's tasks, and the scenes in which it does them.

A task is a verb and one of 24 colour-shape combinations. Six combinations (`HELD_OUT`) are never commanded in training,
with any verb; they still appear as distractors. Three more splits leave out a whole colour (`NOVEL_COLOUR`) as well:
nothing of it is in any scene of `known` and `recombined`, and `novel` commands nothing else. In every scene one other
object shares the target's colour and another shares its shape, so no single word of the instruction is enough. Lengths
in m, angles in rad, in the frame of the robot's base (x forward, y left, z up, table top at z = 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, Literal, get_args

import numpy as np

from ki_vla_ros.errors import InstructionError, SimulationError

# Where one stands is part of the seed of its scenes: new ones come last.
Split = Literal["train", "held_out", "all", "known", "recombined", "novel"]

COLOURS: Final = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES: Final = ("cube", "ball", "disc", "pole")
VERBS: Final = ("touch", "point at")

# Each colour once, every shape at least once, so training still teaches each word through other commands.
HELD_OUT: Final = frozenset(
    {("red", "disc"), ("green", "ball"), ("blue", "cube"), ("yellow", "pole"), ("purple", "cube"), ("white", "disc")}
)

# A colour and no shape, so that how to reach a novel object is known, and only what it looks like is not.
NOVEL_COLOUR: Final = "purple"

# Half the height of each shape at size 1.
HALF_HEIGHT_M: Final = {"cube": 0.025, "ball": 0.027, "disc": 0.008, "pole": 0.045}
SIZE_RANGE: Final = (0.9, 1.1)

X_RANGE_M: Final = (0.28, 0.52)
Y_RANGE_M: Final = (-0.22, 0.22)
MIN_DISTANCE_M: Final = 0.095
_MAX_OBJECTS: Final = 5


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object on the table, centred at (`x`, `y`) and turned by `yaw`; `size` scales the shape's dimensions."""

    colour: str
    shape: str
    x: float
    y: float
    yaw: float
    size: float

    @property
    def top_m(self) -> float:
        """Height of its highest point above the table."""
        return 2.0 * HALF_HEIGHT_M[self.shape] * self.size


@dataclass(frozen=True, slots=True)
class Task:
    verb: str
    colour: str
    shape: str

    @property
    def instruction(self) -> str:
        return f"{self.verb} the {self.colour} {self.shape}"

    @classmethod
    def parse(cls, text: str) -> Task:
        """The task that `text` names; case and spacing do not matter. Raises InstructionError for anything else."""
        words = " ".join(text.lower().split())
        for verb, colour, shape in product(VERBS, COLOURS, SHAPES):
            task = cls(verb, colour, shape)
            if task.instruction == words:
                return task
        raise InstructionError(
            f"instruction {text!r}: the simulated robot knows '<{'|'.join(VERBS)}> the <{'|'.join(COLOURS)}> "
            f"<{'|'.join(SHAPES)}>', e.g. 'touch the red cube'"
        )


LARGEST_SEED: Final = 2**63 - 1
"""The largest seed of a scene: what an integer ROS parameter can hold."""


@dataclass(frozen=True, slots=True)
class Scene:
    """The objects and the task; `seed` is the one they were drawn with."""

    seed: int
    objects: tuple[SceneObject, ...]
    task: Task

    @property
    def target(self) -> int:
        """Index in `objects` of the instructed object."""
        for index, item in enumerate(self.objects):
            if (item.colour, item.shape) == (self.task.colour, self.task.shape):
                return index
        raise SimulationError(f"scene {self.seed} has no {self.task.colour} {self.task.shape}; choose another task")


def sample_scene(seed: int, *, split: Split, task: Task | None = None) -> Scene:
    """A scene of 3 to 5 different objects with a task; the same arguments give the same scene on every machine.

    `split` says which combinations may be commanded: those of training, the held-out ones, or all; without the novel
    colour, `known` and `recombined` are the first two, whose scenes do not show it either, and `novel` is the rest. It
    is part of the random seed, so equal seeds of two splits give unrelated scenes. With `task` the scene is built
    around that task; SimulationError if `split` does not command it.
    """
    if split not in get_args(Split):
        raise SimulationError(f"split {split!r}: expected one of {', '.join(get_args(Split))}")
    if not 0 <= seed <= LARGEST_SEED:
        raise SimulationError(f"scene seed {seed}: expected 0 to {LARGEST_SEED}")
    entropy = [seed, get_args(Split).index(split)]
    if seed >= 2**32:
        entropy.append(1)  # numpy splits such a seed into two words: [2**32, 0] would be the same stream as [0, 1]
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
    drawn = _sample_task(rng, split)
    if task is None:
        task = drawn
    elif not _commanded((task.colour, task.shape), split):
        raise SimulationError(f"{task.instruction!r} is never commanded in split {split!r}; use split 'all'")

    kinds = _sample_kinds(rng, (task.colour, task.shape), [colour for colour in COLOURS if _shown(colour, split)])
    places = _sample_places(rng, len(kinds))
    objects = tuple(
        SceneObject(colour, shape, x, y, yaw=float(rng.uniform(-np.pi, np.pi)), size=float(rng.uniform(*SIZE_RANGE)))
        for (colour, shape), (x, y) in zip(kinds, places, strict=True)
    )
    return Scene(seed, objects, task)


def _commanded(kind: tuple[str, str], split: Split) -> bool:
    if split == "novel" or not _shown(kind[0], split):
        return (kind[0] == NOVEL_COLOUR) == (split == "novel")
    return split == "all" or (kind in HELD_OUT) == (split in ("held_out", "recombined"))


def _shown(colour: str, split: Split) -> bool:
    return split not in ("known", "recombined") or colour != NOVEL_COLOUR


def _sample_task(rng: np.random.Generator, split: Split) -> Task:
    tasks = [Task(*words) for words in product(VERBS, COLOURS, SHAPES) if _commanded(words[1:], split)]
    return tasks[int(rng.integers(len(tasks)))]


def _sample_kinds(rng: np.random.Generator, target: tuple[str, str], colours: Sequence[str]) -> list[tuple[str, str]]:
    """The scene's objects in random order: the target, one of its colour, one of its shape, and up to two more."""
    colour, shape = target
    same_colour = [(colour, other) for other in SHAPES if other != shape]
    same_shape = [(other, shape) for other in colours if other != colour]
    kinds = [target, same_colour[int(rng.integers(len(same_colour)))], same_shape[int(rng.integers(len(same_shape)))]]
    rest = [kind for kind in product(colours, SHAPES) if kind not in kinds]
    count = int(rng.integers(len(kinds), _MAX_OBJECTS + 1))
    kinds += [rest[int(i)] for i in rng.permutation(len(rest))[: count - len(kinds)]]
    return [kinds[int(i)] for i in rng.permutation(len(kinds))]


def _sample_places(rng: np.random.Generator, count: int) -> list[tuple[float, float]]:
    """Centres on the table, no two closer than MIN_DISTANCE_M; starts over when the free space seems used up."""
    places: list[tuple[float, float]] = []
    refused = 0
    while len(places) < count:
        x, y = float(rng.uniform(*X_RANGE_M)), float(rng.uniform(*Y_RANGE_M))
        if all(np.hypot(x - px, y - py) >= MIN_DISTANCE_M for px, py in places):
            places.append((x, y))
            continue
        refused += 1
        if refused % 50 == 0:
            places.clear()
    return places
