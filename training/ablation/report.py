"""The page of a comparison, and its figure, from the JSON files of its runs alone.

    docs/results/ablation/BENCH/bench.json    what the comparison is of (the driver writes it)
    docs/results/ablation/BENCH/*.json        what came out
    docs/results/ablation/notes.yaml          what a person says of it; nothing overwrites it
    docs/results/ablation.md, BENCH.svg       written here

Legend: S runs (seeds), E episodes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.files import read_json
from ki_vla_ros.yaml_file import parse_yaml
from training.ablation.config import AblationConfig
from training.ablation.drawing import Curve, Dot, draw_story
from training.ablation.intervals import Estimate, at, difference, mean, time_to
from training.ablation.plan import GRID, START, TIMING
from training.results import MADE_OF, read_result, result_path, table
from training.storage import write_whole

Array = NDArray[np.float64]
BENCH: Final = "bench.json"
NOTES: Final = "notes.yaml"
SAME_WITHIN: Final = 0.1
"""Two arms are about equal if the whole interval of their difference is within so much."""
LEVELS: Final = (0.5, 0.8)
WAYS: Final = ("flow", "tokens", "regression")


def write_bench(config: AblationConfig, path: Path) -> None:
    """What the comparison is of, beside its results."""
    told = {
        "name": config.name,
        "config": path.as_posix(),
        "steps": config.steps,
        "points": config.points,
        "rates": config.grid.rates,
        "grid_steps": config.grid.steps,
        "splits": list(config.closed_loop.splits),
        "episodes": config.closed_loop.episodes,
        "kinds": [] if config.knowledge is None else list(config.knowledge.kinds),
        "arms": {name: arm.model_dump() for name, arm in config.arms.items()},
    }
    config.results.mkdir(parents=True, exist_ok=True)
    write_whole(config.results / BENCH, json.dumps(told, indent=1) + "\n")


@dataclass(frozen=True)
class Bench:
    """One comparison as its files say it. `runs` are by arm and seed."""

    told: Mapping[str, Any]
    start: Mapping[str, Any]
    grid: Mapping[str, Mapping[str, float | None]]
    runs: Mapping[str, Mapping[int, Mapping[str, Any]]]
    timing: Mapping[str, float]

    @property
    def arms(self) -> list[str]:
        """Those of which there is a run."""
        return [arm for arm in self.told["arms"] if self.runs.get(arm)]

    def values(self, arm: str, figure: str, split: str | None, point: int = -1) -> Array:
        """[S, E]: of one split, or of all, one after the other."""
        splits = self.told["splits"] if split is None else [split]
        rows = []
        for _, run in sorted(self.runs[arm].items()):
            episodes = run["points"][point]["episodes"]
            rows.append([float(hit) for name in splits for hit in episodes[name][figure]])
        return np.array(rows)

    def paired(self, arm: str, other: str, figure: str, split: str | None) -> Estimate | None:
        """The arm minus another, over the seeds that both have; None without any."""
        seeds = sorted(self.runs[arm].keys() & self.runs.get(other, {}).keys())
        if not seeds:
            return None
        ours, theirs = (
            self.values(name, figure, split)[[sorted(self.runs[name]).index(seed) for seed in seeds]]
            for name in (arm, other)
        )
        return difference(ours, theirs)

    def mean_of(self, arm: str, *keys: str, point: int | None = None) -> float:
        """Over the seeds, of a figure of the runs or of one of their points; NaN where none has it."""
        found = []
        for run in self.runs[arm].values():
            value: Any = run if point is None else run["points"][point]
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                found.append(float(value))
        return float(np.mean(found)) if found else math.nan

    def seconds(self, arm: str) -> float:
        """Of a step; NaN where steps have not been timed."""
        return self.timing.get(arm, math.nan)


def read_bench(folder: Path) -> Bench:
    """ConfigurationError for runs that are of different starts or data."""
    told = read_json(folder / BENCH)
    start = read_result(result_path(folder, START)) or {}
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    grid: dict[str, dict[str, float | None]] = {}
    for arm, planned in told["arms"].items():
        for seed in range(planned["seeds"]):
            if (found := read_result(path := result_path(folder, f"{arm}-{seed}"))) is not None:
                check_run(told, path, found)
                runs.setdefault(arm, {})[seed] = found
        for rate in told["rates"]:
            if (found := read_result(result_path(folder, f"{GRID}/{arm}-{rate:g}"))) is not None:
                grid.setdefault(arm, {})[f"{rate:g}"] = found["error"]
    origins = {
        (run[MADE_OF].get("start.weights"), run["data"], run.get("questions")): f"{arm}-{seed}"
        for arm, seeds in runs.items()
        for seed, run in seeds.items()
    }
    if len(origins) > 1:
        raise ConfigurationError(
            f"{folder}: expected runs of one start, one set of data and the same questions, got others in "
            f"{' and '.join(origins.values())}; move those away that do not belong to the comparison"
        )
    timing = read_result(result_path(folder, TIMING)) or {}
    return Bench(told, start, grid, runs, timing.get("seconds_per_step", {}))


def check_run(told: Mapping[str, Any], path: Path, run: Mapping[str, Any]) -> None:
    """ConfigurationError for a run that is not as long, or not measured as often, as the comparison says."""
    of = run[MADE_OF]
    got = [of.get(f"points.{n}") for n in range(len(run["points"]))], of.get("closed_loop.episodes")
    if got != (expected := (list(told["points"]), told["episodes"])):
        raise ConfigurationError(
            f"{path}: expected a run with points after {expected[0]} steps and {expected[1]} episodes, as "
            f"{path.parent / BENCH} says, got {got[0]} and {got[1]}; move one of the two away"
        )


def write_report(results: Path) -> list[Path]:
    """The page beside the folder of results, and a figure for each comparison in it; returns what was written."""
    if (results / BENCH).exists():
        raise ConfigurationError(
            f"{results}: expected the folder of several comparisons, got one's own; give {results.parent}"
        )
    folders = sorted(path.parent for path in results.glob(f"*/{BENCH}"))
    if not folders:
        raise ConfigurationError(
            f"{results}: expected folders with {BENCH} and results, found none; run python -m training.ablate --config"
        )
    notes, written, parts = read_notes(results / NOTES), [], []
    for folder in folders:
        bench = read_bench(folder)
        if not bench.arms:
            continue
        figure = results / f"{folder.name}.svg"
        write_whole(figure, draw(bench))
        written.append(figure)
        parts += ["", *section(bench, notes.get(folder.name) or {}, f"{results.name}/{figure.name}")]
    page = results.with_suffix(".md")
    said = notes.get("page")
    write_whole(
        page, "\n".join([*head(results.name), *([said.strip(), ""] if said else []), *READING, *parts]).rstrip() + "\n"
    )
    return [*written, page]


def read_notes(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        found = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{path}: expected YAML, got something else ({error})") from error
    if not isinstance(found, Mapping):
        raise ConfigurationError(f"{path}: expected page, and a likely cause by comparison and arm, got {found!r}")
    return found


def head(folder: str) -> Iterator[str]:
    yield from ("# Knowledge insulation, compared", "")
    yield "Recipes (`config/training/recipes/`) on the same robot data from the same start. This page is written by"
    yield f"`python -m training.ablate --report` from the files in [{folder}/]({folder}/); the likely causes, and what"
    yield f"stands below this paragraph, a person writes into `{folder}/notes.yaml`, which nothing overwrites."
    yield ""


READING: Final = (
    "How to read it:",
    "",
    "- **follow**: the instructed object was the first that the arm reached. **success**: it did there what it was",
    "  told.",
    "- **Intervals** are of 95 %: a bootstrap over runs (seeds), and over episodes within each, and never narrower",
    "  than that of as many independent episodes (Wilson; of pairs Agresti and Min). Of one run it is over its",
    "  episodes alone, and does not say what another seed would give. Of three runs it is itself uncertain.",
    "- **Differences** are paired: a seed has the same robot samples in all arms, the same noise where both have as",
    "  many draws for a chunk (`hybrid_mask` and `oft` always have one), and the same new weights where both have an",
    "  expert (`oft` and `transfusion` have none). All are judged on the same episodes.",
    "- The **learning rate** of each arm is that of a grid with the smallest error of chunks on held-out episodes of",
    "  the robot data, after short runs with a seed that no figure is of. It falls along a cosine over each stage,",
    "  and weights are averaged; points before a run's last say how it goes, not what a shorter run would reach.",
    "- Beside the paper, an arm **agrees** or **disagrees** if the whole interval does (about equal: within "
    f"{SAME_WITHIN:.0%});",
    "  else one **cannot tell**, and never from one seed.",
)


def section(bench: Bench, causes: Mapping[str, str], figure: str) -> Iterator[str]:
    told = bench.told
    yield from (f"## {told['name']}", "", f"    python -m training.ablate --config {told['config']}", "")
    yield describe(bench)
    yield from ("", f"![The whole comparison in one figure]({figure})", "", "### After equally many steps", "")
    yield from outcomes(bench, None)
    if bench.timing:
        seconds = min(told["steps"] * bench.seconds(arm) for arm in bench.arms if arm in bench.timing)
        yield from ("", "### After equally many seconds", "")
        yield f"{seconds:.3g} s of one core: what the arm with the shortest step takes for all its steps' gradients."
        yield ""
        yield from outcomes(bench, seconds)
    yield from paper(bench, causes)
    yield from times(bench)
    yield from knowledge(bench)
    yield from details(bench)


def describe(bench: Bench) -> str:
    """When, where, of what, and what is missing."""
    told, runs = bench.told, [run for seeds in bench.runs.values() for run in seeds.values()]
    dates, machines, commits = (sorted({run[key] for run in runs}) for key in ("date", "machine", "commit"))
    missing = [
        f"{arm} ({len(bench.runs.get(arm, {}))} of {planned['seeds']})"
        for arm, planned in told["arms"].items()
        if len(bench.runs.get(arm, {})) < planned["seeds"]
    ]
    return (
        f"{dates[0]}{'' if len(dates) == 1 else f' to {dates[-1]}'}; {', '.join(machines)}; commit "
        f"{', '.join(commits)}. {told['steps']} steps, {told['episodes']} episodes of each split. "
        + (f"Not all runs are there yet: {', '.join(missing)}." if missing else "All runs are there.")
    )


def outcomes(bench: Bench, seconds: float | None) -> Iterator[str]:
    """Follow and success of each split, after all steps or after so many seconds."""
    columns = [(figure, split) for figure in ("follow", "success") for split in bench.told["splits"]]
    rows = []
    for arm in bench.arms:
        if seconds is not None and arm not in bench.timing:
            continue
        found = [
            bench.values(arm, *column) if seconds is None else after_seconds(bench, arm, *column, seconds)
            for column in columns
        ]
        steps = [] if seconds is None else [f"{steps_in(bench, arm, seconds):.0f}"]
        rate = next(iter(bench.runs[arm].values()))["learning_rate"]
        rows.append([arm, str(len(bench.runs[arm])), f"{rate:g}", *steps, *(share(mean(values)) for values in found)])
    names = ["arm", "runs", "rate", *([] if seconds is None else ["steps"])]
    yield from table([*names, *(f"{figure}, {split}, %" for figure, split in columns)], rows)


def by_tokens(bench: Bench, arm: str, split: str) -> Array | None:
    """[S, E]: follow of the arm driven by its action tokens, its own way or not; None where it was not measured."""
    runs = [run for _, run in sorted(bench.runs[arm].items())]
    if all(run["recipe"].get("sampler") == "tokens" for run in runs):
        return bench.values(arm, "follow", split)
    found = [run["by_tokens"]["follow"] for run in runs if run.get("by_tokens")]
    return np.array([[float(hit) for hit in digits] for digits in found]) if found else None


def steps_in(bench: Bench, arm: str, seconds: float) -> float:
    return min(seconds / bench.seconds(arm), float(bench.told["steps"]))


def after_seconds(bench: Bench, arm: str, figure: str, split: str, seconds: float) -> Array:
    """[S, E], between two points on a line."""
    points = bench.told["points"]
    values = [bench.values(arm, figure, split, p) for p in range(len(points))]
    return at(steps_in(bench, arm, seconds), points, values)


def paper(bench: Bench, causes: Mapping[str, str]) -> Iterator[str]:
    """Each arm beside what the paper reports of it."""
    rows = []
    for arm in bench.arms:
        claim = bench.told["arms"][arm]["paper"]
        if claim is None:
            continue
        found = bench.paired(arm, claim["than"], claim["figure"], claim["split"])
        if found is None:
            continue
        verdict = found.beside(claim["expected"], SAME_WITHIN)
        where = claim["split"] or "all splits"
        what = f"{arm} - {claim['than']}, {claim['figure']}, {where}"
        rows.append([arm, claim["says"], what, points_of(found), str(found.runs), verdict, str(causes.get(arm) or "")])
    if rows:
        yield from ("", "### Beside the paper", "")
        yield from table(["arm", "the paper", "ours", "difference, points", "seeds", "ours", "likely cause"], rows)


def times(bench: Bench) -> Iterator[str]:
    """Steps and seconds until a share of the instructions is followed in distribution."""
    split, points, rows = bench.told["splits"][0], bench.told["points"], []
    for arm in bench.arms:
        values = [bench.values(arm, "follow", split, p) for p in range(len(points))]
        cells = []
        for level in LEVELS:
            found = time_to(points, values, level)
            cells += [reached(found, 1.0, points[-1]), reached(found, bench.seconds(arm), points[-1])]
        rows.append([arm, *cells])
    yield from ("", f"### Until so many are followed ({split})", "")
    yield "Between points that were measured, on a straight line; an interval is from where the upper ends of the"
    yield "points' intervals come to the level to where the lower ends do. Seconds are steps times the processor time"
    yield "of a step's gradients."
    yield ""
    yield from table(["arm", *(f"{what} to {level:.0%}" for level in LEVELS for what in ("steps", "seconds"))], rows)


def knowledge(bench: Bench) -> Iterator[str]:
    kinds = bench.told["kinds"]
    if not kinds or not bench.start:
        return
    before = bench.start["knowledge"]
    first = [*(f"{before[kind]['right']:.1%}" for kind in kinds), *(f"{before[kind]['loss']:.3f}" for kind in kinds)]
    rows = [["(the common start)", *first]]
    for arm in bench.arms:
        right, loss = (
            [bench.mean_of(arm, "knowledge", kind, key, point=-1) for kind in kinds] for key in ("right", "loss")
        )
        rows.append([arm, *(f"{value:.1%}" for value in right), *(f"{value:.3f}" for value in loss)])
    yield from ("", "### What the vision-language model still knows", "")
    yield "Right answers, read greedily (a place may be a little off), and cross-entropy per token; means of the runs."
    yield ""
    yield from table(["arm", *(f"{kind}, right" for kind in kinds), *(f"{kind}, loss" for kind in kinds)], rows)


def details(bench: Bench) -> Iterator[str]:
    """Tokens, time, gradients and the grid."""
    rows, split = [], bench.told["splits"][0]
    for arm in bench.arms:
        recipe = next(iter(bench.runs[arm].values()))["recipe"]
        if any(stage["action_tokens"] for stage in recipe["stages"]):
            right, error, whole = (
                bench.mean_of(arm, "offline", f"fast_{what}") for what in ("accuracy", "error", "whole")
            )
            count = bench.mean_of(arm, "tokens_per_chunk")
            followed_SE = by_tokens(bench, arm, split)
            followed = "-" if followed_SE is None else share(mean(followed_SE))
            rows.append([arm, number(count, 1), percent(right), number(error, 3), percent(1.0 - whole), followed])
    if rows:
        yield from ("", "### Action tokens", "")
        yield "Right tokens are of the likeliest ones, given the true ones before them; error and what is malformed of"
        yield "the likeliest, read one by one. Episodes are driven by drawn tokens if the run's `token_temperature` is"
        yield "not 0."
        yield ""
        names = ["tokens per chunk", "next token right", "error of chunks", "malformed"]
        yield from table(["arm", *names, f"follow by tokens, {split}, %"], rows)
    rows, quickest = [], min(bench.timing.values(), default=math.nan)
    for arm in bench.arms:
        step = bench.seconds(arm)
        chunk = [number(bench.mean_of(arm, "latency_ms", way), 1) for way in WAYS]
        pulls = [number(bench.mean_of(arm, "gradients", key, point=-1), 3) for key in ("tokens", "flow", "cosine")]
        rows.append([arm, number(1e3 * step, 0), number(step / quickest, 2), *chunk, *pulls])
    yield from ("", "### Time, and gradients in the backbone", "")
    yield "Processor time of a step's gradients, all arms taking turns in one process, and of a chunk for one"
    yield "observation, prefix included. Gradients at the last point, on batches like the stage's; the flow's as it"
    yield "would be without insulation."
    yield ""
    names = ["step, ms", "beside the quickest", *(f"chunk by {way}, ms" for way in WAYS)]
    yield from table(["arm", *names, "norm of tokens", "norm of flow", "cosine"], rows)
    if bench.grid:
        yield from ("", "### Learning rates", "")
        yield f"Error of chunks on held-out robot data after {bench.told['grid_steps']} steps; no number: it diverged."
        yield ""
        rates = [f"{rate:g}" for rate in bench.told["rates"]]
        rows = [[arm, *(number(errors.get(rate), 4) for rate in rates)] for arm, errors in bench.grid.items()]
        yield from table(["arm", *rates], rows)


# --- cells


def share(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.0f} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def points_of(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.0f} [{100 * estimate.low:+.0f}, {100 * estimate.high:+.0f}]"


def reached(estimate: Estimate, scale: float, last: float) -> str:
    """`> N` where it was not within the run."""

    def told(value: float) -> str:
        return f"{value * scale:.0f}" if math.isfinite(value) else f"> {last * scale:.0f}"

    if math.isnan(scale):
        return "-"
    return f"{told(estimate.value)} [{told(estimate.low)}, {told(estimate.high)}]"


def number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def draw(bench: Bench) -> str:
    """The whole story: every arm on every split, how the main arms came there, and what they forgot on the way."""
    told, points = bench.told, bench.told["points"]
    split, count = told["splits"][0], len(points)
    most = max(len(bench.runs[arm]) for arm in bench.arms)
    main = [arm for arm in bench.arms if len(bench.runs[arm]) == most]
    dots = {
        name: [Dot(arm, *interval(mean(bench.values(arm, "follow", name)))) for arm in bench.arms]
        for name in told["splits"]
    }
    curves = [
        Curve(arm, points, [float(bench.values(arm, "follow", split, p).mean()) for p in range(count)]) for arm in main
    ]
    kept = None
    if told["kinds"] and bench.start:
        kind = told["kinds"][0]
        first = bench.start["knowledge"][kind]["right"]
        shares = {arm: [bench.mean_of(arm, "knowledge", kind, "right", point=p) for p in range(count)] for arm in main}
        kept = (
            f"{kind} still right, by step",
            [Curve(arm, [0, *points], [first, *values]) for arm, values in shares.items()],
        )
    title = f"{told['name']}: follow by split, after {told['steps']} steps"
    return draw_story(title, dots, (f"follow, {split}, by step", curves), kept)


def interval(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high
