"""Count the tokens sampled from a model, and the time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfdistill.runtime import clock

if TYPE_CHECKING:  # these modules import this one
    from selfdistill.model.loading import LoadedModel
    from selfdistill.model.sampling import Rollout


@dataclass(frozen=True)
class RolloutCount:
    """How much was sampled from a model, in total or between two readings."""

    tokens: int = 0
    """Tokens on all ranks, including end tokens."""
    seconds: float = 0.0
    """Seconds on this rank; with an engine, including the time to load weights."""

    def __add__(self, other: RolloutCount) -> RolloutCount:
        return RolloutCount(self.tokens + other.tokens, self.seconds + other.seconds)

    def __sub__(self, earlier: RolloutCount) -> RolloutCount:
        return RolloutCount(self.tokens - earlier.tokens, self.seconds - earlier.seconds)


@contextmanager
def counting(loaded: LoadedModel) -> Iterator[list[Rollout]]:
    """Yield a list for rollouts; on exit, add their tokens and the time spent to ``loaded.rollout_count``."""
    began = clock(loaded.device)
    rollouts: list[Rollout] = []
    yield rollouts
    loaded.rollout_count += RolloutCount(sum(len(rollout.ids) for rollout in rollouts), clock(loaded.device) - began)
