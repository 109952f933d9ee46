"""Key/value caches with memory for future tokens.

Legend: B unfinished samples, L length so far, H key/value heads, C channels of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

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


def preallocate(cache: DynamicCache, most: int) -> None:
    """Give the layers memory for up to ``most`` new tokens, one by one: only one layer is held twice at a time."""
    layers: list[Any] = cache.layers
    for number, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[number] = PreallocatedLayer(layer, most)
