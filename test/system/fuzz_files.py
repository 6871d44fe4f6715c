"""Damages files of every kind that we read, and counts what the readers do: none may fail, hang or fill the memory.

    PYTHONPATH=test python -m system.fuzz_files --cases 100000
    PYTHONPATH=test python -m system.fuzz_files --kind onnx --first 1234 --cases 1    # one case again

A case is a number: it gives the kind and the damage (test/support/damage.py, damaged_files.py), with `--seed` for other
ones. The cases run in a process of their own, with 1 GiB of memory above what it has at first; a case that takes 10 s
of processor time, hangs (60 s), or ends the process is counted, and the next case gets a new process. A reader may read
the file or refuse it with a KiVlaError of printable text; anything else is a fault. Exit code 1 if there was one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from support.damaged_files import Kind, make_kinds

from ki_vla_ros.console import ExitCode
from ki_vla_ros.errors import KiVlaError

MEMORY_BYTES, LONGEST_S, HANGS_S = 1 << 30, 10.0, 60.0


def run_case(kinds: dict[str, Kind], number: int, seed: int, folder: Path) -> dict[str, Any]:
    """What one case does; `folder` keeps a copy of the files that belong to each kind."""
    name = list(kinds)[number % len(kinds)]
    kind = kinds[name]
    place = folder / name.replace(" ", "_")
    if not place.exists():
        shutil.copytree(kind.folder, place)
    (place / kind.file).write_bytes(kind.damaged(random.Random(f"{seed} {number}")))
    began_s, result = time.process_time(), "read"
    try:
        kind.read(place)
    except KiVlaError as error:
        text = str(error)
        readable = all(line.isprintable() for line in text.split("\n")) and len(text) < 4000
        result = "refused" if readable else f"text: {type(error).__name__} {text[:300]!r}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = "memory" if isinstance(error, MemoryError) else "traceback"
        result = f"{what}: {type(error).__name__} at {where.filename}:{where.lineno}: {str(error)[:200]!r}"
    took_s = time.process_time() - began_s
    if took_s > LONGEST_S:
        result = f"time: {took_s:.0f} s"
    for extra in set(place.rglob("*")) - {place / path.relative_to(kind.folder) for path in kind.folder.rglob("*")}:
        extra.unlink(missing_ok=True)
    if name == "tokenizer":
        shutil.copy(kind.folder / "manifest.json", place)
    return {"kind": name, "result": result, "s": round(took_s, 3)}


def work(kinds: dict[str, Kind], numbers: range, seed: int, pipe: int) -> None:
    """The child: runs cases and writes a line about each."""
    base = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (base + MEMORY_BYTES, base + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)  # decoders and Rust say there what they think of the files
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            line = json.dumps({"number": number, **run_case(kinds, number, seed, Path(folder))}) + "\n"
            os.write(pipe, line.encode())


def run(kinds: dict[str, Kind], numbers: range, seed: int) -> list[dict[str, Any]]:
    """All cases, in as many children as it takes."""
    found: list[dict[str, Any]] = []
    names = list(kinds)
    at, shown_s = numbers.start, time.monotonic()
    while at < numbers.stop:
        source, sink = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(source)
            try:
                work(kinds, range(at, numbers.stop, numbers.step), seed, sink)
            finally:
                os._exit(0)
        os.close(sink)
        text, late = b"", False
        while at < numbers.stop:
            ready, _, _ = select.select([source], [], [], HANGS_S)
            block = os.read(source, 1 << 16) if ready else b""
            if not block:
                late = not ready
                break
            text += block
            *lines, text = text.split(b"\n")
            for line in lines:
                found.append(json.loads(line))
                if not found[-1]["result"].startswith(("read", "refused")):
                    print(json.dumps(found[-1]), flush=True)
                at = found[-1]["number"] + numbers.step
            if time.monotonic() - shown_s > 60.0:
                shown_s = time.monotonic()
                print(f"{at} of {numbers.stop}", file=sys.stderr, flush=True)
        if at < numbers.stop:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(source)
        if at < numbers.stop:
            how = "time: hangs" if late else f"crash: status {status}"
            found.append({"number": at, "kind": names[at % len(names)], "result": how, "s": HANGS_S})
            print(json.dumps(found[-1]), flush=True)
            at += numbers.step
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="only this one; the first case is then the first of this kind from --first on")
    given = parser.parse_args()
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        kinds = make_kinds(Path(folder).resolve())
        first, step = given.first, 1
        if given.kind is not None:
            step = len(kinds)
            first += (list(kinds).index(given.kind) - first) % step
        made_s = time.monotonic() - began_s
        found = run(kinds, range(first, first + given.cases * step, step), given.seed)
    table: defaultdict[str, Counter[str]] = defaultdict(Counter)
    slowest: dict[str, float] = {}
    for case in found:
        table[case["kind"]][case["result"].partition(":")[0]] += 1
        slowest[case["kind"]] = max(slowest.get(case["kind"], 0.0), case["s"])
    faults = sum(not case["result"].startswith(("read", "refused")) for case in found)
    print("| kind | cases | read | refused | traceback | text | memory | time | crash | processor s at most |")
    print("|---|" + "---|" * 9)
    for name, counts in table.items():
        columns = ("read", "refused", "traceback", "text", "memory", "time", "crash")
        cells = [counts.total(), *(counts[column] for column in columns), slowest[name]]
        print(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    print(f"{len(found)} cases in {time.monotonic() - began_s - made_s:.0f} s (and {made_s:.0f} s), {faults} faults")
    return ExitCode.FOUND if faults else ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
