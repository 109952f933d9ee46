"""Scores and shares in the tables of studies, with their 95% intervals: never below 0, which differences may be."""

from __future__ import annotations

import math
from collections.abc import Sequence

from selfdistill.evaluation import seeds_interval


def interval_text(low: float | None, high: float | None, most: float = math.inf) -> str:
    """`` (LOW to HIGH)`` within 0 and ``most``; empty for one seed, and for equal seeds, whose spread is unknown."""
    return "" if low is None or high is None or low == high else f" ({max(low, 0):.2f} to {min(high, most):.2f})"


def cell(values: Sequence[float], most: float = 1.0, digits: int = 2) -> str:
    """Mean over seeds and its Student's t interval, if there is one, within what is possible."""
    middle, low, high = seeds_interval(values)
    return f"{middle:.{digits}f}{interval_text(low, high, most)}"
