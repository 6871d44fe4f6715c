"""The trainer knows no robot: no file outside the demo generator names its arm, a joint, a camera or an object."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ki_vla_ros.robot import find_robot, read_robot
from ki_vla_ros.sim import COLOURS, SHAPES

TRAINING = Path(__file__).parents[3] / "training"
OWN = TRAINING / "data/simulated"
ROBOT = read_robot(find_robot("demo_arm"))
WORDS = {
    ROBOT.name,
    *(d.name for d in (*ROBOT.state, *ROBOT.actions)),
    *ROBOT.camera_names,
    *COLOURS,
    *SHAPES,
} - {"gripper"}  # a kind of action in every robot file, and only then a joint of this arm
EXCEPTIONS = {
    "evaluate/closed_loop.py": ({"scene"}, "the simulated arm's own evaluation, over its scenes"),
    "evaluate/aloha.py": ({"cube", "scene"}, "ALOHA's task is to hand over a cube, and its worlds are scenes"),
    "evaluate/__main__.py": ({"scene"}, "seeds of the simulated arm are scenes"),
    "evaluate/page.py": ({"blue"}, "the colour of a curve"),
}


def words_of(path: Path) -> Iterator[str]:
    """Every name and every string of a file, documentation included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        for field in ("id", "attr", "arg", "name"):
            if isinstance(text := getattr(node, field, None), str):
                yield text


def named(path: Path) -> set[str]:
    whole = re.compile(rf"\b({'|'.join(sorted(WORDS))})\b")
    return {word for text in words_of(path) for word in whole.findall(text)}


FILES = {str(path.relative_to(TRAINING)): path for path in TRAINING.rglob("*.py") if OWN not in path.parents}


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_demo_is_not_named(name: str) -> None:
    allowed, _ = EXCEPTIONS.get(name, (set(), ""))
    assert named(FILES[name]) <= allowed


def test_exceptions_are_needed_and_the_generator_would_be_found() -> None:
    assert {name: named(FILES[name]) for name in EXCEPTIONS} == {name: words for name, (words, _) in EXCEPTIONS.items()}
    assert {"wrist", "scene"} <= {word for path in OWN.rglob("*.py") for word in named(path)}
