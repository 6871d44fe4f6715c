"""Launch files and configuration files, without a ROS installation.

launch and launch_ros cannot be installed without ROS, so this file uses a STAND-IN: every name that the launch files
import from them becomes a recorder of its arguments. It shows what the files ask for, not that launch does it: that is
in test_launch.py, for where they are installed.
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

from ki_vla_ros.share import PROFILE_VARIABLES

LAUNCH_FILES = sorted((ROOT / "launch").glob("*.launch.py"))
STANDARD = {"ament_index_python", "launch", "launch_ros", "lifecycle_msgs", "os", "pathlib"}


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

    def run(file: str, /, **arguments: str) -> list[Recorded]:
        description = runpy.run_path(str(ROOT / "launch" / file))["generate_launch_description"]()
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


@pytest.mark.parametrize(
    ("activate", "came_to", "expected"), [("true", "inactive", [3]), ("true", "unconfigured", []), ("false", "", [])]
)
def test_the_policy_is_activated_once_and_only_if_asked(
    generate: Any, activate: str, came_to: str, expected: list[int]
) -> None:
    found = generate("policy.launch.py", **ARGUMENTS | {"bundle": "my", "activate": activate})
    (node,) = of("LifecycleNode", found)
    assert (node.kwargs["package"], node.kwargs["name"].args) == ("ki_vla_ros", ("name",))
    assert node.kwargs["executable"] in executables()
    assert node.kwargs["arguments"] == ["--no-autostart"]
    (configure,) = of("ChangeState", found)
    assert configure.kwargs["transition_id"] == 1
    (transition,) = of("OnStateTransition", found)
    assert transition.kwargs["start_state"] == "configuring"
    # What the handler does after the first attempt to configure, and after those that follow by hand.
    (handler,) = transition.kwargs["entities"]
    for orders, state in ((expected, came_to), ([], "inactive")):
        event = SimpleNamespace(locals=SimpleNamespace(event=SimpleNamespace(goal_state=state)))
        changes = [
            change for entity in handler.kwargs["function"](event) for change in of("ChangeState", entity.flat())
        ]
        assert [change.kwargs["transition_id"] for change in changes] == orders
    chosen = node.kwargs["parameters"][1]
    assert "robot_description" not in chosen and "use_sim_time" not in chosen
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
    assert recorder.kwargs["arguments"][0] == "--policy" and recorder.kwargs["arguments"][1].args == ("name",)
    assert recorder.kwargs["arguments"][2:] == arguments
    # It looks for the policy in its own namespace.
    (policy,) = of("LifecycleNode", found)
    assert recorder.kwargs["namespace"].args == policy.kwargs["namespace"].args == ("namespace",)


@pytest.mark.parametrize("name", ["record", "activate", "respawn", "use_sim_time"])
def test_these_must_be_true_or_false(generate: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"launch argument {name}: expected true or false, got 'yes'"):
        generate("policy.launch.py", **ARGUMENTS | {name: "yes"})


@pytest.mark.parametrize("name", ["params_file", "urdf"])
def test_these_must_exist(generate: Any, name: str) -> None:
    """launch would warn of a missing parameter file, and start the node with its defaults."""
    with pytest.raises(ValueError, match=f"launch argument {name}: expected a file, got '/nowhere', which is missing"):
        generate("policy.launch.py", **ARGUMENTS | {name: "/nowhere"})


def test_simulated_time_reaches_every_node(generate: Any) -> None:
    found = generate("policy.launch.py", **ARGUMENTS | {"use_sim_time": "true", "record": "true"})
    (policy,), (recorder,) = of("LifecycleNode", found), of("Node", found)
    assert policy.kwargs["parameters"][-1]["use_sim_time"] is True
    assert recorder.kwargs["parameters"] == [{"use_sim_time": True}]
    (arm,) = of("Node", generate("demo.launch.py", **ARGUMENTS | {"use_sim_time": "true"}))
    assert arm.kwargs["parameters"][-1]["use_sim_time"].args[0].args == ("use_sim_time",)


def test_the_demo_starts_arm_and_policy(generate: Any) -> None:
    found = generate("demo.launch.py", **ARGUMENTS)
    (arm,) = of("Node", found)
    assert arm.kwargs["executable"] in executables() and arm.kwargs["name"] == "sim_arm"
    assert arm.kwargs["namespace"].args == ("namespace",)
    assert arm.kwargs["parameters"][1]["task"].args[0].args == ("instruction",)
    (source,) = of("PythonLaunchDescriptionSource", found)
    assert Path(source.args[0]) == ROOT / "launch" / "policy.launch.py"
    (included,) = of("IncludeLaunchDescription", found)
    declared = {entity.args[0] for entity in of("DeclareLaunchArgument", generate("policy.launch.py", **ARGUMENTS))}
    assert {name for name, _ in included.kwargs["launch_arguments"]} <= declared
    (group,) = of("GroupAction", found)  # without it, the arguments would reach what is included after the demo
    assert group.args == ([included],)


ARGUMENTS = {
    "urdf": "", "bundle": "", "instruction": "", "params_file": str(ROOT / "config" / "demo.yaml"), "namespace": "",
    "name": "policy", "record": "false", "record_to": "", "activate": "true", "respawn": "false", "use_sim_time": "",
}  # fmt: skip


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_arguments_have_descriptions_and_defaults_that_exist(generate: Any, path: Path) -> None:
    found = generate(path.name, **ARGUMENTS)
    declared = {entity.args[0]: entity.kwargs for entity in of("DeclareLaunchArgument", found)}
    used = {entity.args[0] for entity in of("LaunchConfiguration", found)}
    assert used <= set(declared)
    for name, options in declared.items():
        assert options["description"], name
    if path.name == "demo.launch.py":
        assert Path(declared["params_file"]["default_value"]).is_file()
    else:  # nobody knows whose arm it is
        assert "default_value" not in declared["params_file"]


@pytest.mark.parametrize("distribution", ["humble", "jazzy"])
@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_every_process_gets_the_profile_that_keeps_images(
    generate: Any, path: Path, distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROS_DISTRO", distribution)
    found = generate(path.name, **ARGUMENTS | {"record": "true"})
    nodes = [entity for entity in found if entity.kind in ("Node", "LifecycleNode")]
    assert nodes
    for node in nodes:
        environment = node.kwargs["additional_env"]
        assert list(environment) == [PROFILE_VARIABLES[distribution == "humble"]]
        (profile,) = environment.values()
        for name in PROFILE_VARIABLES:  # one that is set already counts, whichever it is
            assert profile.kind == "EnvironmentVariable" and profile.args == (name,)
            profile = profile.kwargs["default_value"]
        assert Path(profile).is_file()


def executables() -> set[str]:
    """What setup.py installs into lib/ki_vla_ros; test_packaging.py shows that it gets there."""
    return {path.name for path in (ROOT / "scripts" / "ros").iterdir()}


def test_fast_dds_takes_the_profile(ros_environment: dict[str, str]) -> None:
    environment = {**ros_environment, "FASTDDS_DEFAULT_PROFILES_FILE": str(ROOT / "config" / "fastdds.xml")}
    code = "import rclpy; rclpy.init(); rclpy.create_node('probe').destroy_node(); rclpy.shutdown()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "XML" not in done.stdout + done.stderr and "rror" not in done.stdout + done.stderr
