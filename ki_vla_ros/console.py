"""What all commands have in common on a terminal: exit codes, and one message where something goes wrong."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from enum import IntEnum

from ki_vla_ros.errors import KiVlaError


class ExitCode(IntEnum):
    """What a command's exit code means; the same in every command (docs/commands.md)."""

    FINE = 0
    FOUND = 1  # it ran to its end and found what it looks for: the doctor an error, `--fail-if` a figure too high
    FAILED = 2  # it could not do its work: wrong arguments (argparse exits with 2 too), bad input, a missing file
    INTERRUPTED = 130  # 128 + SIGINT, as a shell counts


def run_command(name: str, work: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code that `work` returns; or FAILED or INTERRUPTED, with the reason on standard error.

    `interrupted` says what Ctrl-C leaves behind. A traceback is for faults of ours alone; left to Python, it would end
    with 1, which means that the command has found something.
    """
    try:
        return work()
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except (KiVlaError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
    except Exception:
        print(f"{name}: {traceback.format_exc()}", file=sys.stderr)
    return ExitCode.FAILED
