"""What imports cost, measured in fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.metaworld import needs_metaworld

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


RENDER = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom type='sphere' size='0.3' rgba='1 0 0 1'/></worldbody></mujoco>"
)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    print(renderer.render().std() > 5.0)
"""


def test_another_simulator_can_draw_beside_ours() -> None:
    """The trainer's modules load ours, if any: MuJoCo is then as if its user had imported it alone."""
    pytest.importorskip("mujoco")
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    done = subprocess.run(
        [sys.executable, "-c", f"import ki_vla_ros.sim\n{RENDER}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "True", done.stdout + done.stderr


@needs_metaworld
@pytest.mark.slow
def test_metaworld_draws_in_a_process_that_has_the_trainer() -> None:
    code = (
        "import training.run, training.train, training.losses, training.evaluate.offline, os;"
        "assert 'MUJOCO_GL' not in os.environ; from training.evaluate import open_environment;"
        "print(open_environment('metaworld/reach-v3', image_size=32).observe()[0]['corner2'].std() > 5)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
