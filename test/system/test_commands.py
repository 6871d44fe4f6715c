"""Every command answers --help, and refuses unknown arguments with exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from ki_vla_ros.__main__ import COMMANDS

POLICY_NODE = str(ROOT / "scripts" / "ros" / "policy_node")  # as `ros2 run` and launch files start it
MAIN = 'if __name__ == "__main__":'
# All of a package in one process: importing takes longer than answering.
ASK = """
import contextlib, importlib, io, json, sys
found = {}
for name in sys.argv[1:]:
    main = importlib.import_module(name).main
    for argument in ("--help", "--no-such-option"):
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try:
                code = main([argument])
            except SystemExit as exit:
                code = exit.code
        found[f"{name} {argument}"] = [code, out.getvalue(), error.getvalue()]
print(json.dumps(found))
"""


def commands(package: str) -> list[str]:
    """Modules below `package` that can be run with `python -m`."""
    files = [path for path in sorted((ROOT / package).rglob("*.py")) if MAIN in path.read_text()]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    # train.py is the loop; the command of that name begins in run.py, which builds what the loop runs.
    return ["training.run" if name == "training.train" else name for name in names]


@pytest.mark.parametrize(("package", "needs"), [("ki_vla_ros", "mujoco"), ("training", "torch")])
def test_every_command_answers_help_and_refuses_what_it_does_not_know(package: str, needs: str) -> None:
    pytest.importorskip(needs)
    names = commands(package)
    done = subprocess.run([sys.executable, "-c", ASK, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 2 * len(names) > 4
    for name in names:
        code, out, error = found[f"{name} --help"]
        assert (code, error) == (0, "") and out.startswith("usage: "), name
        code, out, error = found[f"{name} --no-such-option"]
        assert (code, out) == (2, "") and "usage: " in error, name
        # Where something is required, argparse asks for that first.
        assert "--no-such-option" in error or "required" in error, name


@pytest.mark.parametrize("command", [("-m", "ki_vla_ros.doctor"), ("-m", "ki_vla_ros", "replay"), (POLICY_NODE,)])
def test_an_old_pydantic_is_one_line(tmp_path: Path, command: tuple[str, ...]) -> None:
    """apt on Ubuntu has pydantic 1; a STAND-IN knows no more than its version, and so raises as pydantic 1 would."""
    (tmp_path / "pydantic.py").write_text('VERSION = "1.10.14"\n')
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ki_vla_ros: expected pydantic 2 or newer, got 1.10.14; python3 -m pip install ")
    assert done.stderr.count("\n") == 1


def test_the_simulated_arm_without_mujoco_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mujoco.py").write_text("raise ModuleNotFoundError(\"No module named 'mujoco'\", name='mujoco')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, str(ROOT / "scripts" / "ros" / "sim_arm")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "the simulated robot needs the package 'mujoco'" in done.stderr


def test_ki_vla_has_every_command_of_the_package() -> None:
    """All commands but those that another command starts, and the names that older documents use."""
    listed = {module for _, module, _ in COMMANDS}
    others = {"ki_vla_ros.__main__", "ki_vla_ros.build_engines", "ki_vla_ros.record"}
    assert set(commands("ki_vla_ros")) - others == listed - {"ki_vla_ros.engines.build", "ki_vla_ros.ros.recorder"}


def ki_vla(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ki_vla_ros", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_ki_vla_passes_arguments_on() -> None:
    done = ki_vla("doctor", "--bag", "nowhere")
    assert done.returncode == 2 and done.stderr.startswith("doctor: ") and "nowhere" in done.stderr


@pytest.mark.parametrize(("arguments", "got"), [([], "got none"), (["fly"], "got 'fly'")])
def test_ki_vla_lists_its_commands(arguments: list[str], got: str) -> None:
    done = ki_vla(*arguments)
    assert done.returncode == 2 and f"expected a command, {got}" in done.stderr
    assert all(f"\n  {name} " in done.stderr for name, _, _ in COMMANDS)


def test_ki_vla_names_the_package_that_is_missing() -> None:
    # None in sys.modules is a module that cannot be imported.
    code = "import sys; sys.modules['rclpy'] = None; from ki_vla_ros.__main__ import main; sys.exit(main(['node']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("ki-vla node: needs the Python package 'rclpy'")
