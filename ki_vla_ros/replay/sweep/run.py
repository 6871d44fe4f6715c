"""Many settings over one bag, on all cores: each process drives its share of the settings together, tick by tick.

Driven together, they read the bag once and share what they have in common (replay/sweep/shared_engine.py). All start a
tick's chunk from the same noise, so the sweep compares settings and not noise. With the same latencies, two sweeps give
the same bytes, whatever the number of processes.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ki_vla_ros.bags import Bag, open_bag
from ki_vla_ros.bundle import load_bundle
from ki_vla_ros.engines import open_engine
from ki_vla_ros.messages import BagMessage, joint_reading
from ki_vla_ros.records import to_ns
from ki_vla_ros.replay.document import write_whole
from ki_vla_ros.replay.frames import bag_frame
from ki_vla_ros.replay.latency import DrawnLatency, Latency, MeasuredLatency, choose_latency
from ki_vla_ros.replay.loop import Replay
from ki_vla_ros.replay.setup import ReplayOptions, Setup
from ki_vla_ros.replay.sweep.advice import Advice, advise, recommended_yaml, sweep_document
from ki_vla_ros.replay.sweep.figures import Execution, Outcome
from ki_vla_ros.replay.sweep.grid import Candidate, Grid
from ki_vla_ros.replay.sweep.shared_engine import SharedEngine
from ki_vla_ros.replay.ticks import Tick
from ki_vla_ros.replay.topics import ReplayTopics

SWEEP, RECOMMENDED = "sweep.json", "recommended.yaml"
# Decoded messages kept for all settings to share: about two seconds of them.
FRAMES_KEPT, READINGS_KEPT = 128, 1024
PROGRESS_PERIOD_S = 0.5


@dataclass(frozen=True)
class SweepInputs:
    """What every process needs to begin; `latency` makes a new latency model for each setting."""

    bag: Path
    bundle: Path
    topics: ReplayTopics
    latency: Callable[[], Latency]
    segment_s: float
    instruction: str = ""


def sweep(
    bag: Bag,
    setup: Setup,
    grid: Grid,
    options: ReplayOptions,
    metrics: Mapping[str, Any],
    on_progress: Callable[[float], None] = lambda share: None,
) -> Advice:
    """Tries the settings of the grid over the bag.

    `metrics` are those of `replay` with the given settings and the same `options`; if the latency is measured, it is
    drawn from them. `on_progress` gets the share of the bag that is done; if it raises, the sweep ends.
    """
    seed = setup.settings.noise_seed
    inputs = SweepInputs(
        bag=bag.path,
        bundle=setup.bundle.path,
        topics=setup.topics,
        latency=_latency(
            options.latency or choose_latency("", setup.settings, setup.topics.tick is not None), metrics, seed
        ),
        segment_s=metrics["replay"]["segment_s"],
        instruction=options.instruction,
    )
    outcomes = try_settings(inputs, grid.candidates, on_progress=on_progress)
    source = (
        f"{bag.path.name} ({metrics['bag']['duration_s']:.1f} s), bundle {setup.bundle.manifest.name}, "
        f"latency {inputs.latency().description}"
    )
    return advise(grid, outcomes, setup.bundle.manifest, seed, source)


def write_sweep(folder: Path, advice: Advice) -> None:
    write_whole(folder / SWEEP, json.dumps(sweep_document(advice), indent=2) + "\n")
    write_whole(folder / RECOMMENDED, recommended_yaml(advice))


def try_settings(
    inputs: SweepInputs,
    candidates: Sequence[Candidate],
    processes: int | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> list[Outcome]:
    """The outcomes in the candidates' order; by default with one process per core."""
    count = max(1, min(processes or os.cpu_count() or 1, len(candidates)))
    if count == 1:
        return _drive(inputs, candidates, on_progress)
    # Settings that infer most often cost most; they are dealt out in turn, so that no process gets them all.
    order = sorted(range(len(candidates)), key=lambda i: _cost(candidates[i]), reverse=True)
    shares = [order[first::count] for first in range(count)]
    outcomes: list[Outcome | None] = [None] * len(candidates)
    context = multiprocessing.get_context("spawn")  # an engine's threads do not survive a fork
    done = context.Array("d", count)
    with context.Pool(count, _remember, (done,)) as pool:
        jobs = [
            pool.apply_async(_drive_share, (place, inputs, [candidates[i] for i in share]))
            for place, share in enumerate(shares)
        ]
        while not all(job.ready() for job in jobs):
            jobs[0].wait(PROGRESS_PERIOD_S)
            on_progress(min(done[place] for place in range(count)))
        for share, job in zip(shares, jobs, strict=True):
            for i, outcome in zip(share, job.get(), strict=True):
                outcomes[i] = outcome
    return [outcome for outcome in outcomes if outcome is not None]


def _latency(model: Latency, metrics: Mapping[str, Any], seed: int) -> Callable[[], Latency]:
    """A function that makes equal latency models, one per setting.

    Measured latencies are drawn from the replay's: settings that run together and share results cannot be timed.
    """
    if not isinstance(model, MeasuredLatency):
        return functools.partial(_again, model)
    durations_ns = [to_ns(took_s) for took_s in metrics["timing"]["latency_s"]]
    return functools.partial(DrawnLatency, durations_ns, "ticks measured in the replay", seed)


def _again(model: Latency) -> Latency:
    return copy.copy(model)


_done: Any = None
"""In each process: the share of the bag that each process has done."""


def _remember(done: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; only the parent acts on it
    global _done  # a pool can pass shared memory only when its processes start
    _done = done


def _drive_share(place: int, inputs: SweepInputs, candidates: Sequence[Candidate]) -> list[Outcome]:
    return _drive(inputs, candidates, functools.partial(_done.__setitem__, place))


def _cost(candidate: Candidate) -> tuple[bool, float]:
    """A sort key by cost: guided chunks share only the prefix, so they cost most."""
    settings = candidate.settings
    guided = settings.executor in ("rtc", "rtc_trained")
    period_s = 0.0 if settings.executor == "temporal_ensemble" else settings.execution_horizon_s
    return guided, -period_s


def _drive(
    inputs: SweepInputs, candidates: Sequence[Candidate], on_progress: Callable[[float], None] = lambda share: None
) -> list[Outcome]:
    """Drives all candidates through one engine and one reading of the bag, each by one tick in turn."""
    bundle = load_bundle(inputs.bundle)
    engine = open_engine(bundle, candidates[0].settings, lambda text: None)
    with closing(engine), open_bag(inputs.bag) as whole:
        shared, bag = SharedEngine(engine), _SharedBag(whole, len(candidates))
        read_frame = functools.lru_cache(FRAMES_KEPT)(bag_frame)
        read_joints = functools.lru_cache(READINGS_KEPT)(joint_reading)
        running: dict[Execution, Iterator[Sequence[Tick]]] = {}
        for candidate in candidates:
            options = ReplayOptions(
                instruction=inputs.instruction,
                probe_every_s=0.0,
                follow_session=False,
                latency=inputs.latency(),
                noise_by_tick=True,
                read_frame=read_frame,
                read_joints=read_joints,
            )
            replay = Replay(bag, bundle, shared, candidate.settings, inputs.topics, options)
            running[Execution(bundle.manifest, inputs.segment_s)] = replay.steps()
        executions = list(running)
        span_ns = max((whole.end_ns or 0) - replay.start_ns, 1)
        while running:
            for execution, steps in list(running.items()):
                known = next(steps, None)
                if known is None:
                    del running[execution]
                for tick in known or ():
                    execution.add(tick)
            on_progress(min(1.0, (replay.now_ns - replay.start_ns) / span_ns))
        return [execution.finish() for execution in executions]


class _SharedBag:
    """A bag whose messages are read once for several readers that advance together."""

    def __init__(self, bag: Bag, readers: int) -> None:
        self._bag, self._readers, self.path = bag, readers, bag.path
        self._streams: list[Iterator[BagMessage]] = []

    def messages(self, topics: Collection[str] | None = None) -> Iterator[BagMessage]:
        if not self._streams:
            self._streams = list(itertools.tee(self._bag.messages(topics), self._readers))
        return self._streams.pop()
