"""A head start for what has an order: numbers, places and FAST tokens begin as smooth features of their value.

From random rows, a small model would have to learn one by one that 127 is next to 128 and which cell is left of which;
minutes of training are not enough for that. All of these embeddings are then trained further.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ki_vla_ros.bundle import state_bin_token
from training.model.vla import VLA
from training.tokens import STATE_BINS, ActionTokenizer, fast_ids, has_state_tokens, loc_id, location_count, token_id


def wave_features(value_N: Tensor, width: int, *, finest: float) -> Tensor:
    """[N, width]: sines and cosines of values in 0..1, with mean square 1.

    They have from half a period up to `finest` periods over that range.
    """
    frequency = torch.logspace(-1, torch.log2(torch.tensor(finest)).item(), width // 2, base=2.0)
    angle = 2 * torch.pi * value_N[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1) * 2**0.5


@torch.no_grad()
def order_embeddings(model: VLA, tokenizer: Tokenizer, actions: ActionTokenizer) -> None:
    """Give neighbouring numbers, locations, image cells and action tokens similar embeddings, in place."""
    table, width = model.backbone.embedding.weight, model.config.backbone.width
    first_number, bins = token_id(tokenizer, "0"), location_count(tokenizer)
    blocks = [(loc_id(tokenizer, 0), bins, bins / 4)]
    if has_state_tokens(tokenizer):
        blocks.append((token_id(tokenizer, state_bin_token(0)), STATE_BINS, 32.0))
    if tokenizer.token_to_id(str(STATE_BINS - 1)) == first_number + STATE_BINS - 1:  # not in PaliGemma's: digits alone
        blocks.append((first_number, STATE_BINS, 32.0))
    for first, count, finest in blocks:
        features = wave_features(torch.linspace(0, 1, count), width, finest=finest)
        table[first : first + count] = features * width**-0.5  # the backbone multiplies by sqrt(width)
    order_action_tokens(model, tokenizer, actions)
    vision = model.config.vision
    grid = vision.image_size // vision.patch_size
    middle = (torch.arange(grid) + 0.5) / grid
    axis = wave_features(middle, vision.width // 2, finest=grid / 2)
    places = torch.cat([axis[:, None].expand(-1, grid, -1), axis[None, :].expand(grid, -1, -1)], dim=2)
    model.vision.position.weight.copy_(places.flatten(0, 1))


@torch.no_grad()
def order_action_tokens(model: VLA, tokenizer: Tokenizer, actions: ActionTokenizer) -> None:
    """The embeddings of the tokens that actions are written with, in place.

    A token of one coefficient has that coefficient's. One of several has half its first one's; the other half is
    random, always the same, and tells merged tokens apart. Tokens that stand for no whole coefficient (a published
    vocabulary has some) stay as they are.
    """
    table, width = model.backbone.embedding.weight, model.config.backbone.width
    integers = {token: actions.integers(token) for token in range(actions.vocab_size)}
    leading = {token: coefficients[0] for token, coefficients in integers.items() if coefficients}
    first_N = torch.tensor(list(leading.values()))
    share_N = (first_N - first_N.min()) / (first_N.max() - first_N.min())
    wave_NW = wave_features(share_N, width, finest=32.0)
    random_NW = torch.randn(wave_NW.shape, generator=torch.Generator().manual_seed(0))
    alone_N1 = torch.tensor([len(integers[token]) == 1 for token in leading])[:, None]
    ids_N = torch.from_numpy(fast_ids(tokenizer)[list(leading)])
    table[ids_N] = torch.where(alone_N1, wave_NW, (random_NW + wave_NW) * 0.5**0.5) * width**-0.5
