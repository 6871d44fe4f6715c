"""A whole replay: from an open bag to its figures, in a folder or in memory.

    with open_bag("out/demo/bag") as bag:
        result = replay(bag, set_up(bag), ReplayOptions(latency=parse_latency("0.030")))
    print(result.metrics["error"]["rms"], result.metrics["deadlines"]["missed"])

For the ticks instead of the figures, use `Replay` (replay/loop.py).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ki_vla_ros.bags import Bag
from ki_vla_ros.engines import open_engine
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.messages import BagMessage
from ki_vla_ros.records import Observation
from ki_vla_ros.replay.document import make_folder, make_metrics, write_metrics
from ki_vla_ros.replay.figures import Figures
from ki_vla_ros.replay.loop import Replay
from ki_vla_ros.replay.setup import ReplayOptions, Setup
from ki_vla_ros.replay.ticks import Tick

if TYPE_CHECKING:  # opencv's encoder and the mcap writer are loaded only by a caller that makes one
    from ki_vla_ros.replay.predicted import PredictionBag
    from ki_vla_ros.replay.trace import Trace

# While a long bag is read, metrics.json is first written after FIRST_FIGURES_S, then again every FIGURES_EVERY_S.
FIRST_FIGURES_S, FIGURES_EVERY_S = 3.0, 15.0
INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True, eq=False)
class ReplayResult:
    """`metrics` is the content of metrics.json; `complete` is False if an interrupt left the rest of the bag unread."""

    metrics: Mapping[str, Any]
    complete: bool


def replay(
    bag: Bag,
    setup: Setup,
    options: ReplayOptions | None = None,
    out: Path | None = None,
    *,
    trace: Trace | None = None,
    predicted: PredictionBag | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> ReplayResult:
    """Runs the policy over the bag and returns its figures.

    `out`, if given, gets metrics.json, rewritten while the bag is read. `trace` collects what the report draws,
    `predicted` what goes into an mcap; the caller closes both. `on_progress` is called with the share of the bag's
    messages that are done, at each message and tick; a KeyboardInterrupt from there, or from Ctrl-C, ends the replay
    with the figures so far. ConfigurationError if bag, bundle and options do not fit together, or no tick came of it.
    """
    if out is not None:
        make_folder(out)
    last = max(sum(bag.topics[name].count or 0 for name in set(setup.topics.all)) - 1, 1)
    done = 0

    def on_message(message: BagMessage) -> None:
        nonlocal done
        on_progress(min(done / last, 1.0))
        done += 1
        if predicted is not None:
            predicted.copy(message)

    def on_tick(tick: Tick, observation: Observation | None) -> None:
        on_progress(min(done / last, 1.0))
        if predicted is not None:
            predicted.add(tick, observation)
        if trace is not None and observation is not None:
            trace.see(observation)

    options = dataclasses.replace(options or ReplayOptions(), follow_session=setup.follow_session)
    with closing(open_engine(setup.bundle, setup.settings)) as engine:
        running = Replay(bag, setup.bundle, engine, setup.settings, setup.topics, options, on_message, on_tick)
        return _measure(bag, setup, running, out, trace)


def _measure(bag: Bag, setup: Setup, running: Replay, out: Path | None, trace: Trace | None) -> ReplayResult:
    options, seed = running.options, setup.settings.noise_seed
    figures = Figures(setup.bundle.manifest, options.other_instruction, options.probe_every_s, seed)
    began_s = time.perf_counter()
    due_s = began_s + FIRST_FIGURES_S
    stopped: str | None = None

    def metrics(reason: str | None) -> dict[str, Any]:
        return make_metrics(bag, setup, running, figures, time.perf_counter() - began_s, reason)

    try:
        for tick in running.ticks():
            figures.add(tick)
            if trace is not None:
                trace.add(tick)
            if out is not None and time.perf_counter() >= due_s:
                write_metrics(out, metrics("still running"))
                due_s = time.perf_counter() + FIGURES_EVERY_S
    except KeyboardInterrupt:
        stopped = INTERRUPTED
        for tick in running.take_pending():
            figures.add(tick)
            if trace is not None:
                trace.add(tick)
    if stopped is None and not figures.ticks:
        raise ConfigurationError(_without_ticks(setup, running))
    result = ReplayResult(metrics(stopped), stopped is None)
    if out is not None:
        write_metrics(out, dict(result.metrics))
    return result


def _without_ticks(setup: Setup, running: Replay) -> str:
    if not running.messages:
        got = "no message that can be read on the policy's topics"
    elif setup.topics.tick is not None:
        got = f"none: the bag's {setup.topics.tick} never says that the node was active"
    else:
        got = "only messages with long silences between them"
    refused = ", ".join(f"{cause} ({count})" for cause, count in running.refused.most_common())
    return (
        f"bag: expected ticks to replay, got {got}{f'; refused: {refused}' if refused else ''}; "
        "`python -m ki_vla_ros.doctor --bag` says what is wrong with the bag"
    )
