"""Environments by their names: those of the package and the user's own."""

from __future__ import annotations

from selfdistill.data import named
from selfdistill.environments.protocol import Environment, EnvironmentFactory
from selfdistill.errors import UserError

BUNDLED: dict[str, EnvironmentFactory] = {}
"""Environments that ship with the package, without ``bundled:``."""


def make_environment(name: str) -> EnvironmentFactory:
    """What makes the environment of each episode.

    Args:
        name: ``bundled:shop``, or ``python:package.module.Class`` of the current folder or the environment.

    Raises:
        UserError: there is no such environment, or the class is of no form that is known.
    """
    if name.startswith("python:"):
        factory = named(name, "environment", "class")
        if not isinstance(factory(), Environment):
            raise UserError(f"environment {name!r}: it has no tools, reset, step and close")
        return factory  # type: ignore[no-any-return]
    kind, _, rest = name.partition(":")
    if kind != "bundled" or rest not in BUNDLED:
        known = ", ".join(f"bundled:{one}" for one in BUNDLED)
        raise UserError(f"unknown environment {name!r}, expected {known} or python:package.module.Class")
    return BUNDLED[rest]
