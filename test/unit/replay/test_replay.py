"""A replay runs the node's loop again: it makes the same chunks from a recorded run, and its figures are right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT
from support.bundles import CAMERAS, TASK, state_token_policy, write_test_bundle
from support.loop_rig import START
from support.recordings import MS, RecordingWriter, path_J, picture, record_inputs, record_run

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.bundle.folder import Bundle, load_bundle
from ki_vla_ros.console import ExitCode
from ki_vla_ros.messages.decoding import BagMessage, decode
from ki_vla_ros.replay.__main__ import main
from ki_vla_ros.replay.latency import parse_latency
from ki_vla_ros.replay.run import replay as run_replay
from ki_vla_ros.replay.setup import ReplayOptions, set_up

# Random weights leave the arm's reach now and then; these tests are not about that. Nor are they about good chunks: two
# runs of one policy are compared, and flow steps are most of what a run costs.
LOOSE = {
    "limits.on_jump": "clamp",
    "limits.on_speed": "clamp",
    "limits.on_position": "clamp",
    "ramp_in_s": 0.0,
    "flow_steps": 3,
}
LOOSE_ARGUMENTS = [argument for name, value in LOOSE.items() for argument in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def demo() -> Bundle:
    """A trained bundle: random weights turn any noise into nearly the same chunk."""
    return load_bundle(ROOT / "models/demo")


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bag = tmp_path_factory.mktemp("second") / "bag"
    record_inputs(bag, 1.0)
    return bag


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bag = tmp_path_factory.mktemp("inputs") / "bag"
    record_inputs(bag, 8.0)
    return bag


def replay(bag: Path, out: Path, bundle: Bundle, *arguments: str, code: int = 0) -> dict[str, Any]:
    """Runs the command and returns its metrics.json."""
    given = [str(bag), "--bundle", str(bundle.path), "--out", str(out), *LOOSE_ARGUMENTS, *arguments]
    assert main(given) == code
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return metrics


def copy(message: BagMessage, writer: RecordingWriter) -> None:
    fields = decode(message)
    kept = {f.name: getattr(fields, f.name) for f in dataclasses.fields(fields) if f.name != "__msgtype__"}
    writer.write(message.topic, message.type, message.log_ns, **kept)


def as_arguments(settings: dict[str, object]) -> list[str]:
    return [argument for name, value in settings.items() for argument in ("--set", f"{name}={value}")]


@pytest.mark.parametrize(
    "settings",
    [
        {"executor": "asynchronous"},
        pytest.param({"executor": "temporal_ensemble", "noise_seed": 3}, marks=pytest.mark.slow),
        pytest.param({"executor": "rtc", "execution_horizon_s": 0.2}, marks=pytest.mark.slow),
        pytest.param({"executor": "rtc_trained", "execution_horizon_s": 0.2}, marks=pytest.mark.slow),
        pytest.param({"executor": "synchronous"}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: settings["executor"],
)
def test_recorded_ticks_give_the_published_chunks_again(
    tmp_path: Path, demo: Bundle, settings: dict[str, object]
) -> None:
    published = record_run(tmp_path / "bag", demo, 4.0, LOOSE | settings)
    assert len(published) >= 5
    arguments = [*as_arguments(settings), "--ticks", "recorded", "--no-mcap"]
    metrics = replay(tmp_path / "bag", tmp_path / "out", demo, *arguments)
    parity = metrics["parity"]
    assert (parity["chunks"], parity["unmatched"], parity["not_reproduced"]) == (len(published), 0, {})
    assert parity["max_difference"] < 1e-5
    other = replay(tmp_path / "bag", tmp_path / "other", demo, *arguments, "--set", "noise_seed=9")
    assert other["parity"]["max_difference"] > 1e-3


def test_keys_and_values_that_the_node_reused_are_reused(tmp_path: Path) -> None:
    bundle = write_test_bundle(tmp_path / "bundle", state_token_policy())
    settings: dict[str, object] = {"prefill_period_s": 0.3}
    published = record_run(tmp_path / "bag", bundle, 4.0, LOOSE | settings)
    arguments = [*as_arguments(settings), "--ticks", "recorded", "--no-mcap", "--sensitivity-every", "0.4"]
    metrics = replay(tmp_path / "bag", tmp_path / "out", bundle, *arguments)
    # The probes in between overwrite the engine's keys and values.
    assert metrics["sensitivity"]["chunks"] >= 5
    assert metrics["parity"]["chunks"] == len(published) and metrics["parity"]["max_difference"] < 1e-7


def test_a_tick_whose_frame_is_not_in_the_bag_is_reported_and_not_made_up(tmp_path: Path, bundle: Bundle) -> None:
    record_run(tmp_path / "whole", bundle, 3.0, LOOSE)
    writer = RecordingWriter(tmp_path / "bag")
    with open_bag(tmp_path / "whole") as whole:
        for message in whole.messages():
            in_gap = START + 1_000 * MS < message.log_ns < START + 1_600 * MS
            if not (in_gap and message.topic == "/camera/wrist/image_raw"):
                copy(message, writer)
    writer.close()
    slow = replay(tmp_path / "bag", tmp_path / "slow", bundle, "--ticks", "recorded", "--no-mcap", "--latency", "0.15")
    assert slow["deadlines"]["missed"] >= slow["ticks"]["chunks"] - 1 > 0, "each chunk takes one period too long"
    metrics = replay(tmp_path / "bag", tmp_path / "out", bundle, "--ticks", "recorded", "--no-mcap")
    assert metrics["deadlines"]["missed"] == 0
    assert metrics["parity"]["not_reproduced"] and metrics["parity"]["unmatched"]
    assert metrics["parity"]["max_difference"] < 1e-5
    assert {why.partition(": the")[0] for why in metrics["parity"]["not_reproduced"]} == {"recorded: camera 'wrist'"}


@pytest.mark.slow
def test_two_runs_with_a_fixed_latency_are_the_same_to_the_byte(tmp_path: Path, demo: Bundle, inputs: Path) -> None:
    runs = []
    for _ in range(2):  # the second overwrites the first
        metrics = replay(inputs, tmp_path / "out", demo, "--latency", "0.02")
        assert metrics["complete"] and metrics["ticks"]["chunks"] > 50
        for of_this_run in ("realtime_factor", "timing"):  # of this machine, too: they may differ (docs/replay.md)
            metrics.pop(of_this_run)
        runs.append((metrics, read_bytes(tmp_path / "out" / "predicted")))
    assert runs[0] == runs[1]
    third = replay(inputs, tmp_path / "three", demo, "--latency", "0.02", "--set", "noise_seed=5")
    assert third["fingerprint"] != runs[0][0]["fingerprint"]
    assert read_bytes(tmp_path / "three" / "predicted") != runs[0][1]


def test_only_an_earlier_replays_files_are_overwritten(
    tmp_path: Path, bundle: Bundle, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replay(inputs, tmp_path / "out", bundle, "--latency", "0.5")
    again = tmp_path / "out" / "predicted"
    replay(again, tmp_path / "out", bundle, code=ExitCode.FAILED)
    assert "expected a folder without the bag" in capsys.readouterr().err and (again / "predicted.mcap").is_file()
    (again / "notes.txt").write_text("keep me")
    replay(inputs, tmp_path / "out", bundle, code=ExitCode.FAILED)
    assert (
        "expected only an earlier replay's files in" in capsys.readouterr().err
        and (again / "notes.txt").read_text() == "keep me"
    )


def read_bytes(folder: Path) -> bytes:
    return next(folder.glob("*.mcap")).read_bytes()


@pytest.mark.slow
def test_from_python_it_gives_the_same_figures_and_writes_nothing(tmp_path: Path, demo: Bundle, inputs: Path) -> None:
    told = replay(inputs, tmp_path / "command", demo, "--latency", "0.02", "--no-mcap")
    shares: list[float] = []
    with open_bag(inputs) as bag:
        setup = set_up(bag, str(demo.path), changes=LOOSE)
        result = run_replay(bag, setup, ReplayOptions(latency=parse_latency("0.02")), on_progress=shares.append)
    assert result.complete and result.metrics["fingerprint"] == told["fingerprint"]
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] == 1.0
    # At each message and at each tick, so that an interrupt acts within a tick.
    assert len(shares) == sum(result.metrics["bag"]["messages"].values()) + result.metrics["ticks"]["count"]

    def interrupt(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with open_bag(inputs) as bag:
        half = run_replay(bag, setup, ReplayOptions(latency=parse_latency("0.02")), tmp_path, on_progress=interrupt)
    assert not half.complete and half.metrics["stopped"] == "interrupted"
    assert 0 < half.metrics["ticks"]["chunks"] < told["ticks"]["chunks"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == half.metrics


def test_latency_is_that_of_the_given_machine(tmp_path: Path, bundle: Bundle, inputs: Path) -> None:
    quick, slow, late = (
        replay(inputs, tmp_path / text, bundle, "--latency", text, "--no-mcap") for text in ("0.001", "0.25", "0.6")
    )
    assert quick["deadlines"]["missed"] == 0 and quick["ticks"]["sent"] == quick["ticks"]["chunks"] > 70
    # A tick of 250 ms at 10 Hz: every third deadline is met.
    assert slow["ticks"]["chunks"] == pytest.approx(quick["ticks"]["chunks"] / 3, abs=2)
    assert slow["deadlines"]["missed"] == pytest.approx(2 * slow["ticks"]["chunks"], abs=3)
    assert slow["deadlines"]["latency_ms"]["p50"] == 250.0
    # Observation to command: what the tick takes, and how old the images were at its start.
    for metrics, latency_ms in ((quick, 1.0), (slow, 250.0)):
        age = metrics["inputs"]["observation_to_command_ms"]["p50"] - latency_ms
        assert 0.0 < age < 70.0
    # Over limits.max_chunk_age_s (0.4 s) nothing may go out, and it says why.
    assert late["ticks"]["sent"] == 0 and late["safety"]["refusals"] == {"chunk": late["ticks"]["chunks"]}
    assert late["safety"]["holds"] == {"chunk": late["ticks"]["held"]}


def test_errors_are_those_of_the_predicted_chunks(tmp_path: Path, bundle: Bundle, inputs: Path) -> None:
    """The errors are against the arm's path, which the test knows at every instant."""
    metrics = replay(inputs, tmp_path / "out", bundle, "--latency", "0.02")
    errors = []
    with open_bag(tmp_path / "out" / "predicted") as bag:
        for message in bag.messages(["/policy/replay/chunk"]):
            chunk = decode(message)
            start_ns = int(chunk.header.stamp.sec) * 10**9 + int(chunk.header.stamp.nanosec)
            due = [start_ns + (k + 1) * 50 * MS for k in range(len(chunk.points))]
            if due[-1] < START + 7_900 * MS:
                errors.append([point.positions - path_J(at) for point, at in zip(chunk.points, due, strict=True)])
    error_NHJ = np.array(errors)
    assert metrics["error"]["chunks"] >= len(error_NHJ) > 50
    found = metrics["error"]
    # The last chunks are compared in part: a little room.
    assert found["rms"] == pytest.approx(np.sqrt(np.mean(error_NHJ[..., :6] ** 2)), rel=0.02)
    assert found["rms_m"] == pytest.approx(np.sqrt(np.mean(error_NHJ[..., 6] ** 2)), rel=0.04)
    for k in (0, 7, 15):
        step = found["by_step"][k]
        assert step["rms"] == pytest.approx(np.sqrt(np.mean(error_NHJ[:, k, :6] ** 2)), rel=0.02)
        assert (step["step"], step["time_s"]) == (k + 1, pytest.approx((k + 1) * 0.05))
    elbow = found["by_joint"]["elbow"]
    assert elbow["bias"] == pytest.approx(error_NHJ[..., 2].mean(), rel=0.05, abs=1e-3)
    assert elbow["max"] == pytest.approx(np.abs(error_NHJ[..., 2]).max(), rel=0.05)
    assert found["rms_ci"][0] < found["rms"] < found["rms_ci"][1]


def test_a_missing_reference_is_reported(tmp_path: Path, bundle: Bundle, inputs: Path) -> None:
    metrics = replay(inputs, tmp_path / "out", bundle, "--latency", "0.02", "--reference", "command", "--no-mcap")
    assert "arm_controller/joint_trajectory" in metrics["error"]["missing"]
    assert metrics["error"]["rms"] is None and metrics["ticks"]["chunks"] > 50
    none = replay(
        inputs,
        tmp_path / "none",
        bundle,
        "--reference",
        "none",
        "--no-mcap",
        "--fail-if",
        "error.rms>9",
        code=ExitCode.FOUND,
    )
    assert "--reference none" in none["error"]["missing"]


def test_the_parameter_file_chooses_the_reference(tmp_path: Path, bundle: Bundle) -> None:
    published = record_run(tmp_path / "run", bundle, 3.0, LOOSE)
    writer = RecordingWriter(tmp_path / "bag")
    with open_bag(tmp_path / "run") as run:
        for message in run.messages(["/camera/scene/image_raw", "/camera/wrist/image_raw", "/joint_states"]):
            copy(message, writer)
    for chunk in published:
        writer.chunk(chunk.start_ns + 40 * MS, chunk, "/teleoperation/command")
    writer.close()
    params = tmp_path / "params.yaml"
    policy = {"bundle": str(bundle.path), "instruction": TASK}
    told = {"reference": "command", "reference_topic": "/teleoperation/command"}
    tables = {"/**/policy": policy, "/**/replay": told}
    params.write_text(json.dumps({name: {"ros__parameters": values} for name, values in tables.items()}))
    arguments = ["--params", str(params), "--latency", "0.03", "--no-mcap"]
    found = replay(tmp_path / "bag", tmp_path / "out", bundle, *arguments)["error"]
    assert found["reference"] == "command" and found["chunks"] > 15
    measured = replay(tmp_path / "bag", tmp_path / "other", bundle, *arguments, "--reference", "joint_states")["error"]
    assert measured["reference"] == "joint_states" and measured["rms"] != found["rms"]


def test_thresholds_give_an_exit_code(tmp_path: Path, bundle: Bundle, inputs: Path) -> None:
    arguments = ["--latency", "0.02", "--no-mcap"]
    metrics = replay(inputs, tmp_path / "out", bundle, *arguments, "--fail-if", "deadlines.missed>0")
    limit = metrics["error"]["rms"]
    replay(inputs, tmp_path / "out", bundle, *arguments, "--fail-if", f"error.rms>{limit * 0.9}", code=ExitCode.FOUND)
    replay(inputs, tmp_path / "out", bundle, *arguments, "--fail-if", f"error.rms>{limit * 1.1}")


@pytest.mark.slow
def test_what_if_probes_are_reported(tmp_path: Path, demo: Bundle, inputs: Path) -> None:
    arguments = ["--latency", "0.02", "--no-mcap", "--sensitivity-every", "0.5"]
    with_probes = replay(inputs, tmp_path / "with", demo, *arguments, "--instruction-other", "touch the blue ball")
    probes = with_probes["sensitivity"]["probes"]
    assert set(probes) == {"noise", "instruction", "camera.scene", "camera.wrist"}
    assert all(probe["rms"] > 0.0 for probe in probes.values()) and probes["noise"]["ratio"] == pytest.approx(1.0)
    same = replay(inputs, tmp_path / "same", demo, *arguments, "--instruction-other", TASK)
    assert same["sensitivity"]["probes"]["instruction"]["rms"] == 0.0
    without = replay(inputs, tmp_path / "without", demo, "--latency", "0.02", "--no-mcap", "--sensitivity-every", "0")
    assert without["sensitivity"]["probes"] == {} and without["error"] == with_probes["error"]


def test_a_broken_image_is_refused_and_the_one_before_is_used(tmp_path: Path, bundle: Bundle) -> None:
    writer = RecordingWriter(tmp_path / "bag")
    for number in range(300):
        now_ns = START + number * 10 * MS
        writer.joints(now_ns, now_ns, path_J(now_ns))
        if number % 5 == 0:
            for camera in CAMERAS:
                broken = camera == "wrist" and number % 10 == 0
                writer.jpeg(camera, now_ns, now_ns, picture(camera, number), broken)
    writer.close()
    metrics = replay(tmp_path / "bag", tmp_path / "out", bundle, "--latency", "0.02", "--instruction", TASK)
    assert metrics["safety"]["messages_refused"]["camera 'wrist'"] > 5
    assert metrics["ticks"]["sent"] > 20 and metrics["inputs"]["skew_ms"]["max"] == 0.0
    assert any("/camera/wrist/image_raw/compressed" in note for note in metrics["bag"]["notes"])


@pytest.mark.parametrize(
    ("leave_out", "arguments", "said"),
    [
        ("/camera/wrist/image_raw", [], "camera 'wrist': expected"),
        ("/joint_states", [], "joint states: expected"),
        ("/policy/instruction", [], "give one with --instruction"),
        ("", ["--set", "cameras.wrist.topic=/wrong"], "/wrong"),
        ("", ["--set", "rate_hz=fast"], "rate_hz"),
        ("", ["--set", "rate=5"], "parameter 'rate': no such parameter; did you mean 'rate_hz'?"),
        ("", ["--latency", "-1"], "--latency"),
        ("", ["--ticks", "recorded"], "expected recorded ticks, got none"),
        ("", ["--latency", "recorded"], "expected a bag with the node's ticks"),
        ("", ["--fail-if", "error.rsm>0.1"], "error.rsm"),
        ("", ["--instruction", "zyx"], "zyx"),
        ("", ["--sensitivity-every", "nan"], "--sensitivity-every: expected 0 s or more, got nan"),
        ("", ["--sensitivity-every", "-1"], "--sensitivity-every: expected 0 s or more, got -1"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(
    tmp_path: Path,
    bundle: Bundle,
    second: Path,
    capsys: pytest.CaptureFixture[str],
    leave_out: str,
    arguments: list[str],
    said: str,
) -> None:
    bag = tmp_path / "bag" if leave_out else second
    if leave_out:
        writer = RecordingWriter(bag)
        with open_bag(second) as whole:
            for message in whole.messages([topic for topic in whole.topics if topic != leave_out]):
                copy(message, writer)
        writer.close()
    given = [str(bag), "--bundle", str(bundle.path), "--out", str(tmp_path / "out"), *arguments]
    assert main(given) == ExitCode.FAILED
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("replay: ")]
    assert len(lines) == 1 and said in lines[0]
