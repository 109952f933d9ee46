"""Data sets that ship with the package."""

from __future__ import annotations

from importlib import resources

from selfdistill.data.demonstrations import Demonstration, load_prompts

__all__ = ["anchor_prompts", "general_prompts", "packaged"]


def packaged(name: str) -> str:
    """Path of a bundled data file."""
    return str(resources.files(__name__) / name)


def general_prompts() -> list[Demonstration]:
    """A few general prompts along which distances are measured; none of them is trained on."""
    return load_prompts(packaged("general.txt"))


def anchor_prompts() -> list[Demonstration]:
    """General prompts of many kinds, to train on as anchors."""
    return load_prompts(packaged("anchors.jsonl"))
