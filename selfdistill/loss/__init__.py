"""From logits to loss and gradient, in pure PyTorch."""

from selfdistill.loss.chunked import CHUNK_TOKENS, Head, Weighting, chunk_tokens, chunked_loss
from selfdistill.loss.divergence import CrossEntropy, Divergence, Target, forward_kl
from selfdistill.loss.token_weights import (
    check_skip,
    completion_mask,
    group_advantages,
    importance_weights,
    token_weights,
)

__all__ = [
    "CHUNK_TOKENS",
    "CrossEntropy",
    "Divergence",
    "Head",
    "Target",
    "Weighting",
    "check_skip",
    "chunk_tokens",
    "chunked_loss",
    "completion_mask",
    "forward_kl",
    "group_advantages",
    "importance_weights",
    "token_weights",
]
