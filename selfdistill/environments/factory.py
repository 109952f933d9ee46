"""Look up environments by name: the package's own and the user's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from selfdistill.data import named
from selfdistill.environments.forms import ToolClass, form_of, has_reward
from selfdistill.environments.hosted import Hosted
from selfdistill.environments.protocol import Environment, EnvironmentFactory
from selfdistill.environments.shop import Shop
from selfdistill.environments.verifiers_form import VerifiersEpisode, loaded
from selfdistill.errors import UserError

_BUNDLED: dict[str, type] = {"bundled:shop": Shop}
"""Environments that ship with the package."""


def make_environment(name: str) -> EnvironmentFactory:
    """Return a factory of episodes' environments.

    A user's class is tried once here, so that an unusable one is found before a model is loaded.

    Args:
        name: ``bundled:shop``, or ``python:package.module.Class``, which is imported from the current folder or the
            installed packages. The class, or a function that returns an object, takes no arguments. The object
            implements the protocol :class:`Environment` or has another form of :mod:`selfdistill.environments.forms`,
            or is an environment of ``verifiers``.

    Raises:
        UserError: there is no such environment, it cannot be created, it has no known form, or a tool has no schema.
    """
    if name in _BUNDLED:
        return EnvironmentFactory(functools.partial(_made, name, _BUNDLED[name], ToolClass))
    if not name.startswith("python:"):
        known = ", ".join(_BUNDLED)
        raise UserError(f"unknown environment {name!r}, expected {known} or python:package.module.Class")
    make = named(name, "environment", "class")
    shared = loaded(name, make)
    if shared is not None:
        VerifiersEpisode(Hosted(name, lambda: shared)).close()
        return EnvironmentFactory(lambda: VerifiersEpisode(Hosted(name, lambda: shared)))
    first = Hosted(name, make)
    try:
        form = form_of(first, is_class=inspect.isclass(make))
        form(first)
        judges = form is not ToolClass or has_reward(first.object)
    finally:
        first.close()
    return EnvironmentFactory(functools.partial(_made, name, make, form), judges)


def _made(name: str, make: Callable[[], Any], form: Callable[[Hosted], Environment]) -> Environment:
    return form(Hosted(name, make))
