"""Evaluates a policy on a recorded bag, as the node would have run it, without ROS and without waiting.

    python -m ki_vla_ros.replay BAG --bundle demo --params config/demo.yaml --out out/replay
    python -m ki_vla_ros.replay BAG --latency 0.080 --set executor=rtc --fail-if "error.rms>0.1"
    python -m ki_vla_ros.replay BAG --sweep execution_horizon=1..H inference_delay=0..4 executor=asynchronous,rtc

A bag that holds the policy's ~/session needs neither --bundle nor --params. Figures go to OUT/metrics.json
(docs/replay.md), a page to look at to OUT/report.html, the predicted chunks beside what was recorded to OUT/predicted,
an mcap for Foxglove. With --sweep many settings are tried, and OUT/recommended.yaml says which to take.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ki_vla_ros.bags.bag import Bag, open_bag
from ki_vla_ros.engines.choice import open_engine
from ki_vla_ros.errors import ConfigurationError, KiVlaError
from ki_vla_ros.messages.decode import BagMessage
from ki_vla_ros.records import NS_PER_S, Observation
from ki_vla_ros.replay.document import METRICS, make_metrics, write_metrics
from ki_vla_ros.replay.figures import Figures
from ki_vla_ros.replay.latency import MEASURED, RECORDED, RecordedLatency, parse_latency
from ki_vla_ros.replay.loop import Replay
from ki_vla_ros.replay.predicted import PredictionBag
from ki_vla_ros.replay.report import report
from ki_vla_ros.replay.setup import REFERENCES, ReplayOptions, Setup, set_up
from ki_vla_ros.replay.sweep.grid import make_grid
from ki_vla_ros.replay.sweep.output import tune
from ki_vla_ros.replay.thresholds import Threshold, check_figure, parse_threshold
from ki_vla_ros.replay.ticks import ReplayResult, Tick
from ki_vla_ros.replay.trace import Trace
from ki_vla_ros.settings.names import parameter_specs

PREDICTED, REPORT = "predicted", "report.html"
# metrics.json is written so often while a long bag is read, and for the first time after the first of these.
FIRST_FIGURES_S, FIGURES_EVERY_S = 3.0, 15.0
PROGRESS_EVERY_S, LINE_EVERY_S = 0.2, 10.0
FAILED, INTERRUPTED = 3, 130
FAIL_HELP = 'e.g. "error.rms>0.1" or "error.by_step.0.rms>0.05": then exit code 3; an unknown name lists all'
OUT_HELP = "folder for the results; default: out/replay. What an earlier replay left in it is overwritten"


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 with one message where it cannot be done; 3 if a --fail-if holds; 130 after Ctrl-C."""
    try:
        chosen = _parser().parse_args(arguments)
        chosen.arguments = list(sys.argv[1:] if arguments is None else arguments)
        thresholds = [parse_threshold(text) for text in chosen.fail_if]
        result = run(chosen, thresholds)
        failures = _failures(thresholds, result)
    except KiVlaError as error:
        print(f"replay: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if result.metrics["stopped"] == Progress.INTERRUPTED:
        return INTERRUPTED
    return FAILED if failures else 0


def run(chosen: argparse.Namespace, thresholds: Sequence[Threshold] = ()) -> ReplayResult:
    with ExitStack() as resources:
        bag = resources.enter_context(open_bag(chosen.bag))
        plan = set_up(
            bag,
            chosen.bundle,
            chosen.params,
            chosen.node,
            chosen.reference,
            chosen.reference_topic,
            dict(_change(pair) for pair in chosen.set),
        )
        for threshold in thresholds:  # before anything takes long
            check_figure(threshold, plan.bundle.manifest, chosen.ticks == "recorded")
        for note in (*plan.notes, plan.topics.missing_reference):
            if note:
                print(f"note: {note}", file=sys.stderr)
        chosen.out.mkdir(parents=True, exist_ok=True)
        engine = open_engine(plan.bundle, plan.settings)
        resources.callback(engine.close)
        as_recorded = chosen.ticks == "recorded"
        latency = parse_latency(chosen.latency or (RECORDED if as_recorded else MEASURED), plan.settings.noise_seed)
        if isinstance(latency, RecordedLatency) and not as_recorded:
            raise ConfigurationError(
                "--latency recorded: expected --ticks recorded beside it, whose ticks took that long; for other ticks "
                "give seconds, or the metrics.json of a replay"
            )
        # Before anything takes long.
        grid = make_grid(chosen.sweep, plan.settings, plan.bundle.manifest) if chosen.sweep else None
        trace = Trace(plan.bundle.manifest)
        progress = Progress(bag)
        resources.enter_context(progress.interruptible())
        predicted = None
        if chosen.mcap:
            joints = plan.bundle.manifest.joint_names
            predicted = PredictionBag(chosen.out / PREDICTED, plan.topics, plan.node, joints)
            resources.callback(predicted.close)

        def on_message(message: BagMessage) -> None:
            progress.check()
            if predicted is not None:
                predicted.copy(message)

        def on_tick(tick: Tick, observation: Observation | None) -> None:
            if predicted is not None:
                predicted.add(tick, observation)

        options = ReplayOptions(
            instruction=chosen.instruction,
            other_instruction=chosen.instruction_other,
            probe_every_s=chosen.sensitivity_every,
            as_recorded=as_recorded,
            follow_session=plan.follow_session,
            latency=latency,
            on_message=on_message,
            on_tick=on_tick,
            on_observation=trace.see,
        )
        replay = Replay(bag, plan.bundle, engine, plan.settings, plan.topics, options)
        result = _measure(bag, plan, replay, trace, progress, chosen.out)
        _report(chosen.out, result)
        sections, interrupted = [], False
        if grid is not None and result.complete:
            try:
                sweeping = Progress(bag)
                resources.enter_context(sweeping.interruptible())
                sections.append(tune(bag, plan, grid, options, result.metrics, chosen.out, sweeping))
            except KeyboardInterrupt:
                interrupted = True
        command = shlex.join(["python", "-m", "ki_vla_ros.replay", *chosen.arguments])
        (chosen.out / REPORT).write_text(report(trace, result.metrics, command, sections), encoding="utf-8")
        if interrupted:
            print("sweep: interrupted; nothing is recommended", file=sys.stderr)
            raise KeyboardInterrupt
        return result


def _measure(bag: Bag, plan: Setup, replay: Replay, trace: Trace, progress: Progress, out: Path) -> ReplayResult:
    options, seed = replay.options, plan.settings.noise_seed
    figures = Figures(plan.bundle.manifest, options.other_instruction, options.probe_every_s, seed)
    began_s = time.perf_counter()
    due_s = began_s + FIRST_FIGURES_S
    stopped: str | None = None

    def metrics(reason: str | None) -> dict[str, Any]:
        return make_metrics(bag, plan, replay, figures, time.perf_counter() - began_s, reason)

    try:
        for tick in replay.ticks():
            figures.add(tick)
            trace.add(tick)
            progress.show(replay.now_ns)
            if time.perf_counter() >= due_s:
                write_metrics(out, metrics("still running"))
                due_s = time.perf_counter() + FIGURES_EVERY_S
    except KeyboardInterrupt:
        stopped = Progress.INTERRUPTED
        for tick in replay.take_pending():
            figures.add(tick)
    progress.end()
    result = ReplayResult(metrics(stopped), stopped is None)
    write_metrics(out, dict(result.metrics))
    return result


class Progress:
    """A bar on a terminal, a line now and then elsewhere; and Ctrl-C, which takes effect between two messages."""

    INTERRUPTED = "interrupted"

    def __init__(self, bag: Bag) -> None:
        self._start_ns, self._end_ns = bag.start_ns or 0, bag.end_ns or 0
        self._terminal = sys.stderr.isatty()
        self._began_s = self._shown_s = time.perf_counter()
        self._interrupted = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        def interrupt(_number: int, _frame: object) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        if self._interrupted:
            raise KeyboardInterrupt

    def show(self, now_ns: int) -> None:
        time_s = time.perf_counter()
        if time_s - self._shown_s < (PROGRESS_EVERY_S if self._terminal else LINE_EVERY_S):
            return
        self._shown_s = time_s
        done_s, whole_s = (now_ns - self._start_ns) / NS_PER_S, (self._end_ns - self._start_ns) / NS_PER_S
        speed = done_s / (time_s - self._began_s)
        text = f"{done_s:.0f} of {whole_s:.0f} s of the bag, {speed:.1f} times real time"
        if self._terminal:
            filled = min(max(round(30 * done_s / whole_s), 0), 30) if whole_s > 0 else 0
            print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {text}   ", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _report(out: Path, result: ReplayResult) -> None:
    metrics = result.metrics
    error, ticks, seam = metrics["error"], metrics["ticks"], metrics["seam"]
    rms = error["missing"] or f"{_number(error['rms'])} {error['unit']} rms{_interval(error['rms_ci'])}"
    print(f"{ticks['count']} ticks, {ticks['chunks']} chunks: {ticks['sent']} sent, {ticks['refused']} refused")
    print(f"error against {error['reference']}: {rms}" if error["reference"] else rms)
    print(f"seams ({seam['executor']}): jump {_number(seam['jump_rms'])} rms, jerk {_number(seam['jerk_rms'])} rad/s^3")
    holds = ", ".join(f"{cause} {count}" for cause, count in metrics["safety"]["holds"].items())
    print(f"held in {ticks['held']} ticks{f': {holds}' if holds else ''}")
    for fault in metrics["bag"]["faults"]:
        print(f"bag: {fault['where']}: {fault['message']}")
    print(f"realtime_factor {metrics['realtime_factor']:.1f}; {out / METRICS}{'' if result.complete else ' (partial)'}")


def _failures(thresholds: Sequence[Threshold], result: ReplayResult) -> list[str]:
    verdicts = [threshold.verdict(result.metrics) for threshold in thresholds]
    return [verdict for verdict in verdicts if verdict is not None]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _interval(interval: Sequence[float] | None) -> str:
    return f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else ""


def _change(pair: str) -> tuple[str, object]:
    """NAME=VALUE, the value as text: settings turn it into what the parameter is."""
    name, equals, value = pair.partition("=")
    if not equals or not name:
        raise ConfigurationError(f"--set {pair}: expected NAME=VALUE, as executor=rtc")
    kinds = {spec.name: type(spec.default) for spec in parameter_specs()}
    if kinds.get(name) is bool and value not in ("true", "false"):
        raise ConfigurationError(f"--set {pair}: expected true or false")
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ki_vla_ros.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bag", type=Path, help="a rosbag2 folder or file, sqlite3 or mcap")
    parser.add_argument("--bundle", default="", help="folder, or the name of a shipped one; default: as recorded")
    parser.add_argument("--params", type=Path, help="the node's ROS parameter file; default: the recorded parameters")
    parser.add_argument("--out", type=Path, default=Path("out/replay"), help=OUT_HELP)
    parser.add_argument("--node", help="the policy's full name; default: of the bag's session, else /policy")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter, e.g. rate_hz=5")
    parser.add_argument("--instruction", default="", help="instead of those in the bag")
    parser.add_argument("--instruction-other", default="", help="also ask: does the action change with this one?")
    parser.add_argument("--reference", choices=REFERENCES, help="what actions are compared with; default: joint_states")
    parser.add_argument("--reference-topic", help="with --reference command; default: the policy's own command topic")
    parser.add_argument(
        "--latency",
        help="measured (here; default), seconds (0.012), backbone+expert (0.030+0.012), recorded, or a JSON file",
    )
    parser.add_argument(
        "--ticks", choices=("paced", "recorded"), default="paced", help="recorded: the very ticks of the live node"
    )
    parser.add_argument("--sensitivity-every", type=float, default=2.0, metavar="S", help="0: none; default 2 s")
    parser.add_argument(
        "--sweep",
        nargs="+",
        default=[],
        metavar="NAME=VALUES",
        help="e.g. execution_horizon=1..H executor=rtc,asynchronous",
    )
    parser.add_argument("--no-mcap", dest="mcap", action="store_false", help=f"do not write OUT/{PREDICTED}")
    parser.add_argument("--fail-if", action="append", default=[], metavar="CONDITION", help=FAIL_HELP)
    return parser


if __name__ == "__main__":
    sys.exit(main())
