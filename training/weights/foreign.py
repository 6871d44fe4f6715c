"""Published weights: PaliGemma (Hugging Face), pi0 and pi0.5 (openpi's PyTorch form, LeRobot), as safetensors.

The files' keys are brought to one spelling, openpi's, and compared with what the model needs; then each tensor goes
from its file to its place. pi0 and pi0.5 differ in the expert: pi0 has a state token, plain norms and an MLP that mixes
time and actions; pi0.5 has norms that the time modulates (adaRMS).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError
from training.model import VLA, VisionConfig, VLAConfig, draw_weights, settle
from training.tokens import VOCABULARY
from training.weights.checkpoints import assemble, shapes
from training.weights.files import WeightFiles, check_fit, find_weights
from training.weights.lora import Adapter, refuse_lora

Kind = Literal["paligemma", "pi0", "pi05"]
HUGGING_FACE_ROWS = 64  # one for <image>, and padding, after PaliGemma's vocabulary
BLOCK = 2048  # rows of the token table at a time

PALIGEMMA = "paligemma_with_expert.paligemma."
VISION = f"{PALIGEMMA}model.vision_tower.vision_model"
TABLE, HEAD = f"{PALIGEMMA}model.language_model.embed_tokens.weight", f"{PALIGEMMA}lm_head.weight"
LAYERS = {
    r"norm1": "input_layernorm",
    r"norm2": "post_attention_layernorm",
    r"attention\.out": "self_attn.o_proj",
    r"attention\.([qkv])": r"self_attn.\2_proj",
    r"mlp\.(gate|up|down)": r"mlp.\2_proj",
}
NAMES = {
    r"vision\.stem": f"{VISION}.embeddings.patch_embedding",
    r"vision\.position": f"{VISION}.embeddings.position_embedding",
    r"vision\.norm": f"{VISION}.post_layernorm",
    r"vision\.layers\.(\d+)\.norm(\d)": rf"{VISION}.encoder.layers.\1.layer_norm\2",
    r"vision\.layers\.(\d+)\.([qkv]|out)": rf"{VISION}.encoder.layers.\1.self_attn.\2_proj",
    r"vision\.layers\.(\d+)\.up": rf"{VISION}.encoder.layers.\1.mlp.fc1",
    r"vision\.layers\.(\d+)\.down": rf"{VISION}.encoder.layers.\1.mlp.fc2",
    r"projector": f"{PALIGEMMA}model.multi_modal_projector.linear",
    r"backbone\.embedding": TABLE.removesuffix(".weight"),
    r"action_(in|out)": r"action_\1_proj",
    r"state_in": "state_proj",
}
"""Our module -> theirs, in openpi's spelling; the parameter's own name (weight, bias) follows both."""
for _ours, _theirs in {
    "backbone": f"{PALIGEMMA}model.language_model",
    "expert": "paligemma_with_expert.gemma_expert.model",
}.items():
    NAMES[rf"{_ours}\.norm"] = f"{_theirs}.norm"
    NAMES |= {rf"{_ours}\.layers\.(\d+)\.{ours}": rf"{_theirs}.layers.\1.{theirs}" for ours, theirs in LAYERS.items()}
TIME = {"adarms": r"time_mlp_\1", "concat": r"action_time_mlp_\1"}  # expert.time_(in|out)

SPELLINGS = (
    (r"^model\.(?=paligemma_with_expert\.|action_|time_mlp|state_proj)", ""),  # LeRobot
    (r"^(?=model\.|language_model\.|vision_tower\.|multi_modal_projector\.|lm_head\.)", PALIGEMMA),  # Hugging Face
    (r"^(.*paligemma\.)language_model\.lm_head\.", r"\1lm_head."),  # transformers before 4.52
    (r"^(.*paligemma\.)language_model\.model\.", r"\1model.language_model."),
    (r"^(.*paligemma\.)(?=vision_tower\.|multi_modal_projector\.|language_model\.)", r"\1model."),
    (r"(?<=\.vision_tower\.)(?!vision_model\.)", "vision_model."),  # transformers 5
)
UNREAD = re.compile(
    r"paligemma_with_expert\.gemma_expert\.lm_head\.weight"  # the expert speaks no words
    r"|.*\.rotary_emb\.inv_freq|.*\.embeddings\.position_ids"  # constants
    r"|(un)?normalize_(inputs|targets|outputs)\.buffer_.*"  # LeRobot's older policies: statistics
)


def import_weights(
    config: VLAConfig,
    path: Path,
    kind: Kind,
    dtype: torch.dtype | None = torch.float32,
    vocabulary: int | None = None,
    seed: int = 0,
    lora: Path | None = None,
) -> VLA:
    """A model with the weights at `path` (a file or folder, see `find_weights`), in `dtype` (None: as in the file).

    `lora` is the folder of an adapter of these weights, which is merged into them.

    `vocabulary` is the source's number of tokens, by default PaliGemma's, or all that a smaller model has. Further rows
    of the model's token table are our own action ids: each starts as the mean of the others plus noise of a tenth of
    their spread, drawn from `seed`, so that its logit starts near the average.

    "paligemma" brings vision, projector and backbone; expert and action layers are **untrained**, drawn from `seed`:
    something to train from, never to run. ConfigurationError lists what does not fit.
    """
    check_config(config, kind)
    weights = find_weights(path)
    refuse_lora(weights.shapes, path, lora)
    keys = spellings(weights.shapes, path)
    check_kind(keys, kind, path)
    key_of_table = choose_table(keys, kind, weights, path)
    vocabulary = vocabulary or min(config.vocab_size, VOCABULARY)
    sizes = shapes(config)
    ours = {name: their_name(name, config) for name in sizes}
    wanted = {name: theirs for name, theirs in ours.items() if kind != "paligemma" or theirs.startswith(PALIGEMMA)}
    expected = {theirs: sizes[name] for name, theirs in wanted.items()}
    got = {spelled: weights.shapes[key] for spelled, key in keys.items()}
    expected[TABLE] = (vocabulary, config.backbone.width)
    if got[TABLE] == (vocabulary + HUGGING_FACE_ROWS, config.backbone.width):
        got[TABLE] = expected[TABLE]
    check_fit(
        expected, got, str(path), f"expected {kind} of the sizes of the given configuration; is it another model?"
    )
    adapter = None if lora is None else Adapter(lora, spellings)
    if adapter is not None:
        adapter.check({theirs: shape for theirs, shape in expected.items() if theirs != TABLE})
    found = {name: weights.get(keys[theirs], dtype) for name, theirs in wanted.items() if theirs != TABLE}
    if adapter is not None:
        found = {name: adapter.merge(wanted[name], tensor) for name, tensor in found.items()}
    found["backbone.embedding.weight"] = token_table(weights, key_of_table, vocabulary, config.vocab_size, dtype, seed)
    if kind == "paligemma":
        common = dtype or found["backbone.norm.weight"].dtype
        found |= {name: tensor.to(common) for name, tensor in untrained(config, seed).items() if name not in found}
    return assemble(config, found)


def check_config(config: VLAConfig, kind: Kind) -> None:
    """ConfigurationError unless the configuration has the kind's form."""
    if kind not in get_args(Kind):
        raise ConfigurationError(f"import: expected one of {', '.join(get_args(Kind))} as kind, got {kind!r}")
    if config.vision.stem != "patch":
        raise ConfigurationError(f"import: {kind}: expected vision.stem 'patch', got {config.vision.stem!r}")
    form = {"pi0": ("concat", True), "pi05": ("adarms", False)}.get(kind)
    got = (config.conditioning, config.state_dim is not None)
    if form is not None and got != form:
        words = [f"conditioning {how!r} {'with' if state else 'without'} state_dim" for how, state in (form, got)]
        raise ConfigurationError(f"import: {kind}: expected {words[0]}, got {words[1]}")


def spellings(keys: Iterable[str], path: Path) -> dict[str, str]:
    """The file's spelling by openpi's, for every key that is read."""
    found: dict[str, str] = {}
    for key in keys:
        spelled = key
        for pattern, replacement in SPELLINGS:
            spelled = re.sub(pattern, replacement, spelled)
        if UNREAD.fullmatch(spelled):
            continue
        if spelled in found:
            raise ConfigurationError(f"{path}: expected each weight once, got both {found[spelled]} and {key}")
        found[spelled] = key
    return found


def check_kind(keys: Iterable[str], kind: Kind, path: Path) -> None:
    """ConfigurationError if the file holds another model than `kind`; it names that model."""
    parts = {key.split(".")[0] for key in keys}
    tests: tuple[tuple[str, bool], ...] = (
        ("pi0", "state_proj" in parts or "action_time_mlp_in" in parts),
        ("pi05", "time_mlp_in" in parts),
        ("paligemma", parts == {"paligemma_with_expert"} and not any(".gemma_expert." in key for key in keys)),
    )
    holds = [name for name, test in tests if test]
    if holds and kind not in holds:
        raise ConfigurationError(
            f"{path}: expected the weights of {kind}, got those of {holds[0]}; import them as that"
        )


def choose_table(keys: dict[str, str], kind: Kind, weights: WeightFiles, path: Path) -> str:
    """The file's key of the token table, which is tied to the output head: a file may hold either or both.

    Of both, the table counts: the prompt is made of it. LeRobot trains it, and keeps the head that it began with.
    PaliGemma's head is what training goes on from: there, both must be the same.
    """
    head = keys.pop(HEAD, None)
    table = keys.setdefault(TABLE, head) if head is not None else keys.get(TABLE)
    if table is None:
        raise ConfigurationError(f"{path}: expected the token table ({TABLE} or {HEAD}), got neither")
    if kind == "paligemma" and head is not None and head != table and not same(weights, table, head):
        raise ConfigurationError(
            f"{path}: expected output head and token table to be tied, got different {head}, {table}"
        )
    return table


def same(weights: WeightFiles, one: str, other: str) -> bool:
    rows = weights.shapes[one][0]
    return weights.shapes[one] == weights.shapes[other] and all(
        torch.equal(*(weights.rows(key, start, start + BLOCK) for key in (one, other)))
        for start in range(0, rows, BLOCK)
    )


def token_table(
    weights: WeightFiles, key: str, vocabulary: int, rows: int, dtype: torch.dtype | None, seed: int
) -> Tensor:
    """The file's first `vocabulary` rows, then drawn ones up to `rows`; see `import_weights`."""
    if weights.shapes[key][0] == vocabulary == rows:
        return weights.get(key, dtype)
    width = weights.shapes[key][1]
    total, squares = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    table = torch.empty(rows, width, dtype=dtype or weights.rows(key, 0, 1).dtype)
    for start in range(0, vocabulary, BLOCK):
        stop = min(start + BLOCK, vocabulary)
        block = weights.rows(key, start, stop)
        table[start:stop] = block
        total += block.sum(0, dtype=torch.float64)
        squares += block.double().square().sum(0)
    mean = total / vocabulary
    spread = (squares / vocabulary - mean.square()).clamp_min(0).sqrt()
    noise = torch.randn(rows - vocabulary, width, generator=torch.Generator().manual_seed(seed))
    table[vocabulary:] = mean + 0.1 * spread * noise
    return table


def untrained(config: VLAConfig, seed: int) -> dict[str, Tensor]:
    """Expert and action layers as `initialize` draws them, in a model with only a stub of the rest.

    Each layer is drawn by its name and the seed, so two experts that differ in one layer are alike in the others: runs
    that are compared begin alike.
    """
    stub = replace(
        config,
        vision=VisionConfig(image_size=1, patch_size=1, width=1, depth=1, heads=1, mlp=1),
        backbone=replace(config.backbone, width=1, mlp=1),
        vocab_size=1,
    )
    with torch.random.fork_rng(devices=()):
        model = VLA(stub)
        for name, module in model.named_modules():
            torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            draw_weights(module)
        settle(model)
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(("expert.", "action_", "state_in."))
    }


def their_name(name: str, config: VLAConfig) -> str:
    """What openpi calls one of our weights."""
    for ours, theirs in (*NAMES.items(), (r"expert\.time_(in|out)", TIME[config.conditioning])):
        match = re.fullmatch(rf"{ours}(?P<parameter>(?:\.dense)?\.(?:weight|bias))", name)
        if match:
            return match.expand(theirs) + match["parameter"]
    raise ConfigurationError(f"import: no counterpart of {name} is known")
