"""Time spent on each part of a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from selfdistill.runtime import clock


class Stopwatch:
    """Sums seconds by name, synchronising CUDA devices first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = clock(device)
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time spent inside the context to ``name``."""
        began = clock(self._device)
        yield
        self.add(name, clock(self._device) - began)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that something else measured to ``name``."""
        self._seconds[name] += seconds

    def seconds(self) -> dict[str, float]:
        """Seconds by name, plus ``step``: since the stopwatch was created."""
        return {**self._seconds, "step": clock(self._device) - self._began}
