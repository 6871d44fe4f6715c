"""From one observation to one action chunk."""

from ki_vla_ros.policy.guidance import Guide
from ki_vla_ros.policy.policy import Policy, Stage, untimed, widen
from ki_vla_ros.policy.preprocess import (
    check_instruction,
    clean_instruction,
    fit_square,
    images_to_input,
    longest_input,
    make_model_input,
    normalize,
    render_prompt,
    resize_with_pad,
    state_to_bins,
    state_token,
    tokenize,
    trained_turn,
    unnormalize,
    write_prompt,
)

__all__ = [
    "Guide",
    "Policy",
    "Stage",
    "check_instruction",
    "clean_instruction",
    "fit_square",
    "images_to_input",
    "longest_input",
    "make_model_input",
    "normalize",
    "render_prompt",
    "resize_with_pad",
    "state_to_bins",
    "state_token",
    "tokenize",
    "trained_turn",
    "unnormalize",
    "untimed",
    "widen",
    "write_prompt",
]
