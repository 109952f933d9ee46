"""Raw rows, each with its place, and the wording of errors about them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from selfdistill.errors import UserError, number_of, shortened

Made = TypeVar("Made")

_SHOWN = 10
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair. JSON can write it; UTF-8, and so any tokenizer, cannot."""


def join_surrogates(text: str) -> str:
    """Join the halves of surrogate pairs, and replace lone ones with U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@dataclass(frozen=True)
class RawRow:
    """One unchecked row: its place within the path (``line 3``), and its value or the reason it has none.

    Only :func:`repeated_key` detects an object with a duplicate key.
    """

    place: str
    source: str
    value: Any = None
    problem: str | None = None
    folder: str = ""
    """Where relative paths in the row begin: the folder of its file; "" for the working directory."""


class _RepeatedKey(str):
    """A duplicate key, in place of its JSON object, so that the error can name the row."""


def numbered(name: str, rows: Iterable[Any]) -> list[RawRow]:
    """Rows that are numbered from 0."""
    return [RawRow(f"row {number}", f"{name}[{number}]", row) for number, row in enumerate(rows)]


def parse_json(text: str) -> Any:
    """The value of a JSON text. An object with a duplicate key becomes what :func:`repeated_key` detects.

    Raises:
        ValueError: the text is not JSON; Python's NaN and Infinity are not.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)


def json_at(text: str, at: int) -> tuple[Any, int]:
    """The value of the JSON that begins at a position of a text, as by :func:`parse_json`, and where it ends.

    Raises:
        ValueError: there is none.
        RecursionError: it is nested too deeply.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)
    value, end = decoder.raw_decode(text, at)
    return value, int(end)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _RepeatedKey:
    repeated = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    return _RepeatedKey(repeated[0]) if repeated else dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def repeated_key(row: Any) -> str | None:
    """The problem if any object in the row, at any depth, has a duplicate key."""
    stack = [row]
    while stack:
        value = stack.pop()
        if isinstance(value, _RepeatedKey):
            return f"duplicate key {quoted(value)}; remove one"
        stack.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
    return None


def from_text(value: Any) -> Any:
    """The value of a JSON text, in which tables and other projects keep objects; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = parse_json(value)
    except (ValueError, RecursionError):
        return value
    return value if repeated_key(found) else found


def describe_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        if not value.strip():
            return "only whitespace" if value else "empty text"
        return quoted(value) + (" with a lone surrogate" if LONE_SURROGATE.search(value) else "")
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def one_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def quoted(text: str) -> str:
    return repr(shortened(text, 40))


def check_rows(
    path: str,
    rows: Sequence[RawRow],
    form_of: Callable[[Any, list[str]], str | None],
    make: Callable[[RawRow, str, int, list[str]], Made],
    whole: str,
) -> list[Made]:
    """Convert each row with ``make``, requiring one form; both callables append to a list of problems.

    Args:
        path: for the error.
        rows: the raw rows.
        form_of: returns the column that identifies a row's form, or None with a problem.
        make: converts a row, given its form and the number of rows before it.
        whole: what must have one form, ``set`` or ``file``, for the error.

    Raises:
        UserError: names the bad rows; see :func:`by_reason`.
    """
    made: list[Made] = []
    bad: list[RowProblem] = []
    first_form = first_place = None
    for raw in rows:
        problems = [raw.problem] if raw.problem else []
        form = None if problems else form_of(raw.value, problems)
        if form and first_form is None:
            first_form, first_place = form, raw.place
        if form and form != first_form:
            problems.append(f"has '{form}' but {first_place} has '{first_form}'; use one form in the whole {whole}")
        elif form:
            made.append(make(raw, form, len(made), problems))
        if problems:
            bad.append(_of_text(raw.place, " and ".join(problems)))
    if bad:
        raise UserError(f"{path}: {_bad_rows(bad, len(rows))}")
    return made


def _bad_rows(bad: Sequence[RowProblem], total: int) -> str:
    if len(bad) == total > 1 and len({problem.reason for problem in bad}) == 1:
        return f"all {total} rows: {_reason(bad)}"
    return f"{number_of(len(bad), 'bad row')}: {by_reason(bad, ', ')}"


class RowProblem(NamedTuple):
    """What is wrong with a row, at its place: a text with one value, such as a length, that differs between rows."""

    place: str
    before: str
    value: str = ""
    after: str = ""

    @property
    def reason(self) -> tuple[str, str]:
        """What rows with the same problem share."""
        return self.before, self.after


class RowError(UserError):
    """The error about one row; the arguments are those of :class:`RowProblem`."""

    def __init__(self, *problem: str) -> None:
        self.problem = RowProblem(*problem)
        super().__init__(by_reason([self.problem]))


def _of_text(place: str, text: str) -> RowProblem:
    """A problem as a text, of which what was found is the value."""
    found = re.fullmatch(r"(.*?\bfound )(.*?)(, expected .*)", text, re.DOTALL)
    return RowProblem(place, *(found.groups() if found else [text]))


def by_reason(bad: Sequence[RowProblem], after_one: str = ": ") -> str:
    """Problems of rows on one line: the first ten reasons, each after the places of its rows.

    As in ``a.jsonl:1, 3, 7 and 20 more: prompt has 619, 622, ... tokens, limit 504``.
    """
    alike: dict[tuple[str, str], list[RowProblem]] = {}
    for problem in bad:
        alike.setdefault(problem.reason, []).append(problem)
    return first_ten([f"{_places(of)}{after_one if len(of) == 1 else ': '}{_reason(of)}" for of in alike.values()])


def _reason(alike: Sequence[RowProblem]) -> str:
    values = [*dict.fromkeys(problem.value for problem in alike)]
    before, after = alike[0].reason
    return before + ", ".join([*values[:2], *(["..."] if len(values) > 2 else [])]) + after


def _places(alike: Sequence[RowProblem]) -> str:
    """The first three places, as ``lines 1, 3, 7``, and the number of others."""
    shown = [problem.place for problem in alike[:3]]
    begins = {re.sub(r"\d+$", "", place) for place in shown}
    if len(shown) > 1 and len(begins) == 1:
        begin = begins.pop()
        plural = re.sub(r"(?<=\w) $", "s ", begin)  # of: line 1
        shown = [plural + shown[0].removeprefix(begin), *(place.removeprefix(begin) for place in shown[1:])]
    return ", ".join(shown) + (f" and {len(alike) - len(shown)} more" if len(alike) > len(shown) else "")


def first_three(found: Sequence[str]) -> str:
    """The first three, for a note."""
    return ", ".join([*found[:3], *(["..."] if len(found) > 3 else [])])


def first_ten(found: Sequence[str]) -> str:
    """The first ten on one line, and the number of others."""
    more = f"; ... and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more
