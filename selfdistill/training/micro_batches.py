"""Micro-batches: how the tokens that a part of a step learns are weighed, and how they are divided into passes.

Legend: B completions of a part, b some of them, T completion tokens, N completion tokens without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from selfdistill.loss import completion_mask, token_weights
from selfdistill.methods import Completion
from selfdistill.runtime import rank_slice
from selfdistill.training.selection import Selected


@dataclass(frozen=True)
class Weighed:
    """Completions of a part, with token weights computed over all that the part learns."""

    completions: Sequence[Completion]
    mask_bT: Tensor
    weights_bT: Tensor
    """Weight of each token in the part's loss; the weights sum to 1 over all that the part learns."""
    factor_b: Tensor
    """Factor on each completion's weights, such as its advantage."""

    @property
    def ids(self) -> list[list[int]]:
        return [c.ids for c in self.completions]

    @property
    def prompts(self) -> list[list[int]]:
        return [c.example.student_ids for c in self.completions]

    @property
    def has_weight_b(self) -> Tensor:
        """Mask of the completions with tokens of nonzero weight; padding has none."""
        return (self.weights_bT > 0).any(dim=1)

    def has_weight_N(self, device: torch.device) -> Tensor:
        """Mask of the tokens with nonzero weight."""
        return self.weights_bT[self.mask_bT].to(device) > 0

    def rows(self, numbers: Sequence[int]) -> Weighed:
        """Some of the completions."""
        chosen = list(numbers)
        some = [self.completions[number] for number in chosen]
        return Weighed(some, self.mask_bT[chosen], self.weights_bT[chosen], self.factor_b[chosen])

    def padded(self, count: int) -> Weighed:
        """With copies of the first completion, without weight, so that the number is a multiple of ``count``."""
        more = -len(self.completions) % count
        padded = self.rows([*range(len(self.completions)), *([0] * more)])
        weights_bT = torch.cat([self.weights_bT, self.weights_bT.new_zeros(more, self.weights_bT.shape[1])])
        return replace(padded, weights_bT=weights_bT)

    def with_gradient(self) -> Weighed:
        """The completions whose gradient is not zero: they have weight, and a factor such as an advantage."""
        return self.rows(((self.factor_b != 0) & self.has_weight_b).nonzero()[:, 0].tolist())


def weigh(selected: Selected, normalisation: Literal["sequence", "token"]) -> Weighed:
    """All that a part learns, with its weights."""
    completions = selected.completions
    lengths = [len(c.ids) for c in completions]
    mask_BT = completion_mask(lengths, max(lengths, default=0))
    is_own_BT = torch.zeros_like(mask_BT)
    is_own_BT[mask_BT] = torch.tensor([own for c in completions for own in c.is_own], dtype=torch.bool)
    weights_BT = token_weights(
        is_own_BT, skip_first_tokens=selected.part.method.skip_first_tokens, normalisation=normalisation
    )
    return Weighed(completions, mask_BT, weights_BT, torch.tensor([c.factor for c in completions]))


def micro_batches(passed: Weighed, size: int, unit: int, *, equal: bool) -> list[Weighed]:
    """This rank's completions in micro-batches.

    Args:
        passed: what is learnt on all ranks.
        size: none takes more memory than so many completions, if all were as long as the longest.
        unit: completions without weight fill the number up to a multiple of this.
        equal: as for :func:`cut`.
    """
    if not passed.completions:
        return []
    padded = passed.padded(unit)
    own = rank_slice(len(padded.completions))
    lengths = [_tokens(completion) for completion in padded.completions[own]]
    chosen = cut(lengths, size, equal=equal)
    return [padded.rows([own.start + number for number in numbers]) for numbers in chosen]


def cut(lengths: Sequence[int], size: int, *, equal: bool) -> list[list[int]]:
    """Divide sequences into micro-batches of similar lengths, the shortest first, so that little is padding.

    With its padding, none has more tokens than ``size`` of the longest sequences. One that holds all keeps their order.

    Args:
        lengths: tokens of each sequence.
        size: sequences of a micro-batch, if all were as long as the longest.
        equal: exactly ``size`` in each, except in the last: for processes that must run the same passes.

    Returns:
        The indices of each micro-batch.
    """
    if len(lengths) <= size:
        return [list(range(len(lengths)))] if lengths else []
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    if equal:
        return [order[start : start + size] for start in range(0, len(order), size)]
    most, batches = size * lengths[order[-1]], [[order[0]]]
    for number in order[1:]:
        if (len(batches[-1]) + 1) * lengths[number] <= most:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def _tokens(completion: Completion) -> int:
    """Tokens of a completion after the longer of its two prompts."""
    prompts = completion.example.student_ids, completion.example.teacher_ids or []
    return max(map(len, prompts)) + len(completion.ids)
