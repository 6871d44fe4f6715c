"""The ways in which a state enters the model: what each is, and that trainer and robot mean the same by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support.arms import arm_run, arm_stage, entry, make_arms
from support.downloads import run_import, small, write_downloads
from support.recipes import SIZES
from torch import Tensor

from ki_vla_ros.bundle import StateEncoding
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy import make_model_input, state_to_bins
from ki_vla_ros.records import CameraFrame, Observation
from training.action_space import ActionSpace, Numbers
from training.data import Batch
from training.export import as_batch, bundle
from training.model import Cache
from training.run import Run
from training.tokens import STATE_BINS, prompt_ids, prompt_tokenizer, prompt_vocab_size


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_arms(tmp_path_factory.mktemp("arms"))


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PaliGemma's weights and vocabulary, both small, as training.import_weights makes them."""
    folder = tmp_path_factory.mktemp("downloads")
    given = {key: value for key, value in write_downloads(folder).items() if key not in ("--stats", "--robot")}
    assert run_import(given | {"--out": folder / "checkpoint"}, "paligemma") == 0
    return folder / "checkpoint"


def run_with(arms: Path, out: Path, state: str, **changes: Any) -> Run:
    """A run whose weights are away from initial values, at which no state would change an action."""
    model = changes.pop("model", SIZES) | {"state": state}
    run = Run(arm_run(arms, out, entry(arms, "lifter"), model=model, **changes))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    run.model.eval()
    return run


def two_states(run: Run) -> tuple[Batch, Batch]:
    """One frame, and the same one with another state."""
    mixture = run.data.training["robot"]
    [sample] = mixture.read([(0, 3)])
    other = replace(sample, state_S=sample.state_S + 5.0)
    embodiment, rng = run.data.embodiment, np.random.default_rng(0)
    one, two = (run.data.plain.of_robots([embodiment], [given], rng) for given in (sample, other))
    return one, two


@torch.no_grad()
def velocity(run: Run, prefix: Batch, state: Batch) -> Tensor:
    torch.manual_seed(1)
    x_t = torch.randn(1, run.data.robot.horizon, run.model.config.action_dim)
    token = None if run.model.config.state_dim is None else state.state_BS
    return run.model.velocity(run.model.prefill(*prefix.prefix), x_t, torch.full_like(x_t[..., 0], 0.5), token)


@pytest.mark.parametrize("state", get_args(StateEncoding))
def test_the_state_enters_where_its_way_says_and_nowhere_else(arms: Path, tmp_path: Path, state: StateEncoding) -> None:
    run = run_with(arms, tmp_path, state)
    one, two = two_states(run)
    before = velocity(run, one, one)
    by_prompt, by_token = (not torch.equal(velocity(run, *given), before) for given in ((two, one), (one, two)))
    assert (by_prompt, by_token) == (state in ("text", "special", "both"), state in ("token", "both"))
    said = run.data.tokenizer.decode(one.tokens_BL[0].tolist(), skip_special_tokens=False)
    assert said.count("State") == by_prompt and len(one.state_BS[0]) == 3
    words = [run.data.tokenizer.id_to_token(i) for i in one.tokens_BL[0].tolist()]
    bins = [word.removeprefix("<state_").removesuffix(">") for word in words]
    assert [name.isdecimal() for name in bins].count(True) == (3 if by_prompt else 0), "one token for each dimension"
    assert sum(word.startswith("<state_") for word in words) == (3 if state == "special" else 0)


def test_a_state_beyond_what_was_seen_has_the_outermost_special_token(arms: Path, tmp_path: Path) -> None:
    run = run_with(arms, tmp_path, "special", prompt={"length": 40, "style": "openpi"}, vocabulary={"kind": "bpe"})
    prompt = run.data.plain.render("Move it", np.array([-7.0, 0.0, 7.0]))
    assert prompt == "Task: Move it, State: <state_0><state_128><state_255>;\nAction: "
    ids = run.data.tokenizer.encode(prompt).ids
    first = run.data.tokenizer.token_to_id("<state_0>")
    assert [i - first for i in ids if first <= i < first + STATE_BINS] == [0, 128, 255]
    assert prompt_vocab_size(run.data.tokenizer) == first + STATE_BINS, "the last that a prompt can hold"


def test_the_states_range_is_that_of_the_data_or_of_its_quantiles(arms: Path, tmp_path: Path) -> None:
    """Beyond the quantiles a continuous state goes on past 1, and a bin is the outermost."""
    (space,) = (e.space for e in run_with(arms, tmp_path, "text").data.embodiments.values())
    state_NS = np.random.default_rng(0).normal(size=(20_000, 3)) * [1.0, 10.0, 1e-9]
    chunk_NHD, known_NH = np.repeat(state_NS[:, None], 4, axis=1), np.ones((len(state_NS), 4), dtype=bool)
    numbers = Numbers(state_NS, chunk_NHD, known_NH, state_NS.min(axis=0), state_NS.max(axis=0))
    whole, quantile = (ActionSpace.fit(space.robot, numbers, "quantile", of) for of in ("whole", "quantile"))
    assert np.abs(whole.normalize_state(state_NS)).max() < 1.0
    ends = np.quantile(state_NS[:, :2], (0.01, 0.99), axis=0)
    np.testing.assert_allclose([quantile.state_low[:2], quantile.state_high[:2]], ends)
    beyond_NS = quantile.normalize_state(state_NS)
    assert np.mean(np.abs(beyond_NS[:, 0]) > 1.0) == pytest.approx(0.02, abs=1e-3) and beyond_NS[:, :2].max() > 1.4
    assert np.abs(beyond_NS[:, 2]).max() < 0.1, "what hardly moves is not blown up"
    bins = state_to_bins(beyond_NS[:, 0])
    assert bins.min() == 0 and bins.max() == STATE_BINS - 1
    assert (whole.action_low, whole.action_high) == (quantile.action_low, quantile.action_high)
    run = run_with(arms, tmp_path, "both", state_range="quantile")
    assert run.describe().state.low == run.data.embodiment.space.state_low > space.state_low
    with pytest.raises(ValidationError, match="state_range: expected quantile with normalization quantile, got mean_"):
        run_with(arms, tmp_path, "both", state_range="quantile", normalization="mean_std")


class Written(Exception):
    """In place of tracing, which takes long and is tested elsewhere."""


def exported_prefill(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The prefill graph as `export_bundle` makes it of the run's policy."""
    made: list[Any] = []

    def keep(graphs: list[tuple[Any, Any]], _: Path) -> None:
        made.append(graphs[0][0])
        raise Written

    monkeypatch.setattr(bundle, "write_graphs", keep)
    run.write_policy(folder / "policy", folder / "adapter", run.describe(), {}, run.model.state_dict())
    with pytest.raises(Written):
        bundle.export_bundle(folder / "policy", folder / "bundle")
    return made[0]


@torch.no_grad()
def same_on_the_robot(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The velocity for a frame, from the exported prefix and from the trainer's batch."""
    prefill, robots = exported_prefill(run, folder, monkeypatch), prompt_tokenizer(run.data.tokenizer)
    embodiment, rng = run.data.embodiment, np.random.default_rng(0)
    [sample] = run.data.training["robot"].read([(0, 3)])
    found = []
    for shift in (0.0, 5.0):
        given = replace(sample, state_S=sample.state_S + shift)
        batch = run.data.plain.of_robots([embodiment], [given], rng)
        images = zip(run.data.robot.camera_names, given.images, strict=True)
        seen = Observation(0, {name: CameraFrame(name, 0, image) for name, image in images}, given.state_S)
        (*prefix, tokens, mask), token = as_batch(
            make_model_input(run.describe(), robots, seen, given.task), run.model.config.state_dim
        )
        assert int(tokens.max()) < robots.get_vocab_size() == len(prefill.model.backbone.embedding.weight)
        keys, values, seen_P = prefill(*(tensor[0] for tensor in (*prefix, tokens, mask)))
        x_t = torch.randn(1, run.data.robot.horizon, run.model.config.action_dim)
        rest = x_t, torch.full_like(x_t[..., 0], 0.5)
        velocity = run.model.velocity(Cache(keys[:, None], values[:, None], seen_P[None]), *rest, token)
        trained = None if run.model.config.state_dim is None else batch.state_BS
        expected = run.model.velocity(run.model.prefill(*batch.prefix), *rest, trained)
        torch.testing.assert_close(velocity, expected, atol=1e-4, rtol=1e-4)
        found.append(run.model.velocity(Cache(keys[:, None], values[:, None], seen_P[None]), x_t * 0, rest[1], token))
    assert (found[0] - found[1]).abs().max() > 1e-3, "the state counts"


@pytest.mark.parametrize("state", ["token", "special"])
def test_the_robot_does_with_a_state_what_the_trainer_does(
    arms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: StateEncoding
) -> None:
    same_on_the_robot(run_with(arms, tmp_path, state), tmp_path, monkeypatch)


def test_special_tokens_follow_paligemmas_and_come_along_to_the_robot(
    arms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paligemma: Path
) -> None:
    sizes = small("pi05")
    changes = {
        "start": {"checkpoint": str(paligemma), "parts": ["vision", "backbone"]},
        "model": {name: vars(getattr(sizes, name)) for name in ("vision", "backbone", "expert")},
        "prompt": {"length": 80},
        "stages": [arm_stage(train=["backbone", "expert"])],
    }
    run = run_with(arms, tmp_path, "special", **changes)
    ids = prompt_ids(run.data.tokenizer)
    assert list(ids[-STATE_BINS:]) != list(range(len(ids)))[-STATE_BINS:], "after locations and segments"
    assert run.data.tokenizer.token_to_id("<fast_0>") == ids[-1] + 1
    same_on_the_robot(run, tmp_path, monkeypatch)
    # Without the state in the prompt, the template of the checkpoint's kind has no place for it.
    without = run_with(arms, tmp_path / "token", "token", **changes)
    assert without.data.form.prompt.template == "Task: {task}\n" and without.model.config.state_dim == 3
    # FAST's tokens end a vocabulary, so none can be added behind them.
    text = run_with(arms, tmp_path / "text", "text", **changes)
    text.write_policy(tmp_path / "said", tmp_path / "adapter", text.describe(), {}, text.model.state_dict())
    changes["start"] |= {"checkpoint": str(tmp_path / "said")}
    with pytest.raises(ConfigurationError, match=r"expected special tokens for the state, .* got 256 FAST tokens"):
        run_with(arms, tmp_path / "late", "special", **changes)
