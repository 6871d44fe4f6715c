"""Actions as tokens in a run: which tokens a step learns, how they are read again, and what stays with the policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.arms import arm_run, arm_stage, entry, make_arms
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError
from training.data import Batch
from training.model import FAULTS, TokenSampler
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


def test_fast_without_merges_is_learned_and_read_to_its_end(
    arms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"fast_merges": "none", "sampler": "tokens", "stages": [arm_stage(losses={"fast": 1.0}, steps=1)]}
    run = run_with(arms, tmp_path / "run", **changes)
    run.run()
    one, first = run.data.embodiment, int(run.data.plain.postfix.ids[0])
    samples = run.data.training["robot"].read([(0, 0), (0, 1)])
    batch = run.data.plain.of_robots([one] * 2, samples, np.random.default_rng(0))
    chunk_BHA = batch.action_BHA[..., :3].double().numpy() * [[[1.0]], [[0.0]]]
    sequences = [one.chunks.encode(chunk_HA) for chunk_HA in chunk_BHA]
    assert sequences[1] == [one.chunks.vocab_size - 1] and len(sequences[0]) > 3
    say(run, monkeypatch, *([first + i for i in ids] for ids in sequences))
    found_BHA = run.sampler()(run.model, batch.prefix, batch.state_BS, torch.zeros(()))
    np.testing.assert_array_equal(found_BHA, [one.chunks.decode(ids) for ids in sequences])
    read = load_actions(tmp_path / "run" / "policy" / ACTIONS)
    assert read.encode(chunk_BHA[0]) == sequences[0] and describe_actions(read) == describe_actions(one.chunks)


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


WHOLE = {"postfix": "whole", "sampler": "tokens", "stages": [arm_stage(losses={"fast": 1.0})]}


def one_sample(run: Run) -> tuple[Batch, list[int]]:
    """A frame as a batch, and its action tokens in the model's vocabulary."""
    [sample] = run.data.training["robot"].read([(0, 1)])
    batch = run.data.plain.of_robots([run.data.embodiment], [sample], np.random.default_rng(0))
    chunk_HA = batch.action_BHA[0, :, :3].double().numpy()
    return batch, [run.data.tokenizer.token_to_id(f"<fast_{i}>") for i in run.data.embodiment.chunks.encode(chunk_HA)]


def ids_of(run: Run, *tokens: str) -> list[int]:
    return [run.data.tokenizer.token_to_id(token) for token in tokens]


@pytest.mark.parametrize("prompt", [None, "Task: {task}, State: {state};\nAction: "])
def test_a_whole_postfix_is_openpis_and_all_of_it_is_learned(arms: Path, tmp_path: Path, prompt: str | None) -> None:
    """pi0.5's prompt says the first words itself; then the postfix does not say them again."""
    run = run_with(arms, tmp_path, **WHOLE, prompt={"length": 40, "template": prompt})
    batch, actions = one_sample(run)
    begin = ids_of(run, "Action", ":") if prompt is None else []
    postfix = [*begin, *actions, *ids_of(run, "|", "<eos>")]
    assert batch.postfix_BT[batch.fast_mask_BT].tolist() == postfix
    said = run.data.tokenizer.decode(batch.tokens_BL[0].tolist(), skip_special_tokens=False)
    assert ("Action" in said) == (prompt is not None) and run.data.form.prompt.template.endswith(prompt or ";\n")
    # The loss is a mean over every token of it, the words and the end too.
    stage = run.config.stages[0]
    [piece] = run.trainer.losses.split(batch, stage, np.random.default_rng(0))
    output = run.model(*batch.prefix, batch.postfix_BT)
    last = output.prefix_hidden_BPD[0, int(batch.last_token_B[0]) - batch.tokens_BL.shape[1]]
    hidden_TD = torch.cat([last[None], output.postfix_hidden_BTD[0, :-1]])
    surprise = torch.nn.functional.cross_entropy(run.model.logits(hidden_TD), torch.tensor(postfix))
    torch.testing.assert_close(run.trainer.losses(piece, stage)["fast"], surprise)


def test_a_whole_postfix_is_read_to_its_end_and_what_is_malformed_is_named(
    arms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with(arms, tmp_path, **WHOLE)
    batch, actions = one_sample(run)
    begin, end, other = ids_of(run, "Action", ":"), ids_of(run, "|", "<eos>"), ids_of(run, "Task")
    cases = {
        "": [*begin, *actions, *end],
        "frame": [*actions, *end],
        "frame ": [*begin, *actions, end[1]],
        "frame  ": end[1:],
        "foreign": [*begin, actions[0], *other, *actions[1:], *end],
        "chunk": [*begin, *actions, actions[-1], *end],
        "chunk ": [*begin, *end],
        "endless": [*begin, *actions * 9],
    }
    say(run, monkeypatch, *cases.values())
    many = batch.rows(torch.zeros(len(cases), dtype=torch.int64))
    sampler = run.sampler()
    found_BHA = sampler(run.model, many.prefix, None, torch.zeros(()))
    chunks = run.data.embodiment.chunks
    first = run.data.tokenizer.token_to_id("<fast_0>")
    np.testing.assert_array_equal(found_BHA[0], chunks.decode([i - first for i in actions]))
    assert np.isnan(found_BHA[1:]).all(), "never zeros"
    assert sampler.faults == {"frame": 3, "foreign": 1, "chunk": 2, "endless": 1}
    assert sampler.shares(8) == {"endless": 0.125, "frame": 0.375, "foreign": 0.125, "chunk": 0.25}


@torch.no_grad()
def test_a_whole_postfix_is_read_from_the_cache_as_by_the_whole_model(
    arms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = run_with(arms, tmp_path, **WHOLE), list[int]()
    torch.manual_seed(0)
    for parameter in run.model.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
    batch, _ = one_sample(run)
    monkeypatch.setattr(TokenSampler, "_ends", lambda _, ids: said.append(ids[-1]))
    run.sampler()(run.model, batch.prefix, None, torch.zeros(()))
    assert len(said) == 2 + 4 * 3 + 2 and len(set(said)) > 2
    for t, expected in enumerate(said):
        output = run.model(*batch.prefix, torch.tensor([said[:t]]) if t else None)
        last = output.prefix_hidden_BPD[0, int(batch.last_token_B[0]) - batch.tokens_BL.shape[1]]
        hidden = output.postfix_hidden_BTD[0, -1] if t else last
        assert int(run.model.logits(hidden).argmax()) == expected, f"token {t} of {said}"


@torch.no_grad()
def test_drawn_tokens_are_drawn_by_how_likely_they_are(
    arms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same noise draws the same, beside whatever others; temperature 0 draws nothing."""
    run = run_with(arms, tmp_path, **NAIVE, token_temperature=2.0)
    batch, _ = one_sample(run)
    one, first = run.data.embodiment, int(run.data.plain.postfix.ids[0])
    scores_W = torch.full((run.model.config.vocab_size,), 9.0)  # of other tokens, which are not looked at
    scores_W[first : first + 256] = -99.0
    scores_W[first : first + 4] = torch.tensor([2.0, 0.0, -4.0, 1.0])
    monkeypatch.setattr(run.model, "logits", lambda hidden: scores_W.expand(len(hidden), -1))
    many = batch.rows(torch.zeros(400, dtype=torch.int64))
    noise_BHA = torch.randn(400, 4, 5, generator=torch.Generator().manual_seed(0))
    found_BHA = run.sampler()(run.model, many.prefix, None, noise_BHA)
    tokens = np.concatenate([one.chunks.encode(chunk_HA) for chunk_HA in found_BHA])
    shares = np.bincount(tokens, minlength=4) / len(tokens)
    np.testing.assert_allclose(shares, (scores_W[first : first + 4] / 2.0).softmax(dim=0), atol=0.02)
    alone_BHA = run.sampler()(run.model, batch.prefix, None, noise_BHA[7:8])
    np.testing.assert_array_equal(alone_BHA, found_BHA[7:8])
    likeliest = replace(run.sampler(), temperature=0.0)(run.model, many.prefix, None, noise_BHA)
    assert one.chunks.encode(likeliest[0]) == [0] * 9 and (likeliest == likeliest[0]).all()


def test_figures_name_what_was_malformed(arms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_with(arms, tmp_path, **WHOLE)
    said, own = run.figures(), ids_of(run, "Action", ":", "|", "<eos>")
    assert sum(said[f"fast_malformed.{fault}"] for fault in FAULTS) == pytest.approx(1.0 - said["fast_whole"])
    monkeypatch.setattr(
        run.model, "logits", lambda hidden: torch.eye(run.model.config.vocab_size)[own[3]].expand(len(hidden), -1)
    )
    ended = run.figures()
    assert ended["fast_malformed.frame"] == 1.0 and ended["fast_whole"] == 0.0 and np.isnan(ended["fast_error"])
    assert ended["fast_accuracy"] == 0.0, "of action tokens alone: the end, which is right, does not count"


def test_the_words_around_actions_must_be_in_the_vocabulary(arms: Path, tmp_path: Path) -> None:
    stages = [arm_stage(losses={"fast": 1.0}, steps=1)]
    first = run_with(arms, tmp_path / "first", stages=stages)
    first.run()
    start = {"checkpoint": str(tmp_path / "first" / "policy")}
    with pytest.raises(ConfigurationError, match=r"postfix: whole: text: expected words of the vocabulary, got '\|'"):
        run_with(arms, tmp_path / "on", **WHOLE, start=start, model=None, prompt=None)
