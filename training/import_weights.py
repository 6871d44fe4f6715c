"""From downloaded weights to a checkpoint, which `training.export` makes into a bundle or training starts from.

    python -m training.import_weights --from pi05_base --as pi05 --tokenizer paligemma_tokenizer.model \
        --stats norm_stats.json --robot my_arm.yaml --out out/pi05

`--robot` is a robot file (config/robots/imported_arm.yaml is an example): none of the downloaded files has cameras,
joints and their limits. `--as paligemma` takes neither statistics nor robot: its expert is untrained, so no policy is
described, and nothing can be exported for a robot before training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

from ki_vla_ros.bundle import TOKENIZER, ImageSpec, PolicySpec, Provenance
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot import Robot, find_robot, read_robot
from training.model import VLAConfig, paligemma_3b
from training.policy import ENCODINGS, PROMPTS, commit, describe_policy
from training.tokens import read_tokenizer
from training.weights import (
    CONFIG,
    FIELDS,
    POLICY,
    WEIGHTS,
    Kind,
    Method,
    check_published,
    find_weights,
    import_weights,
    read_ranges,
    read_sizes,
    save_checkpoint,
    sizes_beside,
    to_robot,
)

METHODS: dict[str, Method] = {"pi0": "mean_std", "pi05": "quantiles"}


def describe_import(
    kind: Kind, config: VLAConfig, robot: Robot, stats: Path, method: Method, flow_steps: int, in_prompt: bool = True
) -> PolicySpec:
    """The policy for the manifest: prompt and state as the kind has them, normalisation from `stats`."""
    wide = max(len(robot.state), len(robot.actions))
    if wide > config.action_dim:
        raise ConfigurationError(f"robot: expected at most {config.action_dim} dimensions, got {wide}")
    ranges = to_robot(read_ranges(stats, method, len(robot.state), len(robot.actions)), robot)
    form = kind if kind == "pi0" or in_prompt else f"{kind} without state"
    return describe_policy(
        robot,
        name=robot.name,
        image=ImageSpec(size=config.vision.image_size),
        prompt=PROMPTS[form],
        state={"encoding": ENCODINGS[form], **ranges.state._asdict()},
        action=ranges.action._asdict(),
        flow={"steps": flow_steps},
        pad_to=config.action_dim if min(len(robot.state), len(robot.actions)) < config.action_dim else None,
        provenance=Provenance(
            recipe=f"{kind} weights, imported",
            seed=0,
            commit=commit(),
            data_fingerprint=f"statistics {stats.name}, {method}",
        ),
    )


def import_checkpoint(
    kind: Kind,
    source: Path,
    tokenizer_file: Path,
    out: Path,
    *,
    config: VLAConfig,
    policy: PolicySpec | None,
    action_ids: int = 0,
    lora: Path | None = None,
) -> None:
    """Write the checkpoint; weights keep their types. The configuration's tokens include `action_ids`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(f"{out}: expected an empty place for the checkpoint, got something; name another")
    vocabulary = config.vocab_size - action_ids
    tokenizer = read_tokenizer(tokenizer_file, action_ids, vocabulary)
    model = import_weights(config, source, kind, dtype=None, vocabulary=vocabulary, lora=lora)
    save_checkpoint(out, model, tokenizer=tokenizer, policy=policy)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.import_weights", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--from", dest="source", type=Path, required=True, help="folder or file with safetensors")
    add("--as", dest="kind", choices=get_args(Kind), required=True, help="what the weights are")
    add("--tokenizer", type=Path, required=True, help="paligemma_tokenizer.model or tokenizer.json")
    add("--stats", type=Path, help="norm_stats.json (openpi), stats.json or the normalizer's .safetensors (LeRobot)")
    add("--normalization", choices=list(FIELDS), help="default: quantiles for pi05, mean_std for pi0")
    add("--robot", help="robot file, or the name of one in config/robots/; copy imported_arm.yaml there")
    add("--lora", type=Path, help="folder of a LoRA adapter (peft) of these weights, to merge into them")
    add("--config", type=Path, help="the model's sizes, as in a checkpoint's config.json; default: the published ones")
    add("--state", choices=("prompt", "none"), help="where pi05 sees the state; none: openpi's pi05_libero")
    add("--flow-steps", type=int, default=10, help="Euler steps of the flow that the weights were evaluated with")
    add("--action-ids", type=int, default=0, help="action tokens after the vocabulary, for training with FAST")
    add("--out", type=Path, required=True, help="folder of the checkpoint")
    return run_command("import_weights", partial(_import, parser.parse_args(arguments)))


def choose_config(chosen: argparse.Namespace) -> VLAConfig:
    """The sizes of --config, else those that config.json beside the weights names, else those of pi0 and pi0.5."""
    beside = sizes_beside(chosen.source)
    if chosen.config is not None:
        sizes = read_sizes(chosen.config)
        return replace(sizes, vocab_size=sizes.vocab_size + chosen.action_ids)
    return paligemma_3b("pi0" if chosen.kind == "pi0" else "pi05", chosen.action_ids, **beside)


def _import(chosen: argparse.Namespace) -> int:
    find_weights(chosen.source)  # checked first: without the download, no other fault is worth correcting
    given = [name for name in ("stats", "robot") if getattr(chosen, name) is not None]
    config, policy = choose_config(chosen), None
    if chosen.state is not None and chosen.kind != "pi05":
        raise ConfigurationError(f"--state: expected it with --as pi05 only, got --as {chosen.kind}")
    if chosen.kind == "paligemma":
        if given:
            raise ConfigurationError(
                f"--{given[0]}: expected none with --as paligemma: its expert is untrained and cannot move a robot"
            )
    elif len(given) < 2:
        raise ConfigurationError(f"--stats and --robot: expected both with --as {chosen.kind}, got {given or 'none'}")
    else:
        robot = read_robot(find_robot(chosen.robot))
        config = replace(config, horizon=robot.horizon)
        method = chosen.normalization or METHODS[chosen.kind]
        in_prompt = None if chosen.state is None else chosen.state == "prompt"
        check_published(chosen.lora or chosen.source, chosen.kind, config, robot, chosen.stats, method, in_prompt)
        policy = describe_import(
            chosen.kind, config, robot, chosen.stats, method, chosen.flow_steps, in_prompt is not False
        )
    import_checkpoint(
        chosen.kind,
        chosen.source,
        chosen.tokenizer,
        chosen.out,
        config=config,
        policy=policy,
        action_ids=chosen.action_ids,
        lora=chosen.lora,
    )
    size = (chosen.out / WEIGHTS).stat().st_size / 1e9
    print(f"{chosen.out}: {size:.2f} GB of weights, {CONFIG}, {TOKENIZER}" + (f", {POLICY}" if policy else ""))
    if policy:
        print(f"next: python -m training.export --checkpoint {chosen.out} --out BUNDLE")
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
