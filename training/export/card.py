"""The model card: the bundle's README.md."""

from __future__ import annotations

import math

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from ki_vla_ros.bundle import PolicySpec
from training.recipe import recipe_names

STATE_WAYS = {
    "text": "as text in the prompt",
    "special": "as special tokens in the prompt",
    "token": "as a token of the expert",
    "both": "as text in the prompt and as a token of the expert",
    "none": "the policy does not see it",
}


def model_card(policy: PolicySpec, tokenizer: Tokenizer, notes: str, dtype: str) -> str:
    """The manifest in prose; `notes` (Markdown) say what it cannot know: abilities, limits, training."""
    origin = policy.provenance
    lines = [
        f"# {policy.name}",
        "",
        notes.strip() or "No notes were given at export.",
        "",
        "## Inputs and outputs",
        "",
        f"- Cameras: {', '.join(c.name + (' (optional)' if c.optional else '') for c in policy.cameras)}; "
        f"padded to {policy.image.size} x {policy.image.size}.",
        f"- State: {', '.join(dimension.name for dimension in policy.robot.state)}; "
        f"{STATE_WAYS[policy.state.encoding]}.",
        f"- Action chunk: {policy.horizon} actions, one every {policy.action_period_s:g} s.",
        *([] if policy.flow is None else [f"- Flow steps it was judged with: {policy.flow.steps}."]),
        f"- Chunk prefix seen in training: up to {policy.max_prefix_delay} actions.",
    ]
    if dtype == "int8":
        lines.append("- Matrix products in int8, for onnxruntime on a CPU: its chunks are near the model's, not equal.")
    if isinstance(tokenizer.model, WordLevel):
        words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and word.islower())
        lines.append(f"- Words it may be given (others are refused): {', '.join(words)}.")
    lines += ["", "| action | kind | unit | lower | upper | speed limit | |", "|---|---|---|---|---|---|---|"]
    for action in policy.robot.actions:
        low, high = (f"{end:.4g}" if math.isfinite(end) else "" for end in action.span)
        speed = "" if action.max_velocity is None else f"{action.max_velocity:g}"
        way = "relative" if action.relative else "absolute"
        lines.append(f"| {action.name} | {action.kind} | {action.own_unit()} | {low} | {high} | {speed} | {way} |")
    lines += [
        "",
        "## Provenance",
        "",
        f"- Made: {policy.created}, recipe: {origin.recipe}, seed {origin.seed}, code {origin.commit}.",
    ]
    if (name := origin.recipe.partition(" ")[0]) in recipe_names():
        lines.append(
            f"- How a small model of this recipe fares beside the paper's others, from one start: `{name}` in "
            "docs/results/ablation.md of ki_vla_ros."
        )
    lines += [f"- Data fingerprint: {origin.data_fingerprint}."]
    if origin.figures:
        lines += [
            "",
            "| figure | value |",
            "|---|---|",
            *(f"| {name} | {value:.4g} |" for name, value in origin.figures.items()),
        ]
    return "\n".join(lines) + "\n"
