"""How a command ends: exit codes, messages and progress."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

import pytest

from ki_vla_ros.console import ExitCode, Progress, run_command
from ki_vla_ros.errors import BundleError


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize("code", ExitCode)
def test_a_command_returns_the_code_of_its_work(code: ExitCode) -> None:
    assert run_command("replay", lambda: code) == code


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BundleError("manifest.json is missing"), 2, "replay: manifest.json is missing\n"),
        (FileNotFoundError(2, "No such file", "a.yaml"), 2, "replay: [Errno 2] No such file: 'a.yaml'\n"),
        (KeyboardInterrupt(), 130, "replay: figures so far are kept\n"),
    ],
)
def test_an_error_that_stops_a_command_is_one_message(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    assert run_command("replay", raising(error), "figures so far are kept") == code
    assert capsys.readouterr().err == said


def test_a_bug_is_not_reported_as_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("doctor", raising(ZeroDivisionError("here"))) == ExitCode.FAILED
    said = capsys.readouterr().err
    assert said.startswith("doctor: Traceback") and "ZeroDivisionError: here" in said


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_updates_one_line_on_a_terminal_and_erases_it() -> None:
    terminal = Terminal()
    with Progress(terminal, renew_every_s=0.0) as progress:
        progress.show("1 of 3", 1 / 3)
        progress.show("2 of 3", 2 / 3)
        progress.keep("a third is done")
    shown = terminal.getvalue().split("\r\x1b[K")
    assert shown == [
        "",
        "[##########....................] 1 of 3",
        "[####################..........] 2 of 3",
        "a third is done\n",
    ]


def test_the_progress_line_is_erased_when_something_fails() -> None:
    terminal = Terminal()
    with pytest.raises(BundleError), Progress(terminal) as progress:
        progress.show("nearly there")
        progress.show("too soon to be shown")
        raise BundleError("no")
    assert terminal.getvalue() == "\r\x1b[Knearly there\r\x1b[K"


def test_without_a_terminal_progress_is_a_line_now_and_then() -> None:
    stream, said = StringIO(), list[str]()
    for every_s, expected in ((0.0, ["1 of 3", "2 of 3"]), (60.0, [])):
        with Progress(stream, said.append, line_every_s=every_s) as progress:
            progress.show("1 of 3", 1 / 3)
            progress.show("2 of 3")
        assert said == expected
        said.clear()
    progress.keep("done")
    assert stream.getvalue() == "done\n"
