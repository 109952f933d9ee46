"""The loss fused with the LM head: hidden states in, loss and gradients out, chunk by chunk.

Dimension suffixes: N tokens, n tokens in one chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfdistill.errors import UserError
from selfdistill.loss.divergence import CrossEntropy, Divergence, Pair

Head = Callable[[Tensor], Tensor]
Weighting = Callable[[dict[str, Tensor]], Tensor]
"""Maps per-token statistics (:func:`selfdistill.loss.divergence.token_statistics`) to one factor per token, (n,)."""

CHUNK_LOGITS = 5 * 2**19
"""Default number of logits per chunk: 10 MiB in float32. At most seven such tensors are alive at a time."""
CHUNK_TOKENS = 53
"""Default minimum of tokens per chunk, whatever the vocabulary size. Matrix products with fewer rows are slow, and each
chunk reads and writes the head's whole gradient."""


def chunked_loss(
    loss: Divergence | CrossEntropy,
    student_hidden_ND: Tensor,
    student_head: Head,
    head_parameters: Sequence[Tensor],
    tokens_N: Tensor,
    weights_N: Tensor,
    teacher_hidden_ND: Tensor | None = None,
    teacher_head: Head | None = None,
    chunk_size: int | None = None,
    *,
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
        teacher_hidden_ND: the teacher's hidden states for the same tokens; its D may differ. None for
            :class:`CrossEntropy` without a teacher.
        teacher_head: the teacher's head; default ``student_head``.
        chunk_size: tokens per chunk; default: enough for ``CHUNK_LOGITS`` logits, but at least ``CHUNK_TOKENS``.
        base: the base model's hidden states for the same tokens and its head, if the loss's target needs them.
        weighting: an extra per-token factor on loss and gradient; receives no gradient.

    Returns:
        The scalar loss, and detached per-token statistics of shape (N,): ``loss`` and those of
        :func:`token_statistics`.

    Raises:
        UserError: ``chunk_size`` is below 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise UserError(f"chunk_size: found {chunk_size}; use 1 or more tokens")
    if chunk_size is None:
        vocabulary = student_head(student_hidden_ND[:1].detach()).shape[-1]
        chunk_size = max(CHUNK_TOKENS, CHUNK_LOGITS // vocabulary)

    trainable = [parameter for parameter in head_parameters if parameter.requires_grad]
    hidden_moves = student_hidden_ND.requires_grad
    inputs = [student_hidden_ND, *trainable] if hidden_moves else trainable
    differentiate = torch.is_grad_enabled() and bool(inputs)
    gradients = []
    if differentiate:
        gradients = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in inputs]
    # Weights are around 1 / (tokens in the batch). Scale them to at most 1, or a float16 head would underflow.
    tiny = torch.finfo(weights_N.dtype).tiny
    scale = torch.cat([weights_N.detach().abs(), weights_N.new_full((1,), tiny)]).amax()
    scaled_N = weights_N.detach() / scale

    device = student_hidden_ND.device.type
    weight_VD = _plain_weight(student_head, teacher_head, device)
    dtype = None if weight_VD is None else torch.float32

    def run(rows: slice) -> dict[str, Tensor]:
        # A separate function, so that one chunk's tensors are freed before the next chunk's logits are allocated.
        hidden_nD = student_hidden_ND[rows].detach().to(dtype).requires_grad_(hidden_moves)
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight_VD is None):
            logits_nV = student_head(hidden_nD)
        with torch.no_grad():
            teacher_nV = None
            if teacher_hidden_ND is not None:
                teacher_nV = (teacher_head or student_head)(teacher_hidden_ND[rows].to(dtype))
            pair = Pair(logits_nV, teacher_nV)
            del teacher_nV
            logits_dtype = logits_nV.dtype
            if weight_VD is not None:
                del logits_nV
            statistics = pair.statistics(tokens_N[rows])
            aim, known = pair, statistics
            if isinstance(loss, Divergence) and loss.target is not None and pair.log_q_NV is not None:
                base_nV = None if base is None else base[1](base[0][rows].to(dtype))
                aim = pair.towards(loss.target, base_nV)
                known = aim.statistics(tokens_N[rows])
            statistics["loss"], slope_nV = loss.value_and_slope(aim, known, tokens_N[rows])
            scale_n = scaled_N[rows]
            if weighting is not None:
                factor_n = weighting(statistics)
                statistics["loss"], scale_n = statistics["loss"] * factor_n, scale_n * factor_n
            if not differentiate:
                return statistics
            slope_nV = slope_nV.mul_(scale_n[:, None]).to(logits_dtype)
        leaves = [hidden_nD, *trainable] if hidden_moves else trainable
        sums = [gradients[0][rows], *gradients[1:]] if hidden_moves else gradients
        if weight_VD is None:
            for total, gradient in zip(sums, torch.autograd.grad(logits_nV, leaves, slope_nV), strict=True):
                total += gradient
            return statistics
        if hidden_moves:
            torch.mm(slope_nV, weight_VD, out=sums[0])
        if trainable:
            sums[-1].addmm_(slope_nV.T, hidden_nD.detach())
        return statistics

    # Without tokens, run one empty chunk: zero loss, zero gradients, empty statistics.
    autocast = torch.is_autocast_enabled(device)
    plain = weight_VD is not None
    with torch.autocast(device, enabled=autocast and not plain), _rounded_factors(autocast and plain):
        chunks = [run(slice(start, start + chunk_size)) for start in range(0, max(1, len(tokens_N)), chunk_size)]
    statistics = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    value = (weights_N.detach() * statistics["loss"]).sum()
    if differentiate:
        value = _Attach.apply(value, scale, gradients, *inputs)
    return value, statistics


@contextmanager
def _rounded_factors(enabled: bool) -> Iterator[None]:
    """Let float32 matrix products round their factors to bfloat16, as autocast would; sums and results stay float32.

    On a CPU with AMX the head's products then take 0.3 to 0.5 of the time. Other hardware is unaffected. The setting is
    process-wide while the context is active.
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


def _plain_weight(head: Head, teacher_head: Head | None, device: str) -> Tensor | None:
    """The weight of a head that is a single float32 matrix product; None for any other head.

    The product accumulates its gradient in place. With autograd, each chunk would first allocate another tensor of the
    head's size: 1.5 times the total time of loss and gradients, measured at V = 49,152 and 64 tokens per chunk. Under
    autocast to bfloat16 it would allocate three. So on a CPU the head's sums stay in float32; GPUs use bfloat16.
    """
    if device != "cpu" and torch.is_autocast_enabled(device):
        return None
    for module in (head, teacher_head or head):
        if type(module) is not torch.nn.Linear or module.bias is not None or module.weight.dtype != torch.float32:
            return None
    assert isinstance(head, torch.nn.Linear)
    return head.weight.detach()


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
