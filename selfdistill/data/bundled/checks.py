"""A scorer for the bundled tasks ``sums``, ``tickets`` and ``chains``, whose feedback says what is wrong."""

from __future__ import annotations

import re
from typing import Any

FIELD = re.compile(r"\s*(\w+):[ \t]*([^\s.,]+).*")
"""A line ``Name: value``; of a value the first word counts."""


def fields(reply: str, row: dict[str, Any]) -> tuple[bool, str]:
    """Whether the reply has the answer's fields, a line ``Name: value`` each; of lines of one name the first counts.

    For ``--scorer python:selfdistill.data.bundled.checks.fields``. The row's answer is an object with ``fields``, names
    and values, and where values must be of a list, ``allowed`` with the list for each such name. Other lines do not
    matter.
    """
    wanted, allowed = row["answer"]["fields"], row["answer"].get("allowed", {})
    found: dict[str, str] = {}
    for line in reply.splitlines():
        if match := FIELD.fullmatch(line):
            found.setdefault(match[1], match[2])
    for name, value in wanted.items():
        if problem := _problem(name, value, found.get(name), allowed.get(name)):
            return False, problem
    return True, ""


def _problem(name: str, value: str, found: str | None, allowed: list[str] | None) -> str | None:
    if found is None:
        return f"missing field '{name}': expected a line '{name}: ...'"
    if allowed is not None and found not in allowed:
        return f"unknown {name.lower()} '{found}', expected one of {', '.join(allowed)}"
    return None if found == value else f"wrong {name.lower()}: expected {value}, found {found}"
