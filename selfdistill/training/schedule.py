"""Batches and learning rate as pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch

from selfdistill.config import TrainingSettings

Row = TypeVar("Row")


def batch_examples(rows: Sequence[Row], step: int, batch_size: int, seed: int) -> list[Row]:
    """Examples of optimizer step ``step`` (from 0).

    Every epoch has its own order, drawn from the seed and the epoch. Batches continue across epochs, so each example is
    used once per epoch and no batch is short. A data set smaller than a batch repeats within it.
    """
    batch: list[Row] = []
    order, drawn = [0], -1
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, len(rows))
        if epoch != drawn:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order, drawn = torch.randperm(len(rows), generator=generator).tolist(), epoch
        batch.append(rows[order[place]])
    return batch


def steps_of(config: TrainingSettings, examples: int) -> int:
    """``max_steps``; by default the steps of ``num_train_epochs`` over so many examples."""
    return config.max_steps or math.ceil(examples * config.num_train_epochs / config.batch_size)


def learning_rate(
    step: int, *, peak: float, max_steps: int, warmup_steps: int, kind: Literal["cosine", "constant"]
) -> float:
    """Learning rate of optimizer step ``step`` (from 0): linear warm-up, then half a cosine to zero, or constant.

    The warm-up is capped at a tenth of all steps. Neither its first step nor the cosine's last is zero.
    """
    warmup = min(warmup_steps, max_steps // 10)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if kind == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (max_steps - warmup)))
