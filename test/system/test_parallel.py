"""Two real processes: their averaged gradients are those of one process with both batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT
from torch import nn

from training.parallel.group import average_gradients, join_group, mean_of_processes, wait_for_all

SCRIPT = """
import sys
import torch
from torch import nn
from training.parallel.group import average_gradients, join_group, mean_of_processes, wait_for_all

rank, size = join_group()
torch.manual_seed(0)
used, unused = nn.Linear(3, 2), nn.Linear(3, 2)
inputs = torch.arange(12.0).reshape(2, 2, 3)[rank]
used(inputs).square().mean().backward()
sometimes = nn.Linear(1, 1)  # the samples of the second process have no target for it
if rank == 0:
    sometimes(torch.ones(1, 1)).sum().backward()
average_gradients([*used.parameters(), *unused.parameters(), *sometimes.parameters()])
assert mean_of_processes(3.0 + rank) == 3.5
assert [parameter.grad.item() for parameter in sometimes.parameters()] == [0.5, 0.5]
wait_for_all()
assert all(parameter.grad is None for parameter in unused.parameters())
torch.save([parameter.grad for parameter in used.parameters()], f"{sys.argv[1]}/{rank}_of_{size}.pt")
"""


def test_two_processes_hold_the_gradient_of_both_batches(tmp_path: Path) -> None:
    script = tmp_path / "average.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), str(tmp_path)]
    root = ROOT
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    layer(torch.arange(12.0).reshape(4, 3)).square().mean().backward()
    for rank in range(2):
        for got, expected in zip(torch.load(tmp_path / f"{rank}_of_2.pt"), layer.parameters(), strict=True):
            torch.testing.assert_close(got, expected.grad)


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_group() == (0, 1) and mean_of_processes(3.0) == 3.0
    layer = nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    before = layer.weight.grad.clone()
    average_gradients(list(layer.parameters()))
    wait_for_all()
    assert torch.equal(layer.weight.grad, before)
