"""Vision-language samples from what the simulator knows: captions, questions about objects, and localisation.

Locations are PaliGemma's `<loc0512><loc0100>`: row, then column of the object's centre in the scene image, each in 1024
bins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ki_vla_ros.sim import COLOURS, SHAPES

LOCATION_BINS = 1024
COMBINATIONS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)


@dataclass(frozen=True)
class SeenObject:
    """An object in view: its kind and its centre in the image, `u` right and `v` down, both in [0, 1)."""

    colour: str
    shape: str
    u: float
    v: float


@dataclass(frozen=True)
class Sample:
    """A question, its answer, and the object that it is about (None: about no object, or several)."""

    question: str
    answer: str
    about: SeenObject | None


def location_text(seen: SeenObject) -> str:
    row, column = (min(int(x * LOCATION_BINS), LOCATION_BINS - 1) for x in (seen.v, seen.u))
    return f"<loc{row:04d}><loc{column:04d}>"


def ask_where(objects: Sequence[SeenObject], rng: np.random.Generator) -> Sample:
    seen = objects[int(rng.integers(len(objects)))]
    return Sample(f"where is the {seen.colour} {seen.shape} ?", location_text(seen), seen)


def ask_what(objects: Sequence[SeenObject], rng: np.random.Generator) -> Sample:
    seen = objects[int(rng.integers(len(objects)))]
    return Sample(f"what is at {location_text(seen)} ?", f"{seen.colour} {seen.shape}", seen)


def ask_presence(objects: Sequence[SeenObject], rng: np.random.Generator) -> Sample:
    """Ask whether there is a certain object.

    At least half of the absent ones share colour or shape with something present: else it would be too easy.
    """
    present = {(seen.colour, seen.shape): seen for seen in objects}
    if rng.random() < 0.5:
        colour, shape = list(present)[rng.integers(len(present))]
    else:
        absent = [kind for kind in COMBINATIONS if kind not in present]
        near = [kind for kind in absent if any(kind[0] == c or kind[1] == s for c, s in present)]
        pool = near if near and rng.random() < 0.5 else absent
        colour, shape = pool[rng.integers(len(pool))]
    found = present.get((colour, shape))
    return Sample(f"is there a {colour} {shape} ?", "yes" if found else "no", found)


def ask_count(objects: Sequence[SeenObject], rng: np.random.Generator) -> Sample:
    colour = COLOURS[rng.integers(len(COLOURS))]
    count = sum(seen.colour == colour for seen in objects)
    return Sample(f"how many {colour} objects are there ?", str(count), None)


def ask_colour(objects: Sequence[SeenObject], rng: np.random.Generator) -> Sample:
    """Ask for the colour of a shape that occurs once; if there is none, ask where something is."""
    counts = Counter(seen.shape for seen in objects)
    unique = [seen for seen in objects if counts[seen.shape] == 1]
    if not unique:
        return ask_where(objects, rng)
    seen = unique[rng.integers(len(unique))]
    return Sample(f"what colour is the {seen.shape} ?", seen.colour, seen)


def ask_caption(objects: Sequence[SeenObject], rng: np.random.Generator) -> Sample:
    names = [f"{seen.colour} {seen.shape}" for seen in sorted(objects, key=lambda seen: seen.u)]
    return Sample("describe the table .", " , ".join(names), None)


QUESTIONS: tuple[tuple[float, Callable[[Sequence[SeenObject], np.random.Generator], Sample]], ...] = (
    (0.5, ask_where),
    (0.2, ask_what),
    (0.1, ask_presence),
    (0.05, ask_count),
    (0.1, ask_colour),
    (0.05, ask_caption),
)


def draw_sample(objects: Sequence[SeenObject], rng: np.random.Generator) -> Sample:
    """One question about these objects, of a kind drawn by the weights in `QUESTIONS`."""
    weights = np.array([weight for weight, _ in QUESTIONS])
    _, ask = QUESTIONS[rng.choice(len(QUESTIONS), p=weights / weights.sum())]
    return ask(objects, rng)
