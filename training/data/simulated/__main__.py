"""Make the demo's data with the simulator; training does the same if they are missing.

python -m training.data.simulated config/training/demo.yaml
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.robot import find_robot, read_robot
from training.config import load_config
from training.data.batch import ChunkTiming
from training.data.simulated.generate import check_robot, make_data


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.simulated",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path)
    return run_command("simulated", partial(_generate, parser.parse_args(arguments).config))


def _generate(path: Path) -> int:
    config = load_config(path)
    robot = read_robot(find_robot(config.robot))
    check_robot(robot)
    print(json.dumps(make_data(config.data, ChunkTiming.of(config.model.vision, robot)), indent=1))
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
