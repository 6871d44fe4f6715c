"""LoRA: an adapter is merged as peft adds it up, or refused by name; nothing of one is left out."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import ROOT
from support.golden import CONFIG
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError
from training.weights.foreign import TABLE, import_weights, shapes, their_name

PI0 = dataclasses.replace(CONFIG, conditioning="concat", state_dim=7)
NAMES = {name: their_name(name, PI0) for name in shapes(PI0)}
EXPERT = "paligemma_with_expert.gemma_expert.model.layers."
QUERY, UP = f"{EXPERT}1.self_attn.q_proj", f"{EXPERT}2.mlp.up_proj"
RANK, ALPHA = 4, 12
# As peft 0.21 writes it, without lines that are empty there.
SETTINGS: dict[str, Any] = {
    "base_model_name_or_path": "lerobot/pi0_base",
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.1,
    "modules_to_save": ["state_proj"],
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "r": RANK,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": ["q_proj", "up_proj"],
    "use_dora": False,
    "use_rslora": False,
    "loftq_config": {},
    "corda_config": None,
}
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def draw(*shape: int, seed: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base() -> dict[str, Tensor]:
    return {NAMES[name]: draw(*shape, seed=n) for n, (name, shape) in enumerate(shapes(PI0).items())}


def adapter(rank: int = RANK) -> dict[str, Tensor]:
    """Two layers, and one that was trained whole, under LeRobot's names."""
    found = {
        "state_proj.weight": draw(32, 7, seed=100),
        "state_proj.bias": draw(32, seed=101),
    }
    for n, (module, shape) in enumerate(((QUERY, (128, 32)), (UP, (64, 32)))):
        found[f"{module}.lora_A.weight"] = draw(rank, shape[1], seed=200 + n)
        found[f"{module}.lora_B.weight"] = draw(shape[0], rank, seed=300 + n)
    return {f"base_model.model.model.{key}": tensor for key, tensor in found.items()}


def write(folder: Path, weights: dict[str, Tensor], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


def merged(folder: Path, lora: Path, weights: dict[str, Tensor] | None = None, **options: Any) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    save_file(base() if weights is None else weights, path)
    got = import_weights(PI0, path, "pi0", lora=lora, **options).state_dict()
    return {NAMES[name]: tensor for name, tensor in got.items()}


def plain_sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B A, one number after the other."""
    rows = [
        [
            float(weight[i, j]) + scale * sum(float(b[i, k]) * float(a[k, j]) for k in range(len(a)))
            for j in range(weight.shape[1])
        ]
        for i in range(weight.shape[0])
    ]
    return torch.tensor(rows)


def test_an_adapter_is_added_as_peft_adds_it(tmp_path: Path) -> None:
    before, parts = base(), adapter()
    got = merged(tmp_path, write(tmp_path / "lora", parts))
    for module in (QUERY, UP):
        a, b = (parts[f"base_model.model.model.{module}.lora_{factor}.weight"] for factor in "AB")
        expected = plain_sum(before[f"{module}.weight"], a, b, ALPHA / RANK)
        torch.testing.assert_close(got[f"{module}.weight"], expected, atol=1e-5, rtol=0)
    whole = {f"state_proj.{part}": parts[f"base_model.model.model.state_proj.{part}"] for part in ("weight", "bias")}
    for key, tensor in got.items():
        if key not in (f"{QUERY}.weight", f"{UP}.weight"):
            assert torch.equal(tensor, whole.get(key, before[key])), key


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"use_rslora": True}, ALPHA / RANK**0.5),
        ({"alpha_pattern": {"q_proj": 2}}, 2 / RANK),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 2, "layers.1.self_attn.q_proj": 3}}, 3 / RANK),
        ({"alpha_pattern": {"j": 2}}, ALPHA / RANK),  # a name, not the end of one
        ({"alpha_pattern": {"model." + QUERY: 5}}, 5 / RANK),  # under LeRobot's name for it
        ({"rank_pattern": {"q_proj": RANK, "up_proj": RANK}, "r": 9}, ALPHA / RANK),
    ],
)
def test_scales(tmp_path: Path, settings: dict[str, Any], scale: float) -> None:
    parts = adapter()
    got = merged(tmp_path, write(tmp_path / "lora", parts, **settings))
    a, b = (parts[f"base_model.model.model.{QUERY}.lora_{factor}.weight"] for factor in "AB")
    torch.testing.assert_close(got[f"{QUERY}.weight"], base()[f"{QUERY}.weight"] + scale * (b @ a))


def test_other_spellings_of_an_adapter(tmp_path: Path) -> None:
    expected = merged(tmp_path, write(tmp_path / "lora", adapter()))
    renamed = {
        key.replace("lora_A.", "lora_A.default.").replace("state_proj.", "state_proj.modules_to_save.default."): tensor
        for key, tensor in adapter().items()
    }
    renamed["base_model.model.model.state_proj.original_module.bias"] = draw(
        32, seed=7
    )  # peft writes it with bias: all
    got = merged(tmp_path, write(tmp_path / "other", renamed))
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())


def test_the_weights_keep_their_type(tmp_path: Path) -> None:
    half = {key: tensor.bfloat16() for key, tensor in base().items()}
    got = merged(tmp_path, write(tmp_path / "lora", adapter()), half, dtype=None)
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    a, b = (adapter()[f"base_model.model.model.{QUERY}.lora_{factor}.weight"] for factor in "AB")
    assert torch.equal(got[f"{QUERY}.weight"], (half[f"{QUERY}.weight"].float() + ALPHA / RANK * (b @ a)).bfloat16())


def test_an_unused_layer_may_have_an_adapter_that_does_nothing(tmp_path: Path) -> None:
    head = "base_model.model.model.paligemma_with_expert.gemma_expert.lm_head.lora_"
    idle = {f"{head}A.weight": draw(RANK, 32, seed=1), f"{head}B.weight": torch.zeros(512, RANK)}
    merged(tmp_path, write(tmp_path / "lora", adapter() | idle))
    with pytest.raises(
        ConfigurationError, match=r"gemma_expert\.lm_head: expected none, got B \[512, 4\], A \[4, 32\]"
    ):
        merged(tmp_path, write(tmp_path / "lora", adapter() | idle | {f"{head}B.weight": draw(512, RANK, seed=2)}))


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"peft_type": "LOHA"}, "peft_type: expected 'LORA', got 'LOHA'"),
        ({"use_dora": True}, "expected a plain LoRA, got one with use_dora"),
        ({"fan_in_fan_out": True}, "got one with fan_in_fan_out"),
        ({"lora_bias": True}, "got one with lora_bias"),
        ({"a_setting_of_tomorrow": {"x": 1}}, "got one with a_setting_of_tomorrow"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"r": None}, "r: expected r, got none"),
        ({"alpha_pattern": {"(a+)+": 3}}, "alpha_pattern"),
        ({"alpha_pattern": {"\ud800": 3}}, "string"),
        ({"r": 10**400}, "r: "),
    ],
)
def test_what_cannot_be_added_up_is_refused(tmp_path: Path, settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"adapter_config\.json: expected a LoRA .*{re.escape(fault)}"):
        merged(tmp_path, write(tmp_path / "lora", adapter(), **settings))


def lone(key: str) -> str:
    return f"base_model.model.model.{key}"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            lambda w: w | {lone(f"{EXPERT}9.mlp.up_proj.weight"): torch.zeros(64, 32)},
            r"9\.mlp\.up_proj\.weight: expected none",
        ),
        (lambda w: w | {lone("state_proj.weight"): torch.zeros(32, 8)}, r"state_proj\.weight: expected \[32, 7\], got"),
        (
            lambda w: w | {lone(f"{UP}.lora_B.weight"): torch.zeros(64, 3)},
            r"up_proj: expected B \[64, 4\], A \[4, 32\]",
        ),
        (lambda w: {key: t for key, t in w.items() if "up_proj.lora_B" not in key}, "up_proj.lora_A alone"),
        (lambda w: w | {lone(f"{UP}.lora_magnitude_vector"): torch.zeros(64)}, "got .*lora_magnitude_vector"),
        (lambda w: w | {lone(f"{TABLE[:-7]}.lora_embedding_A"): torch.zeros(4, 512)}, "got .*lora_embedding_A"),
        (lambda w: w | {lone(TABLE): torch.zeros(512, 64)}, r"embed_tokens\.weight: expected none"),
        (lambda w: w | {lone("state_proj.base_layer.weight"): torch.zeros(32, 7)}, "expected each weight once"),
    ],
)
def test_an_adapter_of_something_else_is_refused(tmp_path: Path, change: Change, fault: str) -> None:
    with pytest.raises(ConfigurationError, match=fault) as error:
        merged(tmp_path, write(tmp_path / "lora", change(adapter())))
    assert "merge_and_unload" in str(error.value)


def test_the_rank_is_the_configured_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"expected B \[128, 8\], A \[8, 32\], got B \[128, 4\], A \[4, 32\]"):
        merged(tmp_path, write(tmp_path / "lora", adapter(), r=8))


@pytest.mark.parametrize(
    "key",
    [
        f"{QUERY}.lora_A.default.weight",
        f"{QUERY}.base_layer.weight",
        "PaliGemma/llm/layers/attn/q_einsum/lora_a",
        "PaliGemma/llm/layers/mlp/gating_einsum_lora_b",
    ],
)
def test_lora_that_is_not_merged_is_never_ignored(tmp_path: Path, key: str) -> None:
    save_file(base() | {key: draw(4, 32, seed=0)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match=f"expected whole weights, got LoRA beside them: {key}; .*--lora"):
        import_weights(PI0, tmp_path, "pi0")


def test_an_adapter_alone_is_not_the_weights(tmp_path: Path) -> None:
    write(tmp_path / "lora", adapter())
    with pytest.raises(ConfigurationError, match="a LoRA adapter: give its folder with --lora"):
        import_weights(PI0, tmp_path / "lora", "pi0")
    with pytest.raises(ConfigurationError, match="expected whole weights, got LoRA"):
        import_weights(PI0, tmp_path / "lora" / "adapter_model.safetensors", "pi0")
    with pytest.raises(ConfigurationError, match=r"adapter_config\.json: expected a JSON file"):
        merged(tmp_path, tmp_path)
    (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(ConfigurationError, match=r"adapter_model\.bin: expected safetensors, got a pickle"):
        merged(tmp_path, tmp_path / "lora")
    merged(tmp_path, write(tmp_path, adapter()))  # both in one folder
    with pytest.raises(ConfigurationError, match=r"got LoRA beside them: adapter_model\.safetensors"):
        import_weights(PI0, tmp_path, "pi0")


def test_openpis_lora_is_added_as_the_page_says() -> None:
    """openpi computes einsums with the factors; the page's lines make one array of each."""
    page = (ROOT / "docs" / "weights.md").read_text()
    lines = page[page.index("for key in [key for key in flat") : page.index("params = flax.traverse_util.unflatten")]
    rng = np.random.default_rng(0)
    layers, heads, width, dim, rank, hidden = 2, 3, 5, 4, 2, 6
    layout = {  # what openpi computes with the whole array, with lora_a, and with lora_b on that
        "attn/q_einsum/w": ((heads, width, dim), "td,ndh->tnh", "td,ndl->tnl", "tnl,nlh->tnh"),
        "attn/kv_einsum_1/w": ((2, heads, width, dim), "td,skdh->stkh", "td,skdl->stkl", "stkl,sklh->stkh"),
        "attn/attn_vec_einsum/w": ((heads, dim, width), "tnh,nhd->td", "tnh,nhl->tl", "tl,nld->td"),
        "mlp/linear": ((hidden, width), "th,hd->td", "th,hl->tl", "tl,ld->td"),
        "mlp_1/gating_einsum": ((2, width, hidden), "td,sdh->sth", "td,sdl->stl", "stl,slh->sth"),
    }
    flat, before = {}, {}
    for name, (shape, *_) in layout.items():
        stem = name.removesuffix("w") if name.endswith("/w") else f"{name}_"
        before[name] = flat[name] = rng.normal(size=(layers, *shape))
        flat[f"{stem}lora_a"] = rng.normal(size=(layers, *shape[:-1], rank))
        flat[f"{stem}lora_b"] = rng.normal(size=(layers, *shape[:-2], rank, shape[-1]))
    factors = dict(flat)
    exec(lines, {"flat": flat})
    assert sorted(flat) == sorted(layout)
    for name, (_, whole, first, second) in layout.items():
        stem = name.removesuffix("w") if name.endswith("/w") else f"{name}_"
        for layer in range(layers):
            given = rng.normal(size=[{"t": 7, "d": width, "n": heads}.get(c, dim) for c in whole.split(",")[0]])
            if name == "mlp/linear":
                given = rng.normal(size=(7, hidden))
            lora = np.einsum(first, given, factors[f"{stem}lora_a"][layer])
            expected = np.einsum(whole, given, before[name][layer])
            expected = expected + np.einsum(second, lora, factors[f"{stem}lora_b"][layer])
            assert np.einsum(whole, given, flat[name][layer]) == pytest.approx(expected)
