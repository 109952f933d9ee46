"""Scorers: decide whether a reply is correct, by comparison with the row's ``answer``, else its completion.

A wrong or malformed reply scores False. An answer that the scorer cannot use is a :class:`UserError`. The command's
setting, but never a row of the data, may also name a user-defined function or the judge of
:mod:`selfdistill.evaluation.judge`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from selfdistill.data.demonstrations import SCORER_NAMES, Demonstration, Lacks
from selfdistill.data.rows import one_line
from selfdistill.errors import UserError

JUDGE = "judge"
"""The setting with which another model grades replies; not a scorer that :func:`score` accepts."""

FUNCTION = re.compile(r"python:(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*)\.(?P<function>[^\W\d]\w*)")
"""Name of a user-defined scorer: ``python:package.module.function``."""


def score(name: str, reply: str, demonstration: Demonstration) -> bool:
    """Whether ``reply`` is correct according to a scorer.

    A user-defined scorer is called as ``function(reply, row)`` and returns a bool; ``row`` is a dict with ``prompt``
    (chat messages), ``completion``, ``answer`` and ``document``.

    Args:
        name: one of ``SCORER_NAMES``, or a name that matches ``FUNCTION``.
        reply: the reply to score.
        demonstration: what to compare it with.

    Raises:
        UserError: unknown name; no answer or completion to compare with, or one that the scorer cannot use; or a
            user-defined function cannot be imported from the current folder or the environment, raises, or does not
            return a bool.
    """
    if name.startswith("python:"):
        return _by_function(name, reply, demonstration)
    if name not in SCORER_NAMES:
        raise UserError(f"unknown scorer '{name}', expected one of {', '.join(SCORER_NAMES)}")
    return _SCORERS[name](reply, demonstration)


def default_scorer(demonstration: Demonstration, setting: str | None) -> str:
    """Name of the row's own scorer, else ``setting``, else ``exact``."""
    return demonstration.scorer or setting or "exact"


def is_scorable(demonstration: Demonstration, setting: str | None) -> bool:
    """Whether a reply can be scored: there is something to compare it with, or a function that may need nothing."""
    return demonstration.has_reference or default_scorer(demonstration, setting).startswith("python:")


def nothing_to_score(setting: str | None) -> Lacks:
    """The problem of a row whose replies cannot be scored; ``setting`` is the scorer for rows that name none."""

    def lacks(demonstration: Demonstration) -> str | None:
        problem = "column 'completion': missing, expected 'completion' or 'answer' to score replies with"
        return None if is_scorable(demonstration, setting) else problem

    return lacks


def doubt_about(demonstrations: Sequence[Demonstration], setting: str | None) -> str | None:
    """A note if the scorer rejects most demonstrated completions, naming scorers that accept all; else None.

    Args:
        demonstrations: demonstrations whose answers their scorers can use.
        setting: scorer for rows that name none. The judge gets no note, because asking it takes time.
    """
    if setting == JUDGE:
        return None
    rows = [row for row in demonstrations if row.completion and not row.scorer]
    right = sum(score(default_scorer(row, setting), row.completion, row) for row in rows)
    if right * 2 >= len(rows):
        return None
    fitting = [name for name in SCORER_NAMES if all(_right(name, row) for row in rows)]
    instead = f"; --scorer {' or '.join(fitting)} accepts all of them" if fitting else ""
    scorer = setting or "exact"
    return f"scorer {scorer!r} does not fit: it accepts only {right} of {len(rows)} demonstrated completions{instead}"


def _right(name: str, row: Demonstration) -> bool:
    try:
        return score(name, row.completion, row)
    except UserError:
        return False


def exact(reply: str, demonstration: Demonstration) -> bool:
    """The reply equals the answer, after stripping and collapsing whitespace; case-sensitive."""
    return reply.split() == _text(_expected("exact", demonstration), "exact", demonstration).split()


def contains(reply: str, demonstration: Demonstration) -> bool:
    """The reply contains the answer, or any answer of a list, as consecutive whole words.

    Words are numbers, with sign and decimals, and runs of letters and digits. Case, punctuation, whitespace and
    thousands separators are ignored: 4,500 is 4500.
    """
    expected = _expected("contains", demonstration)
    words = words_of(reply)
    found = False
    for answer in expected if isinstance(expected, list) else [expected]:
        wanted = words_of(_text(answer, "contains", demonstration))
        if not wanted:
            raise _unusable("contains", demonstration, "it has no letters or digits")
        found |= any(words[at : at + len(wanted)] == wanted for at in range(len(words)))
    return found


def choice(reply: str, demonstration: Demonstration) -> bool:
    """The option that the reply chooses is the answer, one capital letter.

    The choice is the stripped content of the last ``<answer>...</answer>``. Without a complete tag it is the last
    standalone capital letter A to Z: a word, delimited by whitespace or colons, that is one letter after stripping
    punctuation, as in ``(B)``, ``B.`` or ``Answer:B``. The words "I" and "A" count, too. Without an answer, the correct
    option is the one that the completion chooses.
    """
    if demonstration.answer is None:
        expected = _choice_in(_expected("choice", demonstration))
    else:
        expected = _text(demonstration.answer, "choice", demonstration).strip()
    if expected is None or not re.fullmatch("[A-Z]", expected):
        raise _unusable("choice", demonstration, "it is not one capital letter")
    return _choice_in(reply) == expected


def regex(reply: str, demonstration: Demonstration) -> bool:
    """The answer, a Python ``re`` pattern, matches somewhere in the reply.

    Requires an answer, because a completion is not a pattern.
    """
    if demonstration.answer is None:
        raise UserError(f"{demonstration.source}: scorer 'regex' needs a pattern; add the column 'answer'")
    try:
        return re.search(_text(_expected("regex", demonstration), "regex", demonstration), reply) is not None
    except re.error as error:
        raise _unusable("regex", demonstration, f"invalid pattern: {error}") from error


def tool_call(reply: str, demonstration: Demonstration) -> bool:
    """The reply calls the answer's tools with the answer's arguments.

    A call is a line ``Action: name`` followed by ``Action Input:`` and a JSON object; a malformed call makes the reply
    wrong. The answer is a list of [name, arguments] or its JSON text; the arguments are an object or its JSON text.
    Names must be equal as a multiset. Arguments are merged over all calls: for each argument name the multiset of
    values must be equal, so the order of calls does not matter. A value equals its text: 3 and "3". Without an answer,
    the expected calls are those of the completion.
    """
    if demonstration.answer is None:
        expected = _calls_in(_expected("tool_call", demonstration))
        if not expected:
            raise _unusable("tool_call", demonstration, "it has no Action and Action Input lines")
    else:
        expected = _calls_of_answer(demonstration)
    calls = _calls_in(reply)
    return calls is not None and _merged(calls) == _merged(expected)


_SCORERS: dict[str, Callable[[str, Demonstration], bool]] = {
    "exact": exact,
    "contains": contains,
    "choice": choice,
    "regex": regex,
    "tool_call": tool_call,
}


def _by_function(name: str, reply: str, demonstration: Demonstration) -> bool:
    columns = ("prompt", "completion", "answer", "document")
    row = copy.deepcopy({column: getattr(demonstration, column) for column in columns})
    row["prompt"] = list(row["prompt"])
    function = _function(name)
    try:
        right = function(reply, row)
    except Exception as error:
        raise UserError(
            f"{demonstration.source}: scorer {name!r} failed: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(right, bool):
        found = " ".join(repr(right).split())[:60]
        raise UserError(f"{demonstration.source}: scorer {name!r} returned {found}, expected True or False (a bool)")
    return right


@functools.cache
def _function(name: str) -> Callable[[str, dict[str, Any]], Any]:
    match = FUNCTION.fullmatch(name)
    if match is None:
        raise UserError(f"scorer {name!r}: expected python:package.module.function")
    if match["module"].partition(".")[0] in sys.stdlib_module_names:  # such as builtins.exec
        raise UserError(f"scorer {name!r}: {match['module']!r} is in the standard library; name your own module")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(match["module"])
    except Exception as error:
        raise UserError(
            f"scorer {name!r}: module {match['module']!r} cannot be imported from {here} or the environment: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        sys.path.remove(here)
    function = getattr(module, match["function"], None)
    if not callable(function):
        raise UserError(f"scorer {name!r}: {module.__file__} has no function {match['function']!r}")
    return function


def _expected(scorer: str, demonstration: Demonstration) -> Any:
    expected = demonstration.completion if demonstration.answer is None else demonstration.answer
    if expected == [] or (isinstance(expected, str) and not expected.strip()):
        raise UserError(f"{demonstration.source}: scorer '{scorer}' needs an answer or a completion")
    return expected


def _text(expected: Any, scorer: str, demonstration: Demonstration) -> str:
    if isinstance(expected, int | float) and not isinstance(expected, bool):
        return str(expected)
    if not isinstance(expected, str):
        raise _unusable(scorer, demonstration, "it is not text or a number")
    return expected


def _unusable(scorer: str, demonstration: Demonstration, reason: str) -> UserError:
    column = "completion" if demonstration.answer is None else "answer"
    value = getattr(demonstration, column)
    shown = json.dumps(value, ensure_ascii=False, default=str)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return UserError(f"{demonstration.source}: scorer '{scorer}' cannot use {column} {shown}: {reason}")


def words_of(text: str) -> list[str]:
    """Numbers and runs of letters and digits, as :func:`contains` compares them."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    text = re.sub(r"(?<![\w,.])\d{1,3}(?:,\d{3})+(?!,?\d)", lambda number: number[0].replace(",", ""), text)
    return re.findall(r"(?:(?<!\w)-)?\d+(?:\.\d+)+|(?<!\w)-\d+|[^\W_]+", text)


def _choice_in(reply: str) -> str | None:
    tags = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", reply, re.DOTALL)
    if tags:
        return str(tags[-1]).strip()
    words = [word.strip(string.punctuation) for word in re.split(r"[\s:]+", reply)]
    return next((word for word in reversed(words) if re.fullmatch("[A-Z]", word)), None)


_Calls = list[tuple[str, dict[str, str]]]
"""(name, arguments) of each call, argument values as :func:`_plain` text."""


def _calls_in(reply: str) -> _Calls | None:
    """The reply's calls; None if an ``Action:`` line has no valid arguments."""
    calls: _Calls = []
    for match in re.finditer(r"^[ \t]*Action:(.*)\n\s*Action Input:\s*", reply, re.MULTILINE):
        try:
            value, _ = json.JSONDecoder().raw_decode(reply, match.end())
            calls.append((match[1].strip(), _arguments(value)))
        except (ValueError, TypeError, RecursionError):
            return None
    return calls if len(calls) == len(re.findall(r"^[ \t]*Action:", reply, re.MULTILINE)) else None


def _calls_of_answer(demonstration: Demonstration) -> _Calls:
    try:
        pairs = demonstration.answer
        pairs = json.loads(pairs) if isinstance(pairs, str) else pairs
        calls = [(name, _arguments(json.loads(given) if isinstance(given, str) else given)) for name, given in pairs]
    except (ValueError, TypeError, RecursionError) as error:
        raise _unusable("tool_call", demonstration, "it is not a JSON list of [name, arguments]") from error
    if not all(isinstance(name, str) for name, _ in calls):
        raise _unusable("tool_call", demonstration, "a name is not text")
    return calls


def _arguments(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise TypeError("arguments are not an object")
    plain = {key: _plain(part) for key, part in value.items()}
    return {key: part if isinstance(part, str) else json.dumps(part, sort_keys=True) for key, part in plain.items()}


def _plain(value: Any) -> Any:
    """The value with numbers, true, false and null converted to text, at any depth."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def _merged(calls: _Calls) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    names = Counter(name for name, _ in calls)
    return names, Counter(pair for _, arguments in calls for pair in arguments.items())
