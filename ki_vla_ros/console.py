"""What all commands share on a terminal: exit codes, one message when something goes wrong, progress."""

from __future__ import annotations

import io
import math
import sys
import time
import traceback
from collections.abc import Callable
from enum import IntEnum
from typing import Final, TextIO

from ki_vla_ros.errors import LONGEST_TEXT, KiVlaError, cannot_write, printable, shorten

BAR: Final = 30
START_OF_LINE: Final = "\r\x1b[K"  # and erase the line


class ExitCode(IntEnum):
    """What a command's exit code means; the same in every command (docs/commands.md)."""

    FINE = 0
    FOUND = 1  # ran to its end and found what it looks for: the doctor an error, `--fail-if` too high a figure
    FAILED = 2  # could not do its work: wrong arguments (argparse exits with 2 too), bad input, a missing file
    INTERRUPTED = 130  # 128 + SIGINT, as a shell counts


def run_command(name: str, work: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code that `work` returns, or FAILED or INTERRUPTED with the reason on standard error.

    `interrupted` says what Ctrl-C leaves behind. Only our own faults print a traceback. They are caught here because
    Python would exit with 1, which means that the command found something.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may be no text
            stream.reconfigure(errors="backslashreplace")
    code = _run(name, work, interrupted)
    try:
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = io.StringIO()  # Python tries again at exit, and would end with 120
        if code != ExitCode.FAILED:
            print(f"{name}: {cannot_write('standard output', error)}", file=sys.stderr)
        return ExitCode.FAILED
    return code


def _run(name: str, work: Callable[[], int], interrupted: str) -> int:
    try:
        return work()
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except (KiVlaError, OSError) as error:
        print(shorten(printable(f"{name}: {error}"), LONGEST_TEXT), file=sys.stderr)
    except Exception:
        print(printable(f"{name}: {traceback.format_exc()}"), file=sys.stderr)
    return ExitCode.FAILED


def check_pydantic() -> None:
    """SystemExit with one line if pydantic is version 1, as apt installs it on Ubuntu 22.04 and 24.04."""
    try:
        from pydantic import VERSION
    except ImportError:  # the command that needs it says so
        return
    if VERSION.startswith("1."):
        remedy = "python3 -m pip install 'pydantic>=2' (docs/install.md)"
        print(f"ki_vla_ros: expected pydantic 2 or newer, got {VERSION}; {remedy}", file=sys.stderr)
        raise SystemExit(ExitCode.FAILED)


class Progress:
    """How far the work is: on a terminal one line that updates itself, elsewhere a line now and then.

    Use as a context manager: on leaving it the line is erased, so the next output starts on an empty line.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        say: Callable[[str], object] | None = None,
        renew_every_s: float = 0.2,
        line_every_s: float = 10.0,
    ) -> None:
        """`stream` (default: standard error) decides whether this is a terminal.

        Elsewhere `say` (default: print to the stream) gets the lines, the first after `line_every_s`, so that
        quick work prints nothing.
        """
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._say = say or self._print
        self._every_s = renew_every_s if self._live else line_every_s
        self._shown_s = -math.inf if self._live else time.monotonic()
        self._open = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, text: str, share: float | None = None) -> None:
        """Cheap enough to call for each message; `share`, 0 to 1 of the whole, becomes a bar on a terminal."""
        now_s = time.monotonic()
        if now_s - self._shown_s < self._every_s:
            return
        self._shown_s = now_s
        if not self._live:
            self._say(text)
            return
        filled = 0 if share is None else round(BAR * min(max(share, 0.0), 1.0))
        bar = "" if share is None else f"[{'#' * filled}{'.' * (BAR - filled)}] "
        self._stream.write(f"{START_OF_LINE}{bar}{text}")
        self._stream.flush()
        self._open = True

    def keep(self, text: str) -> None:
        """Print a line that stays, above the one that updates itself."""
        self.clear()
        self._print(text)

    def clear(self) -> None:
        if self._open:
            self._stream.write(START_OF_LINE)
            self._stream.flush()
            self._open = False

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
