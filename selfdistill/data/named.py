"""What a user has written: objects of the user's own modules, named ``python:package.module.name``."""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Any

from selfdistill.data.rows import one_line
from selfdistill.errors import UserError, closest

FUNCTION = re.compile(r"python:(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*)\.(?P<function>[^\W\d]\w*)")
"""Name of an object of the user's: ``python:package.module.function``."""


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
            f"{type(error).__name__}: {one_line(error)}"
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
