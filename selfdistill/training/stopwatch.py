"""Where the time of a step goes: by what is done, and by the parts that the step sums up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch

from selfdistill.runtime import clock

Key = TypeVar("Key")


class Stopwatch:
    """Sums seconds by name, synchronising CUDA devices first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = clock(device)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._of: defaultdict[tuple[str, ...], float] = defaultdict(float)

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """Add the time spent inside the context to ``name``."""
        return self._timed(self._seconds, name)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that something else measured to ``name``."""
        self._seconds[name] += seconds

    def seconds(self) -> dict[str, float]:
        """Seconds by name, plus ``step``: since the stopwatch was created."""
        return {**self._seconds, "step": clock(self._device) - self._began}

    def of(self, parts: Iterable[str]) -> AbstractContextManager[None]:
        """Count the time spent inside the context as these parts'; not to be nested."""
        return self._timed(self._of, tuple(parts))

    @contextmanager
    def _timed(self, sums: defaultdict[Key, float], key: Key) -> Iterator[None]:
        began = clock(self._device)
        yield
        sums[key] += clock(self._device) - began

    def by_part(self, step: float, tokens: Mapping[str, int]) -> dict[str, float]:
        """An estimate of each part's seconds of the ``step`` seconds, which it divides whole.

        What several parts took together is divided by their ``tokens``. What is no part's is divided by those of all.
        """
        found = dict.fromkeys(tokens, 0.0)
        for parts, seconds in [*self._of.items(), ((), step - sum(self._of.values()))]:
            own = {part: tokens[part] for part in parts if part in tokens} or tokens
            for part, count in own.items():
                found[part] += seconds * count / (sum(own.values()) or 1)
        return found
