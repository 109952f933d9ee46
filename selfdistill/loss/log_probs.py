"""Log-probabilities over the vocabulary, and sums over it.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_softmax(logits_NV: Tensor) -> Tensor:
    """Log-probabilities in float32 (float64 for float64 logits); log 0 is half the most negative float."""
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    # A floor replaces log 0 (-inf logits), so 0 * log 0 is 0 and no difference is NaN, nor is any gradient. With half
    # the most negative float, the difference of two floors and a probability-weighted sum stay finite.
    log_NV, floor = torch.log_softmax(logits_NV, dim=-1, dtype=dtype), torch.finfo(dtype).min / 2
    return log_NV.clamp(min=floor) if log_NV.requires_grad else log_NV.clamp_(min=floor)


def dot(a_NV: Tensor, b_NV: Tensor) -> Tensor:
    """sum_v a_v b_v per token."""
    return (a_NV * b_NV).sum(-1)  # not vecdot: autocast would run it in bfloat16


def kl(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """KL(a||b) per token, in nats."""
    return (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(-1)


def pick(log_p_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """The entry at each token, shape (N,)."""
    return log_p_NV.gather(-1, tokens_N.unsqueeze(-1)).squeeze(-1)
