"""The distance between a model and its base, in nats per token.

Legend: N completion tokens of all prompts, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfdistill.data import ChatFormat, Demonstration, drift_prompts, encode_prompts
from selfdistill.loss import CrossEntropy, Divergence, chunked_loss, forward_kl
from selfdistill.model import ForwardOutput, ForwardPass, LoadedModel, Sampling, rest_engine, sample

ANSWER_TOKENS = 32
"""Maximum length of an answer to a general prompt, in tokens."""
DRIFT_PROMPTS, DRIFT_TOKENS = 3, 16
"""Prompts of :func:`drift_from`, and the maximum length of their answers in tokens."""
_ROWS = 8  # prompts per batch
Own = Sequence[Sequence[bool]] | None
"""Whether each token of each completion is the model's own; None if all are."""


class Distance:
    """Mean KL(base||model) per token, over the base's own greedy answers to fixed prompts.

    Stores the base's logits, so the base model itself can be freed.

    Args:
        base: the model to measure from, in its current state.
        forward_pass: runs the models.
        chat: encodes the prompts.
        prompts: demonstrations whose prompts are used.
        max_tokens: maximum length of an answer.
    """

    def __init__(
        self,
        base: LoadedModel,
        forward_pass: ForwardPass,
        chat: ChatFormat,
        prompts: Sequence[Demonstration],
        max_tokens: int = ANSWER_TOKENS,
    ) -> None:
        self._forward_pass = forward_pass
        self._contexts = encode_prompts(prompts, chat)
        rollouts = sample(base, self._contexts, Sampling(max_tokens, temperature=0))
        rest_engine()
        self._completions = [rollout.ids for rollout in rollouts]
        self._base_NV = list(self._logits(base.model))

    def _logits(self, model: Any) -> Iterator[Tensor]:
        for start in range(0, len(self._contexts), _ROWS):
            part = slice(start, start + _ROWS)
            with torch.no_grad():
                scores = self._forward_pass(model, self._contexts[part], self._completions[part])
                logits_NV = scores.head(scores.hidden_ND).float()
            yield logits_NV

    @torch.no_grad()
    def of(self, model: Any) -> float:
        """KL(base||model) in nats per token."""
        parts = zip(self._base_NV, self._logits(model), strict=True)
        return float(torch.cat([forward_kl(mine, base) for base, mine in parts]).mean())


def drift_from(base: LoadedModel, forward_pass: ForwardPass, chat: ChatFormat) -> Distance:
    """A small :class:`Distance`, cheap enough to measure during training."""
    return Distance(base, forward_pass, chat, drift_prompts()[:DRIFT_PROMPTS], DRIFT_TOKENS)


@dataclass(frozen=True)
class Between:
    """Two models on the same prompts, each along its own greedy answers."""

    kl_base: float
    """KL(base||model) along the base's answers, nats per token."""
    kl_model: float
    """KL(model||base) along the model's answers, nats per token."""
    changed: float
    """Share of the model's answers that differ from the base's."""


def between(
    base: LoadedModel,
    model: LoadedModel,
    base_contexts: Sequence[Sequence[int]],
    model_contexts: Sequence[Sequence[int]],
    of_base: Sequence[Sequence[int]],
    of_model: Sequence[Sequence[int]],
    own: tuple[Own, Own] = (None, None),
) -> Between:
    """Both distances between two models with the same vocabulary.

    Args:
        base: the base model.
        model: the model to compare with it.
        base_contexts: token ids of the prompts in the base's chat template.
        model_contexts: the same in the model's.
        of_base: the base's answers, as token ids.
        of_model: the model's answers, as token ids.
        own: which tokens are the base's own, and which the model's.
    """
    changed = sum(list(a) != list(b) for a, b in zip(of_base, of_model, strict=True)) / len(of_base)
    return Between(
        kl_base=kl_along(model_contexts, of_base, base, model, base_contexts, own[0]),
        kl_model=kl_along(base_contexts, of_model, model, base, model_contexts, own[1]),
        changed=changed,
    )


@torch.no_grad()
def kl_along(
    contexts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    q: LoadedModel,
    p: LoadedModel,
    q_contexts: Sequence[Sequence[int]] | None = None,
    own: Own = None,
) -> float:
    """KL(q||p) along given completions, averaged over all tokens that count, in nats per token.

    Args:
        contexts: token ids of p's prompts.
        completions: token ids.
        q: the first model.
        p: the second model.
        q_contexts: token ids of q's prompts; default ``contexts``.
        own: which tokens of the completions count; None: all.
    """
    forward_passes, total, count = (ForwardPass(q), ForwardPass(p)), 0.0, 0
    for start in range(0, len(contexts), _ROWS):
        part = slice(start, start + _ROWS)
        ids = completions[part]
        theirs, mine = (
            forward_pass(loaded.model, shown[part], ids)
            for forward_pass, loaded, shown in zip(
                forward_passes, (q, p), (q_contexts or contexts, contexts), strict=True
            )
        )
        counted = None if own is None else own[part]
        value, _ = summed_loss(Divergence(), mine, ids, theirs, counted)
        total, count = total + float(value), count + sum(map(len, ids) if counted is None else map(sum, counted))
    return total / count


def summed_loss(
    loss: CrossEntropy | Divergence,
    student: ForwardOutput,
    ids: Sequence[Sequence[int]],
    teacher: ForwardOutput | None = None,
    own: Own = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The differentiable loss, summed over the ``own`` tokens of the completions ``ids``, and statistics of all
    tokens."""
    tokens_N = torch.tensor([token for row in ids for token in row], device=student.hidden_ND.device)
    return chunked_loss(
        loss,
        student.hidden_ND,
        student.head,
        student.head_parameters,
        tokens_N,
        _weights(tokens_N, own),
        (teacher.hidden_ND, teacher.head) if teacher else None,
        chunk_size=student.chunk_tokens,
    )


def _weights(tokens_N: Tensor, own: Own) -> Tensor:
    """1 for each token that counts, else 0."""
    if own is None:
        return torch.ones(len(tokens_N), device=tokens_N.device)
    return torch.tensor([float(one) for row in own for one in row], device=tokens_N.device)


@torch.no_grad()
def mean_loss(
    loaded: LoadedModel, contexts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], own: Own = None
) -> float:
    """-log p of completions, averaged over the ``own`` tokens of each and then over completions, in nats per token."""
    forward_pass, total = ForwardPass(loaded), 0.0
    for start in range(0, len(contexts), _ROWS):
        ids = completions[start : start + _ROWS]
        scores = forward_pass(loaded.model, contexts[start : start + _ROWS], ids)
        tokens_N = torch.tensor([token for row in ids for token in row], device=scores.hidden_ND.device)
        counted = [[True] * len(row) for row in ids] if own is None else own[start : start + _ROWS]
        weights_N = torch.tensor([one / sum(row) for row in counted for one in row], device=tokens_N.device)
        value, _ = chunked_loss(
            CrossEntropy(), scores.hidden_ND, scores.head, (), tokens_N, weights_N, chunk_size=scores.chunk_tokens
        )
        total += float(value)
    return total / len(contexts)
