"""Scorers: how good a reply is, by comparison (:mod:`.comparisons`) with the row's ``answer``, else its completion.

Thoughts (``<think>...</think>``) are compared on neither side. A malformed reply is wrong. An answer that the scorer
cannot use is a :class:`UserError`. The command's setting, but never a row of the data, may also name a
user-defined function, ``code``, which runs what the model writes, or the judge of :mod:`selfdistill.evaluation.judge`.
In Python it may also be a function (:mod:`.named`).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from selfdistill.data.chat_format import ChatFormat, thought_and_said
from selfdistill.data.code_tests import run_tests
from selfdistill.data.comparisons import (
    ANSWERS,
    COMPARISONS,
    Verdict,
    answers_in,
    as_text,
    lacks_answer,
    reference,
    said,
    unusable,
)
from selfdistill.data.demonstrations import CODE, SCORER_NAMES, Demonstration, Lacks
from selfdistill.data.messages import said_in, uses_tools
from selfdistill.data.named import GIVEN, is_own, own_function
from selfdistill.data.rows import RowError, join_surrogates
from selfdistill.errors import UserError, found_value, named_error

JUDGE = "judge"
"""The setting with which another model grades replies; not a scorer that :func:`score` accepts."""
_Scorer = Callable[[str, dict[str, Any]], Any]


def scored_text(chat: ChatFormat, prompt: Sequence[int], ids: Sequence[int], row: Demonstration, scorer: str) -> str:
    """The final text of a reply as its scorer compares it: for ``tool_call`` with the template's calls as lines.

    A call that cannot be read becomes a line that the scorer cannot read either.
    """
    _, said = thought_and_said(chat, prompt, ids)
    if scorer != "tool_call" or not chat.writes_calls:
        return said
    message = chat.message_of(ids, prompt, row.template_options)
    return said_in(message) + "\nAction:" * ("invalid" in message)


def verdict(name: str, reply: str, demonstration: Demonstration) -> Verdict:
    """The verdict of a scorer on ``reply``.

    A user-defined scorer is called as ``function(reply, row)``; ``row`` is a dict with ``prompt`` (chat messages),
    ``completion`` (without thoughts), ``answer`` (by default the completion) and ``document``. It returns a bool, a
    reward from 0 to 1, or a pair of one of these and a feedback text.

    Args:
        name: one of ``SCORER_NAMES``, ``CODE``, a name that matches ``FUNCTION``, or one that a given function got.
        reply: the reply to score, without thoughts.
        demonstration: what to compare it with.

    Raises:
        UserError: unknown name; no answer or completion to compare with, or one that the scorer cannot use; or a
            user-defined function cannot be imported from the current folder or the environment, was given in another
            process, raises, or returns something else.
    """
    if name == CODE:
        return verdicts([(name, reply, demonstration)])[0]
    if is_own(name):
        return _by_function(name, reply, demonstration)
    if name not in SCORER_NAMES:
        raise UserError(f"unknown scorer '{name}', expected one of {', '.join(SCORER_NAMES)}")
    return COMPARISONS[name](reply, demonstration)


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
        found[place] = unusable(CODE, given[place][1], result.unusable) if result.unusable else verdict
    return found


def _tests_of(row: Demonstration) -> list[str] | RowError:
    if row.answer is None:
        return RowError(row.source, lacks_answer(CODE))
    try:
        return [as_text(test, CODE, row) for test in answers_in(reference(CODE, row), CODE, row)]
    except RowError as error:
        return error


def score(name: str, reply: str, demonstration: Demonstration) -> bool:
    """Whether ``reply`` is correct: whether its reward is 1; see :func:`verdict`."""
    return verdict(name, reply, demonstration).reward == 1


def default_scorer(demonstration: Demonstration, setting: str | None) -> str:
    """Name of the row's own scorer, else ``setting``, else ``exact``, or ``tool_call`` for a demonstration of calls."""
    shows_calls = demonstration.answer is None and uses_tools(demonstration.episode[-1:])
    return demonstration.scorer or setting or ("tool_call" if shows_calls else "exact")


def is_scorable(demonstration: Demonstration, setting: str | None) -> bool:
    """Whether a reply can be scored: there is something to compare it with, or a function that may need nothing."""
    return demonstration.has_reference or is_own(default_scorer(demonstration, setting))


def nothing_to_score(setting: str | None) -> Lacks:
    """The problem of a row whose replies cannot be scored; ``setting`` is the scorer for rows that name none."""

    def lacks(demonstration: Demonstration) -> str | None:
        name = default_scorer(demonstration, setting)
        if demonstration.answer is None and name in ANSWERS:
            return lacks_answer(name)
        problem = "column 'completion': missing, and no 'answer' to score replies with"
        return None if is_scorable(demonstration, setting) else problem

    return lacks


def doubt_about(
    demonstrations: Sequence[Demonstration], setting: str | None, chat: ChatFormat | None = None
) -> str | None:
    """A note that names demonstrated completions that their scorers reject, and what would accept them; else None.

    Args:
        demonstrations: demonstrations whose answers their scorers can use.
        setting: scorer for rows that name none. Rows for the judge get no note, because asking it takes time.
        chat: writes demonstrated calls as the model would; None: they are lines of text.
    """
    by_scorer: dict[str, list[Demonstration]] = {}
    for row in demonstrations:
        if row.completion:
            by_scorer.setdefault(default_scorer(row, setting), []).append(row)
    by_scorer.pop(JUDGE, None)
    doubts = [doubt for name, rows in by_scorer.items() if (doubt := _doubt(name, rows, chat))]
    return "; ".join(doubts) or None


def _doubt(name: str, rows: Sequence[Demonstration], chat: ChatFormat | None) -> str | None:
    found = verdicts([(name, _demonstrated(row, name, chat), row) for row in rows])
    rejected = [row.source for row, one in zip(rows, found, strict=True) if one.reward != 1]
    if not rejected:
        return None
    # Any answer is a pattern, too, so that regex fits would say little.
    fitting = [other for other in SCORER_NAMES if other != "regex" and all(_accepts(other, row, chat) for row in rows)]
    instead = f", {' or '.join(fitting)} would accept all" if fitting else ""
    places = ", ".join(rejected[:3]) + (f" and {len(rejected) - 3} more" if len(rejected) > 3 else "")
    return f"scorer {name!r} rejects {len(rejected)} of {len(rows)} demonstrated completions{instead}: {places}"


def _accepts(name: str, row: Demonstration, chat: ChatFormat | None) -> bool:
    try:
        return score(name, _demonstrated(row, name, chat), row)
    except UserError:
        return False


def _demonstrated(row: Demonstration, scorer: str, chat: ChatFormat | None) -> str:
    """The completion as the scorer compares it if a model repeats it."""
    if chat is None or not uses_tools(row.episode[-1:]):
        return said(row)
    return scored_text(chat, (), chat.encode_reply(row.episode[-1], row.template_options), row, scorer)


def _by_function(name: str, reply: str, demonstration: Demonstration) -> Verdict:
    columns = ("prompt", "completion", "answer", "document")
    row = copy.deepcopy({column: getattr(demonstration, column) for column in columns})
    row |= {"prompt": list(row["prompt"]), "completion": said(demonstration)}
    if row["answer"] is None:
        row["answer"] = row["completion"]
    function = _function(name)
    try:
        returned = function(reply, row)
    except (Exception, SystemExit) as error:
        raise UserError(f"{demonstration.source}: scorer {name!r} failed: {named_error(error)}") from error
    return as_verdict(returned, f"{demonstration.source}: scorer {name!r}")


def as_verdict(returned: Any, who: str) -> Verdict:
    """The verdict that a user's function returned: a bool, a reward from 0 to 1, or a pair of it and a feedback text.

    Raises:
        UserError: it is something else; names ``who`` returned it.
    """
    reward, feedback = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, "")
    if hasattr(reward, "item"):  # a scalar of numpy or torch
        with suppress(RuntimeError, TypeError, ValueError):  # there are several, or it wants arguments
            reward = reward.item()
    if not (isinstance(reward, int | float) and 0 <= reward <= 1 and isinstance(feedback, str)):
        found = found_value(returned)
        raise UserError(
            f"{who} returned {found}, expected True or False, a reward from 0 to 1, "
            "or a pair of one of these and a feedback text"
        )
    return Verdict(float(reward), join_surrogates(feedback))


def _function(name: str) -> _Scorer:
    """The user's function of this name.

    Raises:
        UserError: there is none, or it is a class.
    """
    return own_function(name, "scorer") if name.startswith(GIVEN) else _imported(name)


@functools.cache
def _imported(name: str) -> _Scorer:
    function: _Scorer = own_function(name, "scorer")
    if inspect.isclass(function) and not issubclass(function, int | float | tuple):
        raise UserError(f"scorer {name!r}: found a class, whose objects are no rewards; name a function instead")
    return function


def check_scorer(setting: str | None) -> None:
    """Refuse a function of the user's that cannot be used; of other scorers there is nothing to check.

    Raises:
        UserError: it cannot be imported, is a class, or was given in another process.
    """
    if setting is not None and is_own(setting):
        _function(setting)
