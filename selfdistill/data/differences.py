"""What feedback says of a difference: what was expected, and what was found."""

from __future__ import annotations

SHOWN = 120
"""Most characters of a value in a line of feedback."""


def cut(text: str, start: int = 0) -> str:
    """At most ``SHOWN`` characters of a text, from a place on, with dots for what is left out."""
    end = start + SHOWN
    return ("..." if start else "") + text[start:end] + ("..." if len(text) > end else "")


def same_start(one: str, other: str) -> int:
    """How many characters both texts begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def side_by_side(expected: str, found: str) -> str:
    """``expected ..., found ...``. Long texts are cut around the place where they first differ."""
    start = 0
    if max(len(expected), len(found)) > SHOWN:
        start = max(0, same_start(expected, found) - SHOWN // 2)
    return f"expected {cut(expected, start)}, found {cut(found, start)}"
