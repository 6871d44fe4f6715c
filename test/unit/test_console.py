"""How a command ends: exit codes, and what it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.errors import BundleError


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize("code", ExitCode)
def test_a_command_ends_with_the_code_of_its_work(code: ExitCode) -> None:
    assert run_command("replay", lambda: code) == code


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BundleError("manifest.json is missing"), 2, "replay: manifest.json is missing\n"),
        (FileNotFoundError(2, "No such file", "a.yaml"), 2, "replay: [Errno 2] No such file: 'a.yaml'\n"),
        (KeyboardInterrupt(), 130, "replay: figures so far are kept\n"),
    ],
)
def test_what_stops_a_command_is_one_message(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    assert run_command("replay", raising(error), "figures so far are kept") == code
    assert capsys.readouterr().err == said


def test_a_fault_of_ours_is_not_taken_for_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("doctor", raising(ZeroDivisionError("here"))) == ExitCode.FAILED
    said = capsys.readouterr().err
    assert said.startswith("doctor: Traceback") and "ZeroDivisionError: here" in said
