"""Scoring: context ids and completion ids to the hidden states that predict the completion tokens.

The sampled ids are scored verbatim. Rows are padded on the right, after the completion, where causal attention never
looks: no attention mask and no position ids are needed there, only for contexts of unlike lengths that were kept. A
row's numbers are its own, but for rounding.

Legend: B rows, L padded length of context and completion, T completion tokens, N completion tokens of all rows
without padding, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from selfdistill.loss import Head
from selfdistill.model.compiled import CompiledLayers
from selfdistill.model.head import body_and_head, head_agrees
from selfdistill.model.loading import LoadedModel
from selfdistill.model.prefix_cache import PrefixCache, can_continue_cache, has_full_attention, shared_prefixes
from selfdistill.runtime import broadcast_from_rank0

PLAIN_ATTENTION_TOKENS = 128
"""Up to this many tokens plain attention trains faster than fused attention, with bfloat16 on the CPU."""


@dataclass(frozen=True)
class ForwardOutput:
    """What predicts each completion token, rows joined without padding."""

    hidden_ND: Tensor
    """Row n predicts completion token n. Logits (N, V) in place of hidden states where the head is the identity."""
    head: Head
    """hidden_ND to logits_NV."""
    head_parameters: tuple[Tensor, ...]
    """Trainable tensors that ``head`` uses."""


class ForwardPass:
    """Scores completions with a model, through body and head apart where the start-up probe allows.

    ``fused`` tells which: True, hidden states go through the head later, in chunks; False, the model changes its logits
    after the head in a way that is not known, and its own logits at the completion positions are taken.

    Args:
        loaded: the model, of whose kind are all models that score.
        compiled: its layers, used where gradients flow.
        sharded: models are sharded, so that every process must do the same passes: each call is a single one.
    """

    def __init__(self, loaded: LoadedModel, compiled: CompiledLayers | None = None, *, sharded: bool = False) -> None:
        self._compiled, self._sharded = compiled, sharded
        self.fused = broadcast_from_rank0(lambda: head_agrees(loaded)) if sharded else head_agrees(loaded)
        self._continues = can_continue_cache(loaded)
        self._keeps = self.fused and self._continues and has_full_attention(loaded.model.config.get_text_config())
        self.pad_token_id = loaded.pad_token_id

    def keep(self, contexts: Iterable[Sequence[int]], budget_bytes: int) -> PrefixCache | None:
        """Room for what a model that does not change has read of these contexts; None for a model that cannot."""
        return PrefixCache(contexts, budget_bytes) if budget_bytes and self._keeps else None

    def __call__(
        self,
        model: Any,
        contexts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        kept: PrefixCache | None = None,
    ) -> ForwardOutput:
        """Score completions under contexts; gradients flow unless the caller switched them off.

        Position: the logits at index t of a sequence predict token t + 1, so completion token j of a row with a context
        of length P is predicted at index P + j - 1. A beginning that several contexts have in common, such as a
        document or the chat template's system turn, is computed once, and gradients through it are those of all its
        rows together. Only under gradient checkpointing, where a pass cannot continue another, and with compiled
        layers, which would be compiled for each layer's cache, is every row with gradients computed whole; and every
        row of sharded models.

        Args:
            model: scores; for ``kept`` to be right, it must be the same weights at every call.
            contexts: token ids, at least one each.
            completions: token ids.
            kept: states of the contexts, where the model does not change. No gradient flows then.
        """
        assert all(contexts), "nothing predicts the first token after an empty context"
        device = next(model.parameters()).device
        parts = body_and_head(model) if self.fused else None
        if parts is None:
            logits_NV = self._hidden(partial(_logits, model), model, contexts, completions)
            return ForwardOutput(logits_NV, torch.nn.Identity(), ())
        body, head = parts
        trainable = tuple(p for p in head.parameters() if p.requires_grad)
        config = model.config.get_text_config()
        passes: list[tuple[list[int], list[int], Callable[[Tensor], Tensor]]] = []  # rows, tokens already read, forward
        held = kept.kept(body, config, contexts) if kept else []
        if kept and held:
            cache, filled_B = kept.cache(body, config, [contexts[row] for row in held])
            passes.append((held, filled_B.tolist(), partial(_last_hidden, body, cache, filled_B)))
        left = sorted(set(range(len(contexts))) - set(held))
        # Train mode is there for checkpointing alone (Run).
        whole = self._sharded or (torch.is_grad_enabled() and (model.training or self._compiled is not None))
        for group, length in [] if whole or not self._continues else shared_prefixes([contexts[row] for row in left]):
            rows = [left[row] for row in group]
            cache = DynamicCache(config=config)
            beginning = torch.tensor([contexts[rows[0]][:length]], device=device)
            with _attention(model, beginning):
                _last_hidden(body, cache, None, beginning)
            cache.batch_repeat_interleave(len(rows))
            passes.append((rows, [length] * len(rows), partial(_last_hidden, body, cache, None)))
        alone = sorted(set(left) - {row for rows, *_ in passes for row in rows})
        if alone:
            passes.append((alone, [0] * len(alone), partial(_last_hidden, body, None, None)))
        by_row: dict[int, Tensor] = {}
        for rows, lengths, forward in passes:
            chosen = [completions[row] for row in rows]
            rest = [contexts[row][length:] for row, length in zip(rows, lengths, strict=True)]
            hidden_ND = self._hidden(forward, model, rest, chosen)
            if rows == list(range(len(contexts))):
                return ForwardOutput(hidden_ND, head, trainable)
            by_row |= dict(zip(rows, hidden_ND.split([len(ids) for ids in chosen]), strict=True))
        return ForwardOutput(torch.cat([by_row[row] for row in range(len(contexts))]), head, trainable)

    def _hidden(
        self,
        forward: Callable[[Tensor], Tensor],
        model: Any,
        contexts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
    ) -> Tensor:
        """What ``forward`` says at the positions that predict the completions' tokens, rows joined."""
        rows = [[*context, *completion] for context, completion in zip(contexts, completions, strict=True)]
        width, device = max(map(len, rows)), next(model.parameters()).device
        ids_BL = torch.tensor([row + [self.pad_token_id] * (width - len(row)) for row in rows], device=device)
        index_N = torch.tensor(
            [
                row * width + len(context) + j - 1
                for row, (context, completion) in enumerate(zip(contexts, completions, strict=True))
                for j in range(len(completion))
            ],
            device=device,
        )
        # What is compiled keeps the attention kernel of its first pass, so there it is always torch's choice.
        with self._compiled.active() if self._compiled and torch.is_grad_enabled() else _attention(model, ids_BL):
            return forward(ids_BL).flatten(0, 1)[index_N]


def _logits(model: Any, ids_BL: Tensor) -> Tensor:
    return model(input_ids=ids_BL, use_cache=False).logits


def _last_hidden(body: Any, cache: DynamicCache | None, filled_B: Tensor | None, ids_BL: Tensor) -> Tensor:
    """Hidden states; ``filled_B`` of the cache's places count in each row, all of them where it is None."""
    places: dict[str, Tensor] = {}
    if cache is not None and filled_B is not None:
        width = cache.get_seq_length()
        mask_BL = torch.arange(width, device=filled_B.device) >= width - filled_B[:, None]
        own_BL = torch.ones_like(ids_BL, dtype=torch.bool)
        position_BL = filled_B[:, None] + torch.arange(ids_BL.shape[1], device=ids_BL.device)
        places = {"attention_mask": torch.cat([mask_BL, own_BL], dim=1).long(), "position_ids": position_BL}
    return body(input_ids=ids_BL, past_key_values=cache, use_cache=cache is not None, **places).last_hidden_state


def _attention(module: Any, ids_BL: Tensor) -> AbstractContextManager[None]:
    """Which attention kernel a pass uses: torch's choice, except where its backward pass is known to be slow.

    On the CPU plain matrix products are faster than fused attention's backward pass in bfloat16 where sequences are
    short: 0.7 of the time of the whole model's backward pass with 44 tokens, no less with 350. Not under gradient
    checkpointing (train mode): what it recomputes later must be what was computed here.
    """
    plain = (
        ids_BL.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.is_grad_enabled()
        and not module.training
        and ids_BL.shape[1] <= PLAIN_ATTENTION_TOKENS
    )
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
