"""Weights of the completion tokens in the loss.

Legend: B batch, T completion tokens, N flattened tokens, V vocabulary, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from selfdistill.errors import UserError

Normalisation = Literal["sequence", "token"]


def completion_mask(lengths: Tensor | Sequence[int], width: int) -> Tensor:
    """Bool mask (B, T), True at the first ``lengths[b]`` of ``width`` positions, on the device of ``lengths``."""
    lengths_B = torch.as_tensor(lengths)
    return torch.arange(width, device=lengths_B.device) < lengths_B.unsqueeze(1)


def token_weights(mask_BT: Tensor, *, skip_first_tokens: int, normalisation: Normalisation) -> Tensor:
    """Token weights such that the loss of the batch is sum(weights * loss).

    ``sequence``: 1 / (retained tokens in the sequence * sequences with any retained token), the mean over tokens and
    then over sequences (official SDFT code). ``token``: 1 / retained tokens in the batch. Either sums to 1.

    Call this on the whole optimizer batch and slice the result. Micro-batches and processes then only sum their
    weights * loss, and every split gives the same gradient.

    Args:
        mask_BT: bool, True at completion tokens.
        skip_first_tokens: number of leading completion tokens in each sequence with zero weight.
        normalisation: ``sequence`` or ``token``.

    Returns:
        float32, shape (B, T); all 0 if no token is retained.
    """
    kept_BT = mask_BT & (mask_BT.cumsum(1) > skip_first_tokens)
    kept_B1 = kept_BT.sum(1, keepdim=True)
    if normalisation == "token":
        return kept_BT.float() / kept_B1.sum().clamp(min=1)
    return kept_BT.float() / (kept_B1 * (kept_B1 > 0).sum()).clamp(min=1)


def importance_weights(student_logps_BT: Tensor, sampler_logps_BT: Tensor, mask_BT: Tensor, cap: float) -> Tensor:
    """Truncated importance weight of each sequence: its mean over retained tokens of min(p_student / p_sampler, cap).

    Corrects for a sampling engine whose probabilities differ from the training model's (SDFT, arXiv 2601.19897, cap 2).

    Args:
        student_logps_BT: log-probabilities, in nats, of the sampled tokens under the training model.
        sampler_logps_BT: the same under the engine that sampled them.
        mask_BT: bool, True at retained tokens; other positions are ignored.
        cap: largest ratio that a token can have.

    Returns:
        float32, shape (B,), detached; 1 for a sequence without retained tokens.
    """
    log_ratio_BT = (student_logps_BT.detach().float() - sampler_logps_BT.detach().float()).masked_fill(~mask_BT, 0.0)
    ratio_BT = log_ratio_BT.exp().clamp(max=cap) * mask_BT
    kept_B = mask_BT.sum(1)
    return torch.where(kept_B > 0, ratio_BT.sum(1) / kept_B.clamp(min=1), 1.0)


def top_k_entropy(log_p_NV: Tensor, k: int) -> Tensor:
    """Entropy of the k most likely tokens, renormalised and divided by its maximum ln k: from 0 to 1, shape (N,).

    Args:
        log_p_NV: log-probabilities.
        k: at least 2; of a smaller vocabulary, all tokens are used.
    """
    k = min(k, log_p_NV.shape[-1])
    log_top_NK = log_p_NV.topk(k, dim=-1).values.log_softmax(-1)
    entropy_N = -(log_top_NK.exp() * log_top_NK).sum(-1) / math.log(k)
    return entropy_N.clamp(max=1)  # rounding may exceed it, and 1 minus it is a weight


def group_advantages(rewards: Sequence[float], group_size: int) -> list[float]:
    """Advantage of each completion over the others for its prompt: (r - mean) / (std + 1e-4) within its group.

    std is the sample standard deviation (n - 1), as in GRPO's published code (arXiv 2402.03300). Equal rewards in a
    group give advantages of 0.

    Args:
        rewards: one per completion; completions of a prompt are adjacent.
        group_size: completions per prompt, at least 2.
    """
    groups = torch.tensor(rewards, dtype=torch.float64).reshape(-1, group_size)
    equal = (groups == groups[:, :1]).all(1, keepdim=True)
    centred = (groups - groups.mean(1, keepdim=True)).masked_fill(equal, 0.0)  # the mean is rounded
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten().tolist()


def check_skip(skip_first_tokens: int, completion_lengths: Sequence[int], what: str = "completions") -> None:
    """Reject a ``skip_first_tokens`` that would mask most of the training signal; the message calls it ``what``.

    Raises:
        UserError: this would mask more than half of all completion tokens, or every token of more than half of the
            (non-empty) completions.
    """
    lengths = [length for length in completion_lengths if length > 0]

    def masked(skip: int) -> tuple[int, int]:
        return sum(min(length, skip) for length in lengths), sum(length <= skip for length in lengths)

    def too_much(skip: int) -> bool:
        tokens, completions = masked(skip)
        return 2 * tokens > sum(lengths) or 2 * completions > len(lengths)

    if too_much(skip_first_tokens):
        tokens, completions = masked(skip_first_tokens)
        largest = next(skip for skip in count() if too_much(skip + 1))
        raise UserError(
            f"skip_first_tokens: {skip_first_tokens} would mask {tokens} of {sum(lengths)} completion tokens and all "
            f"of {completions} of {len(lengths)} {what}; set it to at most {largest} or use longer completions"
        )
