"""The model against a slow reference: one dense attention over all tokens, with the mask written out as a matrix."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import BATCH, CONFIG, POSTFIX, PROMPT, make_batch, make_model, prefix_of, run
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError
from training.model.expert import ExpertLayer, embed_time, gated
from training.model.gemma import BackboneLayer, additive, attend, rotate, rotation
from training.model.siglip import Vision, VisionConfig
from training.model.vla import VLA, Output


def attend_densely(
    layers: list[tuple[BackboneLayer | ExpertLayer, Tensor]], position: Tensor, mask: Tensor
) -> tuple[list[Tensor], Tensor]:
    """All streams in one attention, every head's keys written out: what each stream gets, and the scores."""
    projections = [layer.attention for layer, _ in layers]
    head_dim, heads = projections[0].head_dim, projections[0].heads
    turn = rotation(position, head_dim)

    def gather(name: str) -> Tensor:
        parts = [getattr(p, name)(normed) for p, (_, normed) in zip(projections, layers, strict=True)]
        return torch.cat(parts, dim=1).unflatten(-1, (-1, head_dim))

    query, key, value = rotate(gather("q"), turn), rotate(gather("k"), turn), gather("v")
    key, value = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (key, value))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / head_dim**0.5
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(dim=-1).nan_to_num()
    mixed = torch.einsum("bhij,bjhd->bihd", weights, value).flatten(2)
    lengths = [normed.shape[1] for _, normed in layers]
    return [p.out(x) for p, x in zip(projections, mixed.split(lengths, dim=1), strict=True)], scores


def reference(model: VLA, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Backbone hidden, velocity, backbone stream by layer, scores by layer; no rows are left out."""
    x, prefix_mask = model.embed_prefix(*prefix_of(batch))
    x = torch.cat((x, model.backbone.embed(batch["postfix_BT"])), dim=1)
    y, time = model.action_in(batch["x_t"]), batch["time"]
    if model.expert.conditioning == "concat":
        # pi0: silu between two layers, the first one over action and time; the state token stays outside.
        both = torch.cat((y, embed_time(time, y.shape[-1])), dim=-1)
        y = model.expert.time_out(F.silu(model.expert.time_in(both)))
    if model.state_in is not None:
        y = torch.cat((model.state_in(batch["state"])[:, None], y), dim=1)
        time = torch.cat((torch.zeros(len(time), 1), time), dim=1)
    condition = model.expert.condition(time, with_state=False)  # its time is in `time`
    prefix, postfix, own = prefix_mask.shape[1], POSTFIX, y.shape[1]
    valid = torch.cat((prefix_mask, batch["postfix_mask_BT"], torch.ones(BATCH, own, dtype=torch.bool)), dim=1)
    # openpi's rule: a token sees those whose block number is not above its own; the mutual block is cut by hand.
    block = [0] * prefix + [1] * postfix + [postfix + 1] + [postfix + 1 + int(model.state_in is not None)] * (own - 1)
    block[prefix : prefix + postfix] = range(1, postfix + 1)
    number = torch.tensor(block)
    mask = (number[None, :] <= number[:, None]) & valid[:, None, :] & valid[:, :, None]
    mask[:, prefix + postfix :, prefix : prefix + postfix] = False
    if model.config.hybrid_mask:
        mask[:, prefix : prefix + postfix, prefix + postfix :] = batch["postfix_mask_BT"][:, :, None]
    start = prefix_mask.sum(dim=1, keepdim=True)
    after = start + torch.arange(own)
    position = torch.cat(
        (prefix_mask.long().cumsum(1) - 1, start - 1 + batch["postfix_mask_BT"].long().cumsum(1), after), dim=1
    )
    streams, all_scores = [], []
    through = model.config.actions == "backbone"

    def norm_of(norm: torch.nn.Module, y: Tensor) -> tuple[Tensor, Tensor | None]:
        return (norm(y), None) if through else norm(y, condition)

    experts = model.backbone.layers if through else model.expert.layers
    for layer, expert in zip(model.backbone.layers, experts, strict=True):
        normed, gate = norm_of(expert.norm1, y)
        (dx, dy), scores = attend_densely([(layer, layer.norm1(x)), (expert, normed)], position, mask)
        x, y = x + dx, y + gated(gate, dy)
        normed, gate = norm_of(expert.norm2, y)
        x, y = x + layer.mlp(layer.norm2(x)), y + gated(gate, expert.mlp(normed))
        streams.append(x)
        all_scores.append(scores)
    last = norm_of(model.backbone.norm if through else model.expert.norm, y)[0]
    velocity = model.action_out(last[:, -CONFIG.horizon :])
    return model.backbone.norm(x), velocity, streams, all_scores


THROUGH: dict[str, Any] = {"actions": "backbone", "expert": CONFIG.backbone}


@pytest.mark.parametrize(
    ("state_dim", "changes"),
    [
        (None, {}),
        (4, {}),
        (4, {"conditioning": "concat"}),
        (None, {"hybrid_mask": True}),
        (4, {"hybrid_mask": True}),
        (None, THROUGH),
        (4, THROUGH),
        (4, THROUGH | {"hybrid_mask": True}),
    ],
)
def test_forward_equals_one_dense_attention(state_dim: int | None, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, state_dim=state_dim, **changes)
    model, batch = make_model(config), make_batch(state_dim)
    with torch.no_grad():
        output = model(**batch, probe=(1, 3))
        hidden, velocity, streams, scores = reference(model, batch)
    _, prefix_mask = model.embed_prefix(*prefix_of(batch))
    prefix = prefix_mask.shape[1]
    assert output.velocity_RHA is not None and output.postfix_hidden_BTD is not None
    torch.testing.assert_close(output.velocity_RHA, velocity, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        output.prefix_hidden_BPD[prefix_mask], hidden[:, :prefix][prefix_mask], atol=1e-5, rtol=1e-5
    )
    valid = batch["postfix_mask_BT"]
    torch.testing.assert_close(output.postfix_hidden_BTD[valid], hidden[:, prefix:][valid], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(output.prefix_by_layer, streams, strict=True):
        torch.testing.assert_close(ours[prefix_mask], theirs[:, :prefix][prefix_mask], atol=1e-5, rtol=1e-5)
    assert output.probe_logits_BPQ is not None
    both = prefix_mask[:, :, None] & prefix_mask[:, None, :]
    torch.testing.assert_close(
        output.probe_logits_BPQ[both], scores[1][:, 3, :prefix, :prefix][both], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("state_dim", "changes"), [(None, {}), (4, {}), (4, THROUGH)])
def test_cache_equals_forward_for_several_rows_per_prefix(state_dim: int | None, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, state_dim=state_dim, **changes)
    model, batch = make_model(config), make_batch(state_dim, repeats=3)
    with torch.no_grad():
        full = model(**batch).velocity_RHA
        cache = model.prefill(*prefix_of(batch))
        state = batch.get("state")
        cached = model.velocity(cache, batch["x_t"], batch["time"], state)
        single = []
        for row in range(BATCH * 3):
            own = [x[row // 3, None] for x in prefix_of(batch)]
            alone = slice(row, row + 1)
            rest = (batch["x_t"][alone], batch["time"][alone], None if state is None else state[alone])
            single.append(model.velocity(model.prefill(*own), *rest))
    torch.testing.assert_close(cached, full, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(single), full, atol=1e-5, rtol=1e-5)


def test_prefix_rows_leave_rows_out_and_change_nothing_else() -> None:
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        full, part = model(**batch), model(**batch, prefix_rows=PROMPT)
    assert part.prefix_hidden_BPD.shape[1] == part.prefix_by_layer[-1].shape[1] == PROMPT
    torch.testing.assert_close(part.prefix_hidden_BPD, full.prefix_hidden_BPD[:, -PROMPT:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part.postfix_hidden_BTD, full.postfix_hidden_BTD, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part.velocity_RHA, full.velocity_RHA, atol=1e-5, rtol=1e-5)


def assert_unmoved(before: Output, after: Output, valid: Tensor) -> None:
    """Everything that is read is the same to the last bit."""
    assert before.velocity_RHA is not None and after.velocity_RHA is not None
    assert before.postfix_hidden_BTD is not None and after.postfix_hidden_BTD is not None
    assert torch.equal(before.velocity_RHA, after.velocity_RHA)
    assert torch.equal(before.postfix_hidden_BTD[valid], after.postfix_hidden_BTD[valid])


def test_masked_camera_has_no_influence() -> None:
    model, batch = make_model(), make_batch()
    before = run(model, batch)
    batch["images_BVCSS"] = batch["images_BVCSS"].clone()
    batch["images_BVCSS"][1, 1] = 1.0
    assert_unmoved(before, run(model, batch), batch["postfix_mask_BT"])
    batch["images_BVCSS"][1, 0] = 1.0
    assert not torch.equal(before.velocity_RHA[1], run(model, batch).velocity_RHA[1])  # type: ignore[index]


def test_padding_has_no_influence() -> None:
    model, batch = make_model(), make_batch()
    before = run(model, batch)
    batch["tokens_BL"] = torch.where(batch["token_mask_BL"], batch["tokens_BL"], (batch["tokens_BL"] + 7) % 50)
    batch["postfix_BT"] = torch.where(batch["postfix_mask_BT"], batch["postfix_BT"], (batch["postfix_BT"] + 7) % 50)
    assert_unmoved(before, run(model, batch), batch["postfix_mask_BT"])


def test_padding_and_masked_camera_are_as_if_absent() -> None:
    model, batch = make_model(), make_batch()
    padded = run(model, batch)
    short = {name: tensor[1:] for name, tensor in batch.items()}
    short["images_BVCSS"], short["image_mask_BV"] = short["images_BVCSS"][:, :1], short["image_mask_BV"][:, :1]
    short["tokens_BL"], short["token_mask_BL"] = short["tokens_BL"][:, :4], short["token_mask_BL"][:, :4]
    short["postfix_BT"], short["postfix_mask_BT"] = short["postfix_BT"][:, :3], short["postfix_mask_BT"][:, :3]
    output = run(model, short)
    torch.testing.assert_close(output.velocity_RHA, padded.velocity_RHA[1:], atol=1e-5, rtol=1e-5)  # type: ignore[index]
    torch.testing.assert_close(output.postfix_hidden_BTD, padded.postfix_hidden_BTD[1:, :3], atol=1e-5, rtol=1e-5)  # type: ignore[index]


def test_rows_with_nothing_to_see_stay_finite() -> None:
    model, batch = make_model(), make_batch()
    for name in ("image_mask_BV", "token_mask_BL", "postfix_mask_BT"):
        batch[name] = torch.zeros_like(batch[name])
    output = model(**batch, insulate=False)
    (output.velocity_RHA.square().sum() + output.postfix_hidden_BTD.square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    # torch's attention guards itself against infinite rows; the plain softmax of an exported graph does not.
    assert additive(torch.zeros(1, 3, dtype=torch.bool)).softmax(dim=-1).isfinite().all()


def test_time_of_one_token_conditions_that_token_only() -> None:
    model, batch = make_model(), make_batch()
    for layer in model.expert.layers:
        torch.nn.init.zeros_(layer.attention.out.weight)  # without the exchange between tokens
    before = run(model, batch).velocity_RHA
    batch["time"] = batch["time"].clone()
    batch["time"][:, 2] = 0.0
    after = run(model, batch).velocity_RHA
    assert before is not None and after is not None
    moved = (before != after).any(dim=-1)
    assert torch.equal(moved, (torch.arange(CONFIG.horizon) == 2).expand(BATCH, -1))


def test_clean_prefix_conditions_the_rest() -> None:
    model, batch = make_model(), make_batch()
    batch["time"] = torch.full_like(batch["time"], 0.7)
    batch["time"][:, :2] = 0.0
    before = run(model, batch).velocity_RHA
    batch["x_t"] = batch["x_t"].clone()
    batch["x_t"][:, 0] += 1.0
    after = run(model, batch).velocity_RHA
    assert before is not None and after is not None
    assert (before[:, 2:] != after[:, 2:]).any(dim=-1).all()


def test_sampling_integrates_from_noise_to_actions() -> None:
    model, batch = make_model(), make_batch()
    times = []

    def velocity(cache: object, x_t: Tensor, time: Tensor, state: object) -> Tensor:
        times.append(float(time[0, 0]))
        return x_t - 2.0  # the flow whose end, from noise n, is known: dx/dt = x - 2

    model.velocity = velocity  # type: ignore[method-assign, assignment]
    with torch.no_grad():
        actions = model.sample_actions(model.prefill(*prefix_of(batch)), batch["x_t"], steps=4)
    assert times == [1.0, 0.75, 0.5, 0.25]
    torch.testing.assert_close(actions, 2.0 + (batch["x_t"] - 2.0) * 0.75**4)


def test_grouped_heads_equal_repeated_keys() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 5, 6, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    bias = torch.randn(2, 1, 5, 7)
    ours = attend(query, key, value, bias.repeat_interleave(2, dim=2))
    plain = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=bias
    )
    torch.testing.assert_close(ours, plain.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("stem", "overlaps"), [("patch", False), ("conv", True)])
def test_both_stems_have_the_same_cells_and_conv_sees_beyond_its_own(stem: str, overlaps: bool) -> None:
    torch.manual_seed(0)
    vision = Vision(VisionConfig(image_size=36, patch_size=12, width=16, depth=1, heads=2, mlp=32, stem=stem))  # type: ignore[arg-type]
    vision.layers = torch.nn.ModuleList()  # type: ignore[assignment]  # every cell attends to every other
    torch.nn.init.normal_(vision.position.weight)
    images = torch.randn(1, 3, 36, 36)
    other = images.clone()
    other[:, :, 12:24, 12:24] += 5.0  # the middle cell
    with torch.no_grad():
        moved = (vision(images) != vision(other)).any(dim=-1)[0].reshape(3, 3)
    assert moved[1, 1]
    moved[1, 1] = False
    assert moved.sum() == (8 if overlaps else 0)


def test_initial_scales() -> None:
    """Tokens enter and leave at unit size, and the expert starts near zero with closed branches."""
    torch.manual_seed(0)
    model, batch = VLA(CONFIG).requires_grad_(False), make_batch()
    assert 0.8 < float(model.backbone.embed(batch["tokens_BL"]).std()) < 1.2
    output = run(model, batch)
    assert output.velocity_RHA is not None
    assert 0.5 < float(model.logits(output.prefix_hidden_BPD).std()) < 2.0
    assert 0.0 < float(output.velocity_RHA.std()) < 0.2
    batch["tokens_BL"] = (batch["tokens_BL"] + 1) % 50
    assert torch.equal(run(model, batch).velocity_RHA, output.velocity_RHA)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"time": None}, "x_t and time go together"),
        ({"postfix_BT": None}, "a postfix mask without a postfix"),
        ({"state": torch.zeros(2, 4)}, "state_dim None got a state"),
        ({"x_t": torch.zeros(3, 5, 3)}, "3 rows are not a multiple of 2"),
    ],
)
def test_wrong_expert_inputs_are_refused(change: dict[str, Tensor | None], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_model()(**(make_batch() | change))


def test_missing_state_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="state_dim 4 got no state"):
        make_model(dataclasses.replace(CONFIG, state_dim=4))(**make_batch())


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="depth must agree, got 3 and 2"):
        dataclasses.replace(CONFIG, expert=dataclasses.replace(CONFIG.expert, depth=2))
    with pytest.raises(ConfigurationError, match=r"gemma\.heads: expected a multiple of kv_heads 3, got 4"):
        dataclasses.replace(CONFIG.backbone, kv_heads=3)
    with pytest.raises(ConfigurationError, match=r"vision\.image_size: expected a multiple of patch_size 12, got 25"):
        dataclasses.replace(CONFIG.vision, image_size=25)
    with pytest.raises(ConfigurationError, match="stem: expected 'patch' or 'conv'"):
        dataclasses.replace(CONFIG.vision, stem="mlp")  # type: ignore[arg-type]
