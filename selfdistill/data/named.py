"""What a user has written: objects of the user's own modules, named ``python:package.module.name``.

In Python a function itself may be given. It gets a name with :data:`GIVEN`.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

from selfdistill.errors import UserError, closest, named_error

FUNCTION = re.compile(r"python:(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*)\.(?P<function>[^\W\d]\w*)")
"""Name of an object of the user's: ``python:package.module.function``."""
GIVEN = "function:"
"""Beginning of the name of a function that a caller in this process gave."""
_given: dict[tuple[str, str], Callable[..., Any]] = {}
"""These functions, by use and name."""


def is_own(name: str) -> bool:
    """Whether this is, or is meant as, the name of a function of the user's."""
    return name.startswith(("python:", GIVEN))


def by_name(value: Any, use: str) -> Any:
    """A given function as its name, with which :func:`own_function` finds it in this process; other values as they are.

    Equal names of functions give an equal name, which then means the function given last. The name of a lambda has a
    hash of its code, without the values of its variables, so that a run is not resumed with another one.

    Args:
        value: of the setting.
        use: the setting.

    Raises:
        ValueError: it is a class.
    """
    if isinstance(value, type):
        raise ValueError("a function, or its name as python:package.module.function")
    if not callable(value):
        return value
    name = getattr(value, "__name__", type(value).__name__)
    if name == "<lambda>":
        name = f"<lambda {hashlib.sha256(_written(value.__code__).encode()).hexdigest()[:8]}>"
    _given[use, GIVEN + name] = value
    return GIVEN + name


def _written(constant: Any) -> str:
    """A constant of Python code as a text that is the same in every process."""
    if isinstance(constant, CodeType):
        return repr((constant.co_code, constant.co_names, [_written(one) for one in constant.co_consts]))
    if isinstance(constant, frozenset):
        return repr(sorted(map(repr, constant)))
    return repr(constant)


def known_or_own(name: str, known: Sequence[str]) -> str:
    """The name, if it is known or that of a function of the user's.

    Raises:
        ValueError: it is neither.
    """
    if name in known or FUNCTION.fullmatch(name) or name.startswith(GIVEN):
        return name
    raise ValueError(f"{', '.join(known)} or python:package.module.function{closest(name, known)}")


def own_function(name: str, use: str) -> Callable[..., Any]:
    """The user's function of this name: imported, or given in this process.

    Args:
        name: ``python:package.module.function``, or one of :func:`by_name`.
        use: the setting that names it, such as ``scorer``.

    Raises:
        UserError: it cannot be imported, or was given in another process.
    """
    if not name.startswith(GIVEN):
        function: Callable[..., Any] = named(name, use, "function")
        return function
    if (use, name) not in _given:
        raise UserError(
            f"{use} {name!r}: the function was given in Python, in another process; give it there again as "
            f"{use}={name.removeprefix(GIVEN)}, or for a new run put it into a module and name it "
            "python:module.function"
        )
    return _given[use, name]


def named(name: str, use: str, kind: str, *, lists: bool = False) -> Any:
    """The callable that ``name`` names, imported from the current folder or the environment.

    Args:
        name: ``python:package.module.name``.
        use: what it is used as, such as ``scorer``; for messages.
        kind: what it is, such as ``function``; for messages.
        lists: whether it may also be a list or a tuple, whose items the caller checks.

    Raises:
        UserError: another form of name, a module of the standard library, one that cannot be imported, or one
            that has no such callable.
    """
    match = FUNCTION.fullmatch(name)
    if match is None:
        raise UserError(f"{use} {name!r}: expected python:package.module.{kind}")
    if match["module"].partition(".")[0] in sys.stdlib_module_names:  # such as builtins.exec
        raise UserError(f"{use} {name!r}: {match['module']!r} is in the standard library; name your own module")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(match["module"])
    except (Exception, SystemExit) as error:  # a script may end with sys.exit()
        raise UserError(
            f"{use} {name!r}: module {match['module']!r} cannot be imported from {here} or the environment: "
            f"{named_error(error)}"
        ) from error
    finally:
        sys.path.remove(here)
    found = getattr(module, match["function"], None)

    def is_one(value: Any) -> bool:
        return callable(value) or (lists and isinstance(value, list | tuple))

    if not is_one(found):
        known = [name for name, value in vars(module).items() if is_one(value) and not name.startswith("_")]
        hint = closest(match["function"], known, "; expected one, or a list of functions" if lists else "")
        raise UserError(f"{use} {name!r}: {module.__file__} has no {kind} {match['function']!r}{hint}")
    return found
