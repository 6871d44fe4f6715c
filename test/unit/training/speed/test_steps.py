"""What the benchmark of training steps compares: the ways that it names, on the same expert gradients."""

import dataclasses

import torch
from support.models import DEEP

from training.speed import steps


def test_ki_gives_the_expert_the_gradients_of_flow_alone_and_the_backbone_its_own() -> None:
    config = dataclasses.replace(DEEP, vocab_size=64)
    calls = steps.make_calls(config, rows=2, noise_samples=2)
    assert set(calls) == set(steps.WAYS)
    model = calls["KI"].func.__closure__  # type: ignore[attr-defined]
    trained = next(cell.cell_contents for cell in model if isinstance(cell.cell_contents, torch.nn.Module))
    with torch.no_grad():  # the expert's branches start closed, and would hide what it reads
        for name, parameter in trained.named_parameters():
            if name.endswith("dense.bias"):
                parameter.fill_(0.5)
    found = {}
    for name, call in calls.items():
        call()
        found[name] = {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}
    for name, gradient in found["flow, frozen"].items():
        torch.testing.assert_close(found["KI"][name], gradient, atol=1e-5, rtol=1e-4)
    assert not any(name.startswith(("vision", "backbone")) for name in found["flow, frozen"])
    key = "backbone.layers.0.attention.k.weight"
    assert not torch.equal(found["KI"][key], found["flow, end to end"][key])
