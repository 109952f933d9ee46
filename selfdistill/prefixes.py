"""Beginnings of token sequences: which are worth computing once, and those of a frozen teacher, kept for later epochs.

Legend: B rows, L tokens of a context, H key/value heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

PASS_TOKENS = 64
"""Tokens that take about as long as one more pass through the model: what a shared beginning must save."""
WINDOW = 256
"""Contexts among which a shared beginning is looked for at a time, in sorted order: the search is quadratic in it."""

States = list[tuple[Tensor, ...]]
"""Keys and values of some tokens, layer by layer, each (L, H, C)."""


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


def as_attended(states: Tensor) -> Tensor:
    """Keys or values in the data type in which attention will use them: under autocast it would cast them each time."""
    device = states.device.type
    return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states


class KeptContexts:
    """Key and value states of contexts, for a model whose weights do not change: read at first use, then kept.

    Each context is read on its own, after the beginning that it shares with others of the data, and which contexts are
    kept is settled by the data and the budget: no number depends on the order in which batches ask for them.

    Args:
        contexts: all that will be asked for.
        budget_bytes: memory for the states, on the model's device. Contexts beyond it, in sorted order, are not kept.
    """

    def __init__(self, contexts: Iterable[Sequence[int]], budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._room: dict[tuple[int, ...], int] | None = None  # context that is kept, to its shared beginning's length
        self._states: dict[tuple[tuple[int, ...], int], States] = {}  # by token ids and the first of them that is meant
        self._shared: dict[tuple[int, ...], int] = {}
        unique = sorted({tuple(context) for context in contexts if len(context) > 1})
        for start in range(0, len(unique), WINDOW):
            window = unique[start : start + WINDOW]
            self._shared |= dict.fromkeys(window, 0)
            for rows, length in shared_beginnings(window):
                self._shared |= {window[row]: length for row in rows}

    @staticmethod
    def possible(config: Any) -> bool:
        """Whether the model's layers keep keys and values of every token: no sliding window, no recurrent state."""
        return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)

    def kept(self, body: Any, config: Any, contexts: Sequence[Sequence[int]]) -> list[int]:
        """Which of the contexts are kept, by number. ``body`` and ``config``: the same model at every call."""
        if self._room is None:
            self._room = {}
            one_token = self._read(body, config, next(iter(self._shared))[:1], []) if self._shared else []
            token_bytes = sum(t.numel() * t.element_size() for pair in one_token for t in pair)
            used, beginnings = 0, set()
            for context, shared in self._shared.items():
                used += len(context) - 1 - shared
                if shared and context[:shared] not in beginnings:
                    beginnings.add(context[:shared])
                    used += shared
                if used * token_bytes > self.budget_bytes:
                    break
                self._room[context] = shared
        return [number for number, context in enumerate(contexts) if tuple(context) in self._room]

    def cache(self, body: Any, config: Any, contexts: Sequence[Sequence[int]]) -> tuple[DynamicCache, Tensor]:
        """The states of all but each context's last token, padded on the right; all contexts are ``kept``.

        Returns:
            The cache, and ``filled_B``, how many of its places are filled in each row.
        """
        rows = [self._of_context(body, config, tuple(context)) for context in contexts]
        cache = DynamicCache(config=config)
        for layer in range(len(rows[0])):
            keys_BHLC, values_BHLC = (
                pad_sequence([row[layer][which] for row in rows], batch_first=True).transpose(1, 2) for which in (0, 1)
            )
            cache.update(keys_BHLC, values_BHLC, layer)
        return cache, torch.tensor([len(context) - 1 for context in contexts], device=rows[0][0][0].device)

    def _of_context(self, body: Any, config: Any, context: tuple[int, ...]) -> States:
        assert self._room is not None
        shared = self._room[context]
        beginning = self._once(body, config, context[:shared], []) if shared else []
        if len(context) - 1 == shared:
            return beginning
        rest = self._once(body, config, context[:-1], beginning)
        if not shared:
            return rest
        return [(torch.cat([k, k2]), torch.cat([v, v2])) for (k, v), (k2, v2) in zip(beginning, rest, strict=True)]

    def _once(self, body: Any, config: Any, ids: tuple[int, ...], before: States) -> States:
        key = ids, len(before[0][0]) if before else 0
        if key not in self._states:
            self._states[key] = self._read(body, config, ids, before)
        return self._states[key]

    def _read(self, body: Any, config: Any, ids: tuple[int, ...], before: States) -> States:
        """States of the tokens of ``ids`` that come after those of ``before``."""
        cache = DynamicCache(config=config)
        for layer, (keys_LHC, values_LHC) in enumerate(before):
            cache.update(keys_LHC.transpose(0, 1)[None], values_LHC.transpose(0, 1)[None], layer)
        done = cache.get_seq_length()
        device = next(body.parameters()).device
        body(input_ids=torch.tensor([ids[done:]], device=device), past_key_values=cache, use_cache=True)
        layers: Any = cache.layers  # typed for layers without keys too, which `possible` rules out
        return [
            tuple(as_attended(t[0, :, done:]).transpose(0, 1).contiguous() for t in (layer.keys, layer.values))
            for layer in layers
        ]
