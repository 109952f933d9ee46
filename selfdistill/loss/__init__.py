"""From logits to loss and gradient, in pure PyTorch."""

from selfdistill.loss.chunked import CHUNK_TOKENS, Head, Weighting, chunk_tokens, chunked_loss, plain_weight
from selfdistill.loss.divergence import CrossEntropy, Divergence, Pair, forward_kl
from selfdistill.loss.log_probs import pick
from selfdistill.loss.target import ProximalTarget, Target
from selfdistill.loss.token_weights import (
    check_skip,
    completion_mask,
    group_advantages,
    importance_weights,
    token_weights,
    top_k_entropy,
)

__all__ = [
    "CHUNK_TOKENS",
    "CrossEntropy",
    "Divergence",
    "Head",
    "Pair",
    "ProximalTarget",
    "Target",
    "Weighting",
    "check_skip",
    "chunk_tokens",
    "chunked_loss",
    "completion_mask",
    "forward_kl",
    "group_advantages",
    "importance_weights",
    "pick",
    "plain_weight",
    "token_weights",
    "top_k_entropy",
]
