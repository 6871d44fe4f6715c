"""Every kind of action under the real loop: nothing that is sent leaves its limits; see support/kinds.py.

Ten thousand cases: KI_VLA_CASES=5 make test ARGS=test/contracts/test_kinds.py
"""

from __future__ import annotations

import pytest
from support import MORE_CASES
from support.kinds import FAULTS, PARTS, TOLERANCE, Case, judge

CASES, JOBS = 2000 * MORE_CASES, 10


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize("part", range(JOBS))
def test_no_kind_of_action_leaves_its_limits(part: int) -> None:
    bad = [verdict for seed in range(part, CASES, JOBS) if (verdict := judge(Case(seed))).bad]
    told = [f"{verdict.case}\n    {verdict.ratios}\n    {verdict.faults}" for verdict in bad[:3]]
    assert not bad, f"{len(bad)} of {CASES // JOBS} cases:\n" + "\n".join(told)


@pytest.mark.usefixtures("uncounted")
def test_the_cases_are_not_empty() -> None:
    """Each part of a robot meets each fault, all kinds of axes move, and the worst cases use their limits up."""
    cases = [Case(seed) for seed in range(2500)]
    assert {(part, fault) for case in cases for part in case.parts for fault in case.faults} == {
        (part, fault) for part in PARTS for fault in FAULTS
    }
    verdicts = [judge(case) for case in cases[:200]]
    moved = [kind for verdict in verdicts for kind in verdict.moved]
    assert all(moved.count(kind) > 20 for kind in ("joint", "gripper", "velocity", "position", "rotation"))
    for quantity in ("trajectory speed", "stream speed", "velocity", "change of velocity", "linear speed"):
        assert 0.98 < max(verdict.ratios.get(quantity, 0.0) for verdict in verdicts) < TOLERANCE, quantity
