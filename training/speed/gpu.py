"""The full-size model on an NVIDIA card: one command, at most nine minutes, fills the table in docs/results/gpu.md.

    python -m training.speed.gpu --json gpu.json

Random weights, bfloat16, batch 1, one to three views, 200 prompt tokens, 50 actions, 10 steps. The ways of gpu_ways.py
are compared with a float32 run of the same weights, and timed. A way that cannot run here becomes a row that says why.

What is worth most comes first: three views of the likely fastest way, 10,000 calls of it, one view and two; engines on
a bundle, which is exported only where one of them can run; the other ways. After each row the JSON is written; when
`--within-s` is over, what is there is printed and the process ends.

It was written on a machine without a card: with `--device cpu --size pi05-slice` (in tests, a tiny model) it runs
everything but CUDA graphs and TensorRT.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from ki_vla_ros.bench import (
    Durations,
    Work,
    least_ms,
    measure_ceiling,
    time_alternating,
)
from ki_vla_ros.bundle import Bundle, PolicySpec, load_bundle
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.engines import check_engine
from ki_vla_ros.errors import ConfigurationError, KiVlaError
from ki_vla_ros.settings import settings_from_parameters
from ki_vla_ros.statistics import spread
from training.export import cosine, describe_graphs, export_bundle
from training.export.random_weights import PROMPT_LENGTH, SIZES, policy_spec, write_checkpoint
from training.model import VLA, VLAConfig
from training.speed.cpu import Actions
from training.speed.gpu_ways import (
    Builder,
    ChunkInputs,
    Runner,
    build_model,
    engine_settings,
    make_inputs,
    plain,
    run_engine,
    torch_ways,
    versions,
)

CALLS, ROUNDS, WARM_UP = 10_000, 100, 10
ENOUGH: Final = 1000  # calls, for a 99th percentile to be said
WITHIN_S = 540.0
LEAST_S = 5.0  # a way is not begun with less
LONGEST: Final = 200  # characters of a fault in the table; the file has all
GOALS = {"chunk_ms": 11.0, "steps_ms": 3.0, "p99_over_p50": 1.05, "cosine": 0.999}
"""On one H200 with three views; docs/results/gpu.md says where they come from."""


def measure(runner: Runner, reference_HA: Actions, rounds: int) -> dict[str, Any]:
    """Times of whole chunks, and of all steps on one cache, in ms; cosine with the float32 reference's actions."""
    agreement = cosine(runner.chunk(), reference_HA)
    taken_ms = time_alternating({"chunk": runner.chunk, "all steps": runner.steps}, rounds, WARM_UP)
    return {"ms": {name: tails(values) for name, values in taken_ms.items()}, "calls": rounds, "cosine": agreement}


def tails(values: Durations) -> dict[str, float]:
    found = spread(values) | {"min": float(values.min())}
    return found | {"p99_over_p50": found["p99"] / found["p50"], "p99_minus_min": found["p99"] - found["min"]}


@dataclass
class Report:
    """What is found so far, on disk after each row. `folder` is removed with whoever ends the process."""

    head: dict[str, Any]
    path: Path | None
    began_s: float
    """On the clock of `time.monotonic`."""
    within_s: float
    folder: Path | None = None
    views: list[dict[str, Any]] = field(default_factory=list)
    doing: str = ""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def left_s(self) -> float:
        return self.within_s - self.spent_s()

    def spent_s(self) -> float:
        return time.monotonic() - self.began_s

    def begin(self, what: str) -> None:
        self.doing = f"{what}, since {self.spent_s():.0f} s"
        print(f"{self.spent_s():.0f} s: {what}", file=sys.stderr, flush=True)

    def write(self) -> None:
        if self.path is not None:
            with self.lock:
                part = self.path.with_suffix(".part")
                part.write_text(json.dumps(self.head | {"views": self.views}, indent=1) + "\n")
                part.replace(self.path)

    def finish(self) -> None:
        """Write and print, whatever the measuring thread is doing; for the timer, too."""
        with self.lock:
            for found in self.views:
                found["rows"] = {name: row or {"failed": NO_TIME} for name, row in found["rows"].items()}
            try:
                self.write()
            finally:
                goals = judged(self.views) if self.head.get("goals") else ()
                print("\n".join([table({"views": self.views}), *goals]), flush=True)

    @property
    def measured(self) -> bool:
        return any("ms" in row for found in self.views for row in found["rows"].values())


NO_TIME: Final = "no time was left"


@dataclass(frozen=True)
class Task:
    """A row to be filled: of `found`, the figures of so many views, by one way."""

    found: dict[str, Any]
    name: str
    build: Builder
    reference_HA: Actions


def run_task(report: Report, task: Task, rounds: int, calls: int = 0) -> None:
    """Fill a row; if it is the fastest so far, time its chunks `calls` times, or as a third of the time left allows.

    Whatever goes wrong with a way is its row: those to come need a device that still answers, which is looked at.
    """
    rows, what = task.found["rows"], f"{task.found['views']} views, {task.name}"
    if report.left_s() < LEAST_S:
        rows[task.name] = {"failed": NO_TIME}
        return
    if broken := report.head.get("device_failed"):
        rows[task.name] = {"failed": f"the device failed before: {broken}"}
        return
    report.begin(what)
    try:
        runner = task.build()
        try:
            rows[task.name] = measure(runner, task.reference_HA, rounds)
            report.write()
            p50_s = rows[task.name]["ms"]["chunk"]["p50"] / 1e3
            if fastest(rows) == task.name:
                time_often(rows, task.name, runner, min(calls, int(report.left_s() / 3 / p50_s)))
        finally:
            runner.close()
            del runner
    except Exception as error:  # of compilers, captures, builders and drivers, which have no base in common
        fault = f"{type(error).__name__}: {error}"
        rows[task.name] = rows[task.name] | {"interrupted": fault} if "ms" in rows[task.name] else {"failed": fault}
        if not answers():
            report.head["device_failed"] = what
    release()
    report.write()


def time_often(rows: dict[str, Any], name: str, runner: Runner, count: int) -> None:
    if count > rows[name]["calls"]:
        taken_ms = time_alternating({"chunk": runner.chunk}, count, WARM_UP)
        rows[name] = {**rows[name], "ms": rows[name]["ms"] | {"chunk": tails(taken_ms["chunk"])}, "calls": count}


def fastest(rows: Mapping[str, Any]) -> str | None:
    """Of the ways whose actions are those of float32; None while there is none."""
    right = [name for name, row in rows.items() if "ms" in row and row["cosine"] >= GOALS["cosine"]]
    return min(right, key=lambda name: float(rows[name]["ms"]["chunk"]["p50"]), default=None)


def answers() -> bool:
    """Whether the card still computes: after some faults every call of a process fails."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except Exception:
        return False
    return True


def release() -> None:
    """Give back what a way held, so that the next one has room."""
    gc.collect()
    if torch.cuda.is_available() and answers():
        torch.cuda.empty_cache()


class BundleMaker:
    """The bundle of so many views, made or read when the first engine asks for it; a fault is every other's, too."""

    def __init__(self, make: Callable[[], Path]) -> None:
        self._make = make
        self._bundle: Bundle | None = None
        self._fault: Exception | None = None

    def __call__(self) -> Bundle:
        if self._fault is not None:
            raise self._fault
        try:
            self._bundle = self._bundle or load_bundle(self._make())  # which reads all of it
        except Exception as error:
            self._fault = error
            raise
        return self._bundle


def make_bundle(folder: Path, config: VLAConfig, policy: PolicySpec, seed: int, dtype: str) -> Path:
    """The bundle at `folder`, exported from the same seed unless it is there."""
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            write_checkpoint(Path(place) / "checkpoint", config, policy, seed, torch.bfloat16)  # as `build_model` does
            notes = "Random weights: **never for an arm**."
            export_bundle(Path(place) / "checkpoint", folder, notes, True, dtype, compare=False)  # each row is
    return folder


def roofline(model: VLA, policy: PolicySpec, device: torch.device, steps: int) -> dict[str, Any]:
    graph = describe_graphs(model, policy, model.config.vocab_size)
    sizes = [model_bytes(model.vision, model.projector, *model.backbone.layers), model_bytes(model.expert)]
    prefill, step = Work(graph.prefill_flops, sizes[0]), Work(graph.step_flops, sizes[1])
    ceiling = measure_ceiling("cuda" if device.type == "cuda" else "cpu", torch.get_num_threads(), "bfloat16", sizes)
    return {"roofline_ms": least_ms(ceiling, prefill, step, steps), "roofline_source": ceiling.source}


def model_bytes(*modules: nn.Module) -> int:
    """Bytes of all weights but the time conditioning's, whose results the bundle looks up."""
    total = 0
    for module in modules:
        for name, parameter in module.named_parameters():
            if "dense" not in name and not name.startswith("time_"):
                total += parameter.numel() * parameter.element_size()
    return total


def table(figures: Mapping[str, Any]) -> str:
    """The figures as a Markdown table; of few calls there is no 99th percentile to speak of."""
    lines = [
        "| views | way | chunk p50, ms | p99 | p99 / p50 | p99 - min | all steps p50, ms | cosine | calls |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in figures["views"]:
        for name, row in found["rows"].items():
            if "failed" in row:
                fault = " ".join(row["failed"][:LONGEST].replace("|", "/").split())
                lines.append(f"| {found['views']} | {name} | not measured: {fault} | | | | | | |")
                continue
            chunk, steps = row["ms"]["chunk"], row["ms"]["all steps"]
            far = (f"{chunk['p99']:.2f}", f"{chunk['p99_over_p50']:.3f}", f"{chunk['p99_minus_min']:.2f}")
            p99, ratio, above = far if row["calls"] >= ENOUGH else ("-", "-", "-")
            lines.append(
                f"| {found['views']} | {name} | {chunk['p50']:.2f} | {p99} | {ratio} | {above} | {steps['p50']:.2f} "
                f"| {row['cosine']:.5f} | {row['calls']} |"
            )
        if "roofline_ms" in found:
            roof = found["roofline_ms"]
            lines.append(f"| {found['views']} | roofline | {roof['chunk']:.2f} | | | | {roof['all steps']:.2f} | | |")
    return "\n".join(lines)


def judged(views: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The goals, beside the first views' fastest way of those whose actions are right."""
    rows = views[0]["rows"] if views else {}
    if wrong := [name for name, row in rows.items() if "ms" in row and not row["cosine"] >= GOALS["cosine"]]:
        yield f"cosine below {GOALS['cosine']}, so no goal is theirs: {'; '.join(wrong)}"
    if (name := fastest(rows)) is None:
        return
    chunk, steps = rows[name]["ms"]["chunk"], rows[name]["ms"]["all steps"]
    found = {"chunk_ms": chunk["p50"], "steps_ms": steps["p50"]}
    if rows[name]["calls"] >= ENOUGH:
        found["p99_over_p50"] = chunk["p99_over_p50"]
    for goal, value in found.items():
        yield f"{goal}: {value:.3f}, goal {GOALS[goal]:g}: {'reached' if value <= GOALS[goal] else 'missed'} ({name})"


def main(arguments: Sequence[str] | None = None, age_s: float = 0.0) -> int:
    """`age_s`: since when the time runs, because importing takes a part of it."""
    parser = argparse.ArgumentParser(
        prog="python -m training.speed.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="pi05")
    parser.add_argument("--views", type=int, nargs="+", choices=(1, 2, 3), default=[3, 1, 2], help="in this order")
    parser.add_argument("--calls", type=int, default=CALLS, help=f"of the first views' fastest way; default {CALLS}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each way; default {ROUNDS}")
    parser.add_argument(
        "--bundles", type=Path, help="folder of bundles 1, 2, 3 (views); missing ones are exported there"
    )
    parser.add_argument("--within-s", type=float, default=WITHIN_S, help=f"time for everything; default {WITHIN_S:.0f}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    return run_command("speed.gpu", partial(_measure, parser.parse_args(arguments), age_s))


def _stop(report: Report) -> None:
    """For the timer: a compiler or a builder in another thread cannot be asked to end."""
    try:
        print(f"stopped after {report.within_s:g} s, in: {report.doing}", file=sys.stderr, flush=True)
        report.finish()
        if report.folder is not None:
            shutil.rmtree(report.folder, ignore_errors=True)
    finally:
        os._exit(ExitCode.FINE if report.measured else ExitCode.FAILED)


def _measure(chosen: argparse.Namespace, age_s: float) -> int:
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"--device cuda: expected an NVIDIA card, got torch {torch.__version__} without one; run this where "
            "there is one, with a torch built for its driver"
        )
    config, device = SIZES[chosen.size](), torch.device(chosen.device)
    head = {
        "size": chosen.size,
        "config": asdict(config),
        "card": torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu",
        "driver": driver() if chosen.device == "cuda" else "",
        "versions": versions(),
        "goals": GOALS if chosen.size == "pi05" and chosen.device == "cuda" and chosen.views[0] == 3 else None,
    }
    report = Report(head, chosen.json, time.monotonic() - age_s, chosen.within_s)
    report.write()
    timer = threading.Timer(max(0.0, report.left_s()), _stop, [report])
    timer.daemon = True
    timer.start()
    try:
        with _place(chosen.bundles) as report.folder:
            _fill(report, chosen, config, device, chosen.bundles or report.folder)
    finally:
        timer.cancel()
        report.finish()
    if not report.measured:
        raise ConfigurationError("expected a way that runs here, got none; the table above says why")
    return ExitCode.FINE


def driver() -> str:
    """Driver, clocks and power of the card, as nvidia-smi says them."""
    asked = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", asked, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    return done.stdout.strip()


def _age_s() -> float:
    """Seconds since this process was started."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)


@contextmanager
def _place(bundles: Path | None) -> Iterator[Path]:
    """A folder for what is needed once: plans, and bundles that nobody asked to keep."""
    if bundles is not None:
        bundles.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _fill(report: Report, chosen: argparse.Namespace, config: VLAConfig, device: torch.device, bundles: Path) -> None:
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    policies = [
        policy_spec(config, chosen.size, views, PROMPT_LENGTH[chosen.size], chosen.seed) for views in chosen.views
    ]
    inputs = [make_inputs(policy, config, chosen.seed).to(device) for policy in policies]
    report.begin("the float32 reference")
    references = _references(build_model(config, chosen.seed, torch.float32).to(device), inputs)
    release()
    report.begin("weights")
    model = build_model(config, chosen.seed, torch.bfloat16).to(device)
    own: list[list[Task]] = []
    for n, views in enumerate(chosen.views):
        builders = torch_ways(model, inputs[n], wait)
        names = [*builders, *engine_settings(device.type == "cuda", Path())]
        report.views.append(found := {"views": views, "rows": {name: {} for name in names}})
        try:
            found |= roofline(model, policies[n], device, inputs[n].steps)
        except (KiVlaError, RuntimeError) as error:
            print(f"roofline: {error}", file=sys.stderr, flush=True)
        own.append([Task(found, name, build, references[n]) for name, build in builders.items()])
    report.write()
    first, *others = own
    run_task(report, first[0], chosen.rounds, chosen.calls)
    for tasks in others:
        run_task(report, tasks[0], chosen.rounds)
    dtype = "bfloat16" if device.type == "cuda" else "float32"  # onnxruntime on a CPU has no other kernels
    for n, tasks in enumerate(own):
        folder = bundles / str(chosen.views[n])
        make = BundleMaker(partial(make_bundle, folder, config, policies[n], chosen.seed, dtype))
        cache = (report.folder or bundles) / f"plans-{n}"
        for name, settings in engine_settings(device.type == "cuda", cache).items():
            task = Task(tasks[0].found, name, partial(_on_bundle, make, settings, inputs[n]), references[n])
            run_task(report, task, chosen.rounds, chosen.calls if n == 0 else 0)
        shutil.rmtree(cache, ignore_errors=True)
        if chosen.bundles is None:
            shutil.rmtree(folder, ignore_errors=True)  # three would take 38 GB
        for task in tasks[1:]:
            run_task(report, task, chosen.rounds, chosen.calls if n == 0 else 0)


@torch.no_grad()
def _references(exact: VLA, inputs: Sequence[ChunkInputs]) -> list[Actions]:
    """The float32 model's actions, whose convolutions are not to be rounded to TF32 either."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return [plain(exact, given).chunk()[0].cpu().numpy() for given in inputs]


def _on_bundle(make: BundleMaker, settings: Mapping[str, object], inputs: ChunkInputs) -> Runner:
    gpu = "sm{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
    check_engine(settings_from_parameters(settings), gpu)  # before minutes go into its bundle
    return run_engine(make(), settings, inputs)


if __name__ == "__main__":
    sys.exit(main(age_s=_age_s()))
