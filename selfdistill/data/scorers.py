"""Scorers: how good a reply is, by comparison with the row's ``answer``, else its completion.

Thoughts (``<think>...</think>``) are compared on neither side. A wrong or malformed reply scores False. An answer that
the scorer cannot use is a :class:`UserError`. The command's setting, but never a row of the data, may also name a
user-defined function, ``code``, which runs what the model writes, or the judge of :mod:`selfdistill.evaluation.judge`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from selfdistill.data.chat_format import ChatFormat, thought_and_said
from selfdistill.data.choices import chosen_letter, letter_of
from selfdistill.data.code_tests import run_tests
from selfdistill.data.demonstrations import CODE, SCORER_NAMES, Demonstration, Lacks
from selfdistill.data.messages import said_in
from selfdistill.data.named import FUNCTION, named
from selfdistill.data.rows import RowError, from_text, one_line
from selfdistill.data.thinking import split_thinking
from selfdistill.data.tool_calls import Calls, calls_in, calls_of, same_calls
from selfdistill.data.words import includes, same_text, words_of
from selfdistill.errors import UserError

JUDGE = "judge"
"""The setting with which another model grades replies; not a scorer that :func:`score` accepts."""

_ITEM = r"""(?:'[^']*'|"[^"]*"|[\d.eE+-]+|None|True|False)"""
_PYTHON_LIST = re.compile(rf"""\s*\[\s*(?:['"].*['"]|(?=.*['"])(?:{_ITEM}\s*,\s*)*{_ITEM})\s*\]\s*""", re.DOTALL)
"""A list with a text: only texts, also malformed, or texts, numbers and constants."""


def scored_text(chat: ChatFormat, prompt: Sequence[int], ids: Sequence[int], row: Demonstration, scorer: str) -> str:
    """The final text of a reply as its scorer compares it: for ``tool_call`` with the template's calls as lines."""
    _, said = thought_and_said(chat, prompt, ids)
    if scorer != "tool_call" or not chat.writes_calls:
        return said
    return said_in(chat.message_of(ids, prompt, row.template_options))


@dataclass(frozen=True)
class Verdict:
    """What a scorer says of a reply."""

    reward: float
    """From 0 to 1. The reply is correct if it is 1."""
    feedback: str = ""
    """What the reply's author may learn from, such as the output of a failed test; may be empty."""


def verdict(name: str, reply: str, demonstration: Demonstration) -> Verdict:
    """The verdict of a scorer on ``reply``.

    A user-defined scorer is called as ``function(reply, row)``; ``row`` is a dict with ``prompt`` (chat messages),
    ``completion`` (without thoughts), ``answer`` and ``document``. It returns a bool, a reward from 0 to 1, or a pair
    of one of these and a feedback text.

    Args:
        name: one of ``SCORER_NAMES``, ``CODE``, or a name that matches ``FUNCTION``.
        reply: the reply to score, without thoughts.
        demonstration: what to compare it with.

    Raises:
        UserError: unknown name; no answer or completion to compare with, or one that the scorer cannot use; or a
            user-defined function cannot be imported from the current folder or the environment, raises, or returns
            something else.
    """
    if name == CODE:
        return verdicts([(name, reply, demonstration)])[0]
    if name.startswith("python:"):
        return _by_function(name, reply, demonstration)
    if name not in SCORER_NAMES:
        raise UserError(f"unknown scorer '{name}', expected one of {', '.join(SCORER_NAMES)}")
    found = _SCORERS[name](reply, demonstration)
    return found if isinstance(found, Verdict) else Verdict(float(found))


def verdicts(given: Sequence[tuple[str, str, Demonstration]]) -> list[Verdict]:
    """The verdict for each scorer, reply and demonstration, as by :func:`verdict`; runs code in several processes."""
    coded = iter(by_tests([(reply, row) for name, reply, row in given if name == CODE]))
    found = [next(coded) if name == CODE else verdict(name, reply, row) for name, reply, row in given]
    for one in found:
        if isinstance(one, RowError):
            raise one
    return [one for one in found if isinstance(one, Verdict)]


def by_tests(given: Sequence[tuple[str, Demonstration]]) -> list[Verdict | RowError]:
    """The scorer ``code``: a reply is correct if its code passes all tests of the answer (:mod:`.code_tests`).

    Passing some tests earns nothing, for a function that always returns one value passes some. The answer is a list of
    tests, or one: Python statements that assert, or an expression that must be true. Where the tests cannot be run, an
    error takes the verdict's place.
    """
    tests = [_tests_of(row) for _, row in given]
    found: list[Verdict | RowError] = [one if isinstance(one, RowError) else Verdict(0.0) for one in tests]
    runnable = [(place, one) for place, one in enumerate(tests) if isinstance(one, list)]
    results = run_tests([given[place][0] for place, _ in runnable], [one for _, one in runnable])
    for (place, _), result in zip(runnable, results, strict=True):
        verdict = Verdict(float(result.passed), result.feedback)
        found[place] = _unusable(CODE, given[place][1], result.unusable) if result.unusable else verdict
    return found


def _tests_of(row: Demonstration) -> list[str] | RowError:
    if row.answer is None:
        return RowError(row.source, f"scorer '{CODE}' needs tests; add the column 'answer'")
    try:
        return [_text(test, CODE, row) for test in _answers(reference(CODE, row), CODE, row)]
    except RowError as error:
        return error


def score(name: str, reply: str, demonstration: Demonstration) -> bool:
    """Whether ``reply`` is correct: whether its reward is 1; see :func:`verdict`."""
    return verdict(name, reply, demonstration).reward == 1


def default_scorer(demonstration: Demonstration, setting: str | None) -> str:
    """Name of the row's own scorer, else ``setting``, else ``exact``."""
    return demonstration.scorer or setting or "exact"


def is_scorable(demonstration: Demonstration, setting: str | None) -> bool:
    """Whether a reply can be scored: there is something to compare it with, or a function that may need nothing."""
    return demonstration.has_reference or default_scorer(demonstration, setting).startswith("python:")


def nothing_to_score(setting: str | None) -> Lacks:
    """The problem of a row whose replies cannot be scored; ``setting`` is the scorer for rows that name none."""

    def lacks(demonstration: Demonstration) -> str | None:
        problem = "column 'completion': missing, and no 'answer' to score replies with"
        return None if is_scorable(demonstration, setting) else problem

    return lacks


def reference(scorer: str, demonstration: Demonstration) -> Any:
    """What a scorer, or the judge, compares replies with: the answer, else the completion without its thoughts.

    Raises:
        UserError: the row has neither, or its completion holds nothing but thoughts.
    """
    if demonstration.answer is not None:
        expected = demonstration.answer
    else:
        expected = said(demonstration)
        if demonstration.completion.strip() and not expected.strip():
            raise _unusable(scorer, demonstration, "it holds only thoughts; add the column 'answer'")
    if expected == [] or (isinstance(expected, str) and not expected.strip()):
        raise RowError(demonstration.source, f"scorer '{scorer}' needs an answer or a completion")
    return expected


def said(demonstration: Demonstration) -> str:
    """The completion without its thoughts, as replies are scored."""
    return split_thinking(demonstration.completion)[1]


def doubt_about(demonstrations: Sequence[Demonstration], setting: str | None) -> str | None:
    """A note that names demonstrated completions that their scorers reject, and what would accept them; else None.

    Args:
        demonstrations: demonstrations whose answers their scorers can use.
        setting: scorer for rows that name none. Rows for the judge get no note, because asking it takes time.
    """
    by_scorer: dict[str, list[Demonstration]] = {}
    for row in demonstrations:
        if row.completion:
            by_scorer.setdefault(default_scorer(row, setting), []).append(row)
    by_scorer.pop(JUDGE, None)
    doubts = [doubt for name, rows in by_scorer.items() if (doubt := _doubt(name, rows))]
    return "; ".join(doubts) or None


def _doubt(name: str, rows: Sequence[Demonstration]) -> str | None:
    found = verdicts([(name, said(row), row) for row in rows])
    rejected = [row.source for row, one in zip(rows, found, strict=True) if one.reward != 1]
    if not rejected:
        return None
    # Any answer is a pattern, too, so that regex fits would say little.
    fitting = [other for other in SCORER_NAMES if other != "regex" and all(_accepts(other, row) for row in rows)]
    instead = f", {' or '.join(fitting)} would accept all" if fitting else ""
    places = ", ".join(rejected[:3]) + (f" and {len(rejected) - 3} more" if len(rejected) > 3 else "")
    return f"scorer {name!r} rejects {len(rejected)} of {len(rows)} demonstrated completions{instead}: {places}"


def _accepts(name: str, row: Demonstration) -> bool:
    try:
        return score(name, said(row), row)
    except UserError:
        return False


def exact(reply: str, demonstration: Demonstration) -> bool:
    """The reply equals the answer: the same text, white space and Unicode's spellings aside, or the same number.

    Case, punctuation and accents count. 72, 72.0 and 7.2e1 are one number, 50 and 50% are two.
    """
    return same_text(reply, _text(reference("exact", demonstration), "exact", demonstration))


def contains(reply: str, demonstration: Demonstration) -> bool:
    """The reply contains the answer, or any answer of a list, as consecutive whole words (:func:`words_of`).

    Case, punctuation and white space do not matter, and numbers are compared by value. In scripts without spaces
    every character is a word. A sign of the answer (``#``, ``$``, ``/``) must be in the reply; one that only the reply
    has does not matter unless it makes another word: ``50%``, ``-5``, ``1/2`` and ``C++`` do not contain 50, 5, 1 or C.
    """
    expected = _answers(reference("contains", demonstration), "contains", demonstration)
    words = words_of(reply)
    found = False
    for answer in expected:
        wanted = words_of(_text(answer, "contains", demonstration))
        if not wanted:
            raise _unusable("contains", demonstration, "it has no letters, digits or symbols")
        found |= includes(words, wanted)
    return found


def _answers(expected: Any, scorer: str, demonstration: Demonstration) -> list[Any]:
    """The answers of a list, or of the JSON text of one with a text, as tables keep it; else the one answer."""
    if isinstance(expected, list):
        return expected
    if not isinstance(demonstration.answer, str):
        return [expected]
    answers = from_text(expected)
    if isinstance(answers, list):
        return answers if any(isinstance(answer, str) for answer in answers) else [expected]
    if _PYTHON_LIST.fullmatch(expected):
        raise _unusable(scorer, demonstration, "it is the text of a Python list, expected a list or its JSON text")
    return [expected]


def choice(reply: str, demonstration: Demonstration) -> bool:
    """The option that the reply chooses (:func:`~selfdistill.data.choices.chosen_letter`) is the answer, a letter.

    The answer may also be an option with its letter, as in ``(B) Paris``. Without an answer, the correct option is the
    one that the completion chooses.
    """
    expected = reference("choice", demonstration)
    if demonstration.answer is None:
        letter = chosen_letter(expected)
    else:
        letter = letter_of(_text(expected, "choice", demonstration))
    if letter is None:
        raise _unusable("choice", demonstration, "it has no letter from A to Z; write the option's letter, such as A")
    return chosen_letter(reply) == letter


def regex(reply: str, demonstration: Demonstration) -> bool:
    """The answer, a Python ``re`` pattern, matches somewhere in the reply.

    Requires an answer, because a completion is not a pattern.
    """
    if demonstration.answer is None:
        raise RowError(demonstration.source, "scorer 'regex' needs a pattern; add the column 'answer'")
    try:
        return re.search(_text(reference("regex", demonstration), "regex", demonstration), reply) is not None
    except re.error as error:
        raise _unusable("regex", demonstration, f"invalid pattern: {error}") from error


def tool_call(reply: str, demonstration: Demonstration) -> bool:
    """The reply calls the answer's tools with the answer's arguments.

    A call is a line ``Action: name`` followed by ``Action Input:`` and a JSON object; a malformed call makes the reply
    wrong. The answer is a list of [name, arguments] or its JSON text; the arguments are an object or its JSON text.
    Names must be equal as a multiset. Arguments are merged over all calls: for each argument name the multiset of
    values must be equal, so the order of calls does not matter. A JSON number is equal to a number, or a text, of its
    value: 3, 3.0 and "3". Two texts are compared as texts. Without an answer, the expected calls are those of the
    completion.
    """
    wanted: Calls | None
    if demonstration.answer is None:
        if not (wanted := calls_in(reference("tool_call", demonstration))):
            raise _unusable("tool_call", demonstration, "it has no Action and Action Input lines")
    else:
        try:
            wanted = calls_of(demonstration.answer)
        except ValueError as error:
            raise _unusable("tool_call", demonstration, str(error)) from error
    calls = calls_in(reply)
    return calls is not None and same_calls(calls, wanted)


_SCORERS: dict[str, Callable[[str, Demonstration], bool | Verdict]] = {
    "exact": exact,
    "contains": contains,
    "choice": choice,
    "regex": regex,
    "tool_call": tool_call,
}


def _by_function(name: str, reply: str, demonstration: Demonstration) -> Verdict:
    columns = ("prompt", "completion", "answer", "document")
    row = copy.deepcopy({column: getattr(demonstration, column) for column in columns})
    row |= {"prompt": list(row["prompt"]), "completion": said(demonstration)}
    function = _function(name)
    try:
        returned = function(reply, row)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{demonstration.source}: scorer {name!r} failed: {type(error).__name__}: {one_line(error)}"
        ) from error
    return as_verdict(returned, f"{demonstration.source}: scorer {name!r}")


def as_verdict(returned: Any, who: str) -> Verdict:
    """The verdict that a user's function returned: a bool, a reward from 0 to 1, or a pair of it and a feedback text.

    Raises:
        UserError: it is something else; names ``who`` returned it.
    """
    reward, feedback = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, "")
    if not (isinstance(reward, int | float) and 0 <= reward <= 1 and isinstance(feedback, str)):
        found = " ".join(repr(returned).split())[:60]
        raise UserError(
            f"{who} returned {found}, expected True or False, a reward from 0 to 1, "
            "or a pair of one of these and a feedback text"
        )
    return Verdict(float(reward), feedback)


@functools.cache
def _function(name: str) -> Callable[[str, dict[str, Any]], Any]:
    function: Callable[[str, dict[str, Any]], Any] = named(name, "scorer", "function")
    if inspect.isclass(function) and not issubclass(function, int | float | tuple):
        raise UserError(f"scorer {name!r}: found a class, whose objects are no rewards; name a function instead")
    return function


def check_scorer(setting: str | None) -> None:
    """Refuse a function of the user's that cannot be used; of other scorers there is nothing to check.

    Raises:
        UserError: it cannot be imported, or is a class.
    """
    if setting is not None and FUNCTION.fullmatch(setting):
        _function(setting)


def _text(expected: Any, scorer: str, demonstration: Demonstration) -> str:
    if isinstance(expected, int | float) and not isinstance(expected, bool):
        try:
            return str(expected)
        except ValueError:
            raise _too_long(demonstration) from None
    if not isinstance(expected, str):
        raise _unusable(scorer, demonstration, "it is not text or a number")
    return expected


def _unusable(scorer: str, demonstration: Demonstration, reason: str) -> RowError:
    column = "completion" if demonstration.answer is None else "answer"
    value = getattr(demonstration, column)
    try:
        shown = json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:
        return _too_long(demonstration)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    before = f"scorer '{scorer}' cannot use {column} "
    return RowError(demonstration.source, before, shown, f": {reason}")


def _too_long(demonstration: Demonstration) -> RowError:
    """For numbers that Python does not write as text, because that would take quadratic time."""
    limit = sys.get_int_max_str_digits()
    problem = f"column 'answer': found a number of more than {limit:,} digits, expected fewer; write it as text"
    return RowError(demonstration.source, problem)
