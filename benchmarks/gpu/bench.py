"""What a check gets and what it leaves: a device with a place for files, and named numbers with their bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


class NotRun(Exception):
    """A check cannot run here; the message says why."""


@dataclass(frozen=True)
class Bench:
    """Where a check runs."""

    device: str
    """``cuda`` or ``cpu``. On a CPU all sizes are small, to try the checks themselves."""
    out: Path
    """Folder of the results."""
    scratch: Path
    """Folder of models and runs, deleted at the end."""
    seconds: float = math.inf
    """What the check may take."""

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Number:
    """A measured number, or a word in its place, with the bounds that it must keep."""

    name: str
    value: float | str
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_bounded(self) -> bool:
        return self.at_least is not None or self.at_most is not None

    @property
    def passes(self) -> bool:
        """Whether it keeps its bounds; not a number keeps none."""
        if not self.is_bounded:
            return True
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return not isinstance(self.value, str) and low <= self.value <= high

    def text(self) -> str:
        """The value with its unit, and its bounds in brackets."""
        value = self.value if isinstance(self.value, str) else f"{self.value:.4g}"
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (("at least", self.at_least), ("at most", self.at_most))
            if bound is not None
        ]
        return f"{value} {self.unit}".strip() + (f" ({', '.join(bounds)})" if bounds else "")

    def row(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        finite = isinstance(self.value, str) or math.isfinite(self.value)
        return {**asdict(self), "value": self.value if finite else str(self.value), "passes": self.passes}


class Found:
    """Takes a check's numbers and sends each on at once, so that a stop loses none."""

    def __init__(self, send: Callable[[Number], object]) -> None:
        self._send = send

    def add(
        self,
        name: str,
        value: float | str,
        unit: str = "",
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        self._send(Number(name, value if isinstance(value, str) else float(value), unit, at_least, at_most))


@dataclass(frozen=True)
class Check:
    """A function that measures something, or compares."""

    name: str
    what: str
    seconds: float
    """What it may take on a GPU; it is stopped then."""
    run: Callable[[Bench, Found], None]
