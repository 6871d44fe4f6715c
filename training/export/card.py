"""The model card: the bundle's README.md."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from ki_vla_ros.bundle import PolicySpec

STATE_WAYS = {
    "text": "text in the prompt",
    "token": "a token of the expert",
    "both": "text in the prompt and as a token of the expert",
}


def model_card(policy: PolicySpec, tokenizer: Tokenizer, notes: str) -> str:
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
        f"- Joint state: as {STATE_WAYS[policy.state.encoding]}.",
        f"- Action chunk: {policy.horizon} positions, one every {policy.action_period_s:g} s.",
        f"- Flow steps it was judged with: {policy.flow.steps}.",
        f"- Chunk prefix seen in training: up to {policy.max_prefix_delay} actions.",
    ]
    if isinstance(tokenizer.model, WordLevel):
        words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and word.islower())
        lines.append(f"- Words it may be given (others are refused): {', '.join(words)}.")
    lines += ["", "| joint | unit | lower | upper | speed limit | action |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {joint.name} | {joint.unit} | {joint.lower:.4g} | {joint.upper:.4g} | {joint.max_velocity:g} "
        f"| {'relative' if joint.relative else 'absolute'} |"
        for joint in policy.axes
    ]
    lines += [
        "",
        "## Provenance",
        "",
        f"- Made: {policy.created}, recipe: {origin.recipe}, seed {origin.seed}, code {origin.commit}.",
    ]
    lines += [f"- Data fingerprint: {origin.data_fingerprint}."]
    if origin.figures:
        lines += [
            "",
            "| figure | value |",
            "|---|---|",
            *(f"| {name} | {value:.4g} |" for name, value in origin.figures.items()),
        ]
    return "\n".join(lines) + "\n"
