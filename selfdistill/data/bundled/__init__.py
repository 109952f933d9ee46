"""Data sets that ship with the package."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.data.demonstrations import Demonstration
from selfdistill.data.prompts import load_prompts
from selfdistill.data.readers import read_jsonl
from selfdistill.data.sources import Note, packaged
from selfdistill.errors import UserError, closest

__all__ = ["PACKAGE", "anchor_kinds", "anchor_prompts", "drift_prompts", "is_packaged"]

PACKAGE = "package"
"""The source of anchors that ships with the package."""
KINDS = (
    *("arithmetic", "code", "example", "fact", "instruction"),
    *("language", "list", "question", "reading", "smalltalk"),
)
"""Kinds of its prompts."""


def drift_prompts() -> list[Demonstration]:
    """A few general prompts on which drift is measured. They are not anchors: none of them is trained on."""
    return load_prompts(packaged("general.txt"))


def anchor_prompts(source: str = PACKAGE, note: Note | None = None) -> list[Demonstration]:
    """The prompts of a source of anchors.

    Args:
        source: the package's, see :func:`anchor_kinds`; or a file or data set, see :func:`load_prompts`.
        note: takes what the user should know about prompts of their own.

    Raises:
        UserError: there is no such kind; or as :func:`load_prompts`.
    """
    if not is_packaged(source):
        return load_prompts(source, note)
    kinds = anchor_kinds(source)
    rows = [raw.value for raw in read_jsonl(packaged("anchors.jsonl"))]
    return load_prompts([row for row in rows if row["kind"] in kinds], name=source)


def is_packaged(source: str) -> bool:
    """Whether a source of anchors is the package's prompts, or some kinds of them."""
    return source.partition(":")[0] == PACKAGE


def anchor_kinds(source: str) -> Sequence[str]:
    """The kinds of the package's prompts that ``package`` (all) or ``package:A+B`` names.

    Raises:
        UserError: there is no such kind.
    """
    _, colon, kinds = source.partition(":")
    if not colon:
        return KINDS
    if unknown := [kind for kind in kinds.split("+") if kind not in KINDS]:
        raise UserError(
            f"{PACKAGE}:KIND, or several kinds joined by +, of {', '.join(KINDS)}; there is no kind {unknown[0]!r}"
            + closest(unknown[0], KINDS)
        )
    return kinds.split("+")
