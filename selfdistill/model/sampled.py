"""How much was sampled from a model, and in which time."""

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
    """What was sampled from a model so far, or between two times."""

    tokens: int = 0
    """On all ranks, with end tokens."""
    seconds: float = 0.0
    """On this rank; with an engine also those in which it takes over the weights."""

    def __add__(self, other: Sampled) -> Sampled:
        return Sampled(self.tokens + other.tokens, self.seconds + other.seconds)

    def __sub__(self, earlier: Sampled) -> Sampled:
        return Sampled(self.tokens - earlier.tokens, self.seconds - earlier.seconds)


@contextmanager
def counted(loaded: LoadedModel) -> Iterator[list[Rollout]]:
    """Count in ``loaded.sampled`` the rollouts that are put into this list, and the time until the block's end."""
    began = clock(loaded.device)
    rollouts: list[Rollout] = []
    yield rollouts
    loaded.sampled += Sampled(sum(len(rollout.ids) for rollout in rollouts), clock(loaded.device) - began)
