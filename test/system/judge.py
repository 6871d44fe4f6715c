"""Judges what the node sends, over many random cases: see support/judge.py.

    PYTHONPATH=test python -m system.judge --cases 1000000 --jobs 2 [--seed 0]
    PYTHONPATH=test python -m system.judge --only 4711      # one case, told in words

Prints the worst ratio to each limit, and for each kind of failure how many cases and the smallest of them. Exit code 1
if a case failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing import Pool

from support.judge import Case, Verdict, judge

BATCH = 500


@dataclass
class Total:
    """What many verdicts come to; a kind of failure is told by mode, faults and quantity."""

    cases: int = 0
    moved: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    failed: Counter[str] = field(default_factory=Counter)
    smallest: dict[str, tuple[tuple[int, int, int], int, float]] = field(default_factory=dict)
    bad: int = 0

    def add(self, verdict: Verdict) -> None:
        case = verdict.case
        self.cases += 1
        self.moved += verdict.moved
        self.bad += bool(verdict.bad)
        for name, ratio in verdict.ratios.items():
            self.worst[name] = max(self.worst.get(name, 0.0), ratio)
        for name in verdict.bad:
            kind = f"{case.mode:7} | {'+'.join(sorted(case.faults)):26} | {name}"
            size = (len(case.faults), len(case.events) + len(case.stalls), case.ms)
            self.failed[kind] += 1
            found = (size, case.seed, verdict.ratios.get(name, 0.0))
            before = self.smallest.get(kind, found)
            self.smallest[kind] = (*min(before[:2], found[:2]), max(before[2], found[2]))

    def merge(self, other: Total) -> None:
        self.cases, self.moved, self.bad = self.cases + other.cases, self.moved + other.moved, self.bad + other.bad
        for name, ratio in other.worst.items():
            self.worst[name] = max(self.worst.get(name, 0.0), ratio)
        self.failed += other.failed
        for kind, found in other.smallest.items():
            before = self.smallest.get(kind, found)
            self.smallest[kind] = (*min(before[:2], found[:2]), max(before[2], found[2]))

    def lines(self) -> Iterable[str]:
        yield f"{self.cases} cases, {self.moved} with motion, {self.bad} failed"
        yield "worst ratio to the limit: " + ", ".join(f"{name} {ratio:.4f}" for name, ratio in self.worst.items())
        for kind, count in sorted(self.failed.items(), key=lambda item: (self.smallest[item[0]][0], -item[1])):
            _, seed, ratio = self.smallest[kind]
            yield f"{count:6} | {kind:70} | worst {ratio:10.3f} | smallest seed {seed}"


def batch(first: int, count: int) -> Total:
    total = Total()
    for seed in range(first, first + count):
        total.add(judge(Case(seed)))
    return total


def run(first: int, cases: int, jobs: int) -> Total:
    total = Total()
    batches = [(seed, min(BATCH, first + cases - seed)) for seed in range(first, first + cases, BATCH)]
    if jobs == 1:
        for given in batches:
            total.merge(batch(*given))
        return total
    with Pool(jobs) as pool:
        for part in pool.starmap(batch, batches, chunksize=1):
            total.merge(part)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="the first case's")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", type=int, help="judge this one seed and tell the case")
    given = parser.parse_args()
    if given.only is not None:
        verdict = judge(Case(given.only))
        print(verdict.case, verdict.ratios, *verdict.where, *verdict.faults, sep="\n    ")
        return 1 if verdict.bad else 0
    began_s = time.process_time()
    total = run(given.seed, given.cases, given.jobs)
    print(f"seeds {given.seed} to {given.seed + given.cases - 1}")
    print(*total.lines(), sep="\n")
    if given.jobs == 1:
        print(f"{(time.process_time() - began_s) / given.cases * 1e3:.2f} ms of processor time per case")
    return 1 if total.bad else 0


if __name__ == "__main__":
    sys.exit(main())
