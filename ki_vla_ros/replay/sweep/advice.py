"""What a sweep found: the trade-off as a table and a plot, and the recommended settings with the reason.

Legend: C candidates, G segments of time, J joints, R draws.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle import PolicySpec
from ki_vla_ros.replay.sweep.figures import Outcome
from ki_vla_ros.replay.sweep.grid import HORIZON, HORIZON_S, Changes, Grid, Value, is_used, parameters_of
from ki_vla_ros.replay.ticks import axis_scales
from ki_vla_ros.report import Axes, Span, figure, section, table
from ki_vla_ros.robot import main_axes
from ki_vla_ros.settings import NODE, PARAMETERS
from ki_vla_ros.statistics import FEWEST_SEGMENTS, Draws, interval_95

Array = NDArray[np.float64]
# A share of failed ticks (held, refused or late) that exceeds the least by no more than this counts as equal.
EQUAL_FAILURES = 0.005
# Seams rougher than the smoothest by no more than this factor count as equally smooth.
EQUAL_SMOOTHNESS = 1.1
KEEP = "keep the given settings"


@dataclass(frozen=True)
class Row:
    """One setting's figures.

    `error`: rms deviation of the commanded motion from the reference, in the model's units (1: half of an action's
    range). `error_main`: the same in rad over the revolute joints, or in m where there are none. `jerk`: of the
    commanded motion of these joints, in rad/s^3 or m/s^3, in the sweep's own run.
    """

    changes: Changes
    failures: float
    held: int
    refused: int
    missed: int
    restarts: int
    error: float | None
    error_ci: Sequence[float] | None
    error_main: float | None
    as_good: bool
    jump: float | None
    jerk: float | None
    age_ms: float | None
    chunks_per_s: float


@dataclass(frozen=True)
class Advice:
    """The outcome of a sweep.

    `rows` are in the grid's order, the given settings first; `chosen` is the index of the recommended row. `source`:
    what was swept over, in words. `period_s`: the action period.
    """

    grid: Grid
    source: str
    rows: Sequence[Row]
    chosen: int
    reason: str
    unit: str
    period_s: float

    @property
    def verdict(self) -> str:
        """What to do, in words: "take executor rtc, execution_horizon 6 actions (0.3 s)"."""
        return f"take {told}" if (told := _told(self.rows[self.chosen].changes, self.period_s)) else KEEP


def advise(grid: Grid, outcomes: Sequence[Outcome], spec: PolicySpec, seed: int, source: str) -> Advice:
    """Picks the setting with fewest failures, then least error, then smoothest seams, then fewest inferences.

    Settings count as equal where the bag cannot tell them apart.
    """
    scale_J = axis_scales(spec)
    counted, unit = main_axes(spec.axes)
    main_J = np.array(counted, dtype=np.bool_)
    draws = _draws(outcomes, lambda square_J: float(np.sum(square_J / scale_J**2)), len(spec.axes), seed)
    error_C, error_RC = _roots(draws.total, draws.count), None if draws.drawn is None else _roots(*draws.drawn)
    failures_C = np.array([(o.held + o.refused + o.missed) / max(o.ticks + o.missed, 1) for o in outcomes])
    able_C = (failures_C <= failures_C.min() + EQUAL_FAILURES) & np.isfinite(error_C)
    if not able_C.any():  # no reference, so only failures and seams can be judged
        able_C = failures_C <= failures_C.min() + EQUAL_FAILURES
        good_C = able_C
    else:
        best = int(np.argmin(np.where(able_C, error_C, np.inf)))
        good_C = able_C & _as_good(error_C, error_RC, best)
    main = [_root(outcome, outcome.squares, main_J) for outcome in outcomes]
    jumps = [_root(outcome, outcome.jumps, main_J) for outcome in outcomes]
    rows = []
    for c, (candidate, outcome) in enumerate(zip(grid.candidates, outcomes, strict=True)):
        ci = None
        if error_RC is not None and np.isfinite(error_RC[:, c]).any():
            ci = interval_95(error_RC[:, c])
        rows.append(
            Row(
                changes=candidate.changes,
                failures=float(failures_C[c]),
                held=outcome.held,
                refused=outcome.refused,
                missed=outcome.missed,
                restarts=outcome.restarts,
                error=float(error_C[c]) if np.isfinite(error_C[c]) else None,
                error_ci=ci,
                error_main=main[c],
                as_good=bool(good_C[c]),
                jump=jumps[c],
                jerk=outcome.jerk_rms,
                age_ms=1e3 * outcome.age_s / outcome.acted if outcome.acted else None,
                chunks_per_s=candidate.settings.rate_hz * outcome.chunks / max(outcome.ticks, 1),
            )
        )
    chosen = _choose(rows)
    reason = _reason(rows, chosen, unit, _untold(rows, able_C, draws))
    return Advice(grid, source, rows, chosen, reason, unit, spec.action_period_s)


def _choose(rows: Sequence[Row]) -> int:
    good = [c for c, row in enumerate(rows) if row.as_good]
    # An executor that comes to rest before each chunk has no seams, so it cannot win by smooth ones.
    seams = [jump for c in good if (jump := rows[c].jump) is not None]
    if seams:
        limit = EQUAL_SMOOTHNESS * min(seams)
        smooth = [c for c in good if (jump := rows[c].jump) is not None and jump <= limit]
    else:
        smooth = good
    fewest = min(rows[c].chunks_per_s for c in smooth)
    # A difference of 2 % in chunks depends on where the bag ends.
    return min((c for c in smooth if rows[c].chunks_per_s <= 1.02 * fewest), key=lambda c: (rows[c].error or 0.0, c))


def _untold(rows: Sequence[Row], able_C: NDArray[np.bool_], draws: Draws) -> str:
    """A sentence if errors differ but the intervals tell no two settings apart; "" otherwise."""
    able = [row for row, is_able in zip(rows, able_C, strict=True) if is_able]
    if len({row.error for row in able} - {None}) < 2:
        return ""
    if draws.drawn is None:
        return (
            f"The bag is too short to tell: intervals need {FEWEST_SEGMENTS} segments of time, so the errors are "
            "compared as they are."
        )
    if all(row.as_good for row in able):
        return "The bag is too short to tell which setting has the least error: the differences may all be chance."
    return ""


def _reason(rows: Sequence[Row], chosen: int, unit: str, untold: str) -> str:
    row, good = rows[chosen], sum(row.as_good for row in rows)
    parts = []
    least = min((other.error for other in rows if other.as_good and other.error is not None), default=None)
    if row.error is None or least is None:
        parts.append("The bag has no reference, so only holds, refusals and seams could be compared.")
    else:
        parts.append(
            f"With these settings the commanded motion is {row.error_main:.3g} {unit} (rms) from the reference; as far "
            f"as the bag can tell, {good} of {len(rows)} settings are equally near (least error {least:.3g}, this one "
            f"{row.error:.3g}, in the model's units)."
        )
    if untold:
        parts.append(untold)
    jumps = [other.jump for other in rows if other.as_good and other.jump is not None]
    if row.jump is not None and jumps:
        parts.append(
            f"Among those, these settings are one of the smoothest: {row.jump:.2g} {unit} from chunk to chunk (the "
            f"roughest: {max(jumps):.2g}). Of the equally smooth ones they infer least often: {row.chunks_per_s:.1f} "
            "chunks per second."
        )
    parts.append(
        f"In {row.failures:.1%} of the ticks the arm was held, the chunk refused or the deadline missed; with the best "
        f"setting in {min(other.failures for other in rows):.1%}."
    )
    given = rows[0]
    if chosen and given.error_main is not None and row.error_main is not None:
        parts.append(
            f"The given settings: {given.error_main:.3g} {unit}, jump {_number(given.jump)}, "
            f"{given.chunks_per_s:.1f} chunks per second."
        )
    return " ".join(parts)


CAUTION = (
    "The arm in a bag does not react to the policy. These figures do not show how fast a setting reacts to what it "
    "causes, only how old the images behind its actions are (age). Try it on the robot before you keep it."
)


def recommended_yaml(advice: Advice) -> str:
    """A parameter file with only the differences from the given settings."""
    row = advice.rows[advice.chosen]
    lines = [f"Recommended by a sweep of {len(advice.rows)} settings over {advice.source}.", ""]
    lines += [f"{_sentence(advice.verdict)}.", "", advice.reason, "", CAUTION]
    comment = [f"# {part}".rstrip() for line in lines for part in (textwrap.wrap(line, 116) or [""])]
    values = [f"    {name}: {_yaml(value)}" for name, value in sorted(row.changes.items())]
    body = [f"/**{NODE}:", f"  {PARAMETERS}:{'' if values else ' {}'}", *values]
    return "\n".join([*comment, "", *body]) + "\n"


def sweep_section(advice: Advice) -> str:
    """The sweep's section of the report, as HTML."""
    grid, unit = advice.grid, advice.unit
    given = parameters_of(grid.candidates[0].settings)
    swept = [name for name in grid.names if name in {n for row in advice.rows for n in row.changes}]
    names = [
        *(HORIZON if name == HORIZON_S else name for name in swept),
        f"error, {unit}",
        "error, model's units",
        f"jump, {unit}",
        f"jerk, {unit}/s^3",
        "age, ms",
        "chunks/s",
        "failures",
    ]
    order = sorted(range(len(advice.rows)), key=lambda c: (not advice.rows[c].as_good, advice.rows[c].error or 0.0, c))
    rows = []
    for c in order:
        row, settings = advice.rows[c], parameters_of(grid.candidates[c].settings)
        marks = [mark for mark, at in (("given", 0), ("recommended", advice.chosen)) if at == c]
        executor = str(settings["executor"])
        cells = [_cell(name, settings[name], is_used(name, executor), c == 0, advice.period_s) for name in swept]
        cells[0] += f"<br><small>({', '.join(marks)})</small>" if marks else ""
        ci = "" if row.error_ci is None else f"<br><small>{row.error_ci[0]:.3g} to {row.error_ci[1]:.3g}</small>"
        cells += [_number(row.error_main), _number(row.error) + ci, _number(row.jump), _number(row.jerk)]
        cells += [_number(row.age_ms), _number(row.chunks_per_s), f"{row.failures:.1%}"]
        rows.append(cells)
    told = f"<p><b>{html.escape(_sentence(advice.verdict))}.</b></p><p>{html.escape(advice.reason)}</p>"
    refused = "".join(f"<li>{count} x {html.escape(why)}</li>" for why, count in grid.refused.items())
    left_out = f"{grid.asked} asked for, {grid.same} of them do the same as another" + (":" if refused else ".")
    listed = f"<details><summary>{left_out}</summary><ul>{refused}</ul></details>" if refused else f"<p>{left_out}</p>"
    note = (
        "Error: the commanded motion against the reference. Settings whose error the bag cannot tell from the least "
        f"come first. Jerk is from the sweep's own run; the replay above draws other noise. {CAUTION}"
    )
    drawn = _trade_off(advice, given)
    position = order.index(advice.chosen)
    return section("Sweep", told, drawn, table(names, rows, marked=position), listed, note=note)


def sweep_document(advice: Advice) -> dict[str, Any]:
    """The content of sweep.json."""
    grid = advice.grid
    return {
        "asked": grid.asked,
        "same": grid.same,
        "refused": dict(grid.refused),
        "recommended": dict(advice.rows[advice.chosen].changes),
        "reason": advice.reason,
        "unit": advice.unit,
        "settings": [_plain(row) for row in advice.rows],
    }


def _trade_off(advice: Advice, given: Mapping[str, Value]) -> str:
    """Plots of error against seams and against the rate of inferences, with a colour per executor."""
    executors = sorted({str(row.changes.get("executor", given["executor"])) for row in advice.rows})
    figures = []
    for title, x_unit, values in (
        (f"error over jump at the seams, {advice.unit}", advice.unit, [row.jump for row in advice.rows]),
        ("error over chunks per second", "1/s", [row.chunks_per_s for row in advice.rows]),
    ):
        points = [(c, x, row.error) for c, (x, row) in enumerate(zip(values, advice.rows, strict=True))]
        known = [(c, x, y) for c, x, y in points if x is not None and y is not None]
        axes = Axes(
            Span.of([x for _, x, _ in known], margin=0.1, zero=True), Span.of([y for *_, y in known], margin=0.1)
        )
        layers = []
        for c, x, y in sorted(known, key=lambda point: point[0] == advice.chosen):
            row = advice.rows[c]
            colour = executors.index(str(row.changes.get("executor", given["executor"]))) % 5
            kind = f"c{colour}{' chosen' if c == advice.chosen else ''}"
            label = _told(row.changes, advice.period_s) or "given"
            layers.append(axes.dot(x, y, kind, label))
        figures.append(figure(title, "model's units; large: recommended", axes, layers, x_unit=x_unit, height=190))
    colours = ("blue", "violet", "green", "orange", "red")
    keys = "".join(
        f'<span><i class="key" style="border-color:var(--{colours[k % 5]})"></i>{html.escape(name)}</span>'
        for k, name in enumerate(executors)
    )
    return f'<div class="legend">{keys}</div><div class="plots">{"".join(figures)}</div>'


def _draws(outcomes: Sequence[Outcome], weigh: Callable[[Array], float], joints: int, seed: int) -> Draws:
    """Sums and counts [G, C]; the same segments are drawn for all candidates, so they can be compared in pairs."""
    segments = sorted({segment for outcome in outcomes for segment in outcome.squares})
    total_GC, count_GC = np.zeros((len(segments), len(outcomes))), np.zeros((len(segments), len(outcomes)))
    for c, outcome in enumerate(outcomes):
        for g, segment in enumerate(segments):
            if segment in outcome.squares:
                square_J, count = outcome.squares[segment]
                total_GC[g, c], count_GC[g, c] = weigh(square_J), count * joints
    return Draws(total_GC, count_GC, seed)


def _roots(total: Array, count: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.sqrt(total / count))


def _as_good(error_C: Array, error_RC: Array | None, best: int) -> NDArray[np.bool_]:
    """Which candidates [C] are worse than `best` in at most 97.5 % of the draws; without draws, those not worse."""
    if error_RC is None:
        return np.asarray(error_C <= error_C[best])
    worse_RC = error_RC - error_RC[:, [best]]
    return np.asarray(np.nanpercentile(worse_RC, 2.5, axis=0) <= 0.0)


def _root(outcome: Outcome, sums: Mapping[int, tuple[Array, int]], main_J: NDArray[np.bool_]) -> float | None:
    count = sum(count for _, count in sums.values())
    if not count:
        return None
    total_J = np.sum([square_J for square_J, _ in sums.values()], axis=0)
    return float(np.sqrt(total_J[main_J].mean() / count))


def _plain(row: Row) -> dict[str, Any]:
    fields = {name: getattr(row, name) for name in Row.__dataclass_fields__}
    return fields | {"changes": dict(row.changes)}


def _cell(name: str, value: Value, used: bool, given: bool, period_s: float) -> str:
    """One cell of the table. A parameter that the executor does not use is a dash, but shown for the given settings."""
    if not used and not given:
        return "-"
    told = html.escape(_value(name, value, period_s))
    return told if used else f"{told}<br><small>not used by this executor</small>"


def _told(changes: Changes, period_s: float) -> str:
    named = sorted(changes.items(), key=lambda change: (change[0] != "executor", change[0]))
    return ", ".join(
        f"{HORIZON if name == HORIZON_S else name} {_value(name, value, period_s)}" for name, value in named
    )


def _value(name: str, value: Value, period_s: float) -> str:
    """A value as in a parameter file; a horizon in actions too, as --sweep counts it."""
    if name != HORIZON_S:
        return _yaml(value)
    actions = round(float(value) / period_s, 2)
    return f"{actions:g} action{'' if actions == 1.0 else 's'} ({float(value):g} s)"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _yaml(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value == int(value):
        return f"{value:.1f}"  # ROS tells 1 from 1.0
    return str(value)
