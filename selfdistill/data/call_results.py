"""Tool calls and the messages that answer them: their order, and oddities that deserve a note."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from selfdistill.data.rows import first_three, one_of, quoted

Turn = Mapping[str, Any]

_UNKNOWN = "a call to a tool that is not in its 'tools'"
_UNDECLARED = "an argument that the tool's schema does not declare"
_MISNAMED = "a tool message whose name differs from its call's"
_UNANSWERED = "fewer tool messages than calls before the next turn"
_COMPOSED = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties")
"""Keys with which a schema declares arguments outside its ``properties``."""


def answered(turns: Sequence[Turn], column: str, problems: list[str]) -> list[tuple[int, int]]:
    """For each tool message, the turn that it answers and the call's number there; for others (own number, -1).

    A message answers the call that its ``tool_call_id`` names, or else the first open call. A message that
    answers none, or names a call that is not open, is a problem.
    """
    found: list[tuple[int, int]] = []
    asked, open_calls = 0, dict[int, Any]()
    for number, turn in enumerate(turns):
        at = f"{column}[{number}]"
        if turn["role"] != "tool":
            asked, open_calls = number, dict(enumerate(turn.get("tool_calls", ())))
            found.append((number, -1))
            continue
        name, ids = turn.get("tool_call_id"), {call["id"]: n for n, call in open_calls.items() if "id" in call}
        if not open_calls:
            problems.append(f"column '{at}': found a tool message without a call, expected one after tool_calls")
        elif name is not None and ids and name not in ids:
            problems.append(f"column '{at}.tool_call_id': found {quoted(name)}, expected {one_of([*map(repr, ids)])}")
        else:
            place = ids.get(name, min(open_calls))
            del open_calls[place]
            found.append((asked, place))
    return found


def in_call_order(turns: list[dict[str, Any]], column: str, problems: list[str]) -> list[dict[str, Any]]:
    """The turns, with the tool messages after a turn sorted into the order of its calls.

    Otherwise templates that write results without ids would show them with the wrong calls.
    """
    before = len(problems)
    places = answered(turns, column, problems)
    if len(problems) > before:
        return turns
    return [turns[number] for number in sorted(range(len(turns)), key=places.__getitem__)]


def notes_on_calls(rows: Iterable[tuple[str, Sequence[Turn], Sequence[Mapping[str, Any]] | None]]) -> list[str]:
    """A note for each kind of oddity in the calls of a set, with the number of rows and the first ones.

    Args:
        rows: the source, the valid turns and the tools of each.
    """
    found: dict[str, dict[str, str]] = {kind: {} for kind in (_UNKNOWN, _UNDECLARED, _MISNAMED, _UNANSWERED)}
    for source, turns, tools in rows:
        for kind, what in [*_undeclared(turns, tools or ()), *_unlike(turns)]:
            found[kind].setdefault(source, f"{source}: {what}")
    return [
        f"{'1 row has' if len(places) == 1 else f'{len(places)} rows have'} {kind} ({first_three([*places.values()])})"
        for kind, places in found.items()
        if places
    ]


def _undeclared(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Calls and arguments that the row's tools do not declare, if it has tools of a known form."""
    functions = [tool.get("function", tool) for tool in tools]
    if not functions or not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in functions):
        return
    schemas = {function["name"]: function.get("parameters") for function in functions}
    for call in (call["function"] for turn in turns for call in turn.get("tool_calls", ())):
        name = call["name"]
        if name not in schemas:
            yield _UNKNOWN, quoted(name)
            continue
        declared = _declared(schemas[name])
        if others := [one for one in call["arguments"] if declared is not None and one not in declared]:
            yield _UNDECLARED, f"{quoted(others[0])} of {quoted(name)}"


def _declared(schema: Any) -> Mapping[str, Any] | None:
    """The arguments that a schema declares; None if it allows others or does not list them."""
    if not isinstance(schema, dict) or schema.get("additionalProperties") or any(key in schema for key in _COMPOSED):
        return None
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else None


def _unlike(turns: Sequence[Turn]) -> Iterator[tuple[str, str]]:
    """Tool messages whose name differs from their call's, and unanswered calls in a chat that continues."""
    places = answered(turns, "", [])
    for turn, (asked, place) in zip(turns, places, strict=True):
        name = turn.get("name")
        if turn["role"] == "tool" and name is not None:
            called = turns[asked]["tool_calls"][place]["function"]["name"]
            if name != called:
                yield _MISNAMED, f"{quoted(name)} for {quoted(called)}"
    results = Counter(asked for asked, place in places if place >= 0)
    for number, turn in enumerate(turns[:-1]):
        calls = len(turn.get("tool_calls", ()))
        if results[number] < calls:
            yield _UNANSWERED, f"{results[number]} for {calls}"
