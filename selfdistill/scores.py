"""Scoring: context ids and completion ids to the hidden states that predict the completion tokens.

The sampled ids are scored verbatim. Rows are padded on the right, after the completion, where causal attention never
looks: no attention mask and no position ids are needed, and a row's numbers do not depend on its neighbours.

Legend: B rows, L padded length of context and completion, T completion tokens, N completion tokens of all rows
without padding, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfdistill.models import Head, LoadedModel, body_and_head, head_agrees


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
        of length P is predicted at index P + j - 1.
        """
        device = next(model.parameters()).device
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
        parts = body_and_head(model) if self.fused else None
        if parts is None:
            logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
            return Scores(logits_BLV.flatten(0, 1)[index_N], torch.nn.Identity(), ())
        body, head = parts
        hidden_BLD = body(input_ids=ids_BL, use_cache=False).last_hidden_state
        trainable = tuple(p for p in head.parameters() if p.requires_grad)
        return Scores(hidden_BLD.flatten(0, 1)[index_N], head, trainable)
