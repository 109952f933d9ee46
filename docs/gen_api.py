"""An extension of griffe for the API pages: Sphinx roles in docstrings become links or code."""

from __future__ import annotations

import re
from typing import Any

import griffe

from selfdistill import __all__ as public

_ROLE = re.compile(r":(?:class|func|data|mod|meth):`~?(?P<path>[\w.]+)`")
_TYPES = {
    "Model": "selfdistill.api_inputs.Model",
    "Rows": "selfdistill.data.demonstrations.Rows",
    "OnStep": "selfdistill.training.loop.OnStep",
}
_COMMANDS = ("Ask", "Check", "Compare", "Eval", "Learn", "Questions")


def _link(match: re.Match[str]) -> str:
    path = match["path"]
    name = path.rpartition(".")[2]
    if name.removesuffix("Config") in _COMMANDS:  # its fields are the options of the command
        return f"[`{name}`][selfdistill-{name.removesuffix('Config').lower()}]"
    target = _TYPES.get(name, f"selfdistill.{name}" if name in public else "")
    return f"[`{name}`][{target}]" if target else f"`{path}`"


class Roles(griffe.Extension):
    """Rewrites the docstring of every object as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_link, obj.docstring.value)
