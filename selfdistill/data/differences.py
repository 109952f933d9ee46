"""What feedback says of a difference: what was expected, and what was found."""

from __future__ import annotations

SHOWN = 120
"""Most characters of a value in a line of feedback."""


def cut(text: str, start: int = 0) -> str:
    """At most ``SHOWN`` characters of a text, from a place on, with dots for what is left out."""
    end = start + SHOWN
    return ("..." if start else "") + text[start:end] + ("..." if len(text) > end else "")


def side_by_side(expected: str, found: str) -> str:
    """``expected ..., found ...``. Long texts are cut around the place where they first differ."""
    start = 0
    if max(len(expected), len(found)) > SHOWN:
        pairs = enumerate(zip(expected, found, strict=False))
        first = next((at for at, (one, other) in pairs if one != other), min(len(expected), len(found)))
        start = max(0, first - SHOWN // 2)
    return f"expected {cut(expected, start)}, found {cut(found, start)}"
