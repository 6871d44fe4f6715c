"""Every benchmark's protocol, for two steps of its first task, wherever its simulator is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from support import ROOT

from training.evaluate import open_environment
from training.evaluate.drivers import Chosen
from training.evaluate.protocol import find_protocol, read_protocol
from training.evaluate.trials import run_protocol
from training.export.tiny import robot_policy, write_tiny_bundle

# LIBERO's simulator warns of its age.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

NAMES = sorted(path.stem for path in (ROOT / "config" / "benchmarks").glob("*.yaml"))
# By the first part of an environment's name: what is imported, and what installs it.
PACKAGES = {
    "arm": ("mujoco", "make test"),
    "aloha": ("gym_aloha", "make test"),
    "metaworld": ("metaworld", "make metaworld"),
    "libero": ("libero", "make libero"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_protocol_says_what_it_is_of(name: str) -> None:
    protocol = read_protocol(find_protocol(name))
    assert protocol.name == name and protocol.suite and protocol.environments
    assert {task.partition("/")[0] for task in protocol.environments} <= PACKAGES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_loop_runs_with_random_weights(name: str, tmp_path: Path) -> None:
    whole = read_protocol(find_protocol(name))
    task = whole.environments[0]
    package, remedy = PACKAGES[task.partition("/")[0]]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"protocol {name}: {package} is not installed; '{remedy}' installs it")
    protocol = whole.model_copy(update={"tasks": {"all": (task,)}, "trials": 1, "steps": 2, "image_size": 64})
    environment = open_environment(task, cameras=())
    robot, words = environment.robot, environment.instruction
    environment.close()
    bundle = write_tiny_bundle(tmp_path / "bundle", robot_policy(robot), 0, words)
    found = run_protocol(protocol, Chosen(bundle=bundle.path), tmp_path / "figures.json")
    assert (found["complete"], found["episodes"], found["successes"]) == (True, 1, 0)
    assert found["environments"][task]["malformed"] == 0
