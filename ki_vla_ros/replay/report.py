"""report.html of a replay: one page that needs neither network nor script.

Legend: H horizon, J joints.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ki_vla_ros.replay.ticks import Prediction, axis_scales
from ki_vla_ros.replay.trace import MOMENTS, Moment, Trace
from ki_vla_ros.report import Axes, Span, clock, figure, lanes, page, remark, section, spark, table, tiles, warning
from ki_vla_ros.robot import Axis, main_axes
from ki_vla_ros.settings import UNLIMITED, parameter_specs

# Joints drawn per worst moment: those with the largest errors.
MOMENT_JOINTS = 3
LANES = {"hold": ("held", "bad"), "refused": ("chunk refused", "bad"), "corrected": ("corrected", "c3")}
LANES |= {"restart": ("motion restarted", "c1")}
KINDS = {"joint": "joints", "gripper": "grippers", "position": "positions of the hand"}
KINDS |= {"rotation": "rotations of the hand", "velocity": "integrals of velocities"}
Metrics = Mapping[str, Any]


def report(trace: Trace, metrics: Metrics, command: str, extra: Iterable[str] = ()) -> str:
    """The page as HTML; `metrics`: the content of metrics.json, `command`: the command line, `extra`: more sections."""
    bag, bundle = metrics["bag"], metrics["bundle"]
    subtitle = (
        f"bag {bag['name']} · {_duration(bag['duration_s'])} · bundle {bundle['name']} · "
        f"ticks {metrics['replay']['ticks']}"
    )
    moments = trace.finish()
    sections = [
        _summary(metrics),
        "".join(_warnings(metrics)),
        _joints(trace, metrics),
        _horizon(trace, metrics),
        _timeline(trace, metrics),
        _inputs(trace, metrics),
        _moments(trace, moments),
        _sensitivity(metrics),
        *extra,
        _parameters(trace, metrics),
        _making(metrics, command),
    ]
    return page("Replay", subtitle, filter(None, sections))


def _summary(metrics: Metrics) -> str:
    error, ticks, seam = metrics["error"], metrics["ticks"], metrics["seam"]
    deadlines, safety = metrics["deadlines"], metrics["safety"]
    held = sum(safety["holds"].values())
    refused, corrected = sum(safety["refusals"].values()), sum(safety["corrections"].values())
    latency, unit = deadlines["latency_ms"], error.get("unit") or ""
    entries = [
        (
            "error, rms",
            _value(error["rms"], unit),
            _interval(error["rms_ci"], unit) if error["rms"] is not None else "no reference in the bag",
        ),
        ("chunks", str(ticks["chunks"]), f"of {ticks['count']} ticks; {ticks['sent']} would have gone out"),
        ("held", f"{held} ticks", _most(safety["holds"]) or "never"),
        ("refused", f"{refused} chunks", _most(safety["refusals"]) or f"{corrected} corrected"),
        (
            "latency, median",
            _value(latency and latency["p50"], "ms"),
            f"{deadlines['missed']} deadlines of {deadlines['period_ms']:g} ms missed",
        ),
        ("jump at seams, rms", _value(seam["jump_rms"], unit, digits=2), f"{seam['executor']}, {seam['count']} seams"),
    ]
    if metrics.get("realtime_factor"):
        entries.append(("speed", f"{metrics['realtime_factor']:.0f} x", "real time, on this machine"))
    return tiles(entries)


def _warnings(metrics: Metrics) -> Iterable[str]:
    if not metrics["complete"]:
        yield warning(f"Not the whole bag: {metrics['stopped']}. The figures cover only the part that was read.")
    if metrics["safety"]["stopped"]:
        yield warning(f"Stopped until a reset: {metrics['safety']['stopped']}")
    if metrics["error"]["rms"] is None:
        yield warning(f"No errors: {metrics['error']['missing']}")
    for fault in metrics["bag"]["faults"]:
        yield warning(f"Bag, {fault['where']}: {fault['message']}")
    for note in metrics["bag"]["notes"]:
        yield remark(note)


def _joints(trace: Trace, metrics: Metrics) -> str:
    if not trace.chunks:
        return section("Predicted and recorded", warning("No chunk was predicted."))
    span = Span.of(trace.time_s, [trace.seconds(chunk.due_ns(-1 + len(chunk.position_HJ))) for chunk in trace.chunks])
    commanded = metrics["error"]["reference"] == "command"
    figures = []
    for j, joint in enumerate(trace.spec.axes):
        curves = [_curve(trace, chunk, j) for chunk in trace.chunks]
        axes = Axes(span, Span.of(trace.state_JT[j], *(y for _, y in curves), margin=0.06))
        layers = [axes.line(trace.state_s, trace.state_JT[j], "recorded")]
        if commanded:
            layers.append(axes.lines((_reference(trace, chunk, j) for chunk in trace.chunks), "c3 fine"))
        layers.append(axes.lines(curves, "predicted"))
        figures.append(figure(joint.name, _joint_note(joint, metrics), axes, layers, times=True))
    legend = _legend(
        ("var(--ink)", "recorded joint"),
        ("var(--blue)", f"predicted chunks ({len(trace.chunks)} of {metrics['ticks']['chunks']})"),
        *([("var(--orange)", "recorded command")] if commanded else []),
    )
    note = (
        "Each chunk starts at the recorded joint state that it was computed from and ends one horizon later. The "
        "predictions did not move the arm in the bag."
    )
    return section("Predicted and recorded", legend, f'<div class="plots">{"".join(figures)}</div>', note=note)


def _joint_note(joint: Axis, metrics: Metrics) -> str:
    found = (metrics["error"].get("by_joint") or {}).get(joint.name)
    if not found:
        return joint.unit
    unit = joint.unit if found["what"] == "position" else f"{joint.unit}, {found['what']}"
    if found["rms"] is None:
        return f"{unit}; no error: {found['missing']}"
    return f"{unit}; rms {_value(found['rms'])} ({_interval(found['rms_ci'])})"


def _curve(trace: Trace, chunk: Prediction, j: int) -> tuple[list[float], list[float]]:
    """Times and positions of one joint, from the observed state through the chunk."""
    times = [trace.seconds(chunk.start_ns), *(trace.seconds(chunk.due_ns(k)) for k in range(len(chunk.position_HJ)))]
    return times, [float(chunk.measured_J[j]), *chunk.position_HJ[:, j].tolist()]


def _reference(trace: Trace, chunk: Prediction, j: int) -> tuple[list[float], list[float]]:
    times = [trace.seconds(chunk.due_ns(k)) for k in range(len(chunk.position_HJ))]
    return times, chunk.reference_HJ[:, j].tolist()


def _horizon(trace: Trace, metrics: Metrics) -> str:
    error = metrics["error"]
    if error["rms"] is None:
        return ""
    steps = [step for step in error["by_step"] if step["rms"] is not None]
    times = [step["time_s"] for step in steps]
    bands = [step["rms_ci"] or [step["rms"], step["rms"]] for step in steps]
    axes = Axes(Span(0.0, max(times)), Span.of([step["rms"] for step in steps], bands, margin=0.05, zero=True))
    layers = [axes.band(times, *zip(*bands, strict=True)), axes.line(times, [step["rms"] for step in steps], "mean")]
    main_J, _ = main_axes(trace.spec.axes)
    counted = [axis for axis, chosen in zip(trace.spec.axes, main_J, strict=True) if chosen]
    joints = "all joints" if all(main_J) else f"{KINDS[counted[0].kind]} in {error['unit']}"
    drawn = figure(f"rms error over the horizon, {error['unit']}", f"{joints}; 95 % interval", axes, layers, height=190)
    rows = []
    for name, found in error["by_joint"].items():
        over_H = (error.get("by_joint_step") or {}).get(name) or []
        rows.append(
            [
                html.escape(name),
                f"{_value(found['rms'])} {found['unit']}<br><small>{_interval(found['rms_ci'])}</small>",
                _value(found["bias"]),
                _value(found["max"]),
                spark([np.nan if value is None else value for value in over_H]),
            ]
        )
    names = ("joint", "rms", "bias", "largest", "over the horizon")
    note = (
        f"Compared with the {'commands' if error['reference'] == 'command' else 'joint states'} in the bag when each "
        f"action was due; {error['chunks']} chunks in {error['segments']} segments of time, over which the intervals "
        "are taken."
    )
    return section("Error over the horizon", f'<div class="plots wide">{drawn}</div>', table(names, rows), note=note)


def _timeline(trace: Trace, metrics: Metrics) -> str:
    if not trace.time_s:
        return ""
    rows: list[tuple[str, Sequence[float], str]] = []
    for kind, (label, colour) in LANES.items():
        found = sorted(((why, lane) for (k, why), lane in trace.lanes.items() if k == kind), key=lambda e: -e[1].count)
        rows += [(f"{label}: {why} ({lane.count})", lane.instants_s, colour) for why, lane in found[:8]]
        if len(found) > 8:
            rows.append((f"{label}: {len(found) - 8} more causes, see metrics.json", [], colour))
    if not rows:
        return section("Holds and refusals", "<p>None: every chunk that was due went out unchanged.</p>")
    span = Span.of([0.0], trace.time_s)
    note = "When the arm would have been held and which chunks the gate refused or corrected, with counts in brackets."
    return section("Holds and refusals", f"<figure>{lanes(rows, span)}</figure>", note=note)


def _inputs(trace: Trace, metrics: Metrics) -> str:
    settings, figures = metrics["settings"], []
    for name, ages in sorted(trace.ages_ms.items()):
        own = settings.get("joint_max_age_s" if name == "joint state" else f"cameras.{name}.max_age_s") or 0.0
        limit_ms = 1e3 * (own or settings["max_age_s"])
        spread = metrics["inputs"]["age_ms"].get(name)
        told = f"median {spread['p50']:.1f}, p99 {spread['p99']:.1f}, limit {limit_ms:g}" if spread else "never seen"
        figures.append(_over_time(trace, f"age of {name}, ms", told, ages, limit_ms))
    period_ms, spread = metrics["deadlines"]["period_ms"], metrics["deadlines"]["latency_ms"]
    told = f"median {spread['p50']:.1f}, p99 {spread['p99']:.1f}, period {period_ms:g}" if spread else ""
    figures.append(_over_time(trace, "latency of a tick, ms", told, trace.latency_ms, period_ms))
    skew, delay = metrics["inputs"]["skew_ms"], metrics["inputs"]["observation_to_command_ms"]
    note = "At the start of each tick."
    if skew:
        note += f" The cameras' stamps are {skew['p50']:.1f} ms apart in the median, {skew['max']:.1f} ms at most."
    if delay:
        note += f" From observation to command: {delay['p50']:.0f} ms in the median, {delay['p99']:.0f} ms at p99."
    note += f" Latency: {metrics['replay']['latency']}."
    return section("Inputs and latency", f'<div class="plots">{"".join(figures)}</div>', note=note)


def _over_time(trace: Trace, title: str, told: str, values: Sequence[float], limit: float) -> str:
    largest = np.nanmax(values) if len(values) and not np.all(np.isnan(values)) else 0.0
    # A limit far above all values would flatten the curve; the caption gives it anyway.
    shown = [limit] if largest > limit / 4.0 else []
    axes = Axes(Span.of([0.0], trace.time_s), Span.of(values, shown, margin=0.05, zero=True))
    layers = [axes.line(trace.time_s, values, "c0 fine"), *(axes.across(value, "limit") for value in shown)]
    return figure(title, told, axes, layers, height=110, times=True)


def _moments(trace: Trace, moments: Sequence[Moment]) -> str:
    if not moments:
        return ""
    note = (
        f"The chunks farthest from the reference, at most {MOMENTS} and some seconds apart, by the rms over all "
        "actions in the model's units (1: half of an action's range). The images are those the policy used, smaller."
    )
    return section("Worst moments", *(_moment(trace, moment) for moment in moments), note=note)


def _moment(trace: Trace, moment: Moment) -> str:
    worst, spec = moment.worst, trace.spec
    scale_J = 2.0 * axis_scales(spec)
    off_J = np.sqrt(np.mean(((worst.position_HJ - worst.reference_HJ) / scale_J) ** 2, axis=0))
    images = "".join(
        f'<figure><img alt="camera {html.escape(name)}" src="data:image/jpeg;base64,'
        f'{base64.b64encode(jpeg).decode()}"><figcaption>{html.escape(name)}</figcaption></figure>'
        for name, jpeg in moment.jpegs.items()
    )
    figures = []
    for j in np.argsort(-off_J, kind="stable")[:MOMENT_JOINTS].tolist():
        curves = [_curve(trace, chunk, j) for chunk in moment.around]
        truths = [_reference(trace, chunk, j) for chunk in moment.around]
        own = _curve(trace, worst, j)
        axes = Axes(Span.of(*(x for x, _ in curves)), Span.of(*(y for _, y in [*curves, *truths]), margin=0.06))
        layers = [axes.lines(curves, "predicted"), axes.lines(truths, "recorded"), axes.line(*own, "worst")]
        joint = spec.axes[j]
        figures.append(figure(joint.name, joint.unit, axes, layers, times=True))
    told = f"chunk {worst.index} · “{moment.instruction}”"
    if worst.refusal is not None:
        told += f" · refused: {worst.refusal}"
    return (
        f'<div class="moment"><h3>{_at(moment.at_s)} · error {moment.error:.2f}</h3><p>{html.escape(told)}</p>'
        f'<div class="thumbs">{images}</div><div class="plots">{"".join(figures)}</div></div>'
    )


def _sensitivity(metrics: Metrics) -> str:
    found = metrics.get("sensitivity") or {}
    if not found.get("probes"):
        return ""
    rows = []
    for name, probe in found["probes"].items():
        rows.append(
            [
                f"{html.escape(name)}<br><small>{html.escape(probe['what'])}</small>",
                f"{_value(probe['rms'])}<br><small>{_interval(probe['rms_ci'])}</small>",
                f"{_value(probe['ratio'])}<br><small>{_interval(probe['ratio_ci'])}</small>",
            ]
        )
    note = (
        f"How far the chunk moves when one thing is changed, on {found['chunks']} chunks, one every "
        f"{found['every_s']:g} s. The ratio compares this with another noise: near 1 or below, there is no effect "
        "beyond chance."
    )
    return section("Sensitivity", table(("changed", "rms", "ratio to noise"), rows), note=note)


def _parameters(trace: Trace, metrics: Metrics) -> str:
    settings: Mapping[str, object] = metrics["settings"]
    cameras, joints = [camera.name for camera in trace.spec.cameras], [joint.name for joint in trace.spec.axes]
    defaults = {spec.name: spec.default for spec in parameter_specs(cameras, joints)}
    changed = {name: value for name, value in settings.items() if value != defaults.get(name)}

    def listed(values: Mapping[str, object]) -> str:
        rows = [[html.escape(name), html.escape(_short(value))] for name, value in sorted(values.items())]
        return table(("parameter", "value"), rows).replace("<table>", '<table class="words">')

    whole = f"<details><summary>all {len(settings)} parameters</summary>{listed(settings)}</details>"
    return section("Parameters", listed(changed), whole, note="Those that differ from their defaults.")


def _making(metrics: Metrics, command: str) -> str:
    bag, timing = metrics["bag"], metrics.get("timing") or {}
    rows = [["bag", html.escape(bag["name"])]]
    rows += [[f"topic: {html.escape(role)}", html.escape(_short(topic))] for role, topic in bag["topics"].items()]
    rows += [
        [
            "bundle",
            f"{html.escape(metrics['bundle']['name'])}<br><small>{metrics['bundle']['manifest_sha256']}</small>",
        ],
        ["latency", html.escape(metrics["replay"]["latency"])],
        ["fingerprint of the figures", html.escape(metrics.get("fingerprint") or "none")],
    ]
    if metrics.get("realtime_factor"):
        rows.append(["speed here", f"{metrics['realtime_factor']:.1f} x real time, {timing['wall_s']:.1f} s"])
    made = table(("what", "which"), rows).replace("<table>", '<table class="words">')
    note = "All figures on this page, and more, are in metrics.json; docs/replay.md says what each means."
    return section("How this was made", f"<pre>{html.escape(command)}</pre>", made, note=note)


def _legend(*entries: tuple[str, str]) -> str:
    keys = (
        f'<span><i class="key" style="border-color:{colour}"></i>{html.escape(text)}</span>' for colour, text in entries
    )
    return f'<div class="legend">{"".join(keys)}</div>'


def _value(value: float | None, unit: str = "", digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g} {unit}".rstrip()


def _interval(ci: Sequence[float] | None, unit: str = "") -> str:
    return "" if ci is None else f"{ci[0]:.3g} to {ci[1]:.3g} {unit}".rstrip()


def _most(counts: Mapping[str, int]) -> str:
    """The most frequent cause, or ""."""
    return max(counts, key=lambda name: counts[name]) if counts else ""


def _at(seconds: float) -> str:
    return f"at {clock(seconds, 60.0 if seconds >= 60.0 else 1.0)}{'' if seconds >= 60.0 else ' s'}"


def _duration(seconds: float | None) -> str:
    return "of unknown length" if seconds is None else f"{seconds:.1f} s" if seconds < 60.0 else clock(seconds, 60.0)


def _short(value: object) -> str:
    """The value as JSON, cut short where it is long (a URDF)."""
    if isinstance(value, float) and abs(value) == UNLIMITED:
        return "not set"
    told = value if isinstance(value, str) else json.dumps(value)
    return told if len(told) <= 300 else f"{told[:300]}… ({len(told)} characters)"
