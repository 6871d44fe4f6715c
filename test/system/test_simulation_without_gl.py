"""The simulated world in a process whose off-screen OpenGL is missing, unknown or not needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("mujoco")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


REPORT = """
from ki_vla_ros.errors import SimulationError
from ki_vla_ros.sim.world import World
try:
    World()
except SimulationError as error:
    print(error)
"""


def test_unknown_gl_library_is_named() -> None:
    result = run_python(REPORT, MUJOCO_GL="bogus")
    assert result.stdout.strip() == "MUJOCO_GL='bogus': expected 'egl', 'osmesa' or unset; run 'unset MUJOCO_GL'"
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("gl", "remedy"),
    [
        ("egl", "apt-get install -y libegl1 libgl1-mesa-dri libopengl0"),
        ("osmesa", "apt-get install -y libosmesa6"),
        ("", "apt-get install -y libegl1 libgl1-mesa-dri libopengl0"),
    ],
)
def test_missing_gl_library_names_the_package(gl: str, remedy: str) -> None:
    """PyOpenGL fails the same way if told to use another platform as without the library."""
    result = run_python(REPORT, MUJOCO_GL=gl, PYOPENGL_PLATFORM="glx")
    assert result.stdout.count("\n") == 1
    assert "no off-screen OpenGL for the simulated cameras" in result.stdout
    assert f"run '{remedy}'" in result.stdout
    assert result.stderr == ""


def test_physics_needs_no_gl() -> None:
    code = "from ki_vla_ros.sim.world import World; World(render=False); print('made')"
    result = run_python(code, MUJOCO_GL="bogus")
    assert result.stdout == "made\n", result.stderr


def test_gl_library_is_chosen_when_none_is_named() -> None:
    code = "import os; from ki_vla_ros.sim.world import World; World(render_size=32); print(os.environ['MUJOCO_GL'])"
    result = run_python(code, MUJOCO_GL="")
    assert result.stdout.strip() in ("egl", "osmesa"), result.stderr
