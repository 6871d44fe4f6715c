"""The page of all benchmarks, from the files of `training.evaluate --out` and from what a person says of them.

python -m training.evaluate.benchmarks

    docs/results/benchmarks/*.json       what came out
    docs/results/benchmarks/notes.yaml   of each: policy, kind, training, command; and what others have published
    docs/results/benchmarks.md           written here
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot import Frozen
from ki_vla_ros.yaml_file import read_yaml
from training.evaluate.trials import OUTCOMES
from training.results import MADE_OF, read_result, result_path, table
from training.storage import write_whole

RESULTS: Final = Path("docs/results/benchmarks")
NOTES: Final = "notes.yaml"
LOWEST: Final = 6  # tasks that are named
Kind = Literal["from scratch", "fine-tuned", "demonstration replay", "random weights (loop only)"]
Rate = Annotated[float, Field(ge=0, le=100)]


class Run(Frozen):
    """What a person says of a file of results."""

    policy: str
    kind: Kind
    training: str = Field(description="data, steps, time and machine; or - ")
    command: str = Field(description="as it was given, without paths of a machine")
    note: str = ""


class Published(Frozen):
    """What others report, in percent."""

    policy: str
    kind: Kind
    training: str = "-"
    rate: Rate | None = Field(default=None, description="of all trials")
    mean: Rate | None = Field(default=None, description="of the groups' rates")
    groups: dict[str, Rate] = Field(default_factory=dict)
    trials: str = ""
    source: str


class Notes(Frozen):
    page: str = Field(description="stands at the top")
    runs: dict[str, Run] = Field(description="by file, without .json, in the order of the table")
    published: dict[str, tuple[Published, ...]] = Field(description="by suite, as protocols call it")


def write_page(results: Path) -> Path:
    """The page beside the folder; ConfigurationError if a file lacks its words, or words lack their file."""
    notes = read_yaml(results / NOTES, Notes, "notes", str(RESULTS))
    found = {path.stem: _read(result_path(results, path.stem)) for path in sorted(results.glob("*.json"))}
    if unsaid := sorted(found.keys() - notes.runs.keys()):
        raise ConfigurationError(
            f"{results / NOTES}: runs: expected words for each file, got none for {unsaid[0]}.json"
        )
    if absent := sorted(notes.runs.keys() - found.keys()):
        raise ConfigurationError(f"{results / NOTES}: runs: expected files that are there, got {absent[0]}.json")
    ordered = {name: found[name] for name in notes.runs}
    lines = [*HEAD, "", notes.page.strip(), "", *_table(notes, ordered), "", *_runs(notes, ordered, results.name)]
    page = results.with_suffix(".md")
    write_whole(page, "\n".join(lines).rstrip() + "\n")
    return page


def _read(path: Path) -> Mapping[str, Any]:
    found = read_result(path)
    assert found is not None
    if missing := {"suite", "episodes", "successes", "groups", "date", "machine", OUTCOMES} - found.keys():
        raise ConfigurationError(f"{path}: expected a file of training.evaluate --out, got one without {min(missing)}")
    return found


HEAD: Final = (
    "# Benchmarks",
    "",
    "This page is written by `python -m training.evaluate.benchmarks` from the files in [benchmarks/](benchmarks/),",
    "which `python -m training.evaluate --out` makes ([environments.md](../environments.md#benchmarks)), and from",
    "`benchmarks/notes.yaml`, in which a person says what each is, and what others have published.",
)


def _table(notes: Notes, found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Ours in bold, each suite's above what others report of it."""
    rows: list[Sequence[str]] = []
    suites = dict.fromkeys([*(each["suite"] for each in found.values()), *notes.published])
    for suite in suites:
        for name, each in found.items():
            if each["suite"] == suite:
                rows.append(_ours(notes.runs[name], each, f"[{name}](#{name})"))
        rows += [_theirs(suite, published) for published in notes.published.get(suite, ())]
    names = ("suite", "policy", "kind", "training", "successes / trials", "rate, %", "mean of groups, %", "groups, %")
    yield from table([*names, "run or source"], rows)


def _ours(run: Run, each: Mapping[str, Any], link: str) -> list[str]:
    low, high = (100 * end for end in each["success_95"])
    mean = each["mean_of_groups"]
    return [
        each["suite"],
        f"**{run.policy}**",
        run.kind,
        run.training,
        f"**{each['successes']} / {each['episodes']}**",
        f"**{100 * each['success_rate']:.1f}** [{low:.1f}, {high:.1f}]",
        "" if mean is None else f"**{100 * mean:.1f}**",
        _groups({name: 100 * group["success_rate"] for name, group in each["groups"].items() if group["episodes"]}),
        link,
    ]


def _theirs(suite: str, each: Published) -> list[str]:
    rate, mean = ("" if value is None else f"{value:g}" for value in (each.rate, each.mean))
    return [suite, each.policy, each.kind, each.training, each.trials, rate, mean, _groups(each.groups), each.source]


def _groups(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {rate:.1f}" for name, rate in rates.items())


def _runs(notes: Notes, found: Mapping[str, Mapping[str, Any]], folder: str) -> Iterator[str]:
    yield from ("## Runs", "")
    for name, each in found.items():
        run = notes.runs[name]
        yield from (f"### {name}", "", *(f"    {line}" for line in run.command.strip().splitlines()), "")
        yield from _described(each, f"[Each episode]({folder}/{name}.json).")
        if run.note:
            yield from ("", run.note.strip())
        yield ""


def _described(each: Mapping[str, Any], link: str) -> Iterator[str]:
    tasks = each["environments"]
    size = f", images of {each['image_size']} pixels" if each.get("image_size") else ""
    execute = f", {_count(each['execute'], 'action')} of a chunk" if each.get("execute") else ""
    yield f"{each['date']}; {each['machine']}; commit {each['commit']}. {_count(len(tasks), 'task')}{execute}{size};"
    whole = "" if each["complete"] else f" {_missing(each)}"
    yield f"seeds from {each['seeds'][0]} on.{whole} {link}"
    worst = sorted((found["success_rate"], task) for task, found in tasks.items() if found["success_rate"] < 1)
    if len(tasks) > 1 and worst:
        told = [
            f"{task.partition('/')[2]} {tasks[task]['successes']} of {tasks[task]['episodes']}" for _, task in worst
        ]
        yield f"Lowest: {', '.join(told[:LOWEST])}."


def _missing(each: Mapping[str, Any]) -> str:
    """What of the protocol was not run: tasks, and trials of those that were."""
    begun = len(each["environments"])
    tasks = sum(map(len, each[MADE_OF].get("protocol.tasks", {}).values())) or begun
    which = "each task" if tasks == begun else f"each of {tasks} tasks, of which {begun} were begun"
    return f"Of {each['trials']} trials of {which}, the others were not run."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    return run_command("benchmarks", partial(_write, parser.parse_args(arguments).results))


def _write(results: Path) -> int:
    print(write_page(results))
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
