"""What is measured of a model in a comparison: episodes, errors, what it still knows, gradients, time.

Legend: B batch, T tokens of an answer, H horizon, A action dim, E episodes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError, KiVlaError
from training.ablation.config import ClosedLoop, Knowledge
from training.config import Loss
from training.data import Batch
from training.data.language import PaliGemmaEntry, open_language
from training.evaluate import Environment, at_period, open_environment, roll_out
from training.losses import targets
from training.model import VLA, Sampler, last_tokens
from training.optimizer import select_parameters
from training.run import Run
from training.sources import LEAST_EPISODES, Sources
from training.tokens import location_count

FRAMES: Final = 128  # held-out frames that an error is the mean over
AT_ONCE: Final = 32
MALFORMED_ERROR: Final = 1.0  # of a sequence that stands for no chunk: half of an action's range
GRADIENT_BATCHES: Final = 4
TIMED: Final = 9
PREDICTED: Final[tuple[Loss, ...]] = ("text", "fast", "tokens")
_PLACE: Final = re.compile(r"<loc_?(\d+)>")


def try_out(loop: ClosedLoop, knowledge: Knowledge | None) -> None:
    """Fails now with what would fail after an hour of training: a simulator or questions that are not there."""
    for split, name in loop.splits.items():
        try:
            open_environment(name, **loop.options).close()
        except KiVlaError as error:
            raise ConfigurationError(f"closed_loop.splits.{split}: {error}") from error
    if knowledge is not None and not knowledge.questions.exists():
        raise ConfigurationError(
            f"knowledge.questions: expected data in {knowledge.questions}, found none; the comparison's file says how "
            "it is made"
        )


def drive(run: Run, loop: ClosedLoop, episodes: int, sampler: Sampler | None = None) -> dict[str, dict[str, Any]]:
    """By split, for each episode in the order of their seeds whether it was followed, and whether it succeeded.

    By the policy's own sampler, or another one.
    """
    seeds = range(loop.first_seed, loop.first_seed + episodes)
    act, period_s = run.act(sampler), run.data.robot.action_period_s
    found: dict[str, dict[str, Any]] = {}
    for split, name in loop.splits.items():
        environment, followed = at_period(open_environment(name, **loop.options), period_s), list[bool]()
        note = partial(_note_followed, followed, environment)
        try:
            driven = roll_out(act, environment, seeds, loop.execute, report=note)
        finally:
            environment.close()
        failed = set(driven["failed_seeds"])
        found[split] = {
            "follow": "".join("01"[hit] for hit in followed),
            "success": "".join("01"[seed not in failed] for seed in seeds),
            "malformed": driven["malformed"],
        }
    return found


def drive_by_tokens(run: Run, loop: ClosedLoop) -> dict[str, Any] | None:
    """Of a policy that acts otherwise, the first split's episodes by its action tokens; None if it has none to read."""
    if run.config.sampler == "tokens" or not can_read_tokens(run):
        return None
    split, name = next(iter(loop.splits.items()))
    alone = loop.model_copy(update={"splits": {split: name}})
    return drive(run, alone, loop.episodes, run.sampler("tokens"))[split]


def can_read_tokens(run: Run) -> bool:
    """With the hybrid mask they are said after noisy actions, which no robot has."""
    return any(stage.learns_action_tokens for stage in run.config.stages) and not run.config.model.hybrid_mask


def _note_followed(followed: list[bool], environment: Environment, done: int) -> None:
    followed.append(environment.followed)


def check_held_out(data: Sources) -> None:
    """ConfigurationError unless there is held-out data of the policy's robot: the grid's errors are of it."""
    held_out = [source for source in data.robot_sources if source in data.held_out]
    if not any(data.held_out_parts(source, data.embodiment) for source in held_out):
        raise ConfigurationError(
            f"run.held_out: expected data of robot {data.robot.name} that is kept apart, got none; name some, or take "
            f"a dataset of {LEAST_EPISODES} episodes or more with a held_out_share above 0"
        )


def robot_batches(run: Run) -> Iterator[Batch]:
    """Held-out frames of the policy's robot, always the same ones, as they are on the robot."""
    data, rng = run.data, np.random.default_rng(0)
    for source in data.robot_sources:
        if source in data.held_out:
            mixture = data.held_out[source]
            rows = mixture.spread(FRAMES, data.held_out_parts(source, data.embodiment))
            for first in range(0, len(rows), AT_ONCE):
                samples = mixture.read(rows[first : first + AT_ONCE])
                yield data.plain.of_robots([data.embodiment] * len(samples), samples, rng)


def chunk_error(run: Run) -> float:
    """Mean error of the policy's own chunks on held-out robot data, in normalised units, whatever the recipe.

    Actions past an episode's end do not count. A malformed chunk has the error `MALFORMED_ERROR`.
    """
    sampler, errors = run.sampler(), list[NDArray[np.float64]]()
    for batch in robot_batches(run):
        assert batch.action_BHA is not None and batch.known_BH is not None
        chunk_BHD = sampler(run.model, batch.prefix, batch.state_BS, noise_like(batch))
        true_BHD = batch.action_BHA.double().numpy()[..., : chunk_BHD.shape[2]]
        off_BHD = np.abs(chunk_BHD - true_BHD)
        off_BHD[np.isnan(off_BHD)] = MALFORMED_ERROR
        known_BH = batch.known_BH.numpy()
        errors.append((off_BHD.mean(axis=2) * known_BH).sum(axis=1) / known_BH.sum(axis=1).clip(min=1))
    return float(np.concatenate(errors).mean())


def noise_like(batch: Batch) -> Tensor:
    assert batch.action_BHA is not None
    return torch.randn(batch.action_BHA.shape, generator=torch.Generator().manual_seed(0))


def token_counts(run: Run) -> float:
    """Mean number of action tokens that say a held-out chunk; frames too near an episode's end have none."""
    counts = [batch.fast_mask_BT.sum(dim=1) for batch in robot_batches(run) if batch.fast_mask_BT is not None]
    said = [count for row in counts for count in row.tolist() if count]
    return float(np.mean(said)) if said else float("nan")


# --- knowledge


def ask(run: Run, knowledge: Knowledge) -> dict[str, dict[str, float]]:
    """By kind of question: the share of `right` answers, read greedily, and the `loss` (cross-entropy per token)."""
    data = run.data
    asked = open_language(PaliGemmaEntry(paligemma=knowledge.questions), run.config.model.vision.image_size)
    rows: dict[str, list[int]] = {kind: [] for kind in knowledge.kinds}
    wanted = knowledge.samples * len(rows)
    for first in range(0, len(asked), AT_ONCE):
        if sum(map(len, rows.values())) == wanted:
            break
        block = range(first, min(first + AT_ONCE, len(asked)))
        for row, sample in zip(block, asked.take(list(block)), strict=True):
            kind = next((k for k, begins in knowledge.kinds.items() if sample.prefix.startswith(begins)), None)
            if kind is not None and len(rows[kind]) < knowledge.samples:
                rows[kind].append(row)
    within_bins = knowledge.within * location_count(data.tokenizer)

    def words(ids: Sequence[int]) -> list[str]:
        return [data.tokenizer.id_to_token(i) or "" for i in ids]

    found = {}
    for kind, chosen in rows.items():
        right, losses = list[bool](), list[NDArray[np.float64]]()
        for first in range(0, len(chosen), AT_ONCE):
            samples = asked.take(chosen[first : first + AT_ONCE])
            batch = data.plain.of_language(samples, np.random.default_rng(0))
            answers, loss_N = answer(run.model, batch)
            losses.append(loss_N)
            right += [is_right(words(ids), words(true), within_bins) for ids, true in answers]
        found[kind] = {
            "right": float(np.mean(right)) if right else float("nan"),
            "loss": float(np.concatenate(losses).mean()) if losses else float("nan"),
            "asked": float(len(right)),
        }
    return found


@torch.no_grad()
def answer(model: VLA, batch: Batch) -> tuple[list[tuple[list[int], list[int]]], NDArray[np.float64]]:
    """Greedy answers, each with the true one and as long, ends included; and the true tokens' cross-entropies [N].

    Those are given the true tokens before them.
    """
    assert batch.postfix_BT is not None and batch.text_mask_BT is not None
    cache = model.prefill(*batch.prefix)
    token_B1 = last_tokens(batch.tokens_BL, batch.token_mask_BL)
    before_BT = torch.cat((token_B1, batch.postfix_BT[:, :-1]), dim=1)
    hidden_BTD = model.read_on(cache, before_BT)[0]
    logits_NV = model.logits(hidden_BTD[batch.text_mask_BT])
    loss_N = torch.nn.functional.cross_entropy(logits_NV, batch.postfix_BT[batch.text_mask_BT], reduction="none")
    steps = []
    for _ in range(batch.postfix_BT.shape[1]):
        hidden_B1D, cache = model.read_on(cache, token_B1)
        token_B1 = model.logits(hidden_B1D[:, 0]).argmax(dim=1)[:, None]
        steps.append(token_B1)
    pairs = [
        (read_T[:length].tolist(), true_T[:length].tolist())
        for read_T, true_T, length in zip(
            torch.cat(steps, dim=1), batch.postfix_BT, batch.text_mask_BT.sum(dim=1).tolist(), strict=True
        )
    ]
    return pairs, loss_N.double().numpy()


def is_right(read: Sequence[str], true: Sequence[str], within_bins: float) -> bool:
    """Token for token; but places may be off by so many bins along each side of the image."""
    if len(read) != len(true):
        return False
    for got, wanted in zip(read, true, strict=True):
        places = [_PLACE.fullmatch(token) for token in (got, wanted)]
        if places[0] is not None and places[1] is not None:
            if abs(int(places[0][1]) - int(places[1][1])) > within_bins:
                return False
        elif got != wanted:
            return False
    return True


# --- gradients


def gradients(run: Run) -> dict[str, float]:
    """Of the losses of the last stage, on batches like its own: how the backbone is pulled (vision and language).

    `tokens` and `flow` are the norms of their gradients, each as it is weighed, `cosine` what lies between them. The
    flow's is what it would be without insulation: with it, it is zero. Where tokens see noisy actions, they do so here.
    """
    trainer, index = run.trainer, len(run.config.stages) - 1
    stage = run.config.stages[index]
    kinds: dict[str, dict[Loss, float]] = {
        "tokens": {loss: weight for loss, weight in stage.losses.items() if loss in PREDICTED},
        "flow": {loss: weight for loss, weight in stage.losses.items() if loss == "flow"},
    }
    if run.config.model.hybrid_mask and kinds["flow"]:
        kinds["tokens"]["flow"] = 0.0
    steps = [trainer.draw(index, stage, stage.steps + n) for n in range(GRADIENT_BATCHES)]
    parameters = select_parameters(run.model, None, ("vision", "backbone"))
    pulls: dict[str, Tensor] = {}
    for kind, losses in kinds.items():
        if not losses:
            continue
        alone = stage.model_copy(update={"losses": losses, "insulate": False, "accumulate": 1})
        run.model.zero_grad(set_to_none=True)
        for number, batches in enumerate(steps):
            taught = [batch for batch in batches if targets(batch) & losses.keys()]
            trainer.accumulate_gradients(alone, taught, np.random.default_rng(number))
        flat = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters.values()]
        pulls[kind] = torch.cat(flat) / GRADIENT_BATCHES
    run.model.zero_grad(set_to_none=True)
    for part in run.model.parameters():
        part.requires_grad_(True)
    norms = {kind: float(pull.norm()) for kind, pull in pulls.items()}
    if len(pulls) == 2 and all(norms.values()):
        norms["cosine"] = float(pulls["tokens"] @ pulls["flow"]) / (norms["tokens"] * norms["flow"])
    return norms


# --- time


def latency_ms(run: Run) -> dict[str, float]:
    """Processor time of one chunk for one observation, prefix included: by the policy's sampler, and token by token."""
    samplers: dict[str, Sampler] = {run.config.sampler: run.sampler()}
    if can_read_tokens(run):
        samplers.setdefault("tokens", run.sampler("tokens"))
    batch = next(robot_batches(run)).rows(slice(0, 1))
    noise, found = noise_like(batch), {}
    for name, sampler in samplers.items():
        taken = []
        for _ in range(TIMED):
            began_s = time.process_time()
            sampler(run.model, batch.prefix, batch.state_BS, noise)
            taken.append(time.process_time() - began_s)
        found[name] = 1e3 * float(np.median(taken))
    return found


def offline(figures: Mapping[str, float]) -> dict[str, float]:
    """The trainer's own figures, without those of single dimensions."""
    return {name: value for name, value in figures.items() if "_error." not in name and not name.startswith("minutes")}
