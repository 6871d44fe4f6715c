"""A sweep after a replay: runs it with that replay's inputs and writes what it found."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ki_vla_ros.bags.bag import Bag
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.replay.latency import DrawnLatency, Latency, MeasuredLatency
from ki_vla_ros.replay.setup import ReplayOptions, Setup
from ki_vla_ros.replay.sweep.advice import advise, recommended_yaml, sweep_metrics, sweep_section
from ki_vla_ros.replay.sweep.grid import Grid
from ki_vla_ros.replay.sweep.run import SweepInputs, sweep

SWEEP, RECOMMENDED = "sweep.json", "recommended.yaml"


class Progress(Protocol):
    def check(self) -> None:
        """KeyboardInterrupt after Ctrl-C."""
        ...

    def show(self, now_ns: int) -> None:
        """Log time of the bag."""
        ...

    def end(self) -> None: ...


def tune(
    bag: Bag,
    plan: Setup,
    grid: Grid,
    options: ReplayOptions,
    metrics: Mapping[str, Any],
    out: Path,
    progress: Progress,
) -> str:
    """The report's section. `metrics` are those of the replay with the given settings, which came first."""
    inputs = SweepInputs(
        bag=bag.path,
        bundle=plan.bundle.path,
        topics=plan.topics,
        latency=_latency(options.latency, metrics, plan.settings.noise_seed),
        segment_s=metrics["replay"]["segment_s"],
        instruction=options.instruction,
    )
    start_ns, end_ns = bag.start_ns or 0, bag.end_ns or 0

    def show(share: float) -> None:
        progress.check()
        progress.show(start_ns + round(share * (end_ns - start_ns)))

    outcomes = sweep(inputs, grid.candidates, report=show)
    progress.end()
    advice = advise(grid, outcomes, plan.bundle.manifest, plan.settings.noise_seed)
    source = (
        f"{bag.path.name} ({metrics['bag']['duration_s']:.1f} s), bundle {plan.bundle.manifest.name}, "
        f"latency {inputs.latency().description}"
    )
    (out / SWEEP).write_text(json.dumps(sweep_metrics(grid, advice), indent=2) + "\n", encoding="utf-8")
    (out / RECOMMENDED).write_text(recommended_yaml(grid, advice, source), encoding="utf-8")
    others = len(grid.candidates) - 1
    print(f"sweep: {others} setting{'' if others == 1 else 's'} and the given one; {advice.verdict}: {advice.reason}")
    print(f"see {out / RECOMMENDED}")
    return sweep_section(grid, advice)


def _latency(model: Latency, metrics: Mapping[str, Any], seed: int) -> Callable[[], Latency]:
    """One model for each setting, all alike. What was measured is drawn from: side by side nothing can be timed."""
    if not isinstance(model, MeasuredLatency):
        return functools.partial(_again, model)
    durations_ns = [round(took_s * NS_PER_S) for took_s in metrics["timing"]["latency_s"]]
    return functools.partial(DrawnLatency, durations_ns, "ticks measured in the replay", seed)


def _again(model: Latency) -> Latency:
    return copy.copy(model)
