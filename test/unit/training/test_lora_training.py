"""LoRA in training: what learns, what the checkpoints hold, and what a merged or an own adapter is worth."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import CONFIG, make_batch, make_model, run
from support.toy_training import run_until, toy_stage, toy_trainer
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError
from training.config import LoraSettings, ParallelConfig
from training.lora import FACTOR, add_lora, fingerprint, merge
from training.model import VLA
from training.optimizer import select_parameters
from training.train import Trainer
from training.weights import newest_checkpoint, open_run

BOTH = LoraSettings(parts=("backbone", "expert"), rank=4, alpha=8)


def adapted(settings: LoraSettings = BOTH, seed: int = 0) -> VLA:
    """A model whose factors are away from zero, where they would hide every fault."""
    model = make_model()
    add_lora(model, settings, seed)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return model


def trainer(out: Path, seed: int = 0, **changes: Any) -> Trainer:
    model = make_model()
    with torch.no_grad():
        model.action_out.weight.add_(changes.pop("shift", 0.0))
    add_lora(model, BOTH, seed)
    stage = toy_stage(train=["backbone", "expert"], **changes)
    made = toy_trainer(out, stage, model=model, lora=BOTH)
    made.made_of = {"base": fingerprint(model)}
    return made


def test_parts_stand_for_their_factors_and_what_is_outside_their_layers() -> None:
    model = adapted()
    chosen = select_parameters(model, None, ("backbone", "expert"))
    factors = {name for name in chosen if FACTOR.fullmatch(name)}
    assert len(factors) == 2 * CONFIG.backbone.depth * 7 * 2
    assert {name.split(".")[0] + "." + name.split(".")[1] for name in chosen.keys() - factors} == {
        *("action_in.weight", "action_in.bias", "action_out.weight", "action_out.bias"),
        *("expert.time_in", "expert.time_out"),
    }
    assert not model.backbone.embedding.weight.requires_grad
    whole = select_parameters(model, None, ("backbone", "backbone.embedding.weight"))
    assert "backbone.embedding.weight" in whole and "backbone.norm.weight" not in whole


def flow_gradients(model: VLA, insulate: bool) -> dict[str, Tensor]:
    select_parameters(model, None, ("backbone", "expert"))
    output = model(**make_batch(), insulate=insulate)
    output.velocity_RHA.square().mean().backward()
    return {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.count_nonzero().item()
    }


def test_the_flow_loss_reaches_no_factor_of_the_backbone_when_insulated() -> None:
    insulated, open_ = (flow_gradients(adapted(), insulate) for insulate in (True, False))
    assert not [name for name in insulated if name.startswith(("backbone", "vision", "projector"))]
    assert sum(".lora_" in name for name in insulated if name.startswith("expert")) == CONFIG.expert.depth * 7 * 2
    assert sum(".lora_" in name for name in open_ if name.startswith("backbone")) > 2 * 7 * 2


def test_merged_weights_compute_the_same_as_with_the_factors_beside_them() -> None:
    model, plain = adapted(), make_model()
    merged = merge(model.state_dict(), BOTH)
    plain.load_state_dict(merged)
    ours, theirs = run(model, make_batch()), run(plain, make_batch())
    assert ours.velocity_RHA is not None and theirs.velocity_RHA is not None
    torch.testing.assert_close(ours.velocity_RHA, theirs.velocity_RHA, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.postfix_hidden_BTD, theirs.postfix_hidden_BTD, atol=1e-5, rtol=1e-4)
    for module in model.modules():  # peft's own sum
        if hasattr(module, "merge"):
            module.merge()
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            torch.testing.assert_close(merged[name.replace(".base_layer", "")], tensor, atol=1e-6, rtol=1e-6)
    changed = [name for name, tensor in make_model().state_dict().items() if not torch.equal(tensor, merged[name])]
    assert len(changed) == 2 * CONFIG.backbone.depth * 7


def test_checkpoints_hold_what_is_trained_and_a_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer(tmp_path / "whole")
    whole.run()
    broken = trainer(tmp_path / "broken")
    run_until(broken, 3, monkeypatch)
    folder = newest_checkpoint(tmp_path / "broken")
    assert folder is not None
    _, saved = open_run(folder)
    assert {name.removeprefix("model.") for name in saved.shapes if name.startswith("model.")} == whole.trained
    resumed = trainer(tmp_path / "broken")
    resumed.run()
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    began = make_model().state_dict()
    for name, tensor in merge(ours, BOTH).items():
        adapts = name.startswith(("backbone.layers", "expert.layers")) and name.split(".")[-2] in BOTH.targets
        assert torch.equal(tensor, began[name]) != (adapts or name.startswith(("action_", "expert.time"))), name
    for other, fault in (
        (trainer(tmp_path / "broken", shift=0.1), "base: expected "),
        (toy_trainer(tmp_path / "broken"), r"lora\.\S+: expected none, as this configuration says, got"),
    ):
        with pytest.raises(ConfigurationError, match=fault):
            other.load()


def test_bfloat16_products_leave_factors_and_moments_in_float32(tmp_path: Path) -> None:
    exact, rounded = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    rounded.config = rounded.config.model_copy(update={"parallel": ParallelConfig(dtype="bfloat16")})
    gradients = []
    for made in (exact, rounded):
        made.model.load_state_dict(adapted().state_dict())
        chosen = made.choose(made.config.stages[0])
        given = made.config.stages[0]
        made.accumulate_gradients(given, made.draw(0, given, 0), np.random.default_rng(0))
        found = [p.grad for name, p in chosen.items() if ".lora_" in name and p.grad is not None]
        assert found and {g.dtype for g in found} == {torch.float32}
        gradients.append(torch.cat([g.flatten() for g in found]))
    assert not torch.equal(*gradients) and float(torch.cosine_similarity(*gradients, dim=0)) > 0.98


def test_targets_that_a_part_has_not_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="lora: targets: expected linear layers of vision, got gate"):
        add_lora(make_model(), LoraSettings(parts=("expert", "vision"), targets=("gate",)), 0)
