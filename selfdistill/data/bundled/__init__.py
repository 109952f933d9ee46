"""Data sets that ship with the package."""

from __future__ import annotations

from importlib import resources

from selfdistill.data.demonstrations import Demonstration, load_prompts

__all__ = ["general_prompts", "packaged"]


def packaged(name: str) -> str:
    """Path of a bundled data file."""
    return str(resources.files(__name__) / name)


def general_prompts() -> list[Demonstration]:
    """The bundled general prompts."""
    return load_prompts(packaged("general.txt"))
