"""The passes that continue a batch of samples by one token each.

:class:`GrowingSteps` do this for every model. Each pass is longer than the one before, so a GPU waits while the CPU
launches its kernels one by one, over a thousand for a token of a large model. :class:`FixedSteps` have the same shapes
and addresses for a block of tokens, so that a GPU can replay them with one launch.

Legend: B rows of the batch, L places of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from selfdistill.model.device import captured, has_graphs
from selfdistill.model.fsdp import is_sharded
from selfdistill.model.head import unwrap
from selfdistill.model.loading import LoadedModel
from selfdistill.model.preallocated import (
    PreallocatedLayer,
    can_be_fixed,
    extend,
    fix,
    mask_without_reading,
    preallocate,
)
from selfdistill.model.weights import first_line
from selfdistill.runtime import say_note

COMPARED_TOKENS = 2
"""Tokens for which a model's first captured pass is compared with the pass itself: one could be right by chance, such
as when the captured pass does nothing."""

LEAST_TOKENS = 8
"""Fewest new tokens that are worth a capture, estimated to take as long as three or four without one."""

BLOCK_TOKENS = 256
"""For how many new tokens passes of fixed shapes have memory. Attention reads all of it at each token, and a capture
serves no more of them: estimated to add 1 or 2% to their time."""


@dataclass
class ReadRows:
    """Token sequences that the model has read, one per row of a cache."""

    cache: DynamicCache
    logits_BV: Tensor
    """Logits of the token after each row."""
    mask_BL: Tensor
    """1 where the cache holds a token of the row, 0 at padding."""
    padded: list[bool]
    """Whether the row has padding, known without waiting for the device."""
    shift_B: Tensor
    """Offset of the next token's position from the number of tokens before it: 0, unless the model gives pictures
    two-dimensional positions."""


class GrowingSteps:
    """Passes over a cache that grows.

    Args:
        loaded: the model.
        rows: what it has read; consumed.
        most: maximum number of new tokens.
    """

    def __init__(self, loaded: LoadedModel, rows: ReadRows, most: int) -> None:
        self._model = loaded.model
        self.cache, self.mask_BL = rows.cache, rows.mask_BL
        self._padded = rows.padded
        self._position_B = rows.mask_BL.sum(1) + rows.shift_B
        preallocate(self.cache, most)
        mask_without_reading(self.cache, padded=any(self._padded))

    def __call__(self, token_B: Tensor) -> Tensor:
        """Append a token to each row; returns the logits of the next, ``logits_BV``."""
        self._grow_mask(1)
        logits_BV: Tensor = self._model(
            input_ids=token_B[:, None],
            attention_mask=self.mask_BL if any(self._padded) else None,
            position_ids=self._position_B[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        self._position_B = self._position_B + 1
        return logits_BV

    def _grow_mask(self, count: int) -> None:
        self.mask_BL = torch.cat([self.mask_BL, self.mask_BL.new_ones(len(self.mask_BL), count)], dim=1)

    def skip(self, count: int) -> None:
        """Append this many tokens with zero states."""
        self._grow_mask(count)
        self._position_B = self._position_B + count
        for layer in self.cache.layers:
            if isinstance(layer, PreallocatedLayer):
                layer.skip(count)

    @staticmethod
    def staying(rows: int) -> int:
        """At how many rows or fewer, of so many, the others are worth dropping: always."""
        return rows - 1

    @staticmethod
    def copied(rows: int) -> int:
        """How many rows of a layer, of so many, are copied at most: all where its memory is full."""
        return rows

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        index_B = torch.tensor(rows, device=self.mask_BL.device)
        select_rows(self.cache, index_B)
        self.mask_BL, self._position_B = self.mask_BL[index_B], self._position_B[index_B]
        self._padded = [self._padded[row] for row in rows]
        mask_without_reading(self.cache, padded=any(self._padded))


class FixedSteps:
    """Passes with fixed shapes and addresses, captured where the device can do that; used as :class:`GrowingSteps`.

    The cache has memory for the next ``BLOCK_TOKENS`` tokens, or for the remaining ones if fewer. When it is full, or
    rows leave, the passes have other addresses and are captured again.

    A captured pass reads the weights where they are, so it may not outlive a change of their memory. It is kept for
    these rows only. A model's first is compared with the pass itself. If it differs or cannot be captured, a note says
    so, and the model is not captured again.
    """

    def __init__(self, loaded: LoadedModel, rows: ReadRows, most: int) -> None:
        self._loaded, self.cache, self.mask_BL = loaded, rows.cache, rows.mask_BL
        self._place_1 = torch.tensor([rows.mask_BL.shape[1]], device=rows.mask_BL.device)
        self._position_B1 = (rows.mask_BL.sum(1) + rows.shift_B)[:, None]
        self._token_B1 = torch.zeros_like(self._position_B1)
        self._left, self._room = most, 0  # tokens to come, and those that there is memory for
        self._to_compare = COMPARED_TOKENS if has_graphs(loaded.device.type) and loaded.captures is None else 0
        fix(self.cache, self._place_1)
        self._make_room()

    def _make_room(self) -> None:
        """Have memory for the next block of tokens. The pass over it is not captured yet."""
        self._run: Callable[[], Tensor] | None = None  # first, because a captured pass holds memory
        more = min(BLOCK_TOKENS, self._left) - self._room
        if more:
            extend(self.cache, more)
            self.mask_BL = torch.nn.functional.pad(self.mask_BL, (0, more))
            self._room += more
        # Not a method: an object that refers to itself is freed late, with the memory of the cache.
        self._pass = partial(
            _fixed_pass, self._loaded, self.cache, self._token_B1, self.mask_BL, self._place_1, self._position_B1
        )

    def __call__(self, token_B: Tensor) -> Tensor:
        """Append a token to each row; returns the logits of the next, ``logits_BV``, valid until the next call."""
        if not self._room:
            self._make_room()
        self._token_B1.copy_(token_B[:, None])
        if self._run is None:
            self._capture()
        assert self._run is not None
        logits_BV = self._run()
        if self._to_compare:
            logits_BV = self._compared(logits_BV)
        self._advance(1)
        return logits_BV

    def _advance(self, count: int) -> None:
        self._place_1 += count
        self._position_B1 += count
        self._room -= count
        self._left -= count

    def _capture(self) -> None:
        """Decide how the pass runs as long as the memory lasts."""
        self._run = self._pass
        if self._loaded.captures is False or self._room < LEAST_TOKENS:
            return
        try:
            self._run = captured(self._pass, self._loaded.device)
        except Exception as error:  # whatever a model's code does that cannot be captured
            self._give_up(first_line(error))

    def _compared(self, logits_BV: Tensor) -> Tensor:
        """These logits of a captured pass, or those of the pass itself if they differ."""
        expected_BV = self._pass()
        tolerance = 1e-3 if expected_BV.dtype == torch.float32 else 5e-2
        error = (logits_BV - expected_BV).abs().max()
        if not bool(error <= tolerance * expected_BV.abs().max().clamp(min=1.0)):
            self._give_up("it computed other logits")
            return expected_BV
        self._to_compare -= 1
        if self._to_compare == 0:
            self._loaded.captures = True
        return logits_BV

    def _give_up(self, reason: str) -> None:
        say_note(f"model {self._loaded.name!r}: sampling without a CUDA graph, which takes longer: {reason}")
        self._run, self._to_compare, self._loaded.captures = self._pass, 0, False

    def skip(self, count: int) -> None:
        """Append this many tokens with zero states."""
        while count:
            if not self._room:
                self._make_room()
            part = min(count, self._room)
            self._advance(part)
            count -= part

    def staying(self, rows: int) -> int:
        """At how many rows or fewer, of so many, the others are worth dropping.

        The passes for the rest must be captured again, for the time of a few tokens, and reading the weights takes as
        long for few rows as for many. So this happens once half have ended, and never just before the limit.
        """
        return rows // 2 if self._left >= LEAST_TOKENS else 0

    @staticmethod
    def copied(rows: int) -> int:
        """How many rows of a layer, of so many, are copied at most: those that stay."""
        return rows // 2

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        self._run = None  # first, because a captured pass holds memory
        index_B = torch.tensor(rows, device=self.mask_BL.device)
        select_rows(self.cache, index_B)
        self.mask_BL, self._position_B1 = self.mask_BL[index_B], self._position_B1[index_B]
        self._token_B1 = torch.zeros_like(self._position_B1)
        self._make_room()


def _fixed_pass(
    loaded: LoadedModel, cache: DynamicCache, token_B1: Tensor, mask_BL: Tensor, place_1: Tensor, position_B1: Tensor
) -> Tensor:
    """The logits after these tokens, ``logits_BV``. Running it again changes nothing."""
    mask_BL.index_fill_(1, place_1, 1)
    logits_BV: Tensor = loaded.model(
        input_ids=token_B1, attention_mask=mask_BL, position_ids=position_B1, past_key_values=cache, use_cache=True
    ).logits[:, -1]
    return logits_BV


def steps_for(loaded: LoadedModel, rows: ReadRows, most: int, kind: str) -> GrowingSteps | FixedSteps:
    """The passes for these rows on a device of this kind."""
    is_worth_it = has_graphs(kind) and most >= LEAST_TOKENS
    fixed = is_worth_it and _can_be_captured(loaded) and can_be_fixed(rows.cache)
    return FixedSteps(loaded, rows, most) if fixed else GrowingSteps(loaded, rows, most)


def _can_be_captured(loaded: LoadedModel) -> bool:
    """Whether a model's passes may have fixed shapes: transformers tests it, and nothing runs between its layers."""
    model = unwrap(loaded.model)
    declared = getattr(model, "_can_compile_fullgraph", False) and loaded.captures is not False
    attention = getattr(model.config, "_attn_implementation", None)
    runs_alone = loaded.pictures is None and not is_sharded(loaded.model)
    return declared and attention in ("eager", "sdpa") and runs_alone and not _rotations_change(model)


def _rotations_change(model: torch.nn.Module) -> bool:
    """Whether the frequencies of rotary positions depend on the length so far, for which a pass waits for the device.

    That is what transformers does for these types (``dynamic_rope_update``), whatever the model declares.
    """
    found: list[Any] = [module.rope_type for module in model.modules() if hasattr(module, "rope_type")]
    types = [name for own in found for name in (own.values() if isinstance(own, dict) else [own])]
    return any("dynamic" in name or name == "longrope" for name in types)


def select_rows(cache: DynamicCache, index_B: Tensor) -> None:
    """Select rows of a cache, with the one method that layers with recurrent states also have."""
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.reorder_cache(index_B)
