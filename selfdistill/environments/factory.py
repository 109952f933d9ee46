"""Look up environments by name: the package's own and the user's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from selfdistill.data import named
from selfdistill.environments.forms import Functions, ToolClass, form_of, has_reward
from selfdistill.environments.hosted import Hosted
from selfdistill.environments.protocol import Environment, EnvironmentFactory
from selfdistill.environments.shop import Shop
from selfdistill.environments.verifiers_form import VerifiersEpisode, loaded
from selfdistill.errors import UserError, found_value

_BUNDLED: dict[str, type] = {"bundled:shop": Shop}
"""Environments that ship with the package."""
_GIVEN: dict[str, tuple[Any, EnvironmentFactory]] = {}
"""The classes, and tuples of functions, that a caller in this process gave as an environment, by its name."""
IN_PYTHON = _FUNCTIONS, _CLASS = ("functions:", "class:")
"""Beginnings of such a name."""


def make_environment(name: str) -> EnvironmentFactory:
    """Return a factory of episodes' environments.

    A user's class is tried once here, so that an unusable one is found before a model is loaded.

    Args:
        name: ``bundled:shop``, or ``python:package.module.Class``, which is imported from the current folder or the
            installed packages. The class, or a function that returns an object, takes no arguments. The object
            implements the protocol :class:`Environment` or has another form of :mod:`selfdistill.environments.forms`,
            or is an environment of ``verifiers``. In place of a class, a list or tuple of functions, which are the
            tools. Or a name that :func:`name_of_given` returned.

    Raises:
        UserError: there is no such environment, it cannot be created, it has no known form, or a tool has no schema.
    """
    if name in _GIVEN:
        return _GIVEN[name][1]
    if name.startswith(IN_PYTHON):
        raise UserError(
            f"environment {name!r}: it was given in Python, in another process; give it again as environment=..., "
            "or put it into a module and name it python:package.module.name"
        )
    if name in _BUNDLED:
        return EnvironmentFactory(functools.partial(_made, name, _BUNDLED[name], ToolClass))
    if not name.startswith("python:"):
        known = ", ".join(_BUNDLED)
        raise UserError(f"unknown environment {name!r}, expected {known} or python:package.module.Class")
    make = named(name, "environment", "class", lists=True)
    if isinstance(make, list | tuple):
        return _of_functions(f"environment {name!r}", make)
    return _of_class(name, make)


def name_of_given(given: type | Sequence[Callable[..., Any]]) -> str:
    """The name of an environment that is this class, or has these functions as its tools, in this process.

    :func:`make_environment` takes it. Equal names of classes or functions give an equal name, which then means what was
    given last.

    Raises:
        UserError: the class cannot be used; there are no functions, an item is none or has no schema, or two have the
            same name.
    """
    if isinstance(given, type):
        name = _CLASS + given.__name__
        if name not in _GIVEN or _GIVEN[name][0] != given:
            _GIVEN[name] = given, _of_class(name, given)
        return name
    functions = tuple(given)
    factory = _of_functions("setting 'environment'", functions)
    name = _FUNCTIONS + ",".join(tool["function"]["name"] for tool in factory().tools)
    if name not in _GIVEN or _GIVEN[name][0] != functions:
        _GIVEN[name] = functions, factory
    return name


def _of_class(name: str, make: Callable[[], Any]) -> EnvironmentFactory:
    """Creates objects of a class, or what a function returns, once it has created one that can be used.

    Raises:
        UserError: it cannot be created, it has no known form, or a tool has no schema.
    """
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


def _of_functions(where: str, functions: Sequence[Any]) -> EnvironmentFactory:
    """Creates environments with these tools; ``where`` begins messages.

    Raises:
        UserError: there are none, an item is no function or has no schema, or two have the same name.
    """
    if not functions:
        raise UserError(f"{where}: found an empty list, expected functions that the model may call")
    for number, function in enumerate(functions):
        if not callable(function) or inspect.isclass(function):
            found = found_value(function)
            raise UserError(f"{where}: item {number} is {found}, expected a function that the model may call")
    try:
        Functions(functions)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return EnvironmentFactory(functools.partial(Functions, functions), judges=False)


def _made(name: str, make: Callable[[], Any], form: Callable[[Hosted], Environment]) -> Environment:
    return form(Hosted(name, make))
