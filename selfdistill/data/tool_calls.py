"""Tool calls in a reply or an answer, as comparable values."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from selfdistill.data.words import spelled

Calls = list[tuple[str, dict[str, str]]]
"""(name, arguments) of each call; argument values as text that is the same for equal values."""


def calls_in(reply: str) -> Calls | None:
    """The reply's calls; None if an ``Action:`` line has no valid arguments."""
    calls: Calls = []
    for match in re.finditer(r"^[ \t]*Action:(.*)\n\s*Action Input:\s*", reply, re.MULTILINE):
        try:
            value, _ = json.JSONDecoder().raw_decode(reply, match.end())
            calls.append((match[1].strip(), _arguments(value)))
        except (ValueError, TypeError, RecursionError):
            return None
    return calls if len(calls) == len(re.findall(r"^[ \t]*Action:", reply, re.MULTILINE)) else None


def calls_of(answer: Any) -> Calls:
    """The calls of an answer: a list of [name, arguments], or its JSON text.

    Raises:
        ValueError: the answer has another form; the message says which.
    """
    try:
        pairs = json.loads(answer) if isinstance(answer, str) else answer
        calls = [(name, _arguments(json.loads(given) if isinstance(given, str) else given)) for name, given in pairs]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError("it is not a JSON list of [name, arguments]") from error
    if not all(isinstance(name, str) for name, _ in calls):
        raise ValueError("a name is not text")
    return calls


def merged(calls: Calls) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """The calls' names, and the arguments of all of them, as multisets."""
    names = Counter(name for name, _ in calls)
    return names, Counter(pair for _, arguments in calls for pair in arguments.items())


def _arguments(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise TypeError("arguments are not an object")
    plain = {key: _plain(part) for key, part in value.items()}
    return {key: part if isinstance(part, str) else json.dumps(part, sort_keys=True) for key, part in plain.items()}


def _plain(value: Any) -> Any:
    """The value with each number, true, false and null as text, at any depth, and each text in one spelling."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return spelled(value if isinstance(value, str) else json.dumps(value))
