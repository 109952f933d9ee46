"""Shared prefixes of token sequences, and the prefix cache of a model with fixed weights, such as a frozen teacher.

Legend: B sequences, L tokens, V vocabulary, H key/value heads, C channels of a head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from selfdistill.model.device import PASS_TOKENS
from selfdistill.model.loading import LoadedModel

SEARCH_WINDOW = 256
"""Number of contexts, in sorted order, in one search for shared prefixes; the search is quadratic in it."""

READ_TOKENS = 2048
"""Maximum tokens of contexts that are read together, padding included; a longer context is read alone."""

PROBE_GAP = 300
"""Padding in the start-up probe: longer than the local window of models that do not declare it as sliding."""

ContextIds = tuple[int, ...]
"""Token ids."""
States = list[tuple[Tensor, ...]]
"""Keys and values of some tokens, layer by layer, each (H, L, C)."""


def shared_prefixes(
    contexts: Sequence[Sequence[int]], pass_tokens: int = PASS_TOKENS["cpu"]
) -> list[tuple[list[int], int]]:
    """Groups of contexts whose shared prefix is worth computing once: their indices and the prefix length.

    In sorted order, contexts with a shared prefix are adjacent. Of all partitions of that order into groups, this is
    the one that saves the most tokens, at a cost of ``pass_tokens`` per group. Contexts that share too little belong to
    no group.
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
            gain = saved[start] + (end - start - 1) * length - pass_tokens
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

    A prefix that contexts share (among ``SEARCH_WINDOW`` neighbours in sorted order) is computed once, the rest of each
    context in blocks of at most ``READ_TOKENS`` tokens. Only the data and the budget decide which contexts are cached
    and which form a block, so results do not depend on the order of batches. Requires :func:`can_continue_cache` and
    layers that keep every token.

    Args:
        contexts: all contexts that will be requested.
        budget_bytes: memory for the states, on the model's device. Contexts beyond it, in sorted order, are not cached.
            A batch in use also needs a copy, padded to one length.
        pass_tokens: as in :func:`shared_prefixes`.
    """

    def __init__(
        self, contexts: Iterable[Sequence[int]], budget_bytes: int, pass_tokens: int = PASS_TOKENS["cpu"]
    ) -> None:
        self.budget_bytes = budget_bytes
        self._blocks: dict[ContextIds, list[ContextIds]] | None = None  # cached context -> those that are read with it
        self._prefixes: dict[ContextIds, States] = {}
        self._states: dict[ContextIds, States] = {}  # of all but the shared prefix and the last token
        self._shared: dict[ContextIds, int] = {}  # length of the shared prefix
        unique = sorted({tuple(context) for context in contexts if len(context) > 1})
        for start in range(0, len(unique), SEARCH_WINDOW):
            window = unique[start : start + SEARCH_WINDOW]
            self._shared |= dict.fromkeys(window, 0)
            for rows, length in shared_prefixes(window, pass_tokens):
                self._shared |= {window[row]: length for row in rows}

    def kept(self, body: Any, config: Any, contexts: Sequence[Sequence[int]]) -> list[int]:
        """Indices of the contexts that are cached. ``body`` and ``config`` must be the same model at every call."""
        if self._blocks is None:
            self._blocks = _blocks(self._affordable(body, config))
        return [number for number, context in enumerate(contexts) if tuple(context) in self._blocks]

    def _affordable(self, body: Any, config: Any) -> dict[ContextIds, int]:
        """The contexts that fit into the budget, with the length of each one's shared prefix."""
        if not self._shared:
            return {}
        [one_token] = _read(body, config, [next(iter(self._shared))[:1]], [])
        token_bytes = sum(t.numel() * t.element_size() for pair in one_token for t in pair)
        used, prefixes, affordable = 0, set(), {}
        for context, shared in self._shared.items():
            used += len(context) - 1 - shared
            if shared and context[:shared] not in prefixes:
                prefixes.add(context[:shared])
                used += shared
            if used * token_bytes > self.budget_bytes:
                break
            affordable[context] = shared
        return affordable

    def cache(self, body: Any, config: Any, contexts: Sequence[Sequence[int]]) -> tuple[DynamicCache, Tensor]:
        """The left-padded states of all but each context's last token; all contexts must be ``kept``.

        Returns:
            The cache, and ``filled_B``, the number of valid positions per sequence.
        """
        rows = [self._parts(body, config, tuple(context)) for context in contexts]
        cache = DynamicCache(config=config)
        layers: Any = cache.layers
        for number, layer in enumerate(layers):
            fill(layer, [[part[number] for part in parts] for parts in rows])
        return cache, torch.tensor([len(context) - 1 for context in contexts], device=layers[0].device)

    def _parts(self, body: Any, config: Any, context: ContextIds) -> list[States]:
        """The states of the shared prefix and of the tokens after it, omitting empty parts."""
        assert self._blocks is not None
        shared = self._shared[context]
        prefix = context[:shared]
        if shared and prefix not in self._prefixes:
            [self._prefixes[prefix]] = _read(body, config, [prefix], [])
        before = self._prefixes.get(prefix, [])
        if context not in self._states and len(context) - 1 > shared:
            block = self._blocks[context]
            rests = [other[shared:-1] for other in block]
            self._states |= zip(block, _read(body, config, rests, before), strict=True)
        return [part for part in (before, self._states.get(context)) if part]


def fill(layer: Any, rows: Sequence[Sequence[tuple[Tensor, ...]]]) -> None:
    """Fill an empty layer with the keys and values of each row, whose parts are joined, left-padded with zeros."""
    pair = []
    for which in (0, 1):
        parts_of = [[part[which] for part in parts] for parts in rows]
        lengths = [sum(part.shape[1] for part in parts) for parts in parts_of]
        first_HLC, width = parts_of[0][0], max(lengths)
        states_BHLC = first_HLC.new_zeros(len(rows), len(first_HLC), width, first_HLC.shape[-1])
        for row_HLC, parts, length in zip(states_BHLC, parts_of, lengths, strict=True):
            torch.cat(parts, dim=1, out=row_HLC[:, width - length :])
        pair.append(states_BHLC)
    layer.lazy_initialization(*pair)
    layer.keys, layer.values = pair


def _blocks(shared: Mapping[ContextIds, int]) -> dict[ContextIds, list[ContextIds]]:
    """For each context, those that are read with it: they share a prefix and have about the same length."""
    by_prefix: defaultdict[ContextIds, list[ContextIds]] = defaultdict(list)
    for context, length in shared.items():
        if len(context) - 1 > length:
            by_prefix[context[:length]].append(context)
    blocks: dict[ContextIds, list[ContextIds]] = {context: [] for context in shared}
    for contexts in by_prefix.values():
        block: list[ContextIds] = []
        for context in sorted(contexts, key=len):
            if (len(block) + 1) * (len(context) - 1 - shared[context]) > READ_TOKENS:
                block = []
            block.append(context)
            blocks[context] = block
    return blocks


def _read(body: Any, config: Any, rows: Sequence[Sequence[int]], before: States) -> list[States]:
    """States of each row's tokens, which follow those of ``before``; padding is on the right, where no token
    attends."""
    cache = DynamicCache(config=config)
    for layer, (keys_HLC, values_HLC) in enumerate(before):
        cache.update(keys_HLC.expand(len(rows), -1, -1, -1), values_HLC.expand(len(rows), -1, -1, -1), layer)
    done, width, device = cache.get_seq_length(), max(map(len, rows)), next(body.parameters()).device
    ids_BL = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    body(input_ids=ids_BL, past_key_values=cache, use_cache=True)
    layers: Any = cache.layers

    def own(states_BHLC: Tensor, row: int) -> Tensor:
        """A copy with its own memory: a view would keep the whole tensor alive."""
        view = in_attention_dtype(states_BHLC[row, :, done : done + len(rows[row])])
        return view.clone(memory_format=torch.contiguous_format)

    return [[(own(layer.keys, row), own(layer.values, row)) for layer in layers] for row in range(len(rows))]


def has_full_attention(config: Any) -> bool:
    """Whether all layers keep the keys and values of every token: no sliding window, no recurrent state."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
