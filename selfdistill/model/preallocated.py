"""Key/value caches with memory for future tokens, which grows by itself or when its owner says so.

Legend: B unfinished samples, L length so far, H key/value heads, C channels of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from selfdistill.model.prefix_cache import in_attention_dtype

PREALLOCATED_TOKENS = 64
"""Number of tokens to preallocate memory for at a time."""


class PreallocatedLayer(DynamicLayer):
    """A cache layer with memory for the next ``PREALLOCATED_TOKENS`` tokens, or for the remaining ones if fewer.

    New tokens are written in place. Earlier ones are copied only when the memory is full or rows leave the batch.

    Args:
        layer: a cache layer that holds the prompts.
        most: maximum number of new tokens.
    """

    def __init__(self, layer: Any, most: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self._hold((in_attention_dtype(layer.keys), in_attention_dtype(layer.values)), layer.keys.shape[2])
        self._most = self._length + most
        self._grow(self._length + 1)

    def _hold(self, room: tuple[Tensor, Tensor], length: int) -> None:
        """Use this memory, whose first ``length`` tokens are filled. Keep no other copy."""
        self._room, self._length = room, length
        self.keys, self.values = (states[:, :, :length] for states in room)

    def _grow(self, length: int) -> None:
        """Add memory, for at least this many tokens in total."""
        size = self._room[0].shape[2]
        steps = math.ceil((length - size) / PREALLOCATED_TOKENS)
        more = max(length, min(size + steps * PREALLOCATED_TOKENS, self._most)) - size
        keys_BHLC, values_BHLC = (torch.nn.functional.pad(states, (0, 0, 0, more)) for states in self._room)
        self._hold((keys_BHLC, values_BHLC), self._length)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the new tokens, and return all."""
        new = slice(self._length, self._length + key_states.shape[2])
        if new.stop > self._room[0].shape[2]:
            self._grow(new.stop)
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, new] = states
        self._hold(self._room, new.stop)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def release(self) -> None:
        """Free the memory; nothing is read or written afterwards."""
        del self._room
        self.keys, self.values = None, None

    def skip(self, count: int) -> None:
        """Append this many tokens with zero states."""
        length = self._length + count
        if length > self._room[0].shape[2]:
            self._grow(length)
        self._hold(self._room, length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select these rows of the batch."""
        keys_BHLC, values_BHLC = (states[beam_idx] for states in self._room)
        self._hold((keys_BHLC, values_BHLC), self._length)


class FixedLayer(DynamicLayer):
    """A cache layer that is told by a tensor where the next token belongs, and grows only when its owner says so.

    Until then, a pass for one token has the same shapes and addresses every time. Running it again changes nothing.
    Attention must mask the memory after that token, as transformers does for static caches, because it is returned too.

    Args:
        layer: a cache layer that holds the prompts, perhaps only a sliding window of them.
        place_1: the number of tokens so far, kept up to date by the owner; shape (1,).
    """

    is_compileable = True
    """Tells transformers to make the mask without reading its values."""

    def __init__(self, layer: Any, place_1: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self.is_sliding, self._place_1 = layer.is_sliding, place_1
        self._dropped = layer.get_seq_length() - layer.keys.shape[2]  # tokens before the window
        self.keys, self.values = in_attention_dtype(layer.keys), in_attention_dtype(layer.values)

    def extend(self, count: int) -> None:
        """Add memory for this many tokens."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = (
            torch.nn.functional.pad(states, (0, 0, 0, count)) for states in (self.keys, self.values)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new token, and return the whole memory."""
        assert self.keys is not None
        assert self.values is not None
        index_1 = self._place_1 - self._dropped
        self.keys.index_copy_(2, index_1, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, index_1, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        """Length of the memory, and the place of its first token."""
        assert self.keys is not None
        return self.keys.shape[2], self._dropped

    def get_seq_length(self, *_: Any) -> Tensor:  # type: ignore[override]
        """Number of tokens so far, as a tensor."""
        return self._place_1[0]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select these rows of the batch."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[beam_idx], self.values[beam_idx]

    def release(self) -> None:
        """Free the memory; nothing is read or written afterwards."""
        self.keys, self.values = None, None


def can_be_fixed(cache: DynamicCache) -> bool:
    """Whether all layers of a cache keep keys and values, at most of a sliding window, and nothing else."""
    layers: list[Any] = cache.layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized for layer in layers)


def fix(cache: DynamicCache, place_1: Tensor) -> None:
    """Turn the layers into :class:`FixedLayer`, which have no memory for new tokens yet."""
    layers: list[Any] = cache.layers
    for number, layer in enumerate(layers):
        layers[number] = FixedLayer(layer, place_1)


def extend(cache: DynamicCache, count: int) -> None:
    """Add memory for this many tokens to all :class:`FixedLayer`: only one layer is held twice at a time."""
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.extend(count)


def preallocate(cache: DynamicCache, most: int) -> None:
    """Give the layers memory for up to ``most`` new tokens, one by one: only one layer is held twice at a time."""
    layers: list[Any] = cache.layers
    for number, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[number] = PreallocatedLayer(layer, most)


def mask_without_reading(cache: DynamicCache, *, padded: bool) -> None:
    """Have transformers make the mask of a single token without looking for padding, for which it waits for the device.

    It does that for caches whose layers say that they may be compiled, if all do; without padding it makes no mask.
    """
    layers: list[Any] = cache.layers
    for layer in layers:
        if isinstance(layer, PreallocatedLayer | DynamicSlidingWindowLayer):
            layer.is_compileable = padded
