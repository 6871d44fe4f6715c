"""Check data sets before training: every sample is read, and each that is broken is named with its file and line.

    python -m training.data check config/training/NAME.yaml
    python -m training.data check captions.jsonl talks.json shards/ recordings/ --robot aloha

The exit code is 1 if anything is broken, and 2 if a data set cannot be opened.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ki_vla_ros.console import ExitCode, Progress, run_command
from ki_vla_ros.errors import MOST_FINDINGS, KiVlaError, printable
from training.check import check, find_data
from training.data.samples import Check


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="read every sample, and name those that are broken")
    check.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a training configuration, or data itself")
    check.add_argument("--robot", help="the robot file, or its name in config/robots/, of LeRobot datasets")
    check.add_argument("--all", action="store_true", help=f"name all that is broken, not {MOST_FINDINGS} of each")
    return run_command("data", partial(_check, parser.parse_args(arguments)))


def _check(given: argparse.Namespace) -> int:
    code = ExitCode.FINE
    with Progress() as progress:
        for path in given.paths:
            for name, opened in find_data(path, given.robot):  # a configuration that is wrong ends the command
                try:
                    found = check(opened(), progress.show)
                except (KiVlaError, OSError) as error:
                    progress.clear()
                    print(printable(f"{name}: {error}"), file=sys.stderr)
                    code = ExitCode.FAILED
                    continue
                progress.clear()
                print_check(found, None if given.all else MOST_FINDINGS)
                if found.broken:
                    code = max(code, ExitCode.FOUND)
    return code


def print_check(check: Check, most: int | None) -> None:
    counts = ", ".join(f"{count} {what}" for what, count in {"samples": check.samples, **check.counts}.items())
    print(printable(f"{check.name}: {counts}; {len(check.broken) or 'nothing'} broken"))
    for note in check.notes:
        print(printable(f"    {note}"))
    for line in check.broken[:most]:
        print(printable(f"  {line}"))
    if most is not None and len(check.broken) > most:
        print(f"  and {len(check.broken) - most} more (--all)")


if __name__ == "__main__":
    sys.exit(main())
