"""Scoring: context ids and completion ids to the hidden states that predict the completion tokens.

The sampled ids are scored verbatim. Rows are padded on the right, after the completion, where causal attention never
looks: no attention mask and no position ids are needed, and a row's numbers do not depend on its neighbours.

Legend: B rows, L padded length of context and completion, T completion tokens, N completion tokens of all rows
without padding, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from selfdistill.models import Head, LoadedModel, body_and_head, head_agrees

PASS_TOKENS = 64
"""Tokens that take about as long as one more pass through the model: what a shared beginning must save."""


@dataclass(frozen=True)
class Scores:
    """What predicts each completion token, rows joined without padding."""

    hidden_ND: Tensor
    """Row n predicts completion token n. Logits (N, V) in place of hidden states where the head is the identity."""
    head: Head
    """hidden_ND to logits_NV."""
    head_parameters: tuple[Tensor, ...]
    """Trainable tensors that ``head`` uses."""


class Scorer:
    """Scores completions with a model, through body and head apart where the start-up probe allows.

    ``fused`` tells which: True, hidden states go through the head later, in chunks; False, the model caps or scales its
    logits and its own logits at the completion positions are taken.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.fused = head_agrees(loaded)
        self.pad_token_id = loaded.pad_token_id

    def __call__(self, model: Any, contexts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Scores:
        """Score completions under contexts; gradients flow unless the caller switched them off.

        Position: the logits at index t of a sequence predict token t + 1, so completion token j of a row with a context
        of length P is predicted at index P + j - 1. A beginning that several contexts have in common, such as a
        document or the chat template's system turn, is computed once, and gradients through it are those of all its
        rows together. Only under gradient checkpointing, where a pass cannot continue another, is every row computed
        whole.
        """
        assert all(contexts), "nothing predicts the first token after an empty context"
        device = next(model.parameters()).device
        parts = body_and_head(model) if self.fused else None
        if parts is None:
            logits_NV = self._hidden(partial(_logits, model), device, contexts, completions)
            return Scores(logits_NV, torch.nn.Identity(), ())
        body, head = parts
        trainable = tuple(p for p in head.parameters() if p.requires_grad)
        whole = torch.is_grad_enabled() and model.training  # train mode is there for checkpointing alone (Run)
        groups = [] if whole else shared_beginnings(contexts)
        grouped = {row for rows, _ in groups for row in rows}
        alone = [row for row in range(len(contexts)) if row not in grouped]
        by_row: dict[int, Tensor] = {}
        for rows, length in [*groups, *([(alone, 0)] if alone else [])]:
            cache = None
            if length:
                cache = DynamicCache(config=model.config.get_text_config())
                beginning = torch.tensor([contexts[rows[0]][:length]], device=device)
                body(input_ids=beginning, past_key_values=cache, use_cache=True)
                cache.batch_repeat_interleave(len(rows))
            forward = partial(_last_hidden, body, cache)
            chosen = [completions[row] for row in rows]
            hidden_ND = self._hidden(forward, device, [contexts[row][length:] for row in rows], chosen)
            if len(rows) == len(contexts) and rows == sorted(rows):
                return Scores(hidden_ND, head, trainable)
            by_row |= dict(zip(rows, hidden_ND.split([len(ids) for ids in chosen]), strict=True))
        return Scores(torch.cat([by_row[row] for row in range(len(contexts))]), head, trainable)

    def _hidden(
        self,
        forward: Callable[[Tensor], Tensor],
        device: torch.device,
        contexts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
    ) -> Tensor:
        """What ``forward`` says at the positions that predict the completions' tokens, rows joined."""
        rows = [[*context, *completion] for context, completion in zip(contexts, completions, strict=True)]
        width = max(map(len, rows))
        ids_BL = torch.tensor([row + [self.pad_token_id] * (width - len(row)) for row in rows], device=device)
        index_N = torch.tensor(
            [
                row * width + len(context) + j - 1
                for row, (context, completion) in enumerate(zip(contexts, completions, strict=True))
                for j in range(len(completion))
            ],
            device=device,
        )
        return forward(ids_BL).flatten(0, 1)[index_N]


def _logits(model: Any, ids_BL: Tensor) -> Tensor:
    return model(input_ids=ids_BL, use_cache=False).logits


def _last_hidden(body: Any, cache: DynamicCache | None, ids_BL: Tensor) -> Tensor:
    output = body(input_ids=ids_BL, past_key_values=cache, use_cache=cache is not None)
    return output.last_hidden_state


def shared_beginnings(contexts: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """Groups of rows whose common beginning is worth computing once: row numbers and its length.

    Sorted, contexts with a common beginning are neighbours; of all ways to cut that order into groups, the one that
    saves most tokens is taken, where each group costs ``PASS_TOKENS``. Rows that share too little are in no group.
    """
    order = sorted(range(len(contexts)), key=lambda row: list(contexts[row]))
    common = [common_beginning(contexts[a], contexts[b]) for a, b in pairwise(order)]
    saved = [0] * (len(order) + 1)  # most tokens saved among the first i rows
    cut = [0] * (len(order) + 1)  # where the last group of that best begins
    for end in range(1, len(order) + 1):
        saved[end], cut[end] = saved[end - 1], end - 1
        length = len(contexts[order[end - 1]])
        for start in range(end - 2, -1, -1):
            length = min(length, common[start])
            if length == 0:
                break
            gain = saved[start] + (end - start - 1) * length - PASS_TOKENS
            if gain > saved[end]:
                saved[end], cut[end] = gain, start
    groups, end = [], len(order)
    while end > 0:
        start = cut[end]
        if end - start > 1:
            groups.append((order[start:end], min(common[start : end - 1])))
        end = start
    return groups


def common_beginning(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning, at least one token short of either."""
    length = 0
    for x, y in zip(a[:-1], b[:-1], strict=False):
        if x != y:
            break
        length += 1
    return length
