"""Stretches without a message, stray messages and clocks that were not set: jumped over, named, and counted apart."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import TASK, write_test_bundle
from support.loop_rig import START
from support.recordings import MS, RecordingWriter, path_J, record_inputs, record_run

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.bundle.folder import Bundle
from ki_vla_ros.console import ExitCode
from ki_vla_ros.messages.decoding import BagMessage, decode
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.replay import run
from ki_vla_ros.replay.__main__ import main
from ki_vla_ros.replay.figures import Figures

LOOSE = {"limits.on_jump": "clamp", "limits.on_speed": "clamp", "limits.on_position": "clamp", "ramp_in_s": 0.0}
HOUR_NS = 3600 * NS_PER_S
MIDDLE_NS = START + 1_500 * MS


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bag = tmp_path_factory.mktemp("inputs") / "bag"
    record_inputs(bag, 3.0)
    return bag


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Path:
    """With the node's own ticks, of which each took 30 ms."""
    bag = tmp_path_factory.mktemp("live") / "bag"
    record_run(bag, bundle, 3.0, LOOSE)
    return bag


def replay(bag: Path, out: Path, bundle: Bundle, *arguments: str, code: int = 0) -> dict[str, Any]:
    given = [str(bag), "--bundle", str(bundle.path), "--out", str(out), *arguments]
    assert main([*given, *(part for name, value in LOOSE.items() for part in ("--set", f"{name}={value}"))]) == code
    return json.loads((out / "metrics.json").read_text()) if (out / "metrics.json").exists() else {}


def rewrite(
    bag: Path,
    to: Path,
    later: Callable[[BagMessage], int] = lambda message: 0,
    tick: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: fields,
) -> RecordingWriter:
    """Copies a bag, each message and all stamps in it `later(message)` ns later, and ticks as `tick` changes them.

    The caller closes the writer.
    """
    writer = RecordingWriter(to)
    with open_bag(bag) as opened:
        for message in opened.messages():
            by_ns, fields = later(message), decode(message)
            kept = {f.name: getattr(fields, f.name) for f in dataclasses.fields(fields) if f.name != "__msgtype__"}
            if "header" in kept:
                stamp = kept["header"].stamp
                stamp.sec += by_ns // NS_PER_S
            elif message.topic == "/policy/tick":
                kept["data"] = json.dumps(tick(moved(json.loads(kept["data"]), by_ns)))
            writer.write(message.topic, message.type, message.log_ns + by_ns, **kept)
    return writer


def moved(value: Any, by_ns: int) -> Any:
    if isinstance(value, dict):
        return {name: moved(entry, by_ns) for name, entry in value.items()}
    if isinstance(value, list):
        return [moved(entry, by_ns) for entry in value]
    return value + by_ns if isinstance(value, int) and value > NS_PER_S else value


def an_hour_in_the_middle(bag: Path, to: Path) -> Path:
    rewrite(bag, to, lambda message: HOUR_NS if message.log_ns > MIDDLE_NS else 0).close()
    return to


def with_strays(bag: Path, to: Path) -> Path:
    """A joint state logged at time 0, before the recorder's clock was set, and one an hour after the rest."""
    writer = rewrite(bag, to)
    for log_ns in (0, START + HOUR_NS):
        writer.joints(log_ns, log_ns, path_J(START))
    writer.close()
    return to


def test_an_hour_without_messages_is_jumped_over(
    tmp_path: Path, bundle: Bundle, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = replay(inputs, tmp_path / "whole", bundle, "--no-mcap")
    assert whole["bag"]["silences"] == {"count": 0, "seconds": 0.0}
    metrics = replay(an_hour_in_the_middle(inputs, tmp_path / "bag"), tmp_path / "out", bundle)
    assert metrics["complete"] and metrics["bag"]["silences"]["count"] == 1
    assert metrics["bag"]["silences"]["seconds"] == pytest.approx(3600.0, abs=0.1)
    assert metrics["bag"]["duration_s"] == pytest.approx(whole["bag"]["duration_s"], abs=0.1)
    # A second of it is ticked, and held but for what a chunk covers: what the node would have done.
    assert metrics["ticks"]["count"] == pytest.approx(whole["ticks"]["count"] + 10, abs=2)
    assert 5 <= metrics["ticks"]["held"] <= 12 and metrics["ticks"]["sent"] >= whole["ticks"]["sent"] - 4
    told = "stretches longer than 1 s without a message: 1, 3600.0 s in all; no ticks are made there"
    assert told in capsys.readouterr().out and told in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("ticks", ["paced", "recorded"])
def test_an_hour_in_which_nothing_was_recorded_of_the_node(
    tmp_path: Path, bundle: Bundle, live: Path, ticks: str
) -> None:
    arguments = ["--ticks", ticks, "--no-mcap"]
    whole = replay(live, tmp_path / "whole", bundle, *arguments)
    metrics = replay(an_hour_in_the_middle(live, tmp_path / "bag"), tmp_path / "out", bundle, *arguments)
    assert metrics["bag"]["silences"]["count"] == 1
    assert metrics["ticks"]["count"] == pytest.approx(whole["ticks"]["count"], abs=2)
    if ticks == "recorded":
        assert metrics["parity"]["chunks"] + metrics["parity"]["unmatched"] >= whole["parity"]["chunks"] > 20


@pytest.mark.parametrize("kind", ["inputs", "live", "live, recorded"])
def test_stray_messages_cost_no_ticks(tmp_path: Path, bundle: Bundle, inputs: Path, live: Path, kind: str) -> None:
    arguments = ["--no-mcap", *(("--ticks", "recorded") if "recorded" in kind else ())]
    bag = inputs if kind == "inputs" else live
    whole = replay(bag, tmp_path / "whole", bundle, *arguments)
    metrics = replay(with_strays(bag, tmp_path / "bag"), tmp_path / "out", bundle, *arguments)
    assert metrics["bag"]["silences"]["count"] == 2 and metrics["bag"]["messages"]["/joint_states"] == 302
    assert metrics["ticks"]["count"] == pytest.approx(whole["ticks"]["count"], abs=11 * (kind == "inputs"))
    assert metrics["ticks"]["sent"] == pytest.approx(whole["ticks"]["sent"], abs=2)


def test_a_tick_stamped_an_hour_ahead_is_refused(tmp_path: Path, bundle: Bundle, live: Path) -> None:
    whole = replay(live, tmp_path / "whole", bundle, "--no-mcap")
    writer = rewrite(live, tmp_path / "bag")
    tick = {"stamp_ns": START + HOUR_NS, "chunk_index": None, "instruction": TASK, "hold": None}
    writer.text("/policy/tick", START + 900 * MS, json.dumps(tick))
    writer.close()
    metrics = replay(tmp_path / "bag", tmp_path / "out", bundle, "--no-mcap")
    assert metrics["safety"]["messages_refused"] == {"tick": 1} and metrics["ticks"] == whole["ticks"]


def test_no_tick_at_all_is_no_success(
    tmp_path: Path, bundle: Bundle, inputs: Path, live: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strays = RecordingWriter(tmp_path / "strays")
    strays.text("/policy/instruction", 0, TASK)
    for number, camera in enumerate(("scene", "wrist")):
        strays.image(camera, number * HOUR_NS, 0, np.zeros((8, 8, 3), dtype=np.uint8))
    strays.joints(2 * HOUR_NS, 0, path_J(START))
    strays.close()
    patient = ("--set", "max_age_s=2.0")  # a message is waited for longer than the start of a stretch is
    replay(tmp_path / "strays", tmp_path / "out", bundle, *patient, code=ExitCode.FAILED)
    said = capsys.readouterr().err
    assert "replay: bag: expected ticks to replay, got only messages with long silences between them; " in said

    rewrite(live, tmp_path / "unset", tick=lambda fields: moved(fields, -HOUR_NS)).close()
    replay(tmp_path / "unset", tmp_path / "out", bundle, code=ExitCode.FAILED)
    said = capsys.readouterr().err
    assert "/policy/tick never says that the node was active; refused: tick (29)" in said
    assert not (tmp_path / "out" / "metrics.json").exists()


# --- the default latency


def outcome(bag: Path, out: Path, bundle: Bundle, *arguments: str) -> tuple[dict[str, Any], bytes]:
    metrics = replay(bag, out, bundle, *arguments)
    for of_this_run in ("realtime_factor", "timing"):
        metrics.pop(of_this_run)
    return metrics, (out / "predicted" / "predicted.mcap").read_bytes()


@pytest.mark.parametrize("kind", ["inputs", "live"])
def test_two_runs_with_default_settings_agree_to_the_byte(
    tmp_path: Path, bundle: Bundle, inputs: Path, live: Path, kind: str
) -> None:
    bag = inputs if kind == "inputs" else live
    first, second = (outcome(bag, tmp_path / name, bundle) for name in ("first", "second"))
    assert first == second
    assert first[0]["seam"]["jump_rms"] > 0.0 and len(first[0]["fingerprint"]) == 64
    told = {
        "inputs": "50 ms, assumed: half of the period between ticks",
        "live": "as recorded by the node's own ticks",
    }
    assert first[0]["replay"]["latency"] == told[kind]
    assert first[0]["deadlines"]["latency_ms"]["p50"] == {"inputs": 50.0, "live": 30.0}[kind]
    assert f"Latency: {told[kind]}." in (tmp_path / "first" / "report.html").read_text().replace("&#x27;", "'")


def test_measuring_is_an_option_and_said(
    tmp_path: Path, bundle: Bundle, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = replay(inputs, tmp_path / "out", bundle, "--latency", "measured", "--no-mcap")
    assert metrics["replay"]["latency"] == "measured on this machine"
    assert "latency: measured on this machine\n" in capsys.readouterr().out
    assert metrics["deadlines"]["latency_ms"]["max"] != metrics["deadlines"]["latency_ms"]["p50"]


def test_what_the_ticks_do_not_say_is_assumed_and_counted(tmp_path: Path, bundle: Bundle, live: Path) -> None:
    # As an old node wrote them.
    rewrite(live, tmp_path / "bag", tick=lambda fields: {**fields, "joined_ns": None}).close()
    metrics = replay(tmp_path / "bag", tmp_path / "out", bundle, "--no-mcap")
    chunks = metrics["ticks"]["chunks"]
    assert metrics["replay"]["latency"] == (
        f"as recorded by the node's own ticks, but 50 ms assumed for {chunks} that do not say it"
    )
    assert metrics["deadlines"]["latency_ms"]["p50"] == 50.0


# --- Ctrl-C and SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_acts_within_a_tick(
    tmp_path: Path, bundle: Bundle, inputs: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Figures.add

    def add_and_signal(figures: Figures, tick: Any) -> None:
        add(figures, tick)
        if figures.ticks == 5:
            signal.raise_signal(number)

    monkeypatch.setattr(Figures, "add", add_and_signal)
    before = signal.getsignal(number)
    metrics = replay(inputs, tmp_path / "out", bundle, code=ExitCode.INTERRUPTED)
    assert signal.getsignal(number) is before
    assert metrics["stopped"] == "interrupted" and not metrics["complete"]
    behind = 12  # ticks that wait until the bag has shown what their chunk covers
    assert 5 <= metrics["ticks"]["count"] <= 6 + behind
    with open_bag(tmp_path / "out" / "predicted") as predicted:
        assert predicted.faults == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_engine_opens_acts_at_once(
    tmp_path: Path, bundle: Bundle, inputs: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_for_minutes(*_: object) -> None:
        signal.raise_signal(number)
        raise AssertionError("the signal was not acted upon")

    monkeypatch.setattr(run, "open_engine", open_for_minutes)
    assert replay(inputs, tmp_path / "out", bundle, code=ExitCode.INTERRUPTED) == {}
