"""A protocol's episodes, by as many processes as are wanted, and a file of what came out, which goes on where it ended.

The file has the outcome of each episode, by task and seed, as soon as it is known. An episode depends on its task, its
seed and the policy alone: the same protocol gives the same outcomes, whoever runs it and however often it was ended.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from ki_vla_ros.console import Progress
from ki_vla_ros.errors import ConfigurationError
from training.evaluate.drivers import Chosen, Driver, open_driver
from training.evaluate.environment import Environment
from training.evaluate.environments import open_environment, versions
from training.evaluate.protocol import Protocol
from training.evaluate.rollouts import FAILED, MALFORMED, Act, Outcome, rate, run_episode, summarize
from training.policy import commit
from training.results import check_result, plain, result_path, write_result
from training.storage import only_writer
from training.workers import share_out, share_out_on_ray

Ended = tuple[str, int, Outcome]  # of a task and a seed
Share = Callable[[Callable[..., Ended], Sequence[tuple[Any, ...]]], Iterator[Ended]]
"""Does work for each of its jobs, wherever; each result as soon as it is there."""
OUTCOMES: Final = "outcomes"
FILMS: Final = "films"
# Of what decides outcomes, what no single episode depends on.
OF_NO_FILM: Final = {f"protocol.{name}" for name in ("name", "tasks", "trials", "first_seed")}


@dataclass(frozen=True)
class Films:
    """Of each task `most` episodes are filmed: failures first. `films.json` in the folder says whose they are."""

    folder: Path
    most: int

    def claim(self, made_of: Mapping[str, Any]) -> None:
        """Make the folder; ConfigurationError if it has films of another policy, or of nobody knows which."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = result_path(self.folder, FILMS)
        of_a_film = {name: value for name, value in made_of.items() if name not in OF_NO_FILM}
        if check_result(path, of_a_film) is not None:
            return
        if found := next(self.folder.glob("*.mp4"), None):
            raise ConfigurationError(
                f"{found}: expected {path.name} beside films, which says whose they are, got none; move them away, or "
                "name another folder"
            )
        write_result(path, of_a_film, {})

    def path(self, task: str, seed: int, outcome: Outcome) -> Path:
        what = outcome if isinstance(outcome, str) else "success"
        return self.folder / f"{task.strip('/').replace('/', '_')}_{seed}_{what}.mp4"


def run_protocol(
    protocol: Protocol,
    chosen: Chosen,
    out: Path | None = None,
    workers: int = 1,
    films: Films | None = None,
    now: int | None = None,
    cluster: str | None = None,
) -> dict[str, Any]:
    """Run what `out` does not have yet, and return its figures. ConfigurationError if `out` is of anything else.

    `workers` are processes of this machine; `cluster`, in their place, is the address of a Ray cluster. `now`: only the
    first so many trials of each task, so that another run goes on with the others.
    """
    if chosen.expert:
        protocol = protocol.model_copy(update={"execute": 1})
    if films is not None:  # what would fail at the end fails now
        import_module("training.evaluate.films")
    share: Share = partial(share_out, workers=workers, in_order=False)
    if cluster is not None:
        share = partial(share_out_on_ray, address=cluster)
    try:
        driver = _Worker.driver_of(chosen)
        if driver.horizon is not None and (protocol.execute or 1) > driver.horizon:
            raise ConfigurationError(f"--execute: expected 1 to {driver.horizon}, the horizon, got {protocol.execute}")
        sheet = Sheet(protocol, driver, out)
        if films is not None:
            films.claim(sheet.made_of)
        with nullcontext() if out is None else only_writer(out):
            sheet.read()
            _run(sheet, chosen, share, now)
        if films is not None:
            _film(sheet, chosen, films, share)
        return sheet.figures()
    finally:
        _Worker.close()


class Sheet:
    """The outcomes there are, and what is said of them; the file, if there is one, always has the same."""

    def __init__(self, protocol: Protocol, driver: Driver, out: Path | None) -> None:
        self.protocol, self.out = protocol, out
        self.outcomes: dict[str, dict[int, Outcome]] = {task: {} for task in protocol.environments}
        self.made_of = made_of(protocol, driver)
        half = None if driver.horizon is None else max(1, driver.horizon // 2)
        self._told = {
            "protocol": protocol.name,
            "suite": protocol.suite,
            **driver.told,
            "execute": protocol.execute or half,
            "trials": protocol.trials,
            "seeds": [protocol.seeds[0], protocol.seeds[-1]],
            "image_size": protocol.image_size,
        }
        self._where = {
            "date": datetime.now(timezone.utc).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "commit": commit(),
        }

    def read(self) -> None:
        """What an earlier run of the same has left; ConfigurationError if it was of anything else."""
        found = None if self.out is None else check_result(self.out, self.made_of)
        if found is None:
            return
        seeds = {str(seed): seed for seed in self.protocol.seeds}
        try:
            for task, by_seed in found[OUTCOMES].items():
                self.outcomes[task].update({seeds[seed]: _outcome(value) for seed, value in by_seed.items()})
            self._where = {key: found[key] for key in self._where}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(
                f"{self.out}: expected outcomes of the protocol's tasks and seeds, got something else ({error!r}); "
                "move it away, and its episodes are run again"
            ) from error

    def add(self, task: str, seed: int, outcome: Outcome) -> None:
        self.outcomes[task][seed] = outcome
        if self.out is not None:
            outcomes = {task: dict(sorted(found.items())) for task, found in self.outcomes.items() if found}
            write_result(self.out, self.made_of, self.figures() | {OUTCOMES: outcomes})

    def figures(self) -> dict[str, Any]:
        """Of each task, of each group and over all; `mean_of_groups` where there are several and all is done."""
        protocol = self.protocol
        by_task = {task: summarize(dict(sorted(found.items()))) for task, found in self.outcomes.items() if found}
        groups = {
            group: _over([by_task[task] for task in tasks if task in by_task])
            for group, tasks in protocol.tasks.items()
        }
        whole = _over(list(by_task.values()))
        complete = whole["episodes"] == len(protocol.environments) * protocol.trials
        several = len(groups) > 1
        mean = sum(found["success_rate"] for found in groups.values()) / len(groups) if complete and several else None
        found: dict[str, Any] = plain(
            {
                **self._told,
                "complete": complete,
                **whole,
                "mean_of_groups": mean,
                "groups": groups if several else {},
                "environments": by_task,
                **self._where,
            }
        )
        return found


def made_of(protocol: Protocol, driver: Driver) -> dict[str, Any]:
    """All that decides the outcomes, by dotted name."""
    told = dict(driver.told)
    if told.get("manifest_sha256") is not None:
        told.pop("policy_server", None)  # wherever it is: a name alone would be that of the next policy, too
    return {
        **{f"protocol.{key}": value for key, value in protocol.model_dump(mode="json", exclude={"suite"}).items()},
        **{f"policy.{key}": value for key, value in told.items()},
        **{f"package.{key}": value for key, value in versions(protocol.environments).items()},
    }


def _outcome(value: Any) -> Outcome:
    if value in (FAILED, MALFORMED):
        return FAILED if value == FAILED else MALFORMED
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"outcome {value!r}")
    return float(value)


def _over(found: list[dict[str, Any]]) -> dict[str, Any]:
    episodes = sum(each["episodes"] for each in found)
    return rate(sum(each["successes"] for each in found), episodes) if episodes else {"episodes": 0, "successes": 0}


def _run(sheet: Sheet, chosen: Chosen, share: Share, now: int | None) -> None:
    protocol, seeds = sheet.protocol, sheet.protocol.seeds[:now]
    jobs = [
        (protocol, chosen, task, seed) for task, found in sheet.outcomes.items() for seed in seeds if seed not in found
    ]
    total = len(protocol.environments) * len(seeds)
    with Progress() as progress:
        for count, (task, seed, outcome) in enumerate(share(_run_trial, jobs)):
            sheet.add(task, seed, outcome)
            done = total - len(jobs) + count + 1
            progress.show(f"{task}: {done} of {total} episodes", done / total)


def _film(sheet: Sheet, chosen: Chosen, films: Films, share: Share) -> None:
    """Run the episodes to be shown once more, which end as before: so nobody films all to keep the failures."""
    jobs = [
        (sheet.protocol, chosen, task, seed, films)
        for task, found in sheet.outcomes.items()
        for seed, outcome in _shown(found, films.most)
        if not films.path(task, seed, outcome).exists()
    ]
    with Progress() as progress:
        for count, (task, seed, outcome) in enumerate(share(_run_trial, jobs)):
            progress.show(f"{task}: {count + 1} of {len(jobs)} films", (count + 1) / len(jobs))
            if outcome != (counted := sheet.outcomes[task][seed]):
                progress.keep(
                    f"{films.path(task, seed, outcome)}: it had ended otherwise ({counted}) when it was counted: the "
                    "policy does not do the same from the same start"
                )


def _shown(outcomes: Mapping[int, Outcome], most: int) -> Iterator[tuple[int, Outcome]]:
    """Failures first, then the others, each from the first seed on."""
    ordered = sorted(outcomes.items(), key=lambda item: (not isinstance(item[1], str), item[0]))
    yield from ordered[:most]


class _Worker:
    """What a process has open: the policy, and the environment that was used last."""

    driver: tuple[Chosen, Driver] | None = None
    environment: tuple[Any, Environment, Act, Environment] | None = None

    @classmethod
    def driver_of(cls, chosen: Chosen) -> Driver:
        if cls.driver is None or cls.driver[0] != chosen:
            cls.close()
            cls.driver = chosen, open_driver(chosen)
        return cls.driver[1]

    @classmethod
    def meet(cls, protocol: Protocol, chosen: Chosen, task: str, seen: bool) -> tuple[Act, Environment, float | None]:
        """`seen`: whether anybody looks at its images."""
        options = protocol.options | ({} if seen else {"cameras": ()})
        key = (task, chosen, tuple(sorted(options.items())))
        driver = cls.driver_of(chosen)
        if cls.environment is None or cls.environment[0] != key:
            cls.close_environment()
            opened = open_environment(task, **options)
            try:
                cls.environment = key, opened, *driver.meet(opened, task)
            except BaseException:
                opened.close()
                raise
        _, opened, act, environment = cls.environment
        limit_s = None if protocol.steps is None else protocol.steps * opened.robot.action_period_s
        return act, environment, limit_s

    @classmethod
    def close_environment(cls) -> None:
        if cls.environment is not None:
            cls.environment[1].close()
            cls.environment = None

    @classmethod
    def close(cls) -> None:
        cls.close_environment()
        if cls.driver is not None:
            cls.driver[1].close()
            cls.driver = None


def _run_trial(
    protocol: Protocol, chosen: Chosen, task: str, seed: int, films: Films | None = None
) -> tuple[str, int, Outcome]:
    act, environment, limit_s = _Worker.meet(protocol, chosen, task, seen=films is not None or not chosen.expert)
    if films is None:
        return task, seed, run_episode(act, environment, seed, protocol.execute, limit_s)
    from training.evaluate.films import Film

    film = Film(environment)
    outcome = run_episode(act, environment, seed, protocol.execute, limit_s, film)
    film.write(films.path(task, seed, outcome), outcome if isinstance(outcome, str) else f"done after {outcome:.2f} s")
    return task, seed, outcome
