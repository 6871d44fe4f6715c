"""The losses: tokens and flow are the paper's, hints are ours and optional."""

from training.losses.flow import match_flow
from training.losses.hints import TrainingHeads, asking_rows, prompt_start, scene_scores, take_rows
from training.losses.step import BatchLosses, count_tokens, targets
from training.losses.tokens import next_token_hidden, predict_in_pieces, predict_postfix

__all__ = [
    "BatchLosses",
    "TrainingHeads",
    "asking_rows",
    "count_tokens",
    "match_flow",
    "next_token_hidden",
    "predict_in_pieces",
    "predict_postfix",
    "prompt_start",
    "scene_scores",
    "take_rows",
    "targets",
]
