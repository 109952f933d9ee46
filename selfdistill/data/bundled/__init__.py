"""Data sets that ship with the package."""

from __future__ import annotations

from selfdistill.data.demonstrations import Demonstration
from selfdistill.data.prompts import load_prompts
from selfdistill.data.sources import packaged

__all__ = ["anchor_prompts", "general_prompts", "packaged"]


def general_prompts() -> list[Demonstration]:
    """A few general prompts along which distances are measured; none of them is trained on."""
    return load_prompts(packaged("general.txt"))


def anchor_prompts() -> list[Demonstration]:
    """General prompts of many kinds, to train on as anchors."""
    return load_prompts(packaged("anchors.jsonl"))
