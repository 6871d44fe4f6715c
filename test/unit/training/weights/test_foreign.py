"""Published weights: they reach the right places, however they are spelled, and what does not fit is named."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.golden import CONFIG, draw_weights
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError
from training.model.vla import VLAConfig
from training.weights.foreign import HEAD, PALIGEMMA, TABLE, import_weights, shapes, their_name

Weights = dict[str, Tensor]
PI0 = dataclasses.replace(CONFIG, conditioning="concat", state_dim=7)
EXPERT = "paligemma_with_expert.gemma_expert.model."


def draw_pi0() -> Weights:
    """A small pi0 in openpi's spelling."""
    generator = torch.Generator().manual_seed(3)
    names = {their_name(name, PI0): shape for name, shape in shapes(PI0).items()}
    return {name: 0.15 * torch.randn(shape, generator=generator) for name, shape in names.items()}


def save(folder: Path, weights: Weights) -> Path:
    path = folder / "model.safetensors"
    save_file(weights, path)
    return path


def renamed(weights: Weights, *pairs: tuple[str, str]) -> Weights:
    found = {}
    for key, tensor in weights.items():
        for old, new in pairs:
            key = key.replace(old, new)
        found[key] = tensor
    return found


@pytest.mark.parametrize(
    "pairs",
    [
        [
            ("paligemma_with_expert", "model.paligemma_with_expert"),
            ("action_", "model.action_"),
            ("state_", "model.state_"),
        ],
        [("paligemma.model.language_model.", "paligemma.language_model.model."), ("paligemma.model.", "paligemma.")],
        [(".vision_model.", ".")],
    ],
    ids=["lerobot", "older transformers", "newer transformers"],
)
def test_spellings(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    weights = draw_pi0()
    expected = {name: weights[their_name(name, PI0)] for name in shapes(PI0)}
    spelled = renamed(weights, *pairs)
    assert spelled.keys() != weights.keys()
    got = import_weights(PI0, save(tmp_path, spelled), "pi0").state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_table_from_the_output_head(tmp_path: Path) -> None:
    weights = draw_pi0()
    table = weights.pop(TABLE)
    model = import_weights(PI0, save(tmp_path, {**weights, HEAD: table}), "pi0")
    assert torch.equal(model.backbone.embedding.weight, table)


@pytest.mark.parametrize("half", [False, True])
def test_the_table_wins_over_a_head_that_was_not_trained(tmp_path: Path, half: bool) -> None:
    """Whatever their order in the file, which is by type and then by name."""
    weights = draw_pi0()
    head = weights[TABLE] + 1
    model = import_weights(PI0, save(tmp_path, {**weights, HEAD: head.half() if half else head}), "pi0")
    assert torch.equal(model.backbone.embedding.weight, weights[TABLE])


def test_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"expected the token table .*, got neither"):
        import_weights(PI0, save(tmp_path, without(TABLE)(draw_pi0())), "pi0")


def test_weights_that_nothing_reads_are_left_out(tmp_path: Path) -> None:
    extra = {
        "paligemma_with_expert.gemma_expert.lm_head.weight": torch.zeros(512, 32),
        f"{EXPERT}rotary_emb.inv_freq": torch.zeros(8),
        "normalize_inputs.buffer_observation_state.mean": torch.zeros(7),
    }
    weights = draw_pi0()
    got = import_weights(PI0, save(tmp_path, {**weights, **extra}), "pi0").state_dict()
    assert {their_name(name, PI0): float(tensor.sum()) for name, tensor in got.items()} == {
        key: float(tensor.sum()) for key, tensor in weights.items()
    }


def test_types(tmp_path: Path) -> None:
    """Half precision is widened on request; otherwise each tensor keeps its type."""
    weights = {key: tensor.bfloat16() if "mlp" in key else tensor for key, tensor in draw_pi0().items()}
    path = save(tmp_path, weights)
    for dtype in (torch.float32, torch.bfloat16):
        model = import_weights(PI0, path, "pi0", dtype)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, weights[their_name(name, PI0)].to(dtype)), name
            assert tensor.dtype == dtype
    kept = import_weights(PI0, path, "pi0", dtype=None).state_dict()
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32, torch.bfloat16}


def test_own_action_ids(tmp_path: Path) -> None:
    """New rows lie around the mean of the others, differ from each other, and are the same for the same seed."""
    weights = draw_pi0()
    weights[TABLE] += torch.linspace(-1, 1, 64)
    path, longer = save(tmp_path, weights), dataclasses.replace(PI0, vocab_size=512 + 40)
    table = import_weights(longer, path, "pi0", vocabulary=512).backbone.embedding.weight
    assert torch.equal(table[:512], weights[TABLE])
    new, mean, spread = table[512:], weights[TABLE].mean(0), weights[TABLE].std(0)
    assert ((new - mean).abs() < 0.6 * spread).all()
    assert ((new - mean).std(0) / spread).mean().item() == pytest.approx(0.1, rel=0.1)
    again = import_weights(longer, path, "pi0", vocabulary=512).backbone.embedding.weight
    other = import_weights(longer, path, "pi0", vocabulary=512, seed=1).backbone.embedding.weight
    assert torch.equal(table, again)
    assert not torch.equal(table, other)


def test_hugging_face_padding_is_cut(tmp_path: Path) -> None:
    weights = draw_pi0()
    table = weights[TABLE]
    weights[TABLE] = torch.cat((table, torch.full((64, 64), 9.0)))
    model = import_weights(PI0, save(tmp_path, weights), "pi0")
    assert torch.equal(model.backbone.embedding.weight, table)
    weights[TABLE] = torch.cat((table, torch.full((63, 64), 9.0)))
    with pytest.raises(ConfigurationError, match=r"embed_tokens\.weight: expected \[512, 64\], got \[575, 64\]"):
        import_weights(PI0, save(tmp_path, weights), "pi0")


def test_shards(tmp_path: Path) -> None:
    weights = draw_pi0()
    write_shards(tmp_path, weights)
    model = import_weights(PI0, tmp_path, "pi0")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[their_name(name, PI0)]), name


def write_shards(folder: Path, weights: Weights) -> dict[str, str]:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {key: names[i % 2] for i, key in enumerate(weights)}
    for name in names:
        save_file({key: weights[key] for key, place in places.items() if place == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def test_bad_indexes(tmp_path: Path) -> None:
    weights = draw_pi0()
    places = write_shards(tmp_path, weights)
    first, *_ = places

    def refused(weight_map: Any, match: str) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ConfigurationError, match=match):
            import_weights(PI0, tmp_path, "pi0")

    refused({**places, first: "model-00003-of-00002.safetensors"}, r"expected model-00003-of-00002\.safetensors")
    refused({**places, first: "../model.safetensors"}, "names of files beside the index")
    refused({**places, first: "pytorch_model.bin"}, "got a pickle")
    refused({**places, "ghost": places[first]}, "index and shards to agree, got other places for ghost")
    refused({key: place for key, place in places.items() if key != first}, f"other places for {first}")
    refused(3, "expected an index of safetensors")


def without(key: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("action_in_proj.bias"), r"1 missing: action_in_proj\.bias"),
        (without(f"{EXPERT}layers.2.mlp.up_proj.weight"), r"1 missing: .*layers\.2\.mlp\.up_proj\.weight"),
        (lambda w: {**w, "value_head.weight": torch.zeros(3)}, r"1 unknown: value_head\.weight"),
        (
            lambda w: {**w, f"{EXPERT}norm.dense.bias": torch.zeros(96)},
            r"1 unknown: .*expert\.model\.norm\.dense\.bias",
        ),
        (
            lambda w: {**w, "state_proj.weight": torch.zeros(32, 32)},
            r"1 misshapen: state_proj\.weight: expected \[32, 7\], got \[32, 32\]",
        ),
        (lambda w: {**w, "state_proj.bias": torch.zeros(32, dtype=torch.int8)}, r"state_proj\.bias: I8"),
        (lambda w: {**w, "state_proj.bias": torch.zeros(32).to(torch.float8_e4m3fn)}, r"state_proj\.bias: F8_E4M3"),
        (lambda w: {**w, "state_proj.bias": torch.zeros(32).double()}, r"state_proj\.bias: F64"),
        (
            lambda w: {**w, "model.state_proj.bias": torch.zeros(32)},
            r"got both .*state_proj\.bias and .*state_proj\.bias",
        ),
        (
            lambda w: {key: tensor for key, tensor in w.items() if key.startswith(PALIGEMMA)},
            "expected the weights of pi0, got those of paligemma",
        ),
        (lambda w: draw_weights(), "expected the weights of pi0, got those of pi05"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Callable[[Weights], Weights], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        import_weights(PI0, save(tmp_path, change(draw_pi0())), "pi0")


@pytest.mark.parametrize(("kind", "config"), [("pi05", CONFIG), ("paligemma", CONFIG)])
def test_pi0_is_not_taken_for_another(tmp_path: Path, kind: Any, config: VLAConfig) -> None:
    with pytest.raises(ConfigurationError, match=f"expected the weights of {kind}, got those of pi0"):
        import_weights(config, save(tmp_path, draw_pi0()), kind)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (
            "pi0",
            CONFIG,
            "pi0: expected conditioning 'concat' with state_dim, got conditioning 'adarms' without",
        ),
        ("pi05", PI0, "pi05: expected conditioning 'adarms' without state_dim"),
        ("pi06", CONFIG, "expected one of paligemma, pi0, pi05 as kind, got 'pi06'"),
        ("pi05", dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, stem="conv")), "'patch'"),
    ],
)
def test_configurations_of_another_form_are_refused(tmp_path: Path, kind: Any, config: VLAConfig, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        import_weights(config, tmp_path, kind)


def test_bad_files(tmp_path: Path) -> None:
    path = save(tmp_path, draw_pi0())
    whole = path.read_bytes()
    for content in (whole[:-100], whole[: len(whole) // 2], whole[:4], b"", b"not weights"):
        path.write_bytes(content)
        with pytest.raises(
            ConfigurationError, match=rf"model\.safetensors: expected .* got {len(content)} bytes .*cut"
        ):
            import_weights(PI0, tmp_path, "pi0")
    path.unlink()
    with pytest.raises(ConfigurationError, match="got nothing"):
        import_weights(PI0, tmp_path, "pi0")
    with pytest.raises(ConfigurationError, match="no such file"):
        import_weights(PI0, path, "pi0")
    (tmp_path / "params").mkdir()
    with pytest.raises(ConfigurationError, match="a JAX checkpoint"):
        import_weights(PI0, tmp_path, "pi0")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigurationError, match="a file of another kind"):
        import_weights(PI0, tmp_path / "notes.txt", "pi0")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ConfigurationError, match=rf"{name}: expected safetensors, got a pickle"):
            import_weights(PI0, path, "pi0")


class ReferencePi0:
    """pi0's expert, written out plainly from the checkpoint's tensors.

    Each token's query sees what openpi's cumulative rule lets it see, over the prefix's keys and values.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + self.weights[f"{name}.weight"])

    def velocity(
        self, keys: Tensor, values: Tensor, prefix_mask: Tensor, state: Tensor, x_t: Tensor, time: float
    ) -> Tensor:
        """keys, values [N, P, D] of the one key head, prefix_mask [P], state [S], x_t [H, A] -> [H, A]."""
        heads, dim, width, horizon = 8, 16, 32, len(x_t)
        waves = torch.tensor(
            [time * 2 * math.pi / (4e-3 * (4.0 / 4e-3) ** (i / (width // 2 - 1))) for i in range(width // 2)]
        )
        time_embedding = torch.cat((waves.sin(), waves.cos())).expand(horizon, width)
        mixed = torch.cat((self.linear("action_in_proj", x_t), time_embedding), dim=1)
        mixed = self.linear("action_time_mlp_out", F.silu(self.linear("action_time_mlp_in", mixed)))
        x = torch.cat((self.linear("state_proj", state)[None], mixed))
        block = torch.tensor([1, 1] + [0] * (horizon - 1)).cumsum(0)
        sees = torch.cat((prefix_mask.expand(horizon + 1, -1), block[None, :] <= block[:, None]), dim=1)
        angle = (prefix_mask.sum() + torch.arange(horizon + 1))[:, None] / 10_000.0 ** (torch.arange(0, dim, 2) / dim)

        def turned(x: Tensor) -> Tensor:
            one, two = x[..., : dim // 2], x[..., dim // 2 :]
            return torch.cat((one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()), dim=-1)

        for n in range(len(keys)):
            layer = f"{EXPERT}layers.{n}."
            normed = self.norm(layer + "input_layernorm", x)
            key = torch.cat((keys[n], turned(self.linear(layer + "self_attn.k_proj", normed))))
            value = torch.cat((values[n], self.linear(layer + "self_attn.v_proj", normed)))
            query = turned(self.linear(layer + "self_attn.q_proj", normed).unflatten(1, (heads, dim)).transpose(0, 1))
            scores = (query @ key.T / dim**0.5).masked_fill(~sees, -1e30)
            seen = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
            x = x + self.linear(layer + "self_attn.o_proj", seen)
            normed = self.norm(layer + "post_attention_layernorm", x)
            gate = F.gelu(self.linear(layer + "mlp.gate_proj", normed), approximate="tanh")
            x = x + self.linear(layer + "mlp.down_proj", gate * self.linear(layer + "mlp.up_proj", normed))
        return self.linear("action_out_proj", self.norm(f"{EXPERT}norm", x)[1:])


def test_pi0_agrees_with_a_plain_reference(tmp_path: Path) -> None:
    weights = draw_pi0()
    model = import_weights(PI0, save(tmp_path, weights), "pi0").eval()
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(1, 3, 3, 28, 28, generator=generator) * 2 - 1
    image_mask = torch.tensor([[True, True, False]])
    tokens, token_mask = torch.arange(12)[None] * 7, torch.arange(12)[None] < 9
    state, noise = torch.randn(1, 7, generator=generator), torch.randn(1, 10, 7, generator=generator)
    reference = ReferencePi0(weights)
    with torch.no_grad():
        cache = model.prefill(images, image_mask, tokens, token_mask)
        got = model.sample_actions(cache, noise, 10, state)[0]
        x_t = noise[0]
        for step in range(10):
            velocity = reference.velocity(
                cache.keys_NBKPD[:, 0, 0], cache.values_NBKPD[:, 0, 0], cache.mask_BP[0], state[0], x_t, 1 - step / 10
            )
            x_t = x_t - velocity / 10
        other = model.sample_actions(cache, noise, 10, state + 0.5)[0]
    torch.testing.assert_close(got, x_t, atol=1e-4, rtol=0)
    assert (other - got).abs().max() > 0.01
