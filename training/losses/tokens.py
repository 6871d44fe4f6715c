"""Next-token cross-entropy, the paper's loss for the backbone (arXiv 2505.23705): answers in words, FAST actions.

Legend: B batch, P prefix tokens, T postfix tokens, D width, W vocabulary, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Logits = Callable[[Tensor], Tensor]
Index = Tensor | tuple[Tensor, ...]
"""A boolean mask, or the indices of what it selects."""


def next_token_hidden(prefix_hidden_BPD: Tensor, last_B: Tensor, postfix_hidden_BTD: Tensor) -> Tensor:
    """Hidden states that predict the postfix, in its order.

    They are those of the last valid prefix token (index `last_B`), then of each postfix token but the last.
    """
    first = prefix_hidden_BPD[torch.arange(len(last_B), device=last_B.device), last_B][:, None]
    return torch.cat([first, postfix_hidden_BTD[:, :-1]], dim=1)


def predict_postfix(logits: Logits, hidden_BTD: Tensor, postfix_BT: Tensor, mask: Index) -> Tensor:
    """Cross-entropy of the next token, mean over the tokens that count; 0 if none does.

    `hidden[:, t]` predicts `postfix[:, t]`. Logits are computed for the tokens that count, not for padding.
    """
    token_N = postfix_BT[mask]
    return F.cross_entropy(logits(hidden_BTD[mask]), token_N, reduction="sum") / max(1, len(token_N))


def predict_in_pieces(logits: Logits, hidden_BTD: Tensor, postfix_BT: Tensor, mask: Index, rows: int = 1024) -> Tensor:
    """`predict_postfix` without ever holding the logits of more than `rows` tokens.

    They are computed for the loss, and again for its gradient. With a vocabulary of 257,152 the logits of one token and
    their gradients take 4 MB.
    """
    hidden_ND, postfix_N = hidden_BTD[mask], postfix_BT[mask]

    def summed(hidden: Tensor, token: Tensor) -> Tensor:
        return F.cross_entropy(logits(hidden), token, reduction="sum")

    pieces = zip(hidden_ND.split(rows), postfix_N.split(rows), strict=True)
    return torch.stack([checkpoint(summed, *piece, use_reentrant=False) for piece in pieces]).sum() / max(
        1, len(postfix_N)
    )
