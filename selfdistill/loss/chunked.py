"""The loss fused with the LM head: hidden states in, loss and gradients out, chunk by chunk.

Legend: N tokens, n tokens in one chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfdistill.errors import UserError
from selfdistill.loss.divergence import CrossEntropy, Divergence, Pair, one_per_token

Head = Callable[[Tensor], Tensor]
Weighting = Callable[[Pair, Tensor], Tensor]
"""Maps the distributions at some tokens, and the tokens (n,), to one factor per token, (n,)."""

CHUNK_LOGITS = 5 * 2**19
"""Default number of logits per chunk: 10 MiB in float32. At most seven such tensors are alive at a time."""
CHUNK_TOKENS = 53
"""Default minimum of tokens per chunk, whatever the vocabulary size. Matrix products with fewer rows are slow, and each
chunk reads and writes the head's whole gradient."""
CAST_WEIGHTS = 2**22
"""Weights of a bfloat16 head that are copied to float32 at a time: 16 MiB. With 64 MiB the loss took 1.5 to 1.7 times
as long as through autograd on a CPU, with 1 to 16 MiB about as long."""


def chunked_loss(
    loss: Divergence | CrossEntropy,
    student_hidden_ND: Tensor,
    student_head: Head,
    head_parameters: Sequence[Tensor],
    tokens_N: Tensor,
    weights_N: Tensor,
    teacher: tuple[Tensor, Head] | None = None,
    *,
    chunk_size: int | None = None,
    base: tuple[Tensor, Head] | None = None,
    weighting: Weighting | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_n weights_n * loss_n through the LM head, holding the logits of one chunk at a time.

    The forward pass computes the gradients of the hidden states and head parameters along with the loss. The backward
    pass therefore neither reruns the head nor needs its logits. Head gradients are summed over chunks in float32 or
    better. Differentiable once; call backward at most once.

    Args:
        loss: the per-token loss.
        student_hidden_ND: final hidden states that predict ``tokens_N``, retained tokens only; carries the gradient.
        student_head: maps hidden states (n, D) to logits (n, V), such as the model's ``lm_head``; the identity if
            ``student_hidden_ND`` already holds logits.
        head_parameters: tensors in ``student_head`` that receive gradients; the head must use each of them. Those with
            ``requires_grad=False`` are skipped. They may be tied to the embeddings.
        tokens_N: ids of the completion tokens.
        weights_N: weight of each token (see :mod:`selfdistill.loss.token_weights`); receives no gradient.
        teacher: the teacher's hidden states for the same tokens, whose D may differ, and its head. None for
            :class:`CrossEntropy` without a teacher.
        chunk_size: tokens per chunk; default: enough for ``CHUNK_LOGITS`` logits, but at least ``CHUNK_TOKENS``.
        base: the base model's hidden states for the same tokens and its head, if the loss needs them.
        weighting: an extra per-token factor on loss and gradient; receives no gradient.

    Returns:
        The scalar loss, and detached per-token statistics of shape (N,): ``loss``, those of :meth:`Pair.statistics`,
        and ``factor`` with a ``weighting``.

    Raises:
        UserError: ``chunk_size`` is below 1, or a user's ``loss`` or ``weighting`` returns another shape.
    """
    chunks = _Chunks(loss, (student_hidden_ND, student_head), head_parameters, tokens_N, weights_N, teacher)
    statistics = chunks.run(_chunk_size(student_hidden_ND, student_head, chunk_size), base, weighting)
    value = (weights_N.detach() * statistics["loss"]).sum()
    if chunks.differentiate:
        value = _Attach.apply(value, chunks.scale, chunks.gradients, *chunks.inputs)
    return value, statistics


def _chunk_size(hidden_ND: Tensor, head: Head, given: int | None) -> int:
    if given is not None and given < 1:
        raise UserError(f"chunk_size: found {given}; use 1 or more tokens")
    if given is not None:
        return given
    return chunk_tokens(head(hidden_ND[:1].detach()).shape[-1])


def chunk_tokens(vocabulary: int, logits: int | None = None) -> int:
    """Tokens per chunk for a vocabulary of this size: enough for ``logits`` of them, but at least ``CHUNK_TOKENS``.

    Args:
        vocabulary: its size.
        logits: default ``CHUNK_LOGITS``.
    """
    return max(CHUNK_TOKENS, (CHUNK_LOGITS if logits is None else logits) // vocabulary)


class _Chunks:
    """One call of :func:`chunked_loss`: what all chunks share, and the gradients they add to.

    Args:
        loss: as for :func:`chunked_loss`, like all others except ``student``.
        student: hidden states and head.
    """

    def __init__(
        self,
        loss: Divergence | CrossEntropy,
        student: tuple[Tensor, Head],
        head_parameters: Sequence[Tensor],
        tokens_N: Tensor,
        weights_N: Tensor,
        teacher: tuple[Tensor, Head] | None,
    ) -> None:
        self.loss, self.tokens_N, self.teacher = loss, tokens_N, teacher
        self.hidden_ND, self.head = student
        self.trainable = [parameter for parameter in head_parameters if parameter.requires_grad]
        self.hidden_moves = self.hidden_ND.requires_grad
        self.inputs = [self.hidden_ND, *self.trainable] if self.hidden_moves else self.trainable
        self.differentiate = torch.is_grad_enabled() and bool(self.inputs)
        self.gradients = []
        if self.differentiate:
            self.gradients = [
                torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in self.inputs
            ]
        # Weights are around 1 / (tokens in the batch). Scale them to at most 1, or a float16 head would underflow.
        tiny = torch.finfo(weights_N.dtype).tiny
        self.scale = torch.cat([weights_N.detach().abs(), weights_N.new_full((1,), tiny)]).amax()
        self.scaled_N = weights_N.detach() / self.scale
        self.weight_VD = plain_weight(self.head, None if teacher is None else teacher[1])
        """The weight of the student's head if logits and gradients are computed from it, without autograd."""

    def run(self, size: int, base: tuple[Tensor, Head] | None, weighting: Weighting | None) -> dict[str, Tensor]:
        """Add every chunk to ``gradients``; returns the statistics of all tokens."""
        # Without tokens, run one empty chunk: zero loss, zero gradients, empty statistics.
        device = self.hidden_ND.device.type
        autocast = torch.is_autocast_enabled(device)
        weight_VD = self.weight_VD
        rounded = weight_VD is not None and (autocast or weight_VD.dtype == torch.bfloat16)
        with torch.autocast(device, enabled=autocast and weight_VD is None), _rounded_factors(rounded):
            starts = range(0, max(1, len(self.tokens_N)), size)
            chunks = [self._one(slice(start, start + size), base, weighting) for start in starts]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def _one(self, rows: slice, base: tuple[Tensor, Head] | None, weighting: Weighting | None) -> dict[str, Tensor]:
        # A separate function, so that one chunk's tensors are freed before the next chunk's logits are allocated.
        loss, tokens_n, weight_VD = self.loss, self.tokens_N[rows], self.weight_VD
        dtype = None if weight_VD is None else torch.float32
        hidden_nD = self.hidden_ND[rows].detach().to(dtype).requires_grad_(self.hidden_moves)
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight_VD is None):
            logits_nV = _logits(hidden_nD, self.head)
        with torch.no_grad():
            teacher_nV = None if self.teacher is None else _logits(self.teacher[0][rows].to(dtype), self.teacher[1])
            base_nV = None if base is None else _logits(base[0][rows].to(dtype), base[1])
            pair = Pair(logits_nV, teacher_nV, base_nV)
            del teacher_nV, base_nV
            logits_dtype = logits_nV.dtype
            if weight_VD is not None:
                del logits_nV
            statistics, scale_n = pair.statistics(tokens_n), self.scaled_N[rows]
            factor_n = None
            if weighting is not None:  # before the loss, which overwrites the pair
                factor_n = one_per_token(weighting(pair, tokens_n), tokens_n, "weighting", "factor")
            statistics["loss"], slope_nV = loss.value_and_slope(pair, statistics, tokens_n)
            if factor_n is not None:
                statistics["factor"] = factor_n
                statistics["loss"], scale_n = statistics["loss"] * factor_n, scale_n * factor_n
            if not self.differentiate:
                return statistics
            slope_nV = slope_nV.mul_(scale_n[:, None]).to(logits_dtype)
        leaves = [hidden_nD, *self.trainable] if self.hidden_moves else self.trainable
        sums = [self.gradients[0][rows], *self.gradients[1:]] if self.hidden_moves else self.gradients
        if weight_VD is None:
            for total, gradient in zip(sums, torch.autograd.grad(logits_nV, leaves, slope_nV), strict=True):
                total += gradient
            return statistics
        if self.hidden_moves:
            for entries, block_vD in _float32_blocks(weight_VD):
                sums[0].addmm_(slope_nV[:, entries], block_vD)
        if self.trainable:
            sums[-1].addmm_(slope_nV.T, hidden_nD.detach())
        return statistics


@contextmanager
def _rounded_factors(enabled: bool) -> Iterator[None]:
    """Let float32 matrix products round their factors; sums and results stay float32.

    On a CPU with AMX they are rounded to bfloat16, as autocast would, and the head's products take 0.3 to 0.5 of the
    time. On a GPU they are rounded to TF32, which keeps 3 more bits. Neither rounds factors that were bfloat16. Other
    hardware is unaffected. The setting is process-wide while the context is active.
    """
    if not enabled:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def plain_weight(head: Head, teacher_head: Head | None = None) -> Tensor | None:
    """The weight of a head that is a single matrix product in float32 or bfloat16; None for any other head.

    The product accumulates its gradient in place. With autograd, each chunk would first allocate another tensor of the
    head's size: 1.5 times the total time of loss and gradients, measured at V = 49,152 and 64 tokens per chunk. Under
    autocast to bfloat16 it would allocate three. And the logits of a bfloat16 head would be rounded to bfloat16.
    """
    if _is_plain(head) and (teacher_head is None or _is_plain(teacher_head)):
        return head.weight.detach()
    return None


def _is_plain(head: Head) -> TypeGuard[torch.nn.Linear]:
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    return head.weight.dtype in (torch.float32, torch.bfloat16)


def _logits(hidden_nD: Tensor, head: Head) -> Tensor:
    """The head's logits; from float32 hidden states and bfloat16 weights also in float32, without rounding them."""
    if hidden_nD.dtype != torch.float32 or not _is_plain(head) or head.weight.dtype == torch.float32:
        return head(hidden_nD)
    logits_nV = hidden_nD.new_empty(len(hidden_nD), len(head.weight))
    for entries, block_vD in _float32_blocks(head.weight):
        logits_nV[:, entries] = hidden_nD @ block_vD.T
    return logits_nV


def _float32_blocks(weight_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a weight as float32: all at once if they are, else in copies of ``CAST_WEIGHTS`` numbers."""
    if weight_VD.dtype == torch.float32:
        yield slice(None), weight_VD
        return
    vocabulary, size = weight_VD.shape
    rows = max(1, CAST_WEIGHTS // size)
    for start in range(0, vocabulary, rows):
        entries = slice(start, start + rows)
        yield entries, weight_VD[entries].float()


class _Attach(torch.autograd.Function):
    """The identity on a scalar, whose gradients with respect to ``inputs`` are already known up to a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(scale, *gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        scale, *gradients = ctx.saved_tensors
        return (None, None, None, *(gradient.mul_(incoming * scale) for gradient in gradients))
