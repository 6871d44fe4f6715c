"""Kills a conversion again and again: `python support/killed_conversions.py FOLDER STRIDE`.

Children convert the same bags into the same dataset and are killed at their n-th operation on files, n = 1, 1 + STRIDE,
..., each going on where the one before was killed, until one comes through. Prints how many kills there were, what was
to be seen after them, and whether the dataset is in the end that of a conversion that nobody killed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from ki_vla_ros.records import NS_PER_S
from support.kills import die_at, fork
from support.sample_bags import START_NS, recording, write_bag
from training.convert.__main__ import main as convert_main


def digest(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def convert(bags: list[Path], out: Path, operation: int | None) -> bool:
    """Whether it was killed."""

    def work() -> None:
        if operation is not None:
            die_at(operation)
        given = ["from-bag", *map(str, bags), "--bundle", "demo", "--actions", "states", "--out", str(out)]
        with redirect_stdout(StringIO()):
            code = convert_main(given)
        assert code == 0 or out.exists(), code  # killed when all was done: there it is

    return fork(work)


def main() -> None:
    folder, stride = Path(sys.argv[1]), int(sys.argv[2])
    bags = [
        write_bag(folder / name, recording(0.4, START_NS + k * 100 * NS_PER_S, "compressed"))
        for k, name in enumerate(("one", "two"))
    ]
    convert(bags, folder / "whole", None)
    wanted, out, operation, seen = digest(folder / "whole"), folder / "killed", 1, set()
    while convert(bags, out, operation):
        seen.add("nothing" if not out.exists() else "whole" if digest(out) == wanted else "something else")
        operation += stride
    figures = {"kills": (operation - 1) // stride, "seen": sorted(seen), "same": digest(out) == wanted}
    print(json.dumps(figures | {"left": sorted(path.name for path in folder.iterdir())}))


if __name__ == "__main__":
    main()
