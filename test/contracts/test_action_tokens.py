"""Actions as tokens in a run: which tokens a step learns, how they are read again, and what stays with the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.arms import arm_run, arm_stage, entry, make_arms
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError
from training.run import Run
from training.tokens import ACTIONS, NaiveTokenizer, describe_actions, load_actions


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_arms(tmp_path_factory.mktemp("arms"))


def run_with(arms: Path, out: Path, **changes: Any) -> Run:
    return Run(arm_run(arms, out, entry(arms, "lifter"), entry(arms, "reacher"), **changes))


NAIVE = {
    "action_tokens": "naive",
    "naive_stride": 2,
    "fast_vocabulary": None,
    "sampler": "tokens",
    "stages": [arm_stage(losses={"fast": 1.0})],
}


def say(run: Run, monkeypatch: pytest.MonkeyPatch, *sequences: list[int]) -> None:
    """The model's likeliest tokens are these, one after the other, for each sample of a batch."""
    said = [iter(ids) for ids in sequences]

    def logits(hidden_BD: Tensor) -> Tensor:
        scores_BW = torch.zeros(len(hidden_BD), run.model.config.vocab_size)
        for b, ids in enumerate(said):
            scores_BW[b, next(ids, 0)] = 1.0
        return scores_BW

    monkeypatch.setattr(run.model, "logits", logits)


def test_a_run_may_write_actions_as_naive_tokens(arms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_with(arms, tmp_path / "run", **NAIVE)
    run.run()
    one = run.data.embodiment
    assert one.chunks == NaiveTokenizer(4, 3, 2) and {e.chunks.action_dim for e in run.data.embodiments.values()} == {
        3,
        5,
    }
    [sample] = run.data.training["robot"].read([(0, 1)])
    batch = run.data.plain.of_robots([one], [sample], np.random.default_rng(0))
    chunk_HA = batch.action_BHA[0, :, :3].double().numpy()
    expected = [run.data.tokenizer.token_to_id(f"<fast_{i}>") for i in one.chunks.encode(chunk_HA)]
    assert batch.postfix_BT[batch.fast_mask_BT].tolist() == expected and len(expected) == 3 * 3
    say(run, monkeypatch, expected)
    found_BHA = run.sampler()(run.model, batch.prefix, batch.state_BS, torch.zeros(()))
    np.testing.assert_array_equal(found_BHA, one.chunks.decode(one.chunks.encode(chunk_HA))[None])
    assert load_actions(tmp_path / "run" / "policy" / ACTIONS) == one.chunks


def test_a_policys_tokens_stay_with_it_and_go_on_with_its_statistics(arms: Path, tmp_path: Path) -> None:
    stages = [arm_stage(losses={"fast": 1.0}, steps=1)]
    first = run_with(arms, tmp_path / "first", stages=stages, fast_scale=5.0)
    first.run()
    policy = tmp_path / "first" / "policy"
    assert describe_actions(load_actions(policy / ACTIONS)) == describe_actions(first.data.embodiment.chunks)
    changes = {"stages": stages, "model": None, "prompt": None}
    on, anew = (
        run_with(arms, tmp_path / statistics, start={"checkpoint": str(policy), "statistics": statistics}, **changes)
        for statistics in ("keep", "data")
    )
    assert describe_actions(on.data.actions) == describe_actions(first.data.actions)
    assert anew.data.actions.scale == 10.0 and on.made_of()["action_tokens"] != anew.made_of()["action_tokens"]
    kept = {"checkpoint": str(policy), "statistics": "keep"}
    with pytest.raises(ConfigurationError, match=r"actions\.json: expected naive tokens, as .* says, got fast; say"):
        run_with(arms, tmp_path / "other", start=kept, **changes | {"action_tokens": "naive", "fast_vocabulary": None})
    # A policy that never learned actions as tokens has none.
    flow = run_with(arms, tmp_path / "flow", stages=[arm_stage(losses={"flow": 1.0}, steps=1)])
    flow.run()
    assert not (tmp_path / "flow" / "policy" / ACTIONS).exists()
