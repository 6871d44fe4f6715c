"""What defines each recipe: which loss teaches which part, whom tokens see, what moves, and how it is asked for chunks.

Models are away from their initial values, at which an expert's branches are closed and no leak would show.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from support.models import CONFIG
from support.recipes import SIZES
from support.toy_training import RandomSamples
from torch import Tensor

from training.config import StageConfig, TrainingConfig
from training.data import Batch
from training.export.__main__ import main as export_main
from training.losses import BatchLosses
from training.model import VLA, AdaRMSNorm, FlowSampler, RegressionSampler, SamplerName
from training.optimizer import make_optimizer, named_parameters, select_parameters
from training.policy import describe_random_policy
from training.recipe import lay_recipe, recipe_names
from training.run import describe_recipe
from training.weights import save_checkpoint

SEEING = frozenset({"vision", "backbone"})
EXPERT = frozenset({"expert"})
ALL = SEEING | EXPERT
PREFIXES = {"vision": ("vision.", "projector."), "backbone": ("backbone.",)}


@dataclass(frozen=True)
class Stage:
    """`teaches`: the parts that each loss gives gradients, and none else; `moves`: what an optimizer step changes."""

    teaches: dict[str, frozenset[str]]
    moves: frozenset[str] = ALL
    seen_by_fast: bool = False  # whether FAST tokens see the noisy actions


INSULATED = Stage({"text": SEEING, "fast": SEEING, "flow": EXPERT})
END_TO_END = {"text": SEEING, "fast": SEEING, "flow": ALL}
DEFINITIONS = {
    "ki": [INSULATED],
    "joint": [Stage(END_TO_END)],
    "ki_no_vlm": [Stage({"fast": SEEING, "flow": EXPERT})],
    "joint_no_vlm": [Stage({"fast": SEEING, "flow": ALL})],
    "ki_naive_tokens": [INSULATED],
    "ki_naive_tokens_stride": [INSULATED],
    "frozen": [Stage({"flow": EXPERT}, moves=EXPERT)],
    "stop_gradient_only": [Stage({"text": SEEING, "flow": EXPERT})],
    "pi0": [Stage({"flow": ALL})],
    "pi0_fast": [Stage({"fast": SEEING}, moves=SEEING)],
    "pi05_staged": [Stage({"text": SEEING, "fast": SEEING}, moves=SEEING), Stage(END_TO_END)],
    "hybrid_mask": [Stage(END_TO_END | {"fast": ALL}, seen_by_fast=True)],
    "oft": [Stage({"regression": ALL})],
    "transfusion": [Stage({"text": SEEING, "flow": ALL})],
    "transfusion_fast": [Stage(END_TO_END)],
    "state_special": [INSULATED],
    "state_text": [INSULATED],
    "state_token": [INSULATED],
}
SAMPLERS: dict[str, SamplerName] = {"pi0_fast": "tokens", "oft": "regression"}
STATES = {"pi0": "token", "state_special": "special", "state_token": "token"}  # text in the prompt elsewhere
HORIZON_FREE = {"vocab_size": CONFIG.vocab_size, "action_dim": 3, "horizon": 5, "state_dim": 3}


SPEC: dict[str, Any] = {
    "name": "any",
    "cameras": [{"name": "front"}],
    "image": {"size": 24},
    "created": "2026-11-26",
    "prompt": {"template": "Task: {task}, State: {state}", "length": 40},
    "state": {"encoding": "text", "low": [-1.0] * 3, "high": [1.0] * 3},
    "action": {"low": [-1.0] * 3, "high": [1.0] * 3},
    "horizon": 5,
}


def config_of(recipe: str) -> TrainingConfig:
    given = {
        "name": "any",
        "robot": "demo_arm",
        "recipe": recipe,
        "out": "out",
        "sources": {"robot": [{"lerobot": "robot"}], "talk": [{"paligemma": "talk.jsonl"}]},
        "model": {key: value for key, value in SIZES.items() if key != "state"},
        "prompt": {"length": 40},
        "stage": {"steps": 100, "learning_rate": 1e-2, "warmup_steps": 0, "sources": {"robot": 3, "talk": 2}}
        | {"noise_samples": 2},
    }
    return TrainingConfig.model_validate(lay_recipe(given))


def losses_of(config: TrainingConfig) -> BatchLosses:
    """The recipe's model, small, with every gate open."""
    torch.manual_seed(0)
    vision = replace(config.model.vision, image_size=24)
    model = VLA(replace(config.model.vla(**HORIZON_FREE), vision=vision))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return BatchLosses(model, None, config)


def batches(model: VLA, stage: StageConfig) -> Iterator[Batch]:
    """One of each source that the stage draws from."""
    rng = np.random.default_rng(0)
    for name, count in stage.sources.items():
        drawn = RandomSamples(model.config).draw(count, rng, name == "robot" and stage.learns_action_tokens)
        if name == "talk":
            drawn = RandomSamples(model.config).draw(count, rng)
            words = drawn.fast_mask_BT
            drawn = replace(drawn, text_mask_BT=words, fast_mask_BT=None, action_BHA=None, state_BS=None)
        yield drawn


def part_of(name: str) -> str:
    return next((part for part, prefixes in PREFIXES.items() if name.startswith(prefixes)), "expert")


def reached(loss: Tensor) -> set[Tensor]:
    """The parameters that a backward pass goes to, whatever it brings there."""
    found, seen, todo = set[Tensor](), set[Any](), [loss.grad_fn]
    while todo:
        if (node := todo.pop()) is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        todo += [before for before, _ in node.next_functions]
    return found


def stages_of(recipe: str) -> Iterator[tuple[Stage, StageConfig, BatchLosses]]:
    config = config_of(recipe)
    assert len(config.stages) == len(DEFINITIONS[recipe])
    for defined, stage in zip(DEFINITIONS[recipe], config.stages, strict=True):
        yield defined, stage, losses_of(config)


def test_every_recipe_is_defined_here() -> None:
    assert DEFINITIONS.keys() == set(recipe_names())


@pytest.mark.parametrize("recipe", DEFINITIONS)
def test_words_and_action_tokens_have_one_cross_entropy(recipe: str) -> None:
    """As in the paper: means of each would weigh a word twenty times as much as an action token."""
    for defined, stage, _ in stages_of(recipe):
        words = defined.teaches.keys() & {"text", "fast"}
        assert stage.losses.keys() - {"flow", "regression"} == ({"tokens"} if len(words) == 2 else words)


@pytest.mark.parametrize("recipe", DEFINITIONS)
def test_each_loss_teaches_these_parts_and_goes_nowhere_else(recipe: str) -> None:
    """Exactly zero where a recipe insulates, and without a backward pass; not zero, with open gates, elsewhere."""
    for defined, stage, losses in stages_of(recipe):
        names = {parameter: name for name, parameter in losses.model.named_parameters()}
        taught: dict[str, set[str]] = {}
        select_parameters(losses.model, None, ["vision", "backbone", "expert"])  # also what the stage does not train
        for batch in batches(losses.model, stage):
            [piece] = losses.split(batch, stage, np.random.default_rng(0))
            for loss, value in losses(piece, stage).items():
                if loss == "tokens":  # one cross-entropy over both kinds
                    loss = "fast" if batch.action_BHA is not None else "text"
                into = reached(value)
                assert {part_of(names[p]) for p in into} == defined.teaches[loss], f"{loss}: a backward pass in vain"
                found = zip(into, torch.autograd.grad(value, list(into), retain_graph=True), strict=True)
                taught[loss] = {part_of(names[parameter]) for parameter, gradient in found if gradient.count_nonzero()}
        assert taught == defined.teaches


@pytest.mark.parametrize("recipe", DEFINITIONS)
def test_robot_data_go_through_the_backbone_with_a_graph_only_where_they_teach_it(recipe: str) -> None:
    """All parts could learn. Without a loss of FAST tokens, none of these is read, though the batch has them."""
    for defined, stage, losses in stages_of(recipe):
        kept, read = [], []
        model, embed = losses.model, losses.model.backbone.embed
        model.backbone.layers[0].attention.k.register_forward_hook(lambda *given, to=kept: to.append(given[-1]))
        model.backbone.embed = lambda tokens, to=read, do=embed: to.append(tokens) or do(tokens)  # type: ignore[method-assign, func-returns-value]
        batch = next(batches(model, stage))
        [piece] = losses.split(batch, stage, np.random.default_rng(0))
        losses(piece, stage)
        taught = {part for loss, parts in defined.teaches.items() if loss != "text" for part in parts}
        assert kept[0].requires_grad == ("backbone" in taught)
        assert len(read) == (2 if "fast" in defined.teaches else 1) and batch.postfix_BT is not None


@pytest.mark.parametrize("recipe", DEFINITIONS)
def test_an_optimizer_step_moves_these_parts(recipe: str) -> None:
    for defined, stage, losses in stages_of(recipe):
        model = losses.model
        optimizer = make_optimizer(select_parameters(model, None, stage.train, stage.freeze), stage)
        before = {name: parameter.detach().clone() for name, parameter in named_parameters(model, None).items()}
        for batch in batches(model, stage):
            for piece in losses.split(batch, stage, np.random.default_rng(0)):
                found = losses(piece, stage)
                torch.stack([stage.losses[loss] * value for loss, value in found.items()]).sum().backward()
        optimizer.step()
        moved = {part_of(name) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == defined.moves


@pytest.mark.parametrize(
    "recipe", [name for name, stages in DEFINITIONS.items() if {"fast", "flow"} <= stages[-1].teaches.keys()]
)
def test_whom_action_tokens_and_noisy_actions_see(recipe: str) -> None:
    *_, (defined, stage, losses) = stages_of(recipe)
    batch = next(batches(losses.model, stage))
    [piece] = losses.split(batch, stage, np.random.default_rng(0))
    embedded: list[Tensor] = []
    embed = losses.model.backbone.embed

    def keep(tokens: Tensor) -> Tensor:
        embedded.append(embed(tokens).detach().requires_grad_())
        return embedded[-1]

    losses.model.backbone.embed = keep  # type: ignore[method-assign]
    if piece.flow_rows is not None:
        piece.flow_rows.x_t_RHA.requires_grad_()
    found = losses(piece, stage)
    prompt, fast = embedded
    assert piece.flow_rows is not None and fast.shape[1] == batch.postfix_BT.shape[1]  # type: ignore[union-attr]

    def derivative(loss: str, of: Tensor) -> bool:
        [gradient] = torch.autograd.grad(found[loss], of, retain_graph=True, allow_unused=True)  # type: ignore[index]
        return gradient is not None and bool(gradient.count_nonzero())

    said = "tokens" if "tokens" in found else "fast"
    assert derivative(said, fast) and derivative(said, prompt) and derivative("flow", piece.flow_rows.x_t_RHA)
    assert not derivative("flow", fast), "noisy actions never see action tokens"
    assert derivative(said, piece.flow_rows.x_t_RHA) == defined.seen_by_fast


@pytest.mark.parametrize("recipe", DEFINITIONS)
def test_it_is_asked_for_chunks_by_its_sampler_and_the_state_has_its_way(recipe: str) -> None:
    config = config_of(recipe)
    assert config.sampler == SAMPLERS.get(recipe, "flow") in get_args(SamplerName)
    assert config.model.state == STATES.get(recipe, "text")
    if config.sampler == "tokens":
        return  # test_figures.py has it
    sampler = RegressionSampler() if config.sampler == "regression" else FlowSampler(3)
    model = losses_of(config).model
    batch = RandomSamples(model.config).draw(2, np.random.default_rng(0))
    noise_BHA, other_BHA = torch.randn(2, 2, *batch.action_BHA.shape[1:])  # type: ignore[union-attr]
    one, same, other = (sampler(model, batch.prefix, batch.state_BS, n) for n in (noise_BHA, noise_BHA, other_BHA))
    assert one.shape == batch.action_BHA.shape and np.isfinite(one).all()  # type: ignore[union-attr]
    np.testing.assert_array_equal(one, same)
    assert (one == other).all() == (config.sampler == "regression"), "a regression draws nothing"
    if model.config.state_dim is not None:
        assert (sampler(model, batch.prefix, batch.state_BS + 1.0, noise_BHA) != one).any()  # type: ignore[operator]


@pytest.mark.parametrize("recipe", ["pi0", "ki"])
def test_only_pi0_mixes_the_flow_time_with_each_action_by_an_mlp(recipe: str) -> None:
    model, pi0 = losses_of(config_of(recipe)).model, recipe == "pi0"
    width = model.config.expert.width
    assert tuple(model.expert.time_in.weight.shape) == (width, 2 * width if pi0 else width)
    assert any(isinstance(module, AdaRMSNorm) for module in model.modules()) != pi0
    batch = RandomSamples(model.config).draw(1, np.random.default_rng(0))
    time_1H = torch.full(batch.action_BHA.shape[:2], 0.3)  # type: ignore[union-attr]
    embedded = [model.expert.embed_actions(torch.ones(*time_1H.shape, width), t) for t in (time_1H, time_1H * 2)]
    assert torch.equal(*embedded) != pi0, "the time is in the actions, or in the norms alone"
    said = [
        model.velocity(model.prefill(*batch.prefix), batch.action_BHA, t, batch.state_BS)
        for t in (time_1H, time_1H * 2)
    ]
    assert not torch.equal(*said)


def test_the_card_says_the_recipe() -> None:
    said = {name: describe_recipe(config_of(name)) for name in DEFINITIONS}
    assert said["ki"] == "ki (knowledge insulation)"
    assert said["joint"] == "joint (flow matching end to end, without insulation)"
    assert said["frozen"] == "frozen (flow matching, insulated; no action tokens teach the backbone)"
    assert said["oft"] == "oft (no flow; it acts by regression)"


def test_a_regressions_loss_is_the_mean_distance_of_its_samplers_chunks() -> None:
    [(_, stage, losses)] = stages_of("oft")
    [batch] = batches(losses.model, stage)
    known_BH = torch.arange(5) < torch.tensor([[5], [3], [1]])
    batch = replace(batch, known_BH=known_BH)
    [piece] = losses.split(batch, stage, np.random.default_rng(0))
    chunk_BHA = RegressionSampler()(losses.model, batch.prefix, None, batch.action_BHA)  # type: ignore[arg-type]
    off_BHA = np.abs(chunk_BHA - batch.action_BHA.double().numpy())  # type: ignore[union-attr]
    loss = float(losses(piece, stage)["regression"].detach())
    assert loss == pytest.approx(off_BHA[known_BH.numpy()].mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "flow", "fault"),
    [
        ("oft", None, r"acts by the backbone's own layers \(actions: backbone\)"),
        ("transfusion", {}, r"acts by the backbone's own layers \(actions: backbone\)"),
        ("pi0_fast", None, r"acts by tokens or a regression \(flow: null\)"),
    ],
)
def test_only_an_experts_flow_is_exported(
    recipe: str, flow: dict[str, Any] | None, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = losses_of(config_of(recipe)).model
    save_checkpoint(tmp_path / "policy", model, policy=describe_random_policy(3, **SPEC, flow=flow))
    (tmp_path / "policy" / "weights.safetensors").unlink()  # they are not read
    assert export_main(["--checkpoint", str(tmp_path / "policy"), "--out", str(tmp_path / "bundle")]) == 2
    said = capsys.readouterr().err
    assert re.search(rf"expected a policy that acts by the flow of an action expert, got one that {fault}", said), said
    assert not (tmp_path / "bundle").exists()


def test_without_an_expert_no_layers_are_made_for_it() -> None:
    config = config_of("oft")
    model = losses_of(config).model
    own = {name for name, _ in model.named_parameters() if part_of(name) == "expert"}
    assert {name.rpartition(".")[0] for name in own} == {"action_in", "action_out", "expert.time_in", "expert.time_out"}
    assert model.state_dict().keys() == dict(model.named_parameters()).keys(), "nothing is held twice"
