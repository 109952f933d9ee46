"""Shared prefixes of token sequences, and the prefix cache of a frozen teacher for later epochs.

Legend: B sequences, L tokens, V vocabulary, H key/value heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from selfdistill.model.loading import LoadedModel

PASS_TOKENS = 64
"""Tokens that take about as long as one extra forward pass: what a shared prefix must save."""
SEARCH_WINDOW = 256
"""Contexts, in sorted order, that one search for shared prefixes covers; the search is quadratic in this number."""

PROBE_GAP = 300
"""Padding in the start-up probe: longer than the local window of models that do not declare it as sliding."""

States = list[tuple[Tensor, ...]]
"""Keys and values of some tokens, layer by layer, each (H, L, C)."""


def shared_prefixes(contexts: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """Groups of contexts whose shared prefix is worth computing once: their indices and the prefix length.

    In sorted order, contexts with a shared prefix are adjacent. Of all partitions of that order into groups, this is
    the one that saves the most tokens, at a cost of ``PASS_TOKENS`` per group. Contexts that share too little are in no
    group.
    """
    order = sorted(range(len(contexts)), key=lambda row: list(contexts[row]))
    common = [common_prefix_length(contexts[a], contexts[b]) for a, b in pairwise(order)]
    saved = [0] * (len(order) + 1)  # most tokens saved among the first i contexts
    cut = [0] * (len(order) + 1)  # where the last group of that optimum begins
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


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix, at least one token shorter than either sequence."""
    length = 0
    for x, y in zip(a[:-1], b[:-1], strict=False):
        if x != y:
            break
        length += 1
    return length


@torch.no_grad()
def can_continue_cache(loaded: LoadedModel) -> bool:
    """Start-up probe: does continuing from cached states, across padding, give the same result as a single pass?

    False for models that take no such cache, have a recurrent state, or use cache indices in place of position ids
    (MPT's attention bias, GPT-Neo's local windows). Their sequences are then computed in full, with padding on one side
    only. Runs once per ``loaded``.
    """
    if loaded.continues_cache is None:
        try:
            loaded.continues_cache = _continues(loaded)
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            loaded.continues_cache = False
    return loaded.continues_cache


def _continues(loaded: LoadedModel) -> bool:
    config = loaded.model.config.get_text_config()
    begun, rest = 8, 4
    cache = DynamicCache(config=config)
    longest = PROBE_GAP if loaded.window is None else min(PROBE_GAP, loaded.window - begun - rest)
    gap = 0 if any(cache.is_sliding) else longest  # with a sliding window, callers leave no gap
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(config.vocab_size, (1, begun + rest), generator=generator).to(loaded.device)
    whole_BLV = loaded.model(input_ids=ids_BL, use_cache=False).logits[:, begun:]
    loaded.model(input_ids=ids_BL[:, :begun], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(2)
    padding_BL = torch.full((1, gap), loaded.pad_token_id, device=loaded.device)
    mask_BL = torch.tensor([[1] * begun + [0] * gap + [1] * rest], device=loaded.device)
    continued_BLV = loaded.model(
        input_ids=torch.cat([padding_BL, ids_BL[:, begun:]], dim=1).expand(2, -1),
        attention_mask=mask_BL.expand(2, -1),
        position_ids=(mask_BL.cumsum(1)[:, begun:] - 1).expand(2, -1),
        past_key_values=cache,
        use_cache=True,
    ).logits[:, gap:]
    tolerance = 1e-3 if whole_BLV.dtype == torch.float32 else 5e-2
    error = (continued_BLV - whole_BLV).abs().max()
    return bool(error <= tolerance * whole_BLV.abs().max().clamp(min=1.0))


def in_attention_dtype(states: Tensor) -> Tensor:
    """Keys or values in the data type that attention uses; autocast would otherwise cast them every time."""
    device = states.device.type
    return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states


class PrefixCache:
    """Cache of the contexts' key and value states for a model with fixed weights, filled at first use.

    Each context is computed separately, after the prefix that it shares with others (among ``SEARCH_WINDOW`` neighbours
    in sorted order). Only the data and the budget decide which contexts are cached, so results do not depend on the
    order of batches. Requires :func:`can_continue_cache` and layers that keep every token.

    Args:
        contexts: all contexts that will be requested.
        budget_bytes: memory for the states, on the model's device. Contexts beyond it, in sorted order, are not cached.
            A batch in use needs a copy, padded to one length, in addition.
    """

    def __init__(self, contexts: Iterable[Sequence[int]], budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._room: dict[tuple[int, ...], int] | None = None  # cached context -> length of its shared prefix
        self._states: dict[tuple[tuple[int, ...], int], States] = {}  # by token ids and the index of the first state
        self._shared: dict[tuple[int, ...], int] = {}
        unique = sorted({tuple(context) for context in contexts if len(context) > 1})
        for start in range(0, len(unique), SEARCH_WINDOW):
            window = unique[start : start + SEARCH_WINDOW]
            self._shared |= dict.fromkeys(window, 0)
            for rows, length in shared_prefixes(window):
                self._shared |= {window[row]: length for row in rows}

    def kept(self, body: Any, config: Any, contexts: Sequence[Sequence[int]]) -> list[int]:
        """Indices of the contexts that are cached. ``body`` and ``config`` must be the same model at every call."""
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
        """The left-padded states of all but each context's last token; all contexts must be ``kept``.

        Returns:
            The cache, and ``filled_B``, the number of valid positions per sequence.
        """
        rows = [self._parts(body, config, tuple(context)) for context in contexts]
        filled = [len(context) - 1 for context in contexts]
        width = max(filled)
        cache = DynamicCache(config=config)
        layers: Any = cache.layers
        for number, layer in enumerate(layers):
            pair = []
            for which in (0, 1):
                first_HLC = rows[0][0][number][which]
                states_BHLC = first_HLC.new_zeros(len(rows), len(first_HLC), width, first_HLC.shape[-1])
                for row_HLC, parts, length in zip(states_BHLC, rows, filled, strict=True):
                    torch.cat([part[number][which] for part in parts], dim=1, out=row_HLC[:, width - length :])
                pair.append(states_BHLC)
            layer.lazy_initialization(*pair)
            layer.keys, layer.values = pair
        return cache, torch.tensor(filled, device=layers[0].device)

    def _parts(self, body: Any, config: Any, context: tuple[int, ...]) -> list[States]:
        """The states of the shared prefix and of the tokens after it, omitting empty parts."""
        assert self._room is not None
        shared = self._room[context]
        parts = [self._once(body, config, context[:shared], [])] if shared else []
        if len(context) - 1 > shared:
            parts.append(self._once(body, config, context[:-1], parts[0] if shared else []))
        return parts

    def _once(self, body: Any, config: Any, ids: tuple[int, ...], before: States) -> States:
        key = ids, before[0][0].shape[1] if before else 0
        if key not in self._states:
            self._states[key] = self._read(body, config, ids, before)
        return self._states[key]

    def _read(self, body: Any, config: Any, ids: tuple[int, ...], before: States) -> States:
        """States of the tokens in ``ids`` that follow those of ``before``."""
        cache = DynamicCache(config=config)
        for layer, (keys_HLC, values_HLC) in enumerate(before):
            cache.update(keys_HLC[None], values_HLC[None], layer)
        done = cache.get_seq_length()
        device = next(body.parameters()).device
        body(input_ids=torch.tensor([ids[done:]], device=device), past_key_values=cache, use_cache=True)
        layers: Any = cache.layers
        return [tuple(_own(in_attention_dtype(t[0, :, done:])) for t in (layer.keys, layer.values)) for layer in layers]


def _own(view: Tensor) -> Tensor:
    """A copy with its own memory: a view would keep the whole tensor alive."""
    return view.clone(memory_format=torch.contiguous_format)


def has_full_attention(config: Any) -> bool:
    """Whether all layers keep the keys and values of every token: no sliding window, no recurrent state."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
