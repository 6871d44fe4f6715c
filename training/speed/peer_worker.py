"""One peer in a process of its own: it computes chunks when it is told to, and answers how long each took.

    PYTHON peer_worker.py openpi FOLDER --checkout CHECKOUT
    PYTHON peer_worker.py lerobot FOLDER

`training.speed.peers` starts it with the peer's own interpreter, because the peers need versions of transformers that
exclude each other and ours. So this file imports nothing of this project. FOLDER holds what it is given: `sizes.json`,
`weights.safetensors` in openpi's naming, and a batch, `inputs.npz`: with noise alone it is for a chunk, with actions
and flow times, too, for a training step's gradients.

It speaks JSON, a line a message. First it says which ways it knows: {"ways": [...], "versions": {...}}. Then, for each
line {"way": NAME}, it does so, and answers {"ms": wall time, "processor_ms": processor time, "values": [...]}: a chunk
[H][A], or a step's loss and the norm of its gradients [2]. Instead of any answer it may say {"failed": why}.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

SIGLIP = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
VIEWS = "base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"

Sizes = dict[str, Any]
Tensors = dict[str, Tensor]
Ways = dict[str, Callable[[], Tensor]]


def variant(sizes: Sizes, part: str) -> Any:
    """What both peers look up by a name like "gemma_2b": the sizes of the backbone or of the expert."""
    ours = sizes[part]
    names = {"width": "width", "depth": "depth", "mlp_dim": "mlp"}
    names |= {"num_heads": "heads", "num_kv_heads": "kv_heads", "head_dim": "head_dim"}
    return types.SimpleNamespace(lora_configs={}, **{theirs: ours[name] for theirs, name in names.items()})


def resize(module: Any, sizes: Sizes) -> None:
    """Let a peer's module build models of our sizes, where it has those of SigLIP and of the vocabulary in its code."""
    whole, expert = module.PaliGemmaForConditionalGeneration, module.GemmaForCausalLM

    def build_whole(config: Any) -> Any:
        for name in SIGLIP:
            setattr(config.vision_config, name, sizes["vision"][name])
        config.vision_config.projection_dim = config.projection_dim = sizes["backbone"]["width"]
        config.text_config.vocab_size = config._vocab_size = config.vocab_size = sizes["vocab_size"]
        config.text_config.pad_token_id = 0
        return whole(config=config)

    def build_expert(config: Any) -> Any:
        config.vocab_size, config.pad_token_id = sizes["vocab_size"], 0  # of a table and a head that nothing reads
        return expert(config=config)

    module.PaliGemmaForConditionalGeneration, module.GemmaForCausalLM = build_whole, build_expert


def load(model: nn.Module, weights: Tensors, learns: bool) -> nn.Module:
    """Every weight, once; of the model's own only the heads that speak words may be left."""
    missing, unknown = model.load_state_dict(weights, strict=False)
    left = [name for name in missing if "lm_head" not in name and "embed_tokens" not in name]
    if left or unknown:
        raise ValueError(f"expected the peer to have our weights' names, got {left} missing and {unknown} unknown")
    return model.eval().requires_grad_(learns)


def step_ways(model: nn.Module, errors: Callable[[], Tensor]) -> Ways:
    """A training step's gradients, of the mean of a peer's squared errors [B, H, A]: the loss, and the gradients' norm.

    As its trainer has them, and without checkpointing, which openpi's code demands of whatever is in training.
    """

    def step(training: bool) -> Tensor:
        model.train(training).zero_grad(set_to_none=True)
        loss = errors().mean()
        loss.backward()
        norms = torch._foreach_norm([weight.grad for weight in model.parameters() if weight.grad is not None])
        return torch.stack([loss.detach(), torch.stack(norms).norm()])

    return {"its trainer's": partial(step, True), "without checkpointing": partial(step, False)}


def stand_in(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
    return module


def openpi(sizes: Sizes, weights: Tensors, inputs: Tensors, checkout: Path) -> Ways:
    """openpi's PI0Pytorch. JAX is not needed: of its modules that import it, two stand-ins have what is used here."""
    sys.path.insert(0, str(checkout / "src"))
    stand_in("openpi.models", gemma=stand_in("openpi.models.gemma", get_config=partial(variant, sizes)))
    image_tools = stand_in("openpi.shared.image_tools")  # only to resize images of other sizes
    stand_in("openpi.shared", image_tools=image_tools)
    from openpi.models_pytorch import gemma_pytorch, pi0_pytorch

    resize(gemma_pytorch, sizes)
    config = types.SimpleNamespace(
        pi05=True,
        dtype="float32",
        paligemma_variant="backbone",
        action_expert_variant="expert",
        action_dim=sizes["action_dim"],
        action_horizon=sizes["horizon"],
        pytorch_compile_mode=None,  # openpi's own compiles the same method
    )
    model: Any = load(pi0_pytorch.PI0Pytorch(config), weights, "actions" in inputs)
    views, side = VIEWS[: inputs["images"].shape[1]], sizes["vision"]["image_size"]
    prepare = pi0_pytorch._preprocessing.preprocess_observation_pytorch

    def prepare_plainly(observation: Any, *, train: bool) -> Any:
        """Nothing is augmented, in a training step either."""
        return prepare(observation, train=False, image_keys=views, image_resolution=(side, side))

    pi0_pytorch._preprocessing.preprocess_observation_pytorch = prepare_plainly
    observation = types.SimpleNamespace(
        images={view: inputs["images"][:, n] for n, view in enumerate(views)},
        image_masks={view: inputs["image_mask"][:, n] for n, view in enumerate(views)},
        tokenized_prompt=inputs["tokens"],
        tokenized_prompt_mask=inputs["token_mask"],
        token_ar_mask=None,
        token_loss_mask=None,
        state=torch.zeros(len(inputs["tokens"]), sizes["action_dim"]),  # in pi0.5 it is in the prompt
    )
    if "actions" in inputs:
        return step_ways(model, lambda: model(observation, inputs["actions"], inputs["noise"], inputs["time"]))
    device, noise, steps = torch.device("cpu"), inputs["noise"], sizes["steps"]
    compiled: Any = torch.compile(model.sample_actions)
    return {
        "eager": lambda: model.sample_actions(device, observation, noise=noise, num_steps=steps)[0],
        "compiled": lambda: compiled(device, observation, noise=noise, num_steps=steps)[0],
    }


def lerobot(sizes: Sizes, weights: Tensors, inputs: Tensors, _: Path | None) -> Ways:
    """LeRobot's PI05Policy, from images and tokens to a chunk, or to the errors of a training step."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.pi05 import modeling_pi05
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    resize(modeling_pi05, sizes)
    names = {"gemma_2b": "backbone", "gemma_300m": "expert"}
    modeling_pi05.get_gemma_config = lambda name: variant(sizes, names[name])
    side, actions = sizes["vision"]["image_size"], sizes["action_dim"]
    cameras = [f"observation.images.{view}" for view in VIEWS[: inputs["images"].shape[1]]]
    config = PI05Config(
        dtype="float32",
        device="cpu",
        chunk_size=sizes["horizon"],
        n_action_steps=sizes["horizon"],
        max_action_dim=actions,
        max_state_dim=actions,
        num_inference_steps=sizes["steps"],
        image_resolution=(side, side),
        tokenizer_max_length=inputs["tokens"].shape[1],
        input_features={camera: PolicyFeature(FeatureType.VISUAL, (3, side, side)) for camera in cameras},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (actions,))},
    )
    policy = modeling_pi05.PI05Policy(config)
    load(policy.model, weights, "actions" in inputs)
    policy.eval()
    batch = {camera: (inputs["images"][:, n] + 1) / 2 for n, camera in enumerate(cameras)}
    words = {"tokens": inputs["tokens"], "attention_mask": inputs["token_mask"]}
    batch |= {f"observation.language.{name}": tensor for name, tensor in words.items()}
    if not inputs["image_mask"].all():
        raise ValueError("expected all cameras: LeRobot takes those that it is given as present")
    if "actions" in inputs:

        def errors() -> Tensor:
            """As the policy's own `forward`, with noise and flow times that are given."""
            drawn = inputs["actions"], inputs["noise"], inputs["time"]
            images, masks = policy._preprocess_images(batch)
            found: Tensor = policy.model(images, masks, inputs["tokens"], inputs["token_mask"], *drawn)
            return found

        return step_ways(policy.model, errors)
    noise, plain = inputs["noise"], policy.model.sample_actions
    compiled: Any = torch.compile(plain)  # as its `compile_model` does

    def chunk(sample_actions: Any) -> Tensor:
        policy.model.sample_actions = sample_actions
        actions: Tensor = policy.predict_action_chunk(batch, noise=noise)
        return actions[0]

    return {"eager": lambda: chunk(plain), "compiled": lambda: chunk(compiled)}


def versions(peer: str) -> dict[str, str]:
    packages = ["torch", "transformers", *(["lerobot"] if peer == "lerobot" else [])]
    return {name: importlib.metadata.version(name) for name in packages}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=("openpi", "lerobot"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkout", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args(argv)
    # What a peer prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    torch.set_num_threads(chosen.threads)
    try:
        sizes = json.loads((chosen.folder / "sizes.json").read_text())
        # Copied out of the mapped file, whose addresses have no alignment.
        weights = {name: tensor.clone() for name, tensor in load_file(chosen.folder / "weights.safetensors").items()}
        with np.load(chosen.folder / "inputs.npz") as arrays:
            inputs = {name: torch.from_numpy(arrays[name]) for name in arrays}
        build: Callable[..., Ways] = {"openpi": openpi, "lerobot": lerobot}[chosen.peer]
        ways = build(sizes, weights, inputs, chosen.checkout)
        answer({"ways": list(ways), "versions": versions(chosen.peer)})
    except Exception as error:  # whatever is missing or changed there, it is one peer's and named
        answer({"failed": f"{type(error).__name__}: {error}"})
        return
    for line in sys.stdin:
        way = ways[json.loads(line)["way"]]
        try:
            with torch.set_grad_enabled("actions" in inputs):
                began_ns, processor_ns = time.perf_counter_ns(), time.process_time_ns()
                values = way()
                took_ns = time.perf_counter_ns() - began_ns, time.process_time_ns() - processor_ns
        except Exception as error:  # compilers raise anything
            answer({"failed": f"{type(error).__name__}: {error}"})
        else:
            ms, processor_ms = (ns / 1e6 for ns in took_ns)
            answer({"ms": ms, "processor_ms": processor_ms, "values": values.tolist()})


if __name__ == "__main__":
    main()
