"""Tool calls in a reply or an answer, as comparable values."""

from __future__ import annotations

import json
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfdistill.data.differences import cut, side_by_side
from selfdistill.data.rows import join_surrogates, json_at, repeated_key
from selfdistill.data.text_ids import mapped
from selfdistill.data.words import plain, spelled
from selfdistill.errors import one_line

Calls = list[tuple[str, dict[str, Any]]]
"""(name, arguments) of each call."""


class InvalidCall(Exception):
    """A sampled call cannot be read; the message explains why to the model."""


@dataclass(frozen=True)
class _Number:
    """A JSON number; the value is the same text for the same number."""

    value: str
    written: str = field(compare=False)


def decoded(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at a position of a sampled call, and where it ends.

    Raises:
        InvalidCall: there is none.
    """
    try:
        return _json_at(text, at)
    except (ValueError, RecursionError) as error:
        raise InvalidCall(f"the call is not valid JSON: {one_line(error)}") from None


def _json_at(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at a position, and where it ends.

    JSON can write halves of surrogate pairs, which neither files nor tokenizers take; they become U+FFFD.

    Raises:
        ValueError: there is none, or an object has a key twice; Python's NaN and Infinity are not JSON.
        RecursionError: it is nested too deeply.
    """
    value, end = json_at(text, at)
    if problem := repeated_key(value):
        raise ValueError(problem)
    return mapped(value, join_surrogates), end


def value_at(value: Any, keys: Sequence[str]) -> Any:
    """What the keys lead to in nested JSON objects; None if it is not there."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def calls_in(reply: str) -> Calls | None:
    """The reply's calls; None if an ``Action:`` line has no valid arguments."""
    found = actions_in(reply)
    try:
        return None if found is None else [(name, _arguments(value)) for name, value, _, _ in found]
    except (TypeError, RecursionError):
        return None


def actions_in(reply: str) -> list[tuple[str, Any, int, int]] | None:
    """(name, JSON value, start, end) of each ``Action:``; None if one has no JSON value."""
    found: list[tuple[str, Any, int, int]] = []
    for match in re.finditer(r"^[ \t]*Action:(.*)\n\s*Action Input:\s*", reply, re.MULTILINE):
        try:
            value, end = _json_at(reply, match.end())
        except (ValueError, RecursionError):
            return None
        found.append((match[1].strip(), value, match.start(), end))
    return found if len(found) == len(re.findall(r"^[ \t]*Action:", reply, re.MULTILINE)) else None


def written(calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Calls as text that :func:`calls_in` reads."""
    lines = [f"Action: {name}\nAction Input: {json.dumps(given, ensure_ascii=False)}" for name, given in calls]
    return "\n".join(lines)


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


def first_difference(calls: Calls | None, wanted: Calls) -> str:
    """What is wrong with the calls of a reply (:func:`calls_in`), in a line; empty if they are the same as the wanted.

    They are the same if the names, and over all calls each argument's values, are the same multisets. A number is the
    same as a number, or a text, of its value. Two texts are compared as texts: "3.10" is not "3.1".
    """
    if calls is None:
        return side_by_side(_first(wanted, []) or "no call", "a call that cannot be read")
    if Counter(name for name, _ in calls) != Counter(name for name, _ in wanted):
        expected = _first(wanted, calls) or ("no further call" if wanted else "no call")
        return side_by_side(expected, _first(calls, wanted) or ("no such call" if calls else "no call"))
    values, others = _by_argument(calls), _by_argument(wanted)
    for name in [*others, *(name for name in values if name not in others)]:
        left, lacking = _unmatched(values[name], others[name])
        if left or lacking:
            shown = (_written(side[0]) if side else "nothing" for side in (lacking, left))
            return f"argument '{cut(name)}': {side_by_side(*shown)}"
    return ""


def _first(calls: Calls, others: Calls) -> str:
    """The first call whose name occurs more often than among the others; of such calls, one that is not among them."""
    more = Counter(name for name, _ in calls) - Counter(name for name, _ in others)
    left = sorted((call for call in calls if call[0] in more), key=others.__contains__)
    return f"{left[0][0]} {_written(left[0][1])}" if left else ""


def _written(value: Any) -> str:
    """A value in normal form as JSON."""
    if isinstance(value, dict):
        return "{" + ", ".join([f"{_written(key)}: {_written(part)}" for key, part in value.items()]) + "}"
    if isinstance(value, list):
        return "[" + ", ".join([_written(part) for part in value]) + "]"
    return value.written if isinstance(value, _Number) else json.dumps(value, ensure_ascii=False)


def _by_argument(calls: Calls) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = defaultdict(list)
    for _, arguments in calls:
        for name, value in arguments.items():
            values[name].append(value)
    return values


def _unmatched(values: Sequence[Any], wanted: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The values that are the same as none of the wanted, and the wanted that are the same as none of the values."""
    left, lacking = list(values), list(wanted)
    # Equal ones first: with "3" and 3 on both sides, the text must match the text, because no other text is equal.
    for same in (operator.eq, _same):
        lacking = [value for value in lacking if not _take(left, value, same)]
    return left, lacking


def _take(rest: list[Any], value: Any, same: Callable[[Any, Any], bool]) -> bool:
    """Whether some of the rest is the same as the value; it is removed."""
    for place, other in enumerate(rest):
        if same(value, other):
            del rest[place]
            return True
    return False


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str | _Number) and isinstance(other, str | _Number):
        return one == other if isinstance(one, str) and isinstance(other, str) else _value(one) == _value(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(map(_same, one.values(), [other[key] for key in one]))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return False


def _value(leaf: str | _Number) -> str:
    return leaf.value if isinstance(leaf, _Number) else spelled(leaf)


def _arguments(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("arguments are not an object")
    return {key: _comparable(part) for key, part in value.items()}


def _comparable(value: Any) -> Any:
    """The value in normal form: numbers by value, true, false and null as text, each text in one spelling."""
    if isinstance(value, dict):
        return {key: _comparable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_comparable(part) for part in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = json.dumps(value)
        return _Number(spelled(text), text)
    return plain(value if isinstance(value, str) else json.dumps(value))
