"""Batches and learning rate as pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch

from selfdistill.config import TrainingSettings
from selfdistill.errors import UserError

Row = TypeVar("Row")


def check_shares(shares: Sequence[float], batch_size: int, unit: int) -> None:
    """Check that every step has room for all of its parts; see :func:`positions_of`.

    Raises:
        UserError: the batch is too small.
    """
    if batch_size >= _room(shares, batch_size, unit):
        return
    enough = unit * math.floor(1 / shares[0])  # with less, the first part's share is not one example
    while enough < (room := _room(shares, max(enough, batch_size), unit)):
        enough = room  # a larger batch also has more examples of the other parts
    multiples = f" (each a multiple of {unit}, with fsdp)" if unit > 1 else ""
    few = batch_size < unit * len(shares)
    other = "leave out one, such as a source of anchors" if few else "lower a share, such as anchor_share"
    raise UserError(
        f"setting 'batch_size': {batch_size} is too small for {len(shares)} parts of a step{multiples}, which need "
        f"{enough}; raise it, or {other}"
    )


def _room(shares: Sequence[float], batch_size: int, unit: int) -> int:
    """What a step of this batch size needs: the most that the other parts may take, and one unit of the first."""
    return unit * (1 + sum(math.ceil(batch_size / unit * share) for share in shares[1:]))


def positions_of(shares: Sequence[float], step: int, batch_size: int, seed: int, unit: int) -> list[range]:
    """The positions of step ``step`` (from 0) in the sequence of each part's examples.

    The numbers of examples sum to ``batch_size``. Those of a part are its share on average, and at every step the whole
    number below or above it: part k has had floor(step * batch_size * share_k + u_k) examples before the step, with u_k
    in [0, 1) from the seed. The first part has the rest.

    Args:
        shares: of the parts; they sum to 1.
        step: the optimizer step.
        batch_size: examples of a step.
        seed: of the run.
        unit: the numbers of examples are multiples of this.
    """
    beside = []
    for number, share in enumerate(shares[1:]):
        per_step = batch_size / unit * share
        offset = random.Random(f"{seed}-{number}").random()
        start = unit * math.floor(step * per_step + offset)
        stop = unit * math.floor((step + 1) * per_step + offset)
        beside.append(range(start, stop))
    start = step * batch_size - sum(positions.start for positions in beside)
    return [range(start, start + batch_size - sum(map(len, beside))), *beside]


def fewest_of_first(shares: Sequence[float], batch_size: int, unit: int) -> int:
    """Examples of the first part that every step has; see :func:`positions_of`."""
    # Rounded, as 25 * 0.28 is a little more than 7.
    beside = (math.ceil(round(batch_size / unit * share, 9)) for share in shares[1:])
    return batch_size - unit * sum(beside)


def examples_at(rows: Sequence[Row], positions: range, seed: int) -> list[Row]:
    """Examples at the given positions of an endless sequence of epochs.

    Every epoch has its own order, drawn from the seed and the epoch. Batches continue across epochs, so each example is
    used once per epoch and no batch is short. A data set smaller than a batch repeats within it.
    """
    batch: list[Row] = []
    order, drawn = [0], -1
    for position in positions:
        epoch, place = divmod(position, len(rows))
        if epoch != drawn:
            # A generator takes 64 bits; a seed may be larger than that.
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**64)
            order, drawn = torch.randperm(len(rows), generator=generator).tolist(), epoch
        batch.append(rows[order[place]])
    return batch


def steps_of(config: TrainingSettings, examples: int, share: float = 1.0) -> int:
    """``max_steps``; by default the steps of ``num_train_epochs`` over this many examples, a share of every batch."""
    steps = examples * config.num_train_epochs / (config.batch_size * share)
    return config.max_steps or math.ceil(round(steps, 9))  # 1 - 0.8 is a little less than 0.2


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
