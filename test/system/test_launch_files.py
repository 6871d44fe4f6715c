"""Launch files and configuration files, without a ROS installation.

launch and launch_ros cannot be installed without ROS, so this file uses a STAND-IN: every name that the launch files
import from them becomes a recorder of its arguments. It shows what the files ask for, not that launch does it.
"""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support import ROOT

LAUNCH_FILES = sorted((ROOT / "launch").glob("*.launch.py"))
STANDARD = {"ament_index_python", "launch", "launch_ros", "lifecycle_msgs", "pathlib"}


@dataclass
class Recorded:
    """A recorded call of something that the stand-in replaces."""

    kind: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def perform(self, context: dict[str, str]) -> str:
        """The value of a LaunchConfiguration."""
        return context[self.args[0]]

    def flat(self) -> list[Recorded]:
        """This call and all calls recorded in its arguments."""
        found = [self]
        for value in (*self.args, *self.kwargs.values()):
            for item in value if isinstance(value, (list, tuple)) else [value]:
                found += item.flat() if isinstance(item, Recorded) else []
        return found


class StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: Recorded(name, args, kwargs)


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a launch file with the stand-in and returns what its LaunchDescription consists of."""
    imported = {
        node.module
        for path in LAUNCH_FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    for module in imported:
        if module and module.split(".")[0] in ("launch", "launch_ros"):
            monkeypatch.setitem(sys.modules, module, StandIn(module))
    packages = SimpleNamespace(get_package_share_directory=lambda name: str(ROOT))
    monkeypatch.setitem(sys.modules, "ament_index_python.packages", packages)

    def run(name: str, **arguments: str) -> list[Recorded]:
        description = runpy.run_path(str(ROOT / "launch" / name))["generate_launch_description"]()
        found: list[Recorded] = description.flat()
        for function in [entity for entity in found if entity.kind == "OpaqueFunction"]:
            for entity in function.kwargs["function"](arguments):
                found += entity.flat()
        return found

    return run


def of(kind: str, found: list[Recorded]) -> list[Recorded]:
    """The calls of a kind, each once even if several others refer to it."""
    return list({id(entity): entity for entity in found if entity.kind == kind}.values())


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_launch_files_use_only_what_every_ros_installation_has(path: Path) -> None:
    tree = ast.parse(path.read_text())
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {module.split(".")[0] for module in modules} <= STANDARD
    assert "Composable" not in path.read_text()


def test_the_policy_is_led_from_configure_to_active(generate: Any) -> None:
    found = generate("policy.launch.py", **ARGUMENTS | {"bundle": "my", "params_file": "p.yaml"})
    (node,) = of("LifecycleNode", found)
    assert (node.kwargs["package"], node.kwargs["name"]) == ("ki_vla_ros", "policy")
    assert node.kwargs["executable"] in executables()
    (transition,) = of("OnStateTransition", found)
    (activate,) = of("ChangeState", transition.flat())
    (configure,) = [change for change in of("ChangeState", found) if change is not activate]
    assert (configure.kwargs["transition_id"], activate.kwargs["transition_id"]) == (1, 3)
    # Without the start state every deactivation by hand would be undone.
    assert (transition.kwargs["start_state"], transition.kwargs["goal_state"]) == ("configuring", "inactive")
    chosen = node.kwargs["parameters"][1]
    assert "robot_description" not in chosen
    assert chosen["bundle"].args == ("my",) and "instruction" not in chosen and chosen["autostart"] is False


def test_the_urdf_is_passed_on_by_content(generate: Any, tmp_path: Path) -> None:
    (tmp_path / "arm.urdf").write_text("<robot/>")
    found = generate("policy.launch.py", **ARGUMENTS | {"urdf": str(tmp_path / "arm.urdf")})
    assert of("LifecycleNode", found)[0].kwargs["parameters"][1]["robot_description"].args == ("<robot/>",)


@pytest.mark.parametrize(("folder", "arguments"), [("", []), ("/data/run", ["--out", "/data/run"])])
def test_a_recorder_beside_the_policy(generate: Any, folder: str, arguments: list[str]) -> None:
    assert of("Node", generate("policy.launch.py", **ARGUMENTS)) == []
    found = generate("policy.launch.py", **ARGUMENTS | {"record": "True", "record_to": folder, "namespace": "left"})
    (recorder,) = of("Node", found)
    assert recorder.kwargs["executable"] == "record" and "record" in executables()
    assert recorder.kwargs["arguments"] == arguments
    # It looks for the policy in its own namespace.
    (policy,) = of("LifecycleNode", found)
    assert recorder.kwargs["namespace"].args == policy.kwargs["namespace"].args == ("namespace",)


def test_record_must_be_true_or_false(generate: Any) -> None:
    with pytest.raises(ValueError, match="launch argument record: expected true or false, got 'yes'"):
        generate("policy.launch.py", **ARGUMENTS | {"record": "yes"})


def test_the_demo_starts_arm_and_policy(generate: Any) -> None:
    found = generate("demo.launch.py")
    (arm,) = of("Node", found)
    assert arm.kwargs["executable"] in executables() and arm.kwargs["name"] == "sim_arm"
    assert arm.kwargs["parameters"][1]["task"].args[0].args == ("instruction",)
    (source,) = of("PythonLaunchDescriptionSource", found)
    assert Path(source.args[0]) == ROOT / "launch" / "policy.launch.py"
    (included,) = of("IncludeLaunchDescription", found)
    declared = {entity.args[0] for entity in of("DeclareLaunchArgument", generate("policy.launch.py", **ARGUMENTS))}
    assert {name for name, _ in included.kwargs["launch_arguments"]} <= declared


ARGUMENTS = {
    "urdf": "", "bundle": "", "instruction": "", "params_file": "", "namespace": "", "record": "false", "record_to": "",
}  # fmt: skip


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_arguments_have_descriptions_and_defaults_that_exist(generate: Any, path: Path) -> None:
    found = generate(path.name, **ARGUMENTS)
    declared = {entity.args[0]: entity.kwargs for entity in of("DeclareLaunchArgument", found)}
    used = {entity.args[0] for entity in of("LaunchConfiguration", found)}
    assert used <= set(declared)
    for name, options in declared.items():
        assert options["description"], name
    assert Path(declared["params_file"]["default_value"]).is_file()


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_every_process_gets_the_profile_that_keeps_images(generate: Any, path: Path) -> None:
    found = generate(path.name, **ARGUMENTS | {"record": "true"})
    nodes = [entity for entity in found if entity.kind in ("Node", "LifecycleNode")]
    assert nodes
    for node in nodes:
        profile = node.kwargs["additional_env"]["FASTDDS_DEFAULT_PROFILES_FILE"]
        assert profile.kind == "EnvironmentVariable" and profile.args == ("FASTDDS_DEFAULT_PROFILES_FILE",)
        assert Path(profile.kwargs["default_value"]).is_file()


def executables() -> set[str]:
    """What setup.py installs into lib/ki_vla_ros; test_packaging.py shows that it gets there."""
    return {path.name for path in (ROOT / "scripts" / "ros").iterdir()}


def test_fast_dds_takes_the_profile(ros_environment: dict[str, str]) -> None:
    environment = {**ros_environment, "FASTDDS_DEFAULT_PROFILES_FILE": str(ROOT / "config" / "fastdds.xml")}
    code = "import rclpy; rclpy.init(); rclpy.create_node('probe').destroy_node(); rclpy.shutdown()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "XML" not in done.stdout + done.stderr and "rror" not in done.stdout + done.stderr
