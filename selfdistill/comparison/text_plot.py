"""A figure in plain characters, for a terminal of 80 columns without colour."""

from __future__ import annotations

import math
from collections.abc import Mapping

Point = tuple[float, float]

COLUMNS, ROWS = 61, 15
"""Size of the area inside the axes, in characters."""
MARGIN = 8
"""Characters to the left of the area."""
MARKS = "o123456789"
"""The marks of the points, in order; the first is for the base."""


def scatter(
    points: Mapping[str, Point], x_label: str, y_label: str, *, level: tuple[str, float] | None = None
) -> list[str]:
    """Plot shares (from 0 to 1) against shares, as lines of ASCII text.

    Axes start and end at multiples of 0.1. Points that fall on the same character are drawn side by side.

    Args:
        points: (x, y) by name, at most ten.
        x_label: label of x.
        y_label: label of y.
        level: name and y of a horizontal line.
    """
    x_low, x_high = _range([x for x, _ in points.values()])
    y_low, y_high = _range([y for _, y in points.values()] + ([level[1]] if level else []))
    area = [[" "] * COLUMNS for _ in range(ROWS)]
    ends = [""] * ROWS
    if level:
        number = _cell(y_high - level[1], y_high - y_low, ROWS)
        area[number], ends[number] = list("- " * (COLUMNS // 2) + "-"), f" {level[0]}"
    marked = dict(zip(MARKS, points, strict=False))
    for mark, name in marked.items():
        x, y = points[name]
        row = area[_cell(y_high - y, y_high - y_low, ROWS)]
        row[_nearest_free(row, _cell(x - x_low, x_high - x_low, COLUMNS))] = mark
    ticks = {0: y_high, ROWS // 2: (y_low + y_high) / 2, ROWS - 1: y_low}
    starts = [f"{ticks[number]:.2f} +" if number in ticks else "|" for number in range(ROWS)]
    between = COLUMNS // 2 - len("0.00")
    below = (f"{x:.2f}" for x in (x_low, (x_low + x_high) / 2, x_high))
    return [
        f"{y_label:>{MARGIN - 2}}",
        *(f"{a:>{MARGIN}}{''.join(row)}{z}".rstrip() for a, row, z in zip(starts, area, ends, strict=True)),
        " " * MARGIN + ("-" * (COLUMNS // 2 - 1)).join("+++"),
        " " * (MARGIN - 2) + (" " * between).join(below) + f"  {x_label}",
        " " * MARGIN + "   ".join(f"{mark} {name}" for mark, name in marked.items()),
    ]


def _range(values: list[float]) -> tuple[float, float]:
    """The multiples of 0.1 around the values."""
    low = math.floor(10 * min(values) + 1e-9) / 10
    return low, max(math.ceil(10 * max(values) - 1e-9) / 10, low + 0.1)


def _cell(distance: float, span: float, cells: int) -> int:
    return round(distance / span * (cells - 1))


def _nearest_free(row: list[str], column: int) -> int:
    """The nearest column without a point."""
    free = (number for number, text in enumerate(row) if text not in MARKS)
    return min(free, key=lambda number: abs(number - column))
