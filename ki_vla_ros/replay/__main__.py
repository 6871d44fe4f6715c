"""Evaluates a policy on a recorded bag, as the node would have run it, without ROS and without waiting.

    python -m ki_vla_ros.replay BAG --bundle demo --params config/demo.yaml --out out/replay
    python -m ki_vla_ros.replay BAG --latency 0.080 --set executor=rtc --fail-if "error.rms>0.1"
    python -m ki_vla_ros.replay BAG --sweep execution_horizon=1..H inference_delay=0..4 executor=asynchronous,rtc

A bag that holds the policy's ~/session needs neither --bundle nor --params. Figures go to OUT/metrics.json
(docs/replay.md), a readable page to OUT/report.html, and the predicted chunks beside the recorded ones to
OUT/predicted, an mcap for Foxglove. With --sweep many settings are tried, and OUT/recommended.yaml holds the best.
"""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from ki_vla_ros.bags import open_bag
from ki_vla_ros.console import ExitCode, Progress, run_command
from ki_vla_ros.errors import ConfigurationError, printable
from ki_vla_ros.replay.document import METRICS, make_folder, write_whole
from ki_vla_ros.replay.latency import choose_latency
from ki_vla_ros.replay.predicted import PredictionBag
from ki_vla_ros.replay.report import report
from ki_vla_ros.replay.run import ReplayResult, replay
from ki_vla_ros.replay.setup import REFERENCES, ReplayOptions, set_up
from ki_vla_ros.replay.sweep import RECOMMENDED, Advice, make_grid, sweep, sweep_section, write_sweep
from ki_vla_ros.replay.thresholds import check_figure, parse_threshold
from ki_vla_ros.replay.trace import Trace
from ki_vla_ros.settings import read_changes
from ki_vla_ros.share import expand

PREDICTED, REPORT = "predicted", "report.html"
FAIL_HELP = 'exit code 1 if this holds, e.g. "error.rms>0.1" or "error.by_step.0.rms>0.05"; an unknown name lists all'
OUT_HELP = "folder for the results; default: out/replay. Results of an earlier replay in it are overwritten"


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _parser().parse_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, also before the replay itself
    try:
        return run_command("replay", partial(_replay, chosen, given))
    finally:
        signal.signal(signal.SIGTERM, before)


def _replay(chosen: argparse.Namespace, arguments: Sequence[str]) -> int:
    thresholds = [parse_threshold(text) for text in chosen.fail_if]
    as_recorded = chosen.ticks == "recorded"
    if not (math.isfinite(chosen.sensitivity_every) and chosen.sensitivity_every >= 0.0):
        raise ConfigurationError(f"--sensitivity-every: expected 0 s or more, got {chosen.sensitivity_every:g}")
    if expand(chosen.bag).resolve().is_relative_to(expand(chosen.out / PREDICTED).resolve()):
        raise ConfigurationError(
            f"--out {chosen.out}: expected a folder without the bag, got one that holds {chosen.bag}; choose another"
        )
    with ExitStack() as resources:
        bag = resources.enter_context(open_bag(chosen.bag))
        setup = set_up(
            bag,
            chosen.bundle,
            chosen.params,
            chosen.node,
            chosen.reference,
            chosen.reference_topic,
            read_changes(chosen.set),
        )
        manifest = setup.bundle.manifest
        # Everything the user asked for is checked before anything takes long.
        for threshold in thresholds:
            check_figure(threshold, manifest, as_recorded)
        options = ReplayOptions(
            instruction=chosen.instruction,
            other_instruction=chosen.instruction_other,
            probe_every_s=chosen.sensitivity_every,
            as_recorded=as_recorded,
            latency=choose_latency(chosen.latency, setup.settings, setup.topics.tick is not None),
        )
        grid = make_grid(chosen.sweep, setup.settings, manifest) if chosen.sweep else None
        for note in (*setup.notes, setup.topics.missing_reference):
            if note:
                print(f"note: {printable(note)}", file=sys.stderr)
        make_folder(chosen.out)
        trace, predicted = Trace(manifest), None
        if chosen.mcap:
            predicted = PredictionBag(chosen.out / PREDICTED, setup.topics, setup.node, manifest.robot)
            resources.callback(predicted.close)
        with BagProgress() as bar:
            result = replay(bag, setup, options, chosen.out, trace=trace, predicted=predicted, on_progress=bar.show)
        _print_summary(chosen.out, result, setup.notes)
        sections, interrupted = [], not result.complete or (grid is not None and bar.interrupted)
        if grid is not None and not interrupted:
            try:
                with BagProgress() as bar:
                    advice = sweep(bag, setup, grid, options, result.metrics, bar.show)
            except KeyboardInterrupt:
                interrupted = True
                print("sweep: interrupted; nothing is recommended", file=sys.stderr)
            else:
                write_sweep(chosen.out, advice)
                _print_advice(chosen.out, advice)
                sections.append(sweep_section(advice))
        command = shlex.join(["python", "-m", "ki_vla_ros.replay", *arguments])
        write_whole(chosen.out / REPORT, report(trace, result.metrics, command, sections))
    failures = [verdict for threshold in thresholds if (verdict := threshold.verdict(result.metrics)) is not None]
    for failure in failures:
        print(f"failed: {printable(failure)}", file=sys.stderr)
    if interrupted:
        return ExitCode.INTERRUPTED
    return ExitCode.FOUND if failures else ExitCode.FINE


class BagProgress:
    """Shows how much of the bag is done; inside the `with` block, Ctrl-C takes effect at the next `show`.

    Before the first `show`, while the engine is built, there is nothing to leave in order, and it takes effect at once.
    """

    def __init__(self) -> None:
        self._progress = Progress()
        self._shown = self.interrupted = False

    def __enter__(self) -> BagProgress:
        def interrupt(_number: int, _frame: object) -> None:
            if self.interrupted or not self._shown:  # a second Ctrl-C takes effect at once
                raise KeyboardInterrupt
            self.interrupted = True

        self._handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._progress.clear()

    def show(self, share: float) -> None:
        """Shows that `share` of the bag is done; KeyboardInterrupt after Ctrl-C."""
        self._shown = True
        if self.interrupted:
            raise KeyboardInterrupt
        self._progress.show(f"{share:.0%} of the bag", share)


def _print_summary(out: Path, result: ReplayResult, told: Sequence[str]) -> None:
    """`told`: the notes that were printed before the replay."""
    metrics = result.metrics
    error, ticks, seam = metrics["error"], metrics["ticks"], metrics["seam"]
    of = "" if error["what"] == "position" else f" of the {error['what']}"
    rms = error["missing"] or f"{_number(error['rms'])} {error['unit']} rms{_interval(error['rms_ci'])}{of}"
    print(f"{ticks['count']} ticks, {ticks['chunks']} chunks: {ticks['sent']} sent, {ticks['refused']} refused")
    print(f"error against {error['reference']}: {rms}" if error["reference"] else rms)
    for name, found in (error.get("by_joint") or {}).items():
        if "missing" in found and not error["missing"]:
            print(f"no error of {name}: {found['missing']}")
    unit = error["unit"]
    jerk = f"{_number(seam['jerk_rms'])} {unit}/s^3"
    print(f"seams ({seam['executor']}): jump {_number(seam['jump_rms'])} {unit} rms, jerk {jerk}")
    print(f"latency: {metrics['replay']['latency']}")
    holds = ", ".join(f"{cause} {count}" for cause, count in metrics["safety"]["holds"].items())
    print(f"held in {ticks['held']} ticks{f': {holds}' if holds else ''}")
    if parity := metrics.get("parity"):
        difference = "" if parity["max_difference"] is None else f", largest difference {parity['max_difference']:.2g}"
        print(f"{parity['chunks']} recorded chunks made again, {parity['unmatched']} unmatched{difference}")
    for note in metrics["bag"]["notes"][len(told) :]:
        print(f"note: {note}")
    for fault in metrics["bag"]["faults"]:
        print(f"bag: {fault['where']}: {fault['message']}")
    print(f"realtime_factor {metrics['realtime_factor']:.1f}; {out / METRICS}{'' if result.complete else ' (partial)'}")


def _print_advice(out: Path, advice: Advice) -> None:
    others = len(advice.rows) - 1
    print(f"sweep: {others} setting{'' if others == 1 else 's'} and the given ones; {advice.verdict}: {advice.reason}")
    print(f"see {out / RECOMMENDED}")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _interval(interval: Sequence[float] | None) -> str:
    return f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ki_vla_ros.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bag", type=Path, help="a rosbag2 folder or file, sqlite3 or mcap")
    parser.add_argument("--bundle", default="", help="folder, or the name of a shipped one; default: as recorded")
    parser.add_argument("--params", type=Path, help="the node's ROS parameter file; default: the recorded parameters")
    parser.add_argument("--out", type=Path, default=Path("out/replay"), help=OUT_HELP)
    parser.add_argument("--node", help="the policy's full name; default: the one in the bag's session, else /policy")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter, e.g. rate_hz=5")
    parser.add_argument("--instruction", default="", help="replaces those in the bag")
    parser.add_argument("--instruction-other", default="", help="also measure how much this one changes the actions")
    parser.add_argument("--reference", choices=REFERENCES, help="what actions are compared with; default: joint_states")
    parser.add_argument("--reference-topic", help="with --reference command; default: the policy's own command topic")
    parser.add_argument(
        "--latency",
        default="",
        help="recorded (default where the bag has the node's ticks), assumed (half of their period; default elsewhere),"
        " seconds (0.012), backbone+expert (0.030+0.012), a JSON file, or measured (on this machine; two runs differ)",
    )
    parser.add_argument(
        "--ticks", choices=("paced", "recorded"), default="paced", help="recorded: repeat the live node's own ticks"
    )
    parser.add_argument(
        "--sensitivity-every",
        type=float,
        default=2.0,
        metavar="S",
        help="time between two sensitivity probes; 0: none; default 2 s",
    )
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
