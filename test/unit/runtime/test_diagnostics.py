"""What /diagnostics says."""

from __future__ import annotations

from support.bundles import TASK
from support.loop_rig import Rig

from ki_vla_ros.runtime.diagnostics import Diagnostics, Level
from ki_vla_ros.runtime.observation import InputStatus


def test_diagnostics_report(rig: Rig) -> None:
    diagnostics = Diagnostics()
    assert diagnostics.report("inactive", "", 0.0).level is Level.OK
    for n in range(41):
        diagnostics.record_chunk({"prefill": 2.0, "denoise": 1.0 + (n == 40)}, ("clamped elbow",), 10.0 + 0.1 * n)
        diagnostics.record_tick(None, TASK, 0)
    diagnostics.record_refusal("instruction: too long")
    report = diagnostics.report("active", "an engine", 14.0)
    assert report.level is Level.OK and report.summary == "10.0 chunks per second"
    assert report.values["chunk_rate_hz"] == "10.00"
    assert (report.values["total_ms_p50"], report.values["denoise_ms_p99"]) == ("3.00", "1.60")
    assert report.values["corrected clamped"] == "41" and report.values["refused instruction"] == "1"
    diagnostics.record_tick("camera 'scene': newest frame 300 ms old", TASK, 7)
    diagnostics.record_tick("camera 'scene': newest frame 400 ms old", TASK, 8)
    report = diagnostics.report("active", "an engine", 14.0)
    assert report.level is Level.WARNING and report.summary.startswith("holding: camera 'scene'")
    assert report.values["refused camera 'scene'"] == "2" and report.values["deadline_misses"] == "8"


def test_inputs_skew_and_prefills_are_reported() -> None:
    diagnostics = Diagnostics()
    for n in range(41):
        stages = {"prefill": 2.0} if n % 2 == 0 else {"denoise": 1.0}
        diagnostics.record_chunk(stages, (), 10.0 + 0.1 * n, age_ms=30.0, skew_ms=7.0, delay=2)
    first = {"scene": InputStatus(100, 12_000_000), "joint state": InputStatus(0, None)}
    values = diagnostics.report("active", "an engine", 14.0, first).values
    assert values["prefill_rate_hz"] == "5.00" and values["chunk_delay_actions"] == "2"
    assert values["skew_ms_p99"] == "7.00" and values["observation_to_command_ms_p50"] == "30.00"
    assert (values["scene messages"], values["scene age_ms"], values["joint state age_ms"]) == ("100", "12.0", "")
    second = {"scene": InputStatus(160, 12_000_000), "joint state": InputStatus(400, 0)}
    values = diagnostics.report("active", "an engine", 16.0, second).values
    assert (values["scene rate_hz"], values["joint state rate_hz"]) == ("30.0", "200.0")


def test_faults_around_the_node_are_reported_whatever_it_does() -> None:
    diagnostics = Diagnostics()
    faults = {"/a: also commanded by /b": Level.ERROR, "/c: two": Level.WARNING}
    report = diagnostics.report("active", "an engine", 1.0, faults=faults)
    assert (report.level, report.summary) == (
        Level.ERROR,
        "/a: also commanded by /b; /c: two; 0.0 chunks per second",
    )
    report = diagnostics.report("inactive", "an engine", 1.0, faults={"/c: two": Level.WARNING})
    assert (report.level, report.summary) == (Level.WARNING, "/c: two; inactive")
    diagnostics.record_tick("camera: old", TASK, 0)
    assert diagnostics.report("active", "an engine", 1.0, faults=faults).summary.endswith("holding: camera: old")
