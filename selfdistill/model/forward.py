"""The forward pass: from context and completion ids to the hidden states that predict the completion tokens.

Sampled ids are scored as they are, without retokenisation. Sequences are right-padded, where causal attention never
looks, so no attention mask or position ids are needed; only cached contexts of different lengths need them. Up to
rounding, a sequence's results do not depend on the batch.

Legend: B sequences, L padded length of context plus completion, N completion tokens of all sequences without padding, D
hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from selfdistill.data import PromptIds, pictures_in
from selfdistill.loss import Head
from selfdistill.model.compiled import CompiledLayers
from selfdistill.model.device import any_length, loss_tokens, padded_length, pass_tokens, trains_on_plain_attention
from selfdistill.model.head import body_and_head, head_agrees
from selfdistill.model.loading import LoadedModel
from selfdistill.model.prefix_cache import PrefixCache, can_continue_cache, has_full_attention, shared_prefixes
from selfdistill.runtime import broadcast_from_rank0


@dataclass(frozen=True)
class ForwardOutput:
    """The states that predict each completion token, all sequences concatenated without padding."""

    hidden_ND: Tensor
    """Entry n predicts completion token n. Holds logits (N, V) if the head is the identity."""
    head: Head
    """Maps hidden_ND to logits_NV."""
    head_parameters: tuple[Tensor, ...]
    """Trainable tensors used by ``head``."""
    chunk_tokens: int
    """Tokens per chunk of a loss on these states, for the device of the pass."""


@dataclass(frozen=True)
class _Pass:
    """Some of a call's sequences, which go through the body together."""

    rows: list[int]
    """Which sequences."""
    cached: list[int]
    """Of each, how many tokens of its context are already read."""
    forward: Callable[..., Tensor]
    """Maps the ids of the rest, and inputs for its pictures, to hidden states."""


class ForwardPass:
    """Runs a model over completions, separately through body and head if the start-up probe allows.

    ``fused`` is True if hidden states can go through the head later, in chunks. It is False if the model transforms its
    logits in an unknown way; then the output holds the model's own logits at the completion positions.

    Args:
        loaded: the model. All models passed to a call must have its architecture.
        compiled: its compiled layers, used in passes with gradients.
        sharded: whether models are sharded, or will be. Then each call is one pass, because all ranks must run the same
            passes, and it is not probed whether a pass can continue another.
        kind: the kind of device for which passes are chosen; default: the model's.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        compiled: CompiledLayers | None = None,
        *,
        sharded: bool = False,
        kind: str | None = None,
    ) -> None:
        self._loaded, self._compiled, self._kind, self._window = loaded, compiled, kind, loaded.window
        self._sharded = sharded
        self.fused = broadcast_from_rank0(lambda: head_agrees(loaded)) if sharded else head_agrees(loaded)
        self._continues = not sharded and can_continue_cache(loaded)
        self._keeps = self.fused and self._continues and has_full_attention(loaded.model.config.get_text_config())
        self.pad_token_id, self._pictures = loaded.pad_token_id, loaded.pictures

    def keep(self, contexts: Iterable[Sequence[int]], budget_bytes: int) -> PrefixCache | None:
        """A cache of these contexts' states for a model with fixed weights; None if unsupported or without a budget."""
        contexts = [context for context in contexts if not pictures_in(context)]
        if not budget_bytes or not self._keeps:
            return None
        return PrefixCache(contexts, budget_bytes, pass_tokens(self._kind_of(self._loaded.model)))

    def __call__(
        self,
        model: Any,
        contexts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        prefix_cache: PrefixCache | None = None,
    ) -> ForwardOutput:
        """Run the model over each context followed by its completion; differentiable unless under ``no_grad``.

        The logits at index t of a sequence predict token t + 1. With a context of length P, completion token j is
        therefore predicted at index P + j - 1. A prefix shared by several contexts, such as a document or the chat
        template's system turn, is computed once where that is possible, and its gradients sum over those sequences.

        Args:
            model: the network to run. With ``prefix_cache``, its weights must be the same at every call.
            contexts: token ids, at least one per context.
            completions: token ids.
            prefix_cache: cached states of the contexts, for a model with fixed weights; needs ``no_grad``.
        """
        assert all(contexts), "an empty context predicts no first token"
        if self._pictures is not None:  # now, as a shared or cached beginning is read without pictures
            self._pictures.check(contexts)
        kind = self._kind_of(model)
        chunk_tokens = loss_tokens(model.config.get_text_config().vocab_size, kind)
        parts = body_and_head(model) if self.fused else None
        if parts is None:
            logits_NV = self._hidden(partial(_logits, model), model, contexts, completions, 0)
            return ForwardOutput(logits_NV, torch.nn.Identity(), (), chunk_tokens)
        body, head = parts
        trainable = tuple(p for p in head.parameters() if p.requires_grad)
        hidden_of: dict[int, Tensor] = {}
        lengths = [len(context) + len(ids) for context, ids in zip(contexts, completions, strict=True)]
        with any_length(kind):
            passes = self._passes(model, body, contexts, lengths, prefix_cache)
        for one in passes:
            chosen = [completions[row] for row in one.rows]
            # Whole contexts as they are, because a slice has no pictures.
            rest = [contexts[row][n:] if n else contexts[row] for row, n in zip(one.rows, one.cached, strict=True)]
            hidden_ND = self._hidden(one.forward, model, rest, chosen, max(one.cached))
            if one.rows == list(range(len(contexts))):
                return ForwardOutput(hidden_ND, head, trainable, chunk_tokens)
            hidden_of |= dict(zip(one.rows, hidden_ND.split([len(ids) for ids in chosen]), strict=True))
        hidden_ND = torch.cat([hidden_of[row] for row in range(len(contexts))])
        return ForwardOutput(hidden_ND, head, trainable, chunk_tokens)

    def _kind_of(self, model: Any) -> str:
        """The kind of device for which this model's passes are chosen."""
        return self._kind or str(next(model.parameters()).device.type)

    def _passes(
        self,
        model: Any,
        body: Any,
        contexts: Sequence[Sequence[int]],
        lengths: Sequence[int],
        prefix_cache: PrefixCache | None,
    ) -> list[_Pass]:
        """The passes of a call: after cached contexts, after each prefix that several share, and of all others by
        length."""
        config = model.config.get_text_config()
        passes: list[_Pass] = []
        held = prefix_cache.kept(body, config, contexts) if prefix_cache else []
        if prefix_cache and held:
            cache, filled_B = prefix_cache.cache(body, config, [contexts[row] for row in held])
            passes.append(_Pass(held, filled_B.tolist(), partial(_last_hidden, body, cache, filled_B, self._window)))
        left = sorted(set(range(len(contexts))) - set(held))
        for group, length in self._shared(model, [contexts[row] for row in left]):
            rows = [left[place] for place in group]
            cache = self._read(model, body, contexts[rows[0]], length)
            cache.batch_repeat_interleave(len(rows))
            passes.append(_Pass(rows, [length] * len(rows), partial(_last_hidden, body, cache, None, None)))
        alone = sorted(set(left) - {row for one in passes for row in one.rows})
        # Sharded models need the same passes on all ranks, and compiled layers would be recompiled for a single row.
        in_one = self._sharded or (torch.is_grad_enabled() and self._compiled is not None)
        worth_it = math.inf if in_one else pass_tokens(self._kind_of(model))
        for group in similar_lengths([lengths[row] for row in alone], worth_it):
            rows = [alone[place] for place in group]
            passes.append(_Pass(rows, [0] * len(rows), partial(_last_hidden, body, None, None, None)))
        return passes

    def _shared(self, model: Any, contexts: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
        """Groups of contexts with a shared prefix, as :func:`shared_prefixes`. All their pictures are in the prefix.

        Sequences with gradients are computed in full under gradient checkpointing, where a pass cannot continue
        another, and with compiled layers, which would be recompiled for each layer's cache. With sharded models all
        are computed in full.
        """
        # Train mode means gradient checkpointing (see set_recomputing).
        in_full = torch.is_grad_enabled() and (model.training or self._compiled is not None)
        if in_full or not self._continues:
            return []
        worth_it = pass_tokens(self._kind_of(model))
        if self._pictures is None:
            return shared_prefixes(contexts, worth_it)
        sets = {pictures: -1 - n for n, pictures in enumerate(dict.fromkeys(map(pictures_in, contexts)))}
        # Equal token ids may mean different pictures, so those of a context are a token of their own.
        told = [[sets[pictures_in(ids)], *ids] for ids in contexts]
        groups = shared_prefixes(told, worth_it)
        mark = self._pictures.token_id
        return [
            (rows, n - 1) for rows, n in groups if n > 1 and all(mark not in contexts[row][n - 1 :] for row in rows)
        ]

    def _read(self, model: Any, body: Any, context: Sequence[int], length: int) -> DynamicCache:
        """The states of a context's first tokens, among which are all its pictures."""
        ids_BL = torch.tensor([context[:length]], device=next(model.parameters()).device)
        seen = self._seen(model, [PromptIds(context[:length], pictures_in(context))], ids_BL)
        cache = DynamicCache(config=model.config.get_text_config())
        with _attention(model, ids_BL, self._kind_of(model)):
            _last_hidden(body, cache, None, None, ids_BL, **seen)
        return cache

    def _seen(self, model: Any, contexts: Sequence[Sequence[int]], ids_BL: Tensor) -> dict[str, Any]:
        """Inputs for the pictures of contexts that begin these sequences."""
        return {} if self._pictures is None else self._pictures.inputs(model, contexts, ids_BL, [0] * len(contexts))

    def _hidden(
        self,
        forward: Callable[..., Tensor],
        model: Any,
        contexts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        read: int,
    ) -> Tensor:
        """The output of ``forward`` at the positions that predict completion tokens, concatenated.

        ``read`` is the number of cached tokens before each sequence.
        """
        rows = [[*context, *completion] for context, completion in zip(contexts, completions, strict=True)]
        device, kind = next(model.parameters()).device, self._kind_of(model)
        room = None if self._window is None else self._window - read
        width = padded_length(max(map(len, rows)), room, kind)
        ids_BL = torch.tensor([row + [self.pad_token_id] * (width - len(row)) for row in rows], device=device)
        index_N = torch.tensor(
            [
                row * width + len(context) + j - 1
                for row, (context, completion) in enumerate(zip(contexts, completions, strict=True))
                for j in range(len(completion))
            ],
            device=device,
        )
        seen = self._seen(model, contexts, ids_BL)
        # Compiled layers keep the attention kernel of their first pass, so leave the choice to PyTorch.
        compiled = self._compiled if torch.is_grad_enabled() else None
        kernels = compiled.active() if compiled else _attention(model, ids_BL, kind)
        with kernels, any_length(kind) if read else nullcontext():  # a cache has any length
            return forward(ids_BL, **seen).flatten(0, 1)[index_N]


def similar_lengths(lengths: Sequence[int], pass_tokens: float) -> list[list[int]]:
    """Divide sequences into passes, so that little is padding.

    Of all divisions of the sequences in order of their lengths, this has the fewest tokens, where each pass counts its
    padding and ``pass_tokens`` more.

    Args:
        lengths: tokens of each sequence.
        pass_tokens: tokens that take about as long as one more pass; infinite for one pass of all.

    Returns:
        The indices of each pass, in order.
    """
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    fewest, cut = [0.0], [0]  # of the first n sequences: their tokens, and where the last pass begins
    for end, last in enumerate(order, 1):
        ways = [(fewest[start] + (end - start) * lengths[last] + pass_tokens, start) for start in range(end)]
        tokens, start = min(ways)
        fewest.append(tokens)
        cut.append(start)
    passes, end = [], len(order)
    while end > 0:
        passes.append(sorted(order[cut[end] : end]))
        end = cut[end]
    return passes


def _logits(model: Any, ids_BL: Tensor, **seen: Any) -> Tensor:
    return model(input_ids=ids_BL, use_cache=False, **seen).logits


def _last_hidden(
    body: Any,
    cache: DynamicCache | None,
    filled_B: Tensor | None,
    window: int | None,
    ids_BL: Tensor,
    **seen: Any,
) -> Tensor:
    """Hidden states.

    Args:
        body: the model without its head.
        cache: states of the tokens before; None: there are none.
        filled_B: the number of valid cache positions per sequence; None: all.
        window: the model's, beyond which padding gets no positions; None if it has none.
        ids_BL: token ids.
        seen: inputs for the pictures.
    """
    places: dict[str, Tensor] = {}
    if cache is not None and filled_B is not None:
        width = cache.get_seq_length()
        mask_BL = torch.arange(width, device=filled_B.device) >= width - filled_B[:, None]
        own_BL = torch.ones_like(ids_BL, dtype=torch.bool)
        position_BL = filled_B[:, None] + torch.arange(ids_BL.shape[1], device=ids_BL.device)
        if window is not None:  # learnt positions end there, and rotary ones may change beyond
            position_BL = position_BL.clamp(max=window - 1)
        places = {"attention_mask": torch.cat([mask_BL, own_BL], dim=1).long(), "position_ids": position_BL}
    return body(
        input_ids=ids_BL, past_key_values=cache, use_cache=cache is not None, **places, **seen
    ).last_hidden_state


def _attention(module: Any, ids_BL: Tensor, kind: str) -> AbstractContextManager[None]:
    """Select the attention kernel: PyTorch's choice, except where its backward pass is known to be slow.

    Plain matrix products are not used under gradient checkpointing (train mode), where recomputation must repeat the
    same computation.
    """
    plain = (
        torch.is_autocast_enabled("cpu")
        and torch.is_grad_enabled()
        and not module.training
        and trains_on_plain_attention(ids_BL.shape[1], kind)
    )
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
