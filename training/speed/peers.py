"""One pi0.5 on our engines and on the peers' own code, in one run: tables for docs/results/peers.md.

    python -m training.speed peers --openpi PYTHON:CHECKOUT --lerobot PYTHON --processor-time

Same weights, same input, one chunk a call, all calls taking turns. Ours: the bundle on onnxruntime and on torch.
Theirs: openpi's `PI0Pytorch` of a CHECKOUT, and LeRobot's `PI05Policy`; each runs in a process of its own, by the
interpreter that is given, since the peers need other versions of transformers than we do (docs/results/peers.md says
how to make one). All run eager and compiled by torch.compile. Before anything is timed, all chunks are compared.

Without `--checkpoint` and `--bundle` the model is drawn: `--size 100m`, three views, seed 0.
Exit codes: 0 fine, 2 could not run, or the chunks differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from ki_vla_ros.bench import choose_clock, every_tenth, time_alternating
from ki_vla_ros.bundle import Bundle, load_bundle
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.engines.torch_engine import TorchEngine
from ki_vla_ros.errors import ConfigurationError, EngineError, did_you_mean
from ki_vla_ros.policy import Policy, longest_input
from ki_vla_ros.records import ModelInput
from ki_vla_ros.statistics import ratio_of_medians, spread
from training.export import export_bundle
from training.export.random_weights import PROMPT_LENGTH, SIZES, policy_spec, write_checkpoint
from training.model import VLA
from training.speed.cpu import AGREEMENT
from training.weights import load_checkpoint, their_name

WORKER = Path(__file__).with_name("peer_worker.py")
ROUNDS, WARM_UP, SEED = 30, 2, 0
REFERENCE, QUANTIZED = "onnxruntime", "ours, onnxruntime int8"
GOALS = {"eager": 3.0, "compiled": 2.0}
"""How many times as long as onnxruntime a peer is to take."""

Actions = NDArray[np.float32]


@dataclass(frozen=True)
class Peer:
    """Whose code it is, the interpreter that runs it, and where its source is if it is no package."""

    name: str
    python: str
    checkout: Path | None = None


class Worker:
    """A peer's process: `call` does one of its `ways`. ConfigurationError where the peer cannot do it."""

    def __init__(self, peer: Peer, folder: Path, threads: int) -> None:
        self.peer, self.processor_ns = peer, 0
        checkout = [] if peer.checkout is None else ["--checkout", str(peer.checkout)]
        command = [peer.python, str(WORKER), peer.name, str(folder), "--threads", str(threads), *checkout]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise ConfigurationError(f"{peer.name}: expected a Python, got {peer.python} ({error.strerror})") from None
        try:
            ready = self._answer()
        except ConfigurationError:
            self.close()
            raise
        self.ways: list[str] = ready["ways"]
        self.versions: dict[str, str] = ready["versions"]

    def call(self, way: str) -> Actions:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"way": way}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.processor_ns += round(answer["processor_ms"] * 1e6)
        return np.array(answer["values"], dtype=np.float32)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigurationError(f"{self.peer.name}: its process ended (exit code {self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise ConfigurationError(f"{self.peer.name}: {answer['failed']}")
        return answer


def describe_sizes(model: VLA, steps: int) -> dict[str, Any]:
    """What a worker builds its model by; the image encoder's by transformers' names."""
    config, vision = model.config, model.config.vision
    return {
        "vision": {
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "backbone": asdict(config.backbone),
        "expert": asdict(config.expert),
        "vocab_size": config.vocab_size,
        "action_dim": config.action_dim,
        "horizon": config.horizon,
        "steps": steps,
    }


def write_task(folder: Path, model: VLA, inputs: Mapping[str, NDArray[Any]], steps: int) -> None:
    """The folder that workers read: sizes, weights under openpi's names, and the input, a batch."""
    config = model.config
    if config.conditioning != "adarms" or config.state_dim is not None or config.vision.stem != "patch":
        raise ConfigurationError("peers: expected a checkpoint of pi0.5's form, got another, which no peer can load")
    (folder / "sizes.json").write_text(json.dumps(describe_sizes(model, steps)))
    weights = {their_name(name, config): tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    arrays: dict[str, Any] = dict(inputs)  # numpy's stub takes no mapping of arrays
    np.savez(folder / "inputs.npz", **arrays)


def our_ways(bundle: Bundle, int8: Path | None, threads: int) -> dict[str, Callable[[], Policy]]:
    """Ours by name, each opened when its turn comes."""
    quick = None if int8 is None else load_bundle(int8)
    return {
        REFERENCE: lambda: Policy(bundle, OnnxEngine(bundle, threads=threads)),
        **({} if quick is None else {QUANTIZED: lambda: Policy(quick, OnnxEngine(quick, threads=threads))}),
        "ours, torch eager": lambda: Policy(bundle, TorchEngine(bundle, threads=threads, mode="eager")),
        "ours, torch compiled": lambda: Policy(bundle, TorchEngine(bundle, threads=threads, mode="compile")),
    }


def compare(
    checkpoint: Path,
    bundle_path: Path,
    int8: Path | None,
    peers: Sequence[Peer],
    threads: int,
    rounds: int,
    say: Callable[[str], None],
    processor_time: bool = False,
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """All figures, in ms on the clock that `choose_clock` describes; a worker's processor time counts as ours."""
    own_ns = choose_clock(processor_time, threads)
    model = load_checkpoint(checkpoint).eval().requires_grad_(False)
    bundle = load_bundle(bundle_path)
    given = longest_input(bundle.manifest, bundle.manifest.graph.vocab_size)
    noise_HA = np.random.default_rng(SEED).standard_normal(
        (bundle.manifest.horizon, bundle.manifest.graph.action_dim), dtype=np.float32
    )
    calls: dict[str, Callable[[], Actions]] = {}
    failed: dict[str, str] = {}
    versions: dict[str, Any] = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    workers: list[Worker] = []
    with ExitStack() as held:
        for name, build in our_ways(bundle, int8, threads).items():
            try:
                policy = build()
            except EngineError as error:  # no program for torch in the bundle, no compiler here
                failed[name] = str(error)
                continue
            held.callback(policy.engine.close)
            calls[name] = partial(_chunk, policy, given, noise_HA)
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        inputs = {
            "images": given.images_VCHW,
            "image_mask": given.image_mask_V,
            "tokens": given.tokens_L,
            "token_mask": given.token_mask_L,
            "noise": noise_HA,
        }
        write_task(folder, model, {name: array[None] for name, array in inputs.items()}, bundle.manifest.flow.steps)
        weights = sum(parameter.numel() for parameter in model.parameters())
        del model
        for peer in peers:
            say(f"{peer.name}: loading")
            try:
                worker = Worker(peer, folder, threads)
            except ConfigurationError as error:
                failed[peer.name] = str(error)
                continue
            held.callback(worker.close)
            workers.append(worker)
            versions[peer.name] = worker.versions
            calls |= {f"{peer.name}, {way}": partial(worker.call, way) for way in worker.ways}
        leave_out(without, calls, failed)
        differences = agreement(calls, failed, say)

        def clock_ns() -> int:
            return own_ns() + (sum(worker.processor_ns for worker in workers) if processor_time else 0)

        taken_ms = time_alternating(calls, rounds, WARM_UP, every_tenth(rounds, say), clock_ns)
    return {
        "model": bundle.manifest.name,
        "weights": weights,
        "cameras": len(bundle.manifest.cameras),
        "prefix": bundle.manifest.graph.prefix_length,
        "horizon": bundle.manifest.horizon,
        "steps": bundle.manifest.flow.steps,
        "threads": threads,
        "clock": "processor" if processor_time else "wall",
        "rounds": rounds,
        "versions": versions,
        "differences": differences,
        "failed": failed,
        "ms": {name: spread(values) for name, values in taken_ms.items()},
        "ratios": {name: ratio_of_medians(taken_ms[name], taken_ms[REFERENCE]) for name in calls if name != REFERENCE},
    }


def leave_out(without: Sequence[str], calls: dict[str, Callable[[], Actions]], failed: dict[str, str]) -> None:
    """Move ways from `calls` to `failed`; ConfigurationError for one there is not, and for what all stand beside."""
    for name in without:
        if name == REFERENCE or name not in calls.keys() | failed.keys():
            raise ConfigurationError(
                f"--without: expected some of {', '.join(repr(each) for each in calls if each != REFERENCE)}, got "
                f"{name!r}{did_you_mean(name, calls)}"
            )
        if calls.pop(name, None) is not None:
            failed[name] = "left out, as --without said"


def _chunk(policy: Policy, given: ModelInput, noise_HA: Actions) -> Actions:
    return policy.denoise(policy.prefill(given), noise_HA, given.state_S)


def agreement(
    calls: dict[str, Callable[[], Actions]], failed: dict[str, str], say: Callable[[str], None]
) -> dict[str, float]:
    """The largest difference of each chunk from onnxruntime's; what cannot compute one moves from `calls` to `failed`.

    ConfigurationError if one is above AGREEMENT: they are not comparable. int8 is only near, by its export's own bound.
    """
    expected_HA, found = calls[REFERENCE](), {}
    for name in [name for name in calls if name != REFERENCE]:
        say(f"{name}: first chunk")  # which compiles
        try:
            found[name] = float(np.abs(calls[name]() - expected_HA).max())
        except (ConfigurationError, EngineError) as error:  # a worker's, our own engine's
            failed[name] = str(error)
            del calls[name]
    wrong = {name: found[name] for name in found if name != QUANTIZED and not found[name] <= AGREEMENT}
    if wrong:
        raise ConfigurationError(
            f"peers: expected the same chunk within {AGREEMENT:g}, got {wrong}; is the bundle an export of this "
            "checkpoint, and a peer of the version that docs/results/peers.md names?"
        )
    return found


def table(figures: Mapping[str, Any]) -> str:
    """The figures as a Markdown table; a row for what could not run says why."""
    lines = [
        f"| one chunk, {figures['clock']} time | p50, ms | p90 | times {REFERENCE} | 95 % interval | goal "
        "| largest difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in figures["ms"].items():
        start = f"| {name} | {row['p50']:.0f} | {row['p90']:.0f} |"
        if name == REFERENCE:
            lines.append(f"{start} 1 | | | |")
            continue
        ratio = figures["ratios"][name]
        goal = "" if name.startswith("ours") else goal_reached(name, ratio["ratio"])
        interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        lines.append(f"{start} {ratio['ratio']:.2f} | {interval} | {goal} | {figures['differences'][name]:.1e} |")
    lines += [f"| {name} | not measured: {why} | | | | | |" for name, why in figures["failed"].items()]
    return "\n".join(lines)


def goal_reached(name: str, ratio: float) -> str:
    goal = GOALS[name.rpartition(", ")[2]]
    return f"{goal:g}: {'reached' if ratio >= goal else 'missed'}"


@contextmanager
def drawn(size: str) -> Iterator[tuple[Path, Path, Path]]:
    """A checkpoint of random weights, its bundle and its int8 bundle, for the time of the comparison."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle, int8 = (Path(folder) / name for name in ("checkpoint", "bundle", "int8"))
        config = SIZES[size]()
        write_checkpoint(checkpoint, config, policy_spec(config, size, 3, PROMPT_LENGTH[size], SEED), SEED)
        export_bundle(checkpoint, bundle, "Random weights: **never for an arm**.", with_torch=True)
        export_bundle(checkpoint, int8, "Random weights: **never for an arm**.", dtype="int8")
        yield checkpoint, bundle, int8


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.speed peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--openpi", metavar="PYTHON:CHECKOUT", help="an interpreter with its packages, and its source")
    parser.add_argument("--lerobot", metavar="PYTHON", help="an interpreter that has lerobot")
    parser.add_argument("--checkpoint", type=Path, help="of pi0.5's form, with --bundle; default: one is drawn")
    parser.add_argument("--bundle", type=Path, help="the checkpoint's export with --torch")
    parser.add_argument("--int8", type=Path, metavar="BUNDLE", help="the same checkpoint's export with --dtype int8")
    parser.add_argument("--without", nargs="+", default=[], metavar="WAY", help="such as 'lerobot, compiled'")
    parser.add_argument("--size", choices=("100m", "pi05-slice", "pi05"), default="100m", help="of what is drawn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--processor-time", action="store_true", help="for a busy machine; with one thread only")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return run_command("speed peers", partial(_measure, parser.parse_args(arguments)))


def chosen_peers(openpi: str | None, lerobot: str | None) -> tuple[list[Peer], dict[str, str]]:
    """The peers that were given, and why the others are left out."""
    peers, left_out = [], {}
    if openpi is None:
        left_out["openpi"] = "left out: --openpi PYTHON:CHECKOUT was not given"
    else:
        python, _, checkout = openpi.partition(":")
        if not (Path(checkout) / "src" / "openpi" / "models_pytorch").is_dir() or not checkout:
            raise ConfigurationError(
                f"--openpi: expected PYTHON:CHECKOUT, with openpi's source at CHECKOUT, got {openpi}; "
                "docs/results/peers.md says how to make both"
            )
        peers.append(Peer("openpi", python, Path(checkout)))
    if lerobot is None:
        left_out["lerobot"] = "left out: --lerobot PYTHON was not given"
    else:
        peers.append(Peer("lerobot", lerobot))
    return peers, left_out


def _measure(chosen: argparse.Namespace) -> int:
    if (chosen.checkpoint is None) != (chosen.bundle is None):
        raise ConfigurationError("--checkpoint and --bundle: expected both or neither, got one of them")
    if chosen.int8 is not None and chosen.checkpoint is None:
        raise ConfigurationError("--int8: expected it only with --checkpoint, of which it is an export")
    peers, left_out = chosen_peers(chosen.openpi, chosen.lerobot)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with ExitStack() as held:
        if chosen.checkpoint is None:
            say(f"drawing and exporting {chosen.size}")
            chosen.checkpoint, chosen.bundle, chosen.int8 = held.enter_context(drawn(chosen.size))
        figures = compare(
            chosen.checkpoint,
            chosen.bundle,
            chosen.int8,
            peers,
            chosen.threads,
            chosen.rounds,
            say,
            chosen.processor_time,
            chosen.without,
        )
    figures["failed"] = left_out | figures["failed"]
    print(table(figures))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
