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
class Sampled:
    """How much was sampled from a model, in total or between two readings."""

    tokens: int = 0
    """Tokens on all ranks, including end tokens."""
    seconds: float = 0.0
    """Seconds on this rank; with an engine, including the time to load weights."""

    def __add__(self, other: Sampled) -> Sampled:
        return Sampled(self.tokens + other.tokens, self.seconds + other.seconds)

    def __sub__(self, earlier: Sampled) -> Sampled:
        return Sampled(self.tokens - earlier.tokens, self.seconds - earlier.seconds)


@contextmanager
def counted(loaded: LoadedModel) -> Iterator[list[Rollout]]:
    """Yield a list for rollouts; on exit, add their tokens and the time spent to ``loaded.sampled``."""
    began = clock(loaded.device)
    rollouts: list[Rollout] = []
    yield rollouts
    loaded.sampled += Sampled(sum(len(rollout.ids) for rollout in rollouts), clock(loaded.device) - began)
