"""How fast the runtime is on a CPU, compared with the obvious alternatives: tables for docs/results/cpu.md.

    python -m training.export.random_weights --size 100m --out out/random/100m --bundle out/random/100m-bundle
    python -m training.speed --checkpoint out/random/100m --bundle out/random/100m-bundle --threads 2

`python -m training.speed peers` is the comparison with openpi's and LeRobot's own code. The full-size model on an
NVIDIA card: `python -m training.speed.gpu`. Memory: `python -m training.speed.memory`.
Exit codes: 0 fine, 2 could not run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ki_vla_ros.console import ExitCode, run_command
from training.speed import peers
from training.speed.cpu import ROUNDS, SLOW_ROUNDS, compare, table


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["peers"]:
        return peers.main(given[1:])
    parser = argparse.ArgumentParser(
        prog="python -m training.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True, help="the checkpoint's export")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument(
        "--slow-rounds",
        type=int,
        default=SLOW_ROUNDS,
        help=f"for chunks with the prefix in every step; default {SLOW_ROUNDS}",
    )
    parser.add_argument("--processor-time", action="store_true", help="for a busy machine; with one thread only")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return run_command("speed", partial(_measure, parser.parse_args(given)))


def _measure(chosen: argparse.Namespace) -> int:
    figures = compare(
        chosen.checkpoint,
        chosen.bundle,
        chosen.threads,
        chosen.rounds,
        chosen.slow_rounds,
        lambda line: print(line, file=sys.stderr, flush=True),
        chosen.processor_time,
    )
    print(table(figures))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
