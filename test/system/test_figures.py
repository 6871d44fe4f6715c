"""Figures during training: against slow references, their gates, their record over resumptions, and the page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.arms import arm_run, arm_stage, entry, make_arms
from support.recipes import SIZES
from support.slider import Slider
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError
from training.data import Batch
from training.evaluate import driving, offline
from training.losses import next_token_hidden
from training.model import FAULTS
from training.run import Run
from training.tokens import FastDecodeError
from training.weights import read_policy

VOCABULARY = 60  # so few that a chunk has many tokens

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_arms(tmp_path_factory.mktemp("arms"))


@pytest.fixture(scope="module")
def trained(arms: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two robots, whose chunks FAST has learned in part."""
    out = tmp_path_factory.mktemp("trained")
    stages = [arm_stage(steps=40, learning_rate=1e-2, warmup_steps=1, evaluate_every=15)]
    run = Run(
        arm_run(
            arms,
            out,
            entry(arms, "lifter"),
            entry(arms, "reacher"),
            stages=stages,
            fast_vocabulary=VOCABULARY,
            fast_scale=5.0,
        )
    )
    run.run()
    return run


def held_out(run: Run, name: str) -> tuple[Any, list[Any], Batch]:
    """A robot, all its held-out samples, and their batch."""
    embodiment = next(e for e in run.data.embodiments.values() if e.robot.name == name)
    mixture = run.data.held_out["robot"]
    samples = mixture.read(mixture.spread(1000, run.data.held_out_parts("robot", embodiment)))
    batch = run.data.plain.of_robots([embodiment] * len(samples), samples, np.random.default_rng(0))
    return embodiment, samples, batch


def logits(run: Run, batch: Batch, postfix_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, T + 1, W]: scores of each next token, by the whole model at once, without a cache."""
    output = run.model(*batch.prefix, postfix_BT, mask_BT)
    postfix_BTD = torch.cat([output.postfix_hidden_BTD, output.postfix_hidden_BTD[:, :1]], dim=1)
    last_B = output.prefix_hidden_BPD.shape[1] - batch.tokens_BL.shape[1] + batch.last_token_B
    return run.model.logits(next_token_hidden(output.prefix_hidden_BPD, last_B, postfix_BTD))


@torch.no_grad()
def test_figures_are_those_of_a_slow_reference(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run, scores, counts = trained, [], []
    monkeypatch.setattr(offline, "BATCH", 3)
    figures = run.figures()
    monkeypatch.setattr(offline, "BATCH", 1000)
    whole = run.figures()
    for name, before in (("lifter", ""), ("reacher", "reacher/")):
        embodiment, samples, batch = held_out(run, name)
        assert batch.postfix_BT is not None and batch.fast_mask_BT is not None
        assert not all(sample.known_H.all() for sample in samples), "some reach past the episode's end"
        hits = logits(run, batch, batch.postfix_BT, batch.fast_mask_BT)[:, :-1].argmax(dim=2) == batch.postfix_BT
        accuracy = float(hits[batch.fast_mask_BT].double().mean())
        assert figures[f"{before}fast_accuracy"] == pytest.approx(accuracy, abs=1e-9)
        stage = run.config.stages[0]
        [piece] = run.trainer.losses.split(batch, stage, np.random.default_rng(0))
        losses = run.trainer.losses(piece, stage)
        scores.append(float(losses["fast"]))
        counts.append(int(batch.fast_mask_BT.sum()))

        cache = run.model.prefill(*batch.prefix)
        noise = torch.randn(batch.action_BHA.shape, generator=torch.Generator().manual_seed(0))
        action_BHA = run.model.sample_actions(cache, noise, run.config.flow_steps).double().numpy()
        off: dict[str, list[float]] = {}
        for sample, action_HA in zip(samples, action_BHA, strict=True):
            predicted_HD = embodiment.space.unnormalize_chunk(action_HA[:, : sample.chunk_HD.shape[1]], sample.state_S)
            for d, action in enumerate(embodiment.robot.actions):
                errors = [abs(predicted_HD[h, d] - sample.chunk_HD[h, d]) for h in np.flatnonzero(sample.known_H)]
                off.setdefault(action.name, []).append(float(np.mean(errors)))
        for dimension, errors in off.items():
            assert whole[f"{before}flow_error.{dimension}"] == pytest.approx(np.mean(errors), rel=1e-6)

        fast, first = embodiment.chunks, int(run.data.plain.postfix.ids[0])
        longest = 8 + batch.postfix_BT.shape[1] * 3 // 2
        good = []
        for row in range(len(samples)):
            one = Batch(**{key: None if value is None else value[row : row + 1] for key, value in vars(batch).items()})
            ids: list[int] = []
            while len(ids) < longest and sum(len(fast.integers(i)) for i in ids) < fast.horizon * fast.action_dim:
                given = torch.tensor([[*(first + i for i in ids), 0]])
                there = torch.arange(len(ids) + 1)[None] < len(ids)
                scored_W = logits(run, one, given, there)[0, len(ids)]
                ids.append(int(scored_W[first : first + fast.vocab_size].argmax()))
            try:
                chunk_HD = fast.decode(ids)
            except FastDecodeError:
                continue
            off_HD = np.abs(chunk_HD - offline.normalized(embodiment, [samples[row]])[0])
            good.append(off_HD[samples[row].known_H].mean())
        assert whole[f"{before}fast_whole"] == pytest.approx(len(good) / len(samples))
        if good:
            assert whole[f"{before}fast_error"] == pytest.approx(np.mean(good), rel=1e-5)
    assert figures["fast_loss.robot"] == pytest.approx(np.average(scores, weights=counts), rel=1e-5)
    assert 0 < figures["flow_loss.robot"] < 3


@torch.no_grad()
def test_tokens_read_one_by_one_are_those_of_the_whole_sequence(trained: Run) -> None:
    _, _, batch = held_out(trained, "reacher")
    assert batch.postfix_BT is not None and batch.fast_mask_BT is not None and batch.postfix_BT.shape[1] > 3
    expected_BTW = logits(trained, batch, batch.postfix_BT, batch.fast_mask_BT)
    cache = trained.model.prefill(*batch.prefix)
    given_BT = torch.cat([offline.last_tokens(batch.tokens_BL, batch.token_mask_BL), batch.postfix_BT[:, :-1]], dim=1)
    for t in range(given_BT.shape[1]):
        hidden_B1D, cache = trained.model.read_on(cache, given_BT[:, t : t + 1])
        there_B = batch.fast_mask_BT[:, t]
        got_BW = trained.model.logits(hidden_B1D[:, 0])
        torch.testing.assert_close(got_BW[there_B], expected_BTW[:, t][there_B], atol=1e-4, rtol=1e-4)


def test_the_record_has_every_evaluation_once_also_after_a_stop(arms: Path, tmp_path: Path, trained: Run) -> None:
    def lines(out: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (out / "figures.jsonl").read_text().splitlines()]

    assert {line["step"] for line in lines(trained.config.out)} == {15, 30, 40}
    stages = [arm_stage(steps=4, evaluate_every=3, checkpoint_every=2), arm_stage(name="more", steps=1)]
    whole = Run(arm_run(arms, tmp_path / "whole", entry(arms, "lifter"), stages=stages))
    whole.run()
    broken = Run(arm_run(arms, tmp_path / "broken", entry(arms, "lifter"), stages=stages))
    real, left = broken.trainer.accumulate_gradients, iter(range(9))

    def stop(*given: Any) -> dict[str, float]:
        if next(left) == 3:  # figures of step 3 are written, and its weights are lost
            raise KeyboardInterrupt
        return real(*given)

    broken.trainer.accumulate_gradients = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    assert max(line["step"] for line in lines(tmp_path / "broken")) == 3
    with (tmp_path / "broken" / "figures.jsonl").open("a") as file:
        file.write('{"stage": "joint", "step": 4, "na')  # and a line that was cut off
    Run(arm_run(arms, tmp_path / "broken", entry(arms, "lifter"), stages=stages)).run()
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    places = [(line["stage"], line["step"], line["name"]) for line in lines(tmp_path / "broken")]
    assert len(set(places)) == len(places) and {place[:2] for place in places} == {
        ("joint", 3),
        ("joint", 4),
        ("more", 1),
    }


def test_a_run_that_learns_nothing_stops_early(arms: Path, tmp_path: Path) -> None:
    gates_at = {2: {"flow_error": {"most": 1e-6}, "fast_whole": {"least": 0.0}}}
    run = Run(arm_run(arms, tmp_path, entry(arms, "lifter"), stages=[arm_stage(steps=50, gates_at=gates_at)]))
    with pytest.raises(ConfigurationError, match=r"stage joint, step 2: expected flow_error at most 1e-06, got"):
        run.run()
    assert (tmp_path / "report" / "index.html").exists() and not (tmp_path / "policy").exists()
    again = Run(arm_run(arms, tmp_path, entry(arms, "lifter"), stages=[arm_stage(steps=50, gates_at=gates_at)]))
    with pytest.raises(ConfigurationError, match=r"step 2: expected flow_error"):
        again.run()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"gates": {"flow_eror": {"most": 1}}}, r"stage joint: gates: expected one of the figures fast_loss\.robot, .*"
         r"got 'flow_eror'; did you mean 'flow_error'\?"),
        ({"gates_at": {1: {"success": 0.5}}}, r"stage joint: gates_at: 1: expected one of the figures"),
    ],
)  # fmt: skip
def test_an_unknown_figure_is_refused_before_the_first_step(
    arms: Path, tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    run = Run(arm_run(arms, tmp_path, entry(arms, "lifter"), stages=[arm_stage(**changes)]))
    run.trainer.accumulate_gradients = None  # type: ignore[assignment, method-assign]
    with pytest.raises(ConfigurationError, match=fault):
        run.run()


def test_a_disk_without_room_is_found_before_the_first_step(
    arms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(arm_run(arms, tmp_path, entry(arms, "lifter")))
    run.trainer.accumulate_gradients = None  # type: ignore[assignment, method-assign]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConfigurationError, match=r"out .*: expected 0\.0 GB on the disk for checkpoints and policy"):
        run.run()


def test_the_page_stands_alone_and_has_the_worst_samples(trained: Run) -> None:
    text = (trained.config.out / "report" / "index.html").read_text()
    assert len(text) < 1_500_000
    assert "http" not in text and 'src="data:image/jpeg' in text
    worst = trained.measured.worst
    assert len(worst) == offline.WORST and [w.error for w in worst] == sorted((w.error for w in worst), reverse=True)
    for prediction in worst:
        assert f"error {prediction.error:.3f}" in text
    assert text.count("<img") == sum(len(prediction.sample.images) for prediction in worst)
    for told in (
        "flow_loss.robot",
        "reacher: reacher_4",
        "<td>rad</td>",
        "move the lifter",
        f"fast_vocabulary: {VOCABULARY}",
    ):
        assert told in text


def test_the_model_drives_while_it_is_trained(arms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Slider] = []

    def open_slider(name: str) -> Slider:
        opened.append(Slider(str(arms / "lifter.yaml")))
        opened[-1].instruction, opened[-1].time_limit_s = "move the lifter", 0.5
        return opened[-1]

    monkeypatch.setattr(driving, "open_environment", open_slider)
    environment = {"names": ["slider"], "episodes": 2, "every": 2}
    stages = [arm_stage(steps=3, gates={"success.slider": {"most": 1.0}})]
    run = Run(arm_run(arms, tmp_path, entry(arms, "lifter"), stages=stages, environment=environment))
    run.run()
    assert len(opened) == 3, "tried before the first step, then after two steps and at the end"
    found = run.trainer.figure_record.values("joint", 3)
    assert found["success_low.slider"] <= found["success.slider"] <= found["success_high.slider"]
    assert found["success"] == found["success.slider"]
    words = arm_run(arms, tmp_path / "new", entry(arms, "lifter"), environment={"names": ["slider"]})
    monkeypatch.setattr(Slider, "instruction", "fly")
    monkeypatch.setattr(driving, "open_environment", lambda name: Slider(str(arms / "lifter.yaml")))
    with pytest.raises(Exception, match=r"does not know .*fly"):
        Run(words).run()


def test_a_model_may_drive_by_its_tokens(arms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slider = Slider(str(arms / "lifter.yaml"))
    slider.instruction, slider.time_limit_s = "move the lifter", 0.5
    monkeypatch.setattr(driving, "open_environment", lambda name: slider)
    stages = [arm_stage(losses={"fast": 1.0}, train=["vision", "backbone"])]
    environment = {"names": ["slider"], "episodes": 2}
    changes = {"sampler": "tokens", "stages": stages, "environment": environment, "fast_vocabulary": VOCABULARY}
    whole = Run(arm_run(arms, tmp_path / "whole", entry(arms, "lifter"), **changes, postfix="whole"))
    whole.run()
    found = whole.trainer.figure_record.values("joint", 2)
    assert found["malformed"] == 1.0 and slider.executed == [], "words that were never learned say no chunk"
    assert sum(found[f"malformed.{fault}"] for fault in FAULTS) == 1.0
    run = Run(arm_run(arms, tmp_path, entry(arms, "lifter"), **changes))
    run.run()
    found = run.trainer.figure_record.values("joint", 2)
    assert sum(found[f"malformed.{fault}"] for fault in FAULTS) == pytest.approx(found["malformed"])
    embodiment, samples, batch = held_out(run, "lifter")
    fast = embodiment.chunks
    sequences = [fast.encode(chunk_HD) for chunk_HD in offline.normalized(embodiment, samples)]
    said = [iter(ids) for ids in sequences]

    def logits(hidden_BD: Tensor) -> Tensor:
        scores_BW = torch.zeros(len(hidden_BD), run.model.config.vocab_size)
        for b, ids in enumerate(said):
            scores_BW[b, run.data.plain.postfix.ids[next(ids, 0)]] = 1.0
        return scores_BW

    monkeypatch.setattr(run.model, "logits", logits)
    chunk_BHD = run.sampler()(run.model, batch.prefix, batch.state_BS, torch.zeros(()))
    np.testing.assert_array_equal(chunk_BHD, [fast.decode(ids) for ids in sequences])
    with pytest.raises(ValueError, match=r"sampler: tokens: expected a stage with .* fast or tokens, .* got only flow"):
        arm_run(arms, tmp_path, entry(arms, "lifter"), sampler="tokens", stages=[arm_stage(losses={"flow": 1.0})])


def test_a_model_without_an_expert_drives_by_regression(
    arms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slider = Slider(str(arms / "lifter.yaml"))
    slider.instruction, slider.time_limit_s = "move the lifter", 0.5
    monkeypatch.setattr(driving, "open_environment", lambda name: slider)
    stages = [arm_stage(losses={"regression": 1.0}, insulate=False)]
    model = {key: value for key, value in SIZES.items() if key != "expert"} | {"state": "text", "actions": "backbone"}
    changes = {"sampler": "regression", "model": model, "environment": {"names": ["slider"], "episodes": 1}}
    run = Run(arm_run(arms, tmp_path, entry(arms, "lifter"), stages=stages, **changes))
    run.run()
    found = run.trainer.figure_record.values("joint", 2)
    assert not found.keys() & {"flow_error", "fast_error", "fast_loss.robot"} and slider.executed
    _, samples, batch = held_out(run, "lifter")
    off_BHD = np.abs(run.sampler()(run.model, batch.prefix, None, batch.action_BHA) - batch.action_BHA.numpy())  # type: ignore[union-attr, arg-type]
    means = [off_HD[sample.known_H].mean() for off_HD, sample in zip(off_BHD, samples, strict=True)]
    assert found["regression_error"] == pytest.approx(np.mean(means), rel=1e-5)
    assert "<th>regression</th>" in (tmp_path / "report" / "index.html").read_text()
    assert read_policy(tmp_path / "policy" / "policy.json").flow is None


def test_an_environment_that_there_is_not_is_refused_before_the_first_step(arms: Path, tmp_path: Path) -> None:
    environment = {"names": ["aloha/transfer_cub"]}
    run = Run(arm_run(arms, tmp_path, entry(arms, "lifter"), environment=environment))
    run.trainer.accumulate_gradients = None  # type: ignore[assignment, method-assign]
    with pytest.raises(Exception, match=r"transfer_cub"):
        run.run()
