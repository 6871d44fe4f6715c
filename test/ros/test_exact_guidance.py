"""The node with the torch engine, whose backward pass guides chunks with the true Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.exported import Made
from support.robots import PolicyProcess, Robot
from support.waiting import until


@pytest.mark.parametrize("made", ["text"], indirect=True)
def test_the_node_guides_with_the_true_jacobian(
    robot: Robot, start: Callable[..., PolicyProcess], made: Made, tmp_path: Path
) -> None:
    program = tmp_path / "node.py"
    program.write_text(
        "import sys\n"
        "from ki_vla_ros.ros import node\n"
        "from ki_vla_ros.engines.torch_engine import TorchEngine\n"
        "pullback = TorchEngine.pullback\n"
        "TorchEngine.pullback = lambda *given: (print('pulled', flush=True), pullback(*given))[1]\n"
        "sys.exit(node.main())\n"
    )
    chosen: dict[str, Any] = {"engine": "torch", "executor": "rtc", "guidance_jacobian": "exact"}
    policy = start(
        program=(str(program),),
        bundle=str(made.bundle.path),
        autostart=True,
        instruction="touch the red cube",
        limits__on_jump="clamp",
        limits__on_speed="clamp",
        limits__on_position="clamp",
        **chosen,
    )
    until(lambda: len(robot.chunks) >= 3 and "pulled" in policy.output)
    assert policy.stop() == 0, policy.output
