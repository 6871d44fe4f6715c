"""What imports cost, measured in fresh processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

SIMULATING = (
    "training.data.simulated",
    *(f"training.evaluate.{name}" for name in ("aloha", "closed_loop", "executors")),
)


def test_using_a_policy_loads_neither_ros_nor_torch_nor_the_simulator() -> None:
    code = "import sys, json, ki_vla_ros; before = sorted(sys.modules); ki_vla_ros.Policy; ki_vla_ros.open_engine; "
    code += "ki_vla_ros.open_bag; print(json.dumps([before, sorted(sys.modules)]))"
    before, after = json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True))
    assert "numpy" not in before
    assert not {"rclpy", "torch", "mujoco", "onnxruntime"} & set(after)


def modules() -> dict[str, Path]:
    files = sorted((ROOT / "training").rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def test_no_module_outside_the_simulators_loads_mujoco() -> None:
    """Loading it would choose MuJoCo's renderer in every program, even one that only trains on recordings."""
    pytest.importorskip("torch")
    names = [n for n in modules() if not n.startswith(SIMULATING) and not n.endswith("__main__")]
    assert {"training.train", "training.run", "training.losses.hints", "training.evaluate.offline"} <= set(names)
    code = (
        "import importlib, os, sys; os.environ.pop('MUJOCO_GL', None);"
        f"[importlib.import_module(name) for name in {names}];"
        "print([n for n in sys.modules if n.split('.')[0] == 'mujoco' or n.startswith('ki_vla_ros.sim')],"
        " os.environ.get('MUJOCO_GL'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[] None"), done.stdout + done.stderr
