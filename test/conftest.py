"""Fixtures and marks of all tests; whatever talks over ROS does so on its own domain, to this machine only.

A test that needs a package which only the trainer or this test suite installs is skipped where that package is missing:
`colcon test` on a robot runs the others.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

# The checkout, wherever pytest was started, and test/support.
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

if TYPE_CHECKING:
    from support.exported import Made
    from support.loop_rig import Rig
    from support.robots import PolicyProcess, Robot

# The demo looks for a free domain from 61 on.
_DOMAINS = 60
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
# Another run on this machine starts at another domain.
_run = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
_own_domains = itertools.cycle([1 + (_run + i) % _DOMAINS for i in range(_worker, _DOMAINS, _workers)])

# For tests that start ROS without the fixture, and for whatever they start; a domain must never be the user's.
os.environ["ROS_DOMAIN_ID"] = str(next(_own_domains))
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
os.environ["ROS_PYTHON_CHECK_FIELDS"] = "1"  # otherwise a misspelt message field is published silently
os.environ.setdefault("ROS_LOG_DIR", tempfile.mkdtemp(prefix="ros_log_"))


if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    # Nothing here judges how long an example takes: on a busy machine any may take long.
    settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("tests")

# What a robot has no need of, by the name that is imported: requirements/training.txt, simulation.txt and test.txt, and
# what only a policy server needs.
NOT_ON_A_ROBOT = {
    "av", "coverage", "cuda", "google", "hypothesis", "msgpack", "mujoco", "onnx", "onnx_ir", "onnxscript",
    "openpi_client", "packaging", "pyarrow", "regex", "safetensors", "sentencepiece", "setuptools", "tensorboard",
    "tensorrt_rtx", "torch", "tqdm", "transformers", "websockets",
}  # fmt: skip

LIMIT_S = 180
# For tests that export, trace or search for long, and for those that start processes and wait several times.
SLOW_LIMIT_S = 600
# Files with slow tests come first, in this order of folders, and then all others: at the end no worker has a long one
# while the other has none left.
_FOLDERS = ("contracts", "system", "ros", "engines", "gpu", "bad", "unit")
# What this test's nodes and its robot have to say, if it fails; pytest shows no output of the end of a fixture whose
# beginning failed.
_witnesses: dict[str, Callable[[], str]] = {}
# Fixtures that wait for an export.
_EXPORTED = {"made", "half", "exported"}


def pytest_collectstart(collector: pytest.Collector) -> None:
    """pytest 6 does not enter what it imports into sys.modules, where dataclasses look for their module."""
    if isinstance(collector, pytest.Module) and not hasattr(collector, "path"):
        name = Path(collector.fspath).stem
        sys.modules.setdefault(name, ModuleType(name))


def folder_of(item: pytest.Item) -> str:
    file = Path(getattr(item, "path", None) or item.fspath)  # pytest 6 has only the latter
    return file.relative_to(Path(__file__).parent).parts[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow_files = set()
    for item in items:
        folder = folder_of(item)
        fixtures = set(getattr(item, "fixturenames", ()))
        if folder == "ros" or "ros_environment" in fixtures:
            item.add_marker("ros")
        if folder == "gpu":
            item.add_marker("gpu")
        if fixtures & _EXPORTED:
            item.add_marker("slow")
        slow = item.get_closest_marker("slow") or folder in ("ros", "system")
        if slow:
            slow_files.add(item.fspath)
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_LIMIT_S if slow else LIMIT_S))
    items.sort(key=lambda item: (item.fspath not in slow_files, _FOLDERS.index(folder_of(item))))


def missing_package(error: BaseException | None) -> str:
    """The package that a robot need not have and whose absence caused the error, or ""."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            package = (error.name or "").partition(".")[0]
            return package if package in NOT_ON_A_ROBOT and importlib.util.find_spec(package) is None else ""
        error = error.__cause__
    return ""


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    outcome: Any = yield
    skip_what_a_robot_lacks(outcome.get_result(), outcome.get_result().call, collector.nodeid)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    skip_what_a_robot_lacks(report, call, item.nodeid)
    if report.failed:
        report.sections += [(name, told()) for name, told in _witnesses.items()]
    if report.when == "teardown":
        _witnesses.clear()


def skip_what_a_robot_lacks(report: Any, call: Any, where: str) -> None:
    """Turns the failure of a test, or of a whole file, that lacks such a package into a skip that names it."""
    if report.failed and (package := missing_package(call.excinfo.value)):
        report.outcome, report.longrepr = "skipped", (where, 0, f"Skipped: {package} is not installed")


@pytest.fixture
def ros_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Puts this test on its own domain, with its logs in `tmp_path`; returns the environment for its processes."""
    from ki_vla_ros.ros.children import is_free

    # Other runs of these tests on this machine walk through the same domains, each from a different start.
    domain = next((domain for domain in itertools.islice(_own_domains, _DOMAINS) if is_free(domain)), None)
    assert domain is not None, f"no free ROS domain from 1 to {_DOMAINS}"
    forget_the_dead(domain)
    monkeypatch.setenv("ROS_DOMAIN_ID", str(domain))
    monkeypatch.setenv("ROS_LOG_DIR", str(tmp_path / "ros_log"))
    return dict(os.environ)


def forget_the_dead(domain: int) -> None:
    """Removes what killed processes left of Fast DDS's ports of this free domain, which a new process would open again.

    Their numbers are those of UDP (DDSI-RTPS 9.6.1).
    """
    for left in Path("/dev/shm").glob("*fast*_port*"):
        if (found := re.search(r"_port(\d+)", left.name)) and (int(found[1]) - 7400) // 250 == domain:
            left.unlink(missing_ok=True)


@pytest.fixture
def uncounted() -> Iterator[None]:
    """Stops counting covered lines, which doubles the time of what tries thousands of cases over the same lines."""
    coverage = sys.modules.get("coverage")  # it is there if lines are counted
    counting = coverage.Coverage.current() if coverage else None
    if counting:
        counting.stop()
    yield
    if counting:
        with warnings.catch_warnings():  # that what it counts is imported by now
            warnings.simplefilter("ignore")
            counting.start()


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    from support.bundles import write_test_bundle

    folder = tmp_path_factory.mktemp("bundle") / "test"
    write_test_bundle(folder)
    return str(folder)


@pytest.fixture(scope="session", params=["text", "token"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model and its bundle, by how the model gets the joint state; exported once per run of the tests."""
    from support.exported import export

    return export(tmp_path_factory, request.param)


@pytest.fixture
def rig(bundle_path: str) -> Iterator[Rig]:
    from support.loop_rig import Rig

    from ki_vla_ros.bundle.folder import load_bundle

    rig = Rig(load_bundle(bundle_path))
    yield rig
    rig.engine.close()


@pytest.fixture
def start(ros_environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., PolicyProcess]]:
    """Starts policy nodes as processes; those still alive at the end are killed."""
    from support.robots import PolicyProcess  # only tests of the node need ROS

    started: list[PolicyProcess] = []

    def start_policy(*arguments: str, **parameters: object) -> PolicyProcess:
        policy = PolicyProcess(ros_environment, tmp_path, *arguments, **parameters)
        started.append(policy)
        _witnesses[f"node {len(started)}, process {policy.process.pid}"] = lambda: policy.output
        return policy

    yield start_policy
    for policy in started:
        if policy.process.poll() is None:
            policy.process.kill()
            policy.process.wait()


@pytest.fixture
def robot(ros_environment: dict[str, str]) -> Iterator[Robot]:
    from support.robots import Robot

    robot = Robot(int(ros_environment["ROS_DOMAIN_ID"]))
    _witnesses["robot"] = robot.tell
    yield robot
    del _witnesses["robot"]
    robot.close()
