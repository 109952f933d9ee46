"""The pages of the documentation with the current results."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
NAMES = ("results", "results_anchors", "results_methods", "results_paper")


def results_text() -> str:
    """All of them; not the page of earlier results."""
    return "".join((DOCS / f"{name}.md").read_text(encoding="utf-8") for name in NAMES)
