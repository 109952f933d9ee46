"""The figure in plain characters: every point stands where its numbers say, read off the axes' own labels."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdistill.comparison.text_plot import COLUMNS, MARGIN, MARKS, ROWS, scatter

SHARE = st.integers(0, 100).map(lambda percent: percent / 100)
POINT = st.tuples(SHARE, SHARE)


def axes_of(lines: list[str]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Low and high end of x and of y, as the labels say."""
    y = [float(found[1]) for line in lines if (found := re.match(r" *(\d\.\d\d) \+", line))]
    x = [float(word) for word in lines[ROWS + 2].split()[:3]]
    assert y[1] == pytest.approx((y[0] + y[2]) / 2, abs=0.006)
    assert x[1] == pytest.approx((x[0] + x[2]) / 2, abs=0.006)
    return (x[0], x[2]), (y[2], y[0])


def places_of(lines: list[str]) -> dict[str, tuple[int, int]]:
    """Column, and row from below, of every mark in the area."""
    area = [line[MARGIN : MARGIN + COLUMNS] for line in lines[1 : ROWS + 1]]
    return {
        text: (at, ROWS - 1 - row) for row, line in enumerate(area) for at, text in enumerate(line) if text in MARKS
    }


@given(points=st.lists(POINT, min_size=1, max_size=10), level=st.none() | SHARE)
def test_every_point_stands_where_its_numbers_say(points: list[tuple[float, float]], level: float | None) -> None:
    named = {f"p{number}": point for number, point in enumerate(points)}
    lines = scatter(named, "prior", "new", level=None if level is None else ("teacher", level))
    (x_low, x_high), (y_low, y_high) = axes_of(lines)
    places = places_of(lines)
    assert list(places) != []
    assert set(places) == set(MARKS[: len(points)])
    for mark, (x, y) in zip(MARKS, points, strict=False):
        column, row = places[mark]
        assert x_low <= x <= x_high
        assert y_low <= y <= y_high
        assert abs(row - (y - y_low) / (y_high - y_low) * (ROWS - 1)) <= 0.5 + 1e-6
        beside = sum(abs(at - column) < len(points) and r == row for at, r in places.values()) - 1
        assert abs(column - (x - x_low) / (x_high - x_low) * (COLUMNS - 1)) <= 0.5 + beside + 1e-6
    if level is not None:
        (number,) = (number for number, line in enumerate(lines[1 : ROWS + 1]) if line.endswith(" teacher"))
        assert abs(ROWS - 1 - number - (level - y_low) / (y_high - y_low) * (ROWS - 1)) <= 0.5 + 1e-6


def test_it_is_plain_text_for_a_narrow_terminal() -> None:
    lines = scatter(
        {
            "base": (0.87, 0.0),
            "SFT": (0.43, 1.0),
            "SDFT": (0.71, 0.95),
            "SFT + anchors": (0.88, 1.0),
            "SDFT + anchors": (0.88, 1.0),
        },
        "prior",
        "new",
        level=("teacher", 0.5),
    )
    assert max(map(len, lines)) <= 80
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert lines[-1].split("   ")[-5:] == ["  o base", "1 SFT", "2 SDFT", "3 SFT + anchors", "4 SDFT + anchors"]
    places = places_of(lines)
    assert places["o"] == (56, 0)
    assert places["1"] == (4, ROWS - 1)
    # Both are at .48 of .5 of the axis, or 57.6 of 60 characters; the second gives way by one.
    assert places["3"] == (58, ROWS - 1)
    assert abs(places["4"][0] - 58) == 1
    assert lines[1 + ROWS // 2] == "  0.50 " + "+" + "- " * (COLUMNS // 2) + "- teacher"
