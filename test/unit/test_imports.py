"""The house's rules, read from the imports: what may import what, faces instead of files, no circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

GROUND = ("errors", "records", "statistics", "share", "console", "files", "yaml_file")
# Bottom to top. A package may import what is named here, and itself.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(GROUND, GROUND),
    "robot": GROUND,
    "bundle": (*GROUND, "robot"),
    "messages": GROUND,
    "settings": (*GROUND, "bundle", "robot", "messages"),
    "engines": (*GROUND, "bundle", "settings"),
    "policy": (*GROUND, "robot", "bundle", "settings", "engines.base"),
}
MAY_IMPORT["runtime"] = (*GROUND, "robot", "bundle", "messages", "settings", "engines", "policy")
MAY_IMPORT["bags"] = (*GROUND, "messages", "settings")
MAY_IMPORT["survey"] = (*GROUND, "robot", "bundle", "messages", "settings", "bags")
MAY_IMPORT["report"] = ()
MAY_IMPORT["serve"] = (*MAY_IMPORT["policy"], "engines", "policy")
MAY_IMPORT["ros"] = (*MAY_IMPORT["runtime"], "runtime", "bags", "serve")
MAY_IMPORT["replay"] = (*MAY_IMPORT["runtime"], "runtime", "bags", "report")
MAY_IMPORT["sim"] = (*GROUND, "robot", "messages", "runtime.paths", "ros.process", "ros.qos", "ros.services")
COMMANDS = ("doctor", "bench", "demo")
for command in COMMANDS:
    MAY_IMPORT[command] = (*MAY_IMPORT["ros"], "ros", "report", "sim", "survey")
# A command may use what its package must not: nothing imports a command.
COMMAND_LINES = {"ki_vla_ros.robot.__main__": ("bundle", "settings", "survey")}
# Names of commands, and the front door: nothing imports them.
ENTRIES = ("__init__", "__main__", "record", "build_engines")

# Files that other packages may import besides the face: heavy ones, or all that a package may use of another.
OPEN_FILES = {
    "engines.base": "the contract, for policy/, which must not see any engine",
    "engines.onnx_engine": "imports onnxruntime",
    "engines.torch_engine": "imports torch",
    "engines.torch_program": "imports torch",
    "engines.torch_card": "imports torch",
    "engines.build": "a command",
    "ros.recorder": "a command",
    "training.export.random_weights": "a command",
    "ros.process": "needs no other part of ros/, and rclpy only when a node runs",
    "ros.children": "needs no rclpy",
    "ros.qos": "only QoS, for robots, which are not the policy node",
    "ros.services": "for robots and their operators, who need no other part of ros/",
    "runtime.paths": "the controller model, for sim/, which must not see the policy's runtime",
    "bags.writer": "writing needs none of the readers",
}
ROS_FILES = (
    "ros/",
    "sim/arm_node.py",
    "sim/simulation.py",
    "sim/aloha/node.py",
    "sim/aloha/teleoperator.py",
    "demo/driver.py",
    "doctor/graph.py",
    "bench/node.py",
)
ROS_PACKAGES = ("rclpy", "builtin_interfaces", "lifecycle_msgs", "rcl_interfaces", "rosgraph_msgs")
TORCH_FILES = ("engines/torch_",)
MUJOCO_FILES = ("sim/",)


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file; a package's name is its `__init__`."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


ROBOT, TRAINER = modules("ki_vla_ros"), modules("training")
ALL = {**ROBOT, **TRAINER}


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that the file imports, wherever the statement stands, and its line.

    Not below `if __name__ == "__main__"`: that is a command's beginning, which no importer runs.
    """
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.dump(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: expected absolute imports"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in ALL else node.module), node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno


def part(module: str) -> str:
    """The package (or ground module) of ki_vla_ros that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def allowed(module: str, target: str) -> bool:
    own, other = part(module), part(target)
    if own in ENTRIES or own == other:
        return True
    inside = target.removeprefix("ki_vla_ros.")
    may_import = (*MAY_IMPORT[own], *COMMAND_LINES.get(module, ()))
    return any(inside == may or inside.startswith(f"{may}.") for may in may_import)


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_every_package_has_its_place() -> None:
    assert {part(module) for module in ROBOT} == {*MAY_IMPORT, *ENTRIES} - {"__main__"} | {
        name for name in ("__main__",) if "ki_vla_ros.__main__" in ROBOT
    }


def test_packages_import_only_what_they_may() -> None:
    broken = [
        f"{place(path, line)}: {part(module)} may not import {target}"
        for module, path in ROBOT.items()
        for target, line in imported(path)
        if target.startswith("ki_vla_ros.") and not allowed(module, target)
    ]
    assert broken == []


def test_the_robot_never_imports_the_trainer() -> None:
    assert [place(p, line) for p in ROBOT.values() for t, line in imported(p) if t.split(".")[0] == "training"] == []


def test_the_trainer_leaves_ros_and_the_commands_alone() -> None:
    closed = tuple(f"ki_vla_ros.{name}" for name in ("ros", "doctor", "demo"))
    assert [place(p, line) for p in TRAINER.values() for t, line in imported(p) if t.startswith(closed)] == []


@pytest.mark.parametrize(
    ("packages", "files"),
    [(ROS_PACKAGES, ROS_FILES), (("torch",), TORCH_FILES), (("mujoco",), MUJOCO_FILES)],
    ids=["rclpy", "torch", "mujoco"],
)
def test_heavy_packages_stay_where_they_are_needed(packages: tuple[str, ...], files: tuple[str, ...]) -> None:
    broken = [
        place(path, line)
        for path in ROBOT.values()
        for target, line in imported(path)
        if (target.split(".")[0] in packages or ("rclpy" in packages and target.split(".")[0].endswith("_msgs")))
        and not path.relative_to(ROOT / "ki_vla_ros").as_posix().startswith(files)
    ]
    assert broken == []


def test_the_trainers_simulators_stay_in_environments() -> None:
    """MuJoCo chooses how it draws when it is imported, so a trainer of recordings must not load it."""
    broken = [
        place(path, line)
        for path in TRAINER.values()
        for target, line in imported(path)
        if target.split(".")[0] in ("mujoco", "metaworld", "libero", "robosuite")
        and path.parent != ROOT / "training/evaluate"
    ]
    assert broken == []


def test_other_packages_see_the_face() -> None:
    """`from ki_vla_ros.bundle import Manifest`, not from the file that has it."""
    broken = []
    for module, path in ALL.items():
        for target, line in imported(path):
            owner = face_of(target)
            if owner is None or target == owner or module.startswith(f"{owner}.") or module == owner:
                continue
            if target.removeprefix("ki_vla_ros.") not in OPEN_FILES:
                broken.append(f"{place(path, line)}: {target}: expected from {owner}")
    assert broken == []


def face_of(target: str) -> str | None:
    """The package that a module lies in, or is; None for ground modules and libraries."""
    while target.count(".") >= 1:
        if target in ALL and ALL[target].name == "__init__.py":
            return target
        target = target.rpartition(".")[0]
    return None


def test_every_face_says_its_purpose_in_one_line() -> None:
    for module, path in ALL.items():
        if path.name == "__init__.py":
            text = ast.get_docstring(ast.parse(path.read_text()))
            assert text and text.splitlines()[0].endswith((".", ":")), f"{module}: {text!r}"


def test_a_face_imports_no_command() -> None:
    """Otherwise `python -m` loads it twice, and says so in a warning."""
    broken = [
        f"{place(path, line)}: {target}"
        for path in ALL.values()
        if path.name == "__init__.py"
        for target, line in imported(path)
        if "TYPE_CHECKING" not in path.read_text()  # a lazy face
        if target in ALL and ALL[target].name != "__init__.py" and '== "__main__":' in ALL[target].read_text()
    ]
    assert broken == []


def test_nothing_imports_a_command_line() -> None:
    broken = [place(p, line) for p in ALL.values() for t, line in imported(p) if t.endswith(".__main__")]
    assert broken == []


def test_no_circle_between_files() -> None:
    graph = {m: {t for t, _ in imported(p) if t in ALL and t != m} for m, p in ALL.items()}
    assert circles(graph) == []


def test_no_circle_between_folders() -> None:
    """A `__main__` is an entry: it may use what imports its package."""
    graph: dict[str, set[str]] = {}
    for path in ALL.values():
        if path.name == "__main__.py":
            continue
        own = path.parent.relative_to(ROOT).as_posix()
        graph.setdefault(own, set())
        for target, _ in imported(path):
            if target in ALL and ALL[target].name != "__main__.py":
                other = ALL[target].parent.relative_to(ROOT).as_posix()
                if other != own and own != "ki_vla_ros" and other not in ("ki_vla_ros", "training"):
                    graph[own].add(other)
    assert circles(graph) == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected groups of more than one (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = []
            while True:
                group.append(stack.pop())
                if group[-1] == node:
                    break
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_the_search_for_circles_finds_them() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
