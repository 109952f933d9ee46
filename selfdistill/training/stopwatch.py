"""Time spent on each part of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Sums seconds by name, synchronising CUDA devices first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._now()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time spent inside the context to ``name``."""
        began = self._now()
        yield
        self._seconds[name] += self._now() - began

    def seconds(self) -> dict[str, float]:
        """Seconds by name, plus ``step``: since the stopwatch was created."""
        return {**self._seconds, "step": self._now() - self._began}
