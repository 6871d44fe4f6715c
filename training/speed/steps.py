"""What knowledge insulation costs: gradients of whole training steps on a CPU, three ways, on one batch, taking turns.

    python -m training.speed.steps --rounds 20
    python -m training.speed.steps --recipes              # every recipe's step, in turns; or those that are named
    python -m training.speed.steps --recipes --noise-samples 1 --openpi PYTHON:CHECKOUT --lerobot PYTHON

KI: text or FAST cross-entropy and flow, insulated, in one pass. Flow, end to end: the flow loss alone, which trains the
backbone through its keys and values (the baseline). Flow, frozen: the flow loss trains the expert alone, on a prefix
without a graph. Sizes are those of a small policy; the weights are random, one noise draw or several for each prefix.

A recipe's step (of each of its stages) is all that it draws: the robot's batch, and where it learns words half as many
questions about one image. Peers take the step of their own code, flow alone and end to end, on the same weights,
samples, noise and flow times as ours, after loss and gradients were found equal (docs/results/peers.md says how to
install them).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ki_vla_ros.bench import choose_clock, time_alternating
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.statistics import ratio_of_medians, spread
from training.config import ParallelConfig, StageConfig, TrainingConfig
from training.data import Batch
from training.export.random_weights import draw_weights, hundred_million
from training.losses import BatchLosses
from training.model import VLA, GemmaConfig, VisionConfig, VLAConfig
from training.optimizer import select_parameters
from training.recipe import lay_recipe, recipe_names
from training.speed.peers import Peer, Worker, chosen_peers, write_task

GOAL = 1.2  # KI / flow, end to end
SIZES = VLAConfig(
    vision=VisionConfig(image_size=96, patch_size=12, width=96, depth=4, heads=4, mlp=384, stem="conv"),
    backbone=GemmaConfig(width=128, depth=5, mlp=512, heads=4, kv_heads=1, head_dim=32),
    expert=GemmaConfig(width=64, depth=5, mlp=256, heads=4, kv_heads=1, head_dim=32),
    vocab_size=1024,
    action_dim=7,
    horizon=16,
)
VIEWS, PROMPT, FAST = 2, 40, 24
FLOW_ONLY = "pi0"
OURS = "ours, pi0.5's flow alone"
"""Our step on what the peers have: their model, their loss."""
AGREEMENT = 1e-4
"""How far a peer's loss and the norm of its gradients may be from ours, beside their size."""
MODELS: dict[str, Callable[[], VLAConfig]] = {"small": lambda: SIZES, "100m": hundred_million}
WAYS: dict[str, dict[str, Any]] = {
    "KI": {"losses": {"fast": 1.0, "flow": 1.0}, "train": ("vision", "backbone", "expert")},
    "flow, end to end": {
        "losses": {"flow": 1.0},
        "train": ("vision", "backbone", "expert"),
        "insulate": False,
    },
    "flow, frozen": {"losses": {"flow": 1.0}, "train": ("expert",)},
}


def make_batch(config: VLAConfig, rows: int, shortest: int = FAST // 2, longest: int = FAST) -> Batch:
    """Full prompts, and postfixes of evenly spread lengths."""
    drawn = torch.Generator().manual_seed(0)
    side, lengths = config.vision.image_size, torch.linspace(shortest, longest, rows).long()
    return Batch(
        images_BVCHW=torch.rand(rows, VIEWS, 3, side, side, generator=drawn) * 2 - 1,
        image_mask_BV=torch.ones(rows, VIEWS, dtype=torch.bool),
        tokens_BL=torch.randint(0, config.vocab_size, (rows, PROMPT), generator=drawn),
        token_mask_BL=torch.ones(rows, PROMPT, dtype=torch.bool),
        postfix_BT=torch.randint(0, config.vocab_size, (rows, longest), generator=drawn),
        fast_mask_BT=torch.arange(longest) < lengths[:, None],
        action_BHA=torch.randn(rows, config.horizon, config.action_dim, generator=drawn),
        state_BS=None if config.state_dim is None else torch.randn(rows, config.state_dim, generator=drawn),
    )


def make_questions(config: VLAConfig, rows: int) -> Batch:
    """About one image each, with answers as long as FAST's postfixes."""
    batch = make_batch(config, rows)
    return Batch(
        images_BVCHW=batch.images_BVCHW[:, -1:],
        image_mask_BV=batch.image_mask_BV[:, -1:],
        tokens_BL=batch.tokens_BL,
        token_mask_BL=batch.token_mask_BL,
        postfix_BT=batch.postfix_BT,
        text_mask_BT=batch.fast_mask_BT,
    )


def take_step(losses: BatchLosses, stage: StageConfig, batches: Sequence[Batch]) -> None:
    """All gradients of a step."""
    select_parameters(losses.model, None, stage.train)
    losses.model.zero_grad(set_to_none=True)
    for batch in batches:
        for piece in losses.split(batch, stage, np.random.default_rng(0)):
            torch.stack(list(losses(piece, stage).values())).sum().backward()


def make_calls(config: VLAConfig, rows: int, noise_samples: int) -> dict[str, Callable[[], object]]:
    """A call for each way, which computes all its gradients."""
    torch.manual_seed(0)
    model = VLA(config)
    # A run's other settings are none of a step's.
    run = TrainingConfig.model_construct(parallel=ParallelConfig(), max_prefix_delay=4)
    losses, batch = BatchLosses(model, None, run), make_batch(config, rows)
    stages = {
        name: StageConfig.model_validate(
            {"name": "step", "steps": 1, "learning_rate": 1.0, "sources": {"robot": rows}, **way}
            | {"noise_samples": noise_samples}
        )
        for name, way in WAYS.items()
    }
    return {name: partial(take_step, losses, stage, [batch]) for name, stage in stages.items()}


def recipe_calls(
    recipes: Sequence[str], sizes: VLAConfig, rows: int, noise_samples: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    """A call for each stage of each recipe, by name, as in `make_calls`."""
    for recipe in recipes:
        given = {
            "name": recipe,
            "robot": "any",
            "recipe": recipe,
            "out": "none",
            "sources": {"robot": [{"lerobot": "any"}], "questions": [{"paligemma": "any"}]},
            "model": {part: asdict(getattr(sizes, part)) for part in ("vision", "backbone", "expert")},
            "prompt": {"length": PROMPT},
            "max_prefix_delay": 4,
            "stage": {"steps": 100, "learning_rate": 1.0, "sources": {"robot": rows, "questions": max(1, rows // 2)}}
            | {"noise_samples": noise_samples},
        }
        config = TrainingConfig.model_validate(lay_recipe(given))
        torch.manual_seed(0)
        fields = {"vocab_size": sizes.vocab_size, "action_dim": sizes.action_dim, "horizon": sizes.horizon}
        model = VLA(config.model.vla(state_dim=sizes.action_dim, **fields))
        losses = BatchLosses(model, None, config)
        robot = make_batch(model.config, rows)
        if config.action_tokens == "naive":
            said = len(range(0, sizes.horizon - 1, config.naive_stride)) + 1  # actions; the last one always
            robot = make_batch(model.config, rows, said * sizes.action_dim, said * sizes.action_dim)
        batches = {"robot": robot, "questions": make_questions(model.config, max(1, rows // 2))}
        for stage in config.stages:
            drawn = [batches[name] for name in stage.sources]
            if not stage.learns_action_tokens:
                drawn[0] = replace(drawn[0], postfix_BT=None, fast_mask_BT=None)
            name = recipe if len(config.stages) == 1 else f"{recipe}: {stage.name}"
            yield name, partial(take_step, losses, stage, drawn)


def peers_form(sizes: VLAConfig) -> VLAConfig:
    """Sizes that peers can build: images in patches, and eight heads, which openpi's code has as a number."""
    backbone, expert = (
        replace(part, heads=8, head_dim=part.heads * part.head_dim // 8) for part in (sizes.backbone, sizes.expert)
    )
    return replace(sizes, vision=replace(sizes.vision, stem="patch"), backbone=backbone, expert=expert)


class PeerSteps:
    """Ours and the peers' step of one model of pi0.5's form; `processor_ns` is what the peers' processes took."""

    def __init__(self, sizes: VLAConfig, rows: int, peers: Sequence[Peer], threads: int, held: ExitStack) -> None:
        config = peers_form(sizes)
        self.model, self.failed, self._workers = VLA(config), dict[str, str](), list[Worker]()
        self.model.load_state_dict(draw_weights(config, 0, torch.float32))
        run = TrainingConfig.model_construct(parallel=ParallelConfig(), max_prefix_delay=0, prefix_lead=0.0)
        stage = {"name": "step", "steps": 1, "learning_rate": 1.0, "sources": {"robot": rows}}
        self.stage = StageConfig.model_validate(stage | WAYS["flow, end to end"])
        self.losses = BatchLosses(self.model, None, run)
        batch = replace(make_batch(config, rows), postfix_BT=None, fast_mask_BT=None)
        self.calls: dict[str, Callable[[], object]] = {OURS: partial(take_step, self.losses, self.stage, [batch])}
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        write_task(folder, self.model, self._inputs(batch), 1)
        expected = self._loss(batch), math.sqrt(sum(float(g.square().sum()) for g in self._gradients()))
        for peer in peers:
            try:
                worker = Worker(peer, folder, threads)
            except ConfigurationError as error:
                self.failed[peer.name] = str(error)
                continue
            held.callback(worker.close)
            for way in worker.ways:
                check_step(f"{peer.name}, {way}", tuple(map(float, worker.call(way))), expected)
                self.calls[f"{peer.name}, {way}"] = partial(worker.call, way)
            self._workers.append(worker)

    @property
    def processor_ns(self) -> int:
        return sum(worker.processor_ns for worker in self._workers)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """The batch, with noise and time of our step; in openpi's naming x_t = time * noise + (1 - time) * actions."""
        rows = self.losses.split(batch, self.stage, np.random.default_rng(0))[0].flow_rows
        assert rows is not None and batch.action_BHA is not None
        return {
            "images": batch.images_BVCHW.numpy(),
            "image_mask": batch.image_mask_BV.numpy(),
            "tokens": batch.tokens_BL.numpy(),
            "token_mask": batch.token_mask_BL.numpy(),
            "actions": batch.action_BHA.numpy(),
            "noise": (rows.target_RHA + batch.action_BHA).numpy(),
            "time": rows.time_RH[:, 0].numpy(),
        }

    def _loss(self, batch: Batch) -> float:
        """Of our step, whose gradients the model then has."""
        take_step(self.losses, self.stage, [batch])
        (piece,) = self.losses.split(batch, self.stage, np.random.default_rng(0))
        with torch.no_grad():
            return float(self.losses(piece, self.stage)["flow"])

    def _gradients(self) -> list[torch.Tensor]:
        return [weight.grad for weight in self.model.parameters() if weight.grad is not None]


def check_step(peer: str, found: tuple[float, ...], expected: tuple[float, ...]) -> None:
    """ConfigurationError unless a peer's loss and the norm of its gradients are ours."""
    if not all(math.isclose(theirs, ours, rel_tol=AGREEMENT) for theirs, ours in zip(found, expected, strict=True)):
        raise ConfigurationError(
            f"{peer}: expected our loss and norm of gradients ({expected[0]:.6g}, {expected[1]:.6g}) within "
            f"{AGREEMENT:g}, got {found[0]:.6g}, {found[1]:.6g}; is it of the version that docs/results/peers.md names?"
        )


def compare(rows: int, noise_samples: int, rounds: int, threads: int, processor_time: bool) -> dict[str, Any]:
    """Durations in ms, ratios of medians with intervals, and tokens per second of KI (images, prompt, FAST, chunk)."""
    clock_ns = choose_clock(processor_time, threads)
    torch.set_num_threads(threads)
    taken_ms = time_alternating(make_calls(SIZES, rows, noise_samples), rounds, 2, lambda _: None, clock_ns)
    tokens = rows * (VIEWS * SIZES.vision.tokens + PROMPT + FAST + noise_samples * SIZES.horizon)
    ki = spread(taken_ms["KI"])
    return {
        "rows": rows,
        "noise_samples": noise_samples,
        "clock": "processor" if processor_time else "wall",
        "ms": {name: spread(durations) for name, durations in taken_ms.items()},
        "ratios": {
            f"KI / {other}": ratio_of_medians(taken_ms["KI"], taken_ms[other]) for other in WAYS if other != "KI"
        },
        "goal": GOAL,
        "tokens_per_s": tokens / ki["p50"] * 1e3,
    }


def compare_recipes(
    recipes: Sequence[str],
    rows: int,
    noise_samples: int,
    rounds: int,
    threads: int,
    processor_time: bool,
    sizes: VLAConfig = SIZES,
    peers: Sequence[Peer] = (),
) -> dict[str, Any]:
    """Durations in ms of every stage's step, and ratios of medians to the step that learns the flow alone.

    With peers, images come to all models in patches, as they do to theirs, and ratios are to our step of their model.
    """
    own_ns = choose_clock(processor_time, threads)
    torch.set_num_threads(threads)
    reference, failed = FLOW_ONLY, dict[str, str]()
    with ExitStack() as held:
        calls: dict[str, Callable[[], object]] = {}
        clock_ns = own_ns
        if peers:
            theirs = PeerSteps(sizes, rows, peers, threads, held)
            sizes, reference, failed = theirs.model.config, OURS, theirs.failed
            calls |= theirs.calls

            def clock_ns() -> int:
                return own_ns() + (theirs.processor_ns if processor_time else 0)

        calls |= recipe_calls([*dict.fromkeys([*recipes, FLOW_ONLY])], sizes, rows, noise_samples)
        taken_ms = time_alternating(calls, rounds, 2, lambda _: None, clock_ns)
    return {
        "rows": rows,
        "noise_samples": noise_samples,
        "clock": "processor" if processor_time else "wall",
        "ms": {name: spread(durations) for name, durations in taken_ms.items()},
        "ratios": {
            f"{name} / {reference}": ratio_of_medians(durations, taken_ms[reference])
            for name, durations in taken_ms.items()
            if name != reference
        },
        "goal": {f"ki_no_vlm / {reference}": GOAL},
        "failed": failed,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.speed.steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16, help="prefixes in the batch; default 16")
    parser.add_argument("--noise-samples", type=int, default=4, help="flow samples of each prefix; default 4")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipes", nargs="*", metavar="RECIPE", help="times their steps; without names all of them")
    parser.add_argument("--processor-time", action="store_true", help="for a busy machine; with one thread only")
    parser.add_argument("--size", choices=MODELS, default="small", help="of the recipes' models; default small")
    parser.add_argument("--openpi", metavar="PYTHON:CHECKOUT", help="an interpreter with its packages, and its source")
    parser.add_argument("--lerobot", metavar="PYTHON", help="an interpreter that has lerobot")
    return run_command("speed", partial(_speed, parser.parse_args(arguments)))


def _speed(chosen: argparse.Namespace) -> int:
    how = (chosen.rows, chosen.noise_samples, chosen.rounds, chosen.threads, chosen.processor_time)
    peers, _ = chosen_peers(chosen.openpi, chosen.lerobot)
    if chosen.recipes is None:
        if peers or chosen.size != "small":
            raise ConfigurationError("--openpi, --lerobot, --size: expected --recipes with them, got none")
        figures = compare(*how)
    else:
        if peers and chosen.noise_samples != 1:
            raise ConfigurationError(
                f"--noise-samples: expected 1 beside peers, which draw one for each prefix, got {chosen.noise_samples}"
            )
        figures = compare_recipes(chosen.recipes or recipe_names(), *how, MODELS[chosen.size](), peers)
    print(json.dumps(figures, indent=2))
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
