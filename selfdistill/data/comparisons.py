"""The scorers that a row may name: each compares a reply with the row's ``answer``, else its completion.

The verdict on a wrong reply has a line of feedback: what was expected, and what was found.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from selfdistill.data.choices import chosen_letter, letter_of
from selfdistill.data.demonstrations import Demonstration
from selfdistill.data.differences import cut, side_by_side
from selfdistill.data.rows import RowError, from_text
from selfdistill.data.thinking import split_thinking
from selfdistill.data.tool_calls import Calls, calls_in, calls_of, first_difference
from selfdistill.data.words import has_minus_of, includes, same_text, words_of
from selfdistill.errors import shortened

MOST_LISTED = 5
"""Most words, or answers, in a line of feedback."""

_ITEM = r"""(?:'[^']*'|"[^"]*"|[\d.eE+-]+|None|True|False)"""
_PYTHON_LIST = re.compile(rf"""\s*\[\s*(?:['"].*['"]|(?=.*['"])(?:{_ITEM}\s*,\s*)*{_ITEM})\s*\]\s*""", re.DOTALL)
"""A list with a text: only texts, also malformed, or texts, numbers and constants."""


@dataclass(frozen=True)
class Verdict:
    """What a scorer says of a reply."""

    reward: float
    """From 0 to 1. The reply is correct if it is 1."""
    feedback: str = ""
    """What the reply's author may learn from, such as the output of a failed test; may be empty."""


RIGHT = Verdict(1.0)
"""The verdict of a comparison on a right reply."""


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
            raise unusable(scorer, demonstration, "it holds only thoughts; add the column 'answer'")
    if expected == [] or (isinstance(expected, str) and not expected.strip()):
        raise RowError(demonstration.source, f"scorer '{scorer}' needs an answer or a completion")
    return expected


def said(demonstration: Demonstration) -> str:
    """The completion without its thoughts, as replies are scored."""
    return split_thinking(demonstration.completion)[1]


def exact(reply: str, demonstration: Demonstration) -> Verdict:
    """Right if the reply is the answer: the same text, white space and Unicode's spellings aside, or the same number.

    Case, punctuation and accents count. 72, 72.0 and 7.2e1 are one number, 50 and 50% are two.
    """
    expected = as_text(reference("exact", demonstration), "exact", demonstration)
    return RIGHT if same_text(reply, expected) else _wrong(side_by_side(_spoken(expected), _spoken(reply)))


def contains(reply: str, demonstration: Demonstration) -> Verdict:
    """Right if the reply contains the answer, or any answer of a list, as consecutive whole words (:func:`words_of`).

    Case, punctuation and white space do not matter, and numbers are compared by value. In scripts without spaces
    every character is a word. A sign of the answer (``#``, ``$``, ``/``) must be in the reply; one that only the reply
    has does not matter unless it makes another word: ``50%``, ``-5``, ``1/2`` and ``C++`` do not contain 50, 5, 1 or C.
    """
    given = answers_in(reference("contains", demonstration), "contains", demonstration)
    answers = [as_text(answer, "contains", demonstration) for answer in given]
    words, wanted = words_of(reply), list(map(words_of, answers))
    if not all(wanted):
        raise unusable("contains", demonstration, "it has no letters, digits or symbols")
    found = [answer for answer, one in zip(answers, wanted, strict=True) if includes(words, one)]
    if any(has_minus_of(reply, answer) for answer in found):
        return RIGHT
    if len(answers) > 1:
        return _wrong(f"expected one of {_listed(answers)}, found none of them")
    if found:
        return _wrong(f"expected {cut(_spoken(answers[0]))}, found it without its minus")
    return _wrong(f"expected {cut(_spoken(answers[0]))}, {_lacking(words, wanted[0])}")


def _lacking(words: Sequence[str], wanted: Sequence[str]) -> str:
    """How the words of a reply fall short of those of the answer, which they do not include."""
    known, distinct = set(words), list(dict.fromkeys(wanted))
    missing = list(islice((w for w in distinct if w not in known and not includes(words, [w])), MOST_LISTED + 1))
    if not missing:
        return "found its words, but not one after the other"
    return "found none of it" if len(missing) == len(distinct) else f"missing {_listed(missing)}"


def choice(reply: str, demonstration: Demonstration) -> Verdict:
    """Right if the option that the reply chooses (:func:`.choices.chosen_letter`) is the answer, a letter.

    The answer may also be an option with its letter, as in ``(B) Paris``. Without an answer, the correct option is the
    one that the completion chooses.
    """
    expected = reference("choice", demonstration)
    if demonstration.answer is None:
        letter = chosen_letter(expected)
    else:
        letter = letter_of(as_text(expected, "choice", demonstration))
    if letter is None:
        raise unusable("choice", demonstration, "it has no letter from A to Z; write the option's letter, such as A")
    chosen = chosen_letter(reply)
    return RIGHT if chosen == letter else _wrong(f"expected {letter}, found {chosen or 'no single choice'}")


ANSWERS = {"regex": "a pattern", "code": "tests"}
"""What the answer is to scorers that need one, because a completion cannot serve as it."""


def lacks_answer(scorer: str) -> str:
    """The problem of a row without an answer for one of :data:`ANSWERS`."""
    return f"scorer '{scorer}' needs {ANSWERS[scorer]}; add the column 'answer'"


def regex(reply: str, demonstration: Demonstration) -> Verdict:
    """Right if the answer, a Python ``re`` pattern, matches somewhere in the reply.

    Requires an answer, because a completion is not a pattern.
    """
    if demonstration.answer is None:
        raise RowError(demonstration.source, lacks_answer("regex"))
    pattern = as_text(reference("regex", demonstration), "regex", demonstration)
    try:
        found = re.search(pattern, reply)
    except re.error as error:
        raise unusable("regex", demonstration, f"invalid pattern: {error}") from error
    return RIGHT if found else _wrong(f"expected text that matches {cut(_pattern(pattern))}, found {cut(repr(reply))}")


def tool_call(reply: str, demonstration: Demonstration) -> Verdict:
    """Right if the reply calls the answer's tools with the answer's arguments.

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
            raise unusable("tool_call", demonstration, "it has no Action and Action Input lines")
    else:
        try:
            wanted = calls_of(demonstration.answer)
        except ValueError as error:
            raise unusable("tool_call", demonstration, str(error)) from error
    problem = first_difference(calls_in(reply), wanted)
    return _wrong(problem) if problem else RIGHT


COMPARISONS: dict[str, Callable[[str, Demonstration], Verdict]] = {
    "exact": exact,
    "contains": contains,
    "choice": choice,
    "regex": regex,
    "tool_call": tool_call,
}
"""The scorers that a row may name."""


_ESCAPES = str.maketrans({"\t": r"\t", "\n": r"\n", "\v": r"\v", "\f": r"\f", "\r": r"\r"})


def _wrong(feedback: str) -> Verdict:
    return Verdict(0.0, feedback)


def _spoken(text: str) -> str:
    """A text in quotes on one line, for scorers to whom white space does not matter."""
    return f"'{' '.join(text.split())}'" if text.strip() else "nothing"


def _pattern(pattern: str) -> str:
    """A pattern in quotes on one line; white space counts in it, so a line break is shown as its escape."""
    return f"'{pattern.translate(_ESCAPES)}'"


def _listed(texts: Sequence[str]) -> str:
    shown = ", ".join(cut(_spoken(text)) for text in texts[:MOST_LISTED])
    return f"{shown} and others" if len(texts) > MOST_LISTED else shown


def answers_in(expected: Any, scorer: str, demonstration: Demonstration) -> list[Any]:
    """The answers of a list, or of the JSON text of one with a text, as tables keep it; else the one answer."""
    if isinstance(expected, list):
        return expected
    if not isinstance(demonstration.answer, str):
        return [expected]
    answers = from_text(expected)
    if isinstance(answers, list):
        return answers if any(isinstance(answer, str) for answer in answers) else [expected]
    if _PYTHON_LIST.fullmatch(expected):
        raise unusable(scorer, demonstration, "it is the text of a Python list, expected a list or its JSON text")
    return [expected]


def is_one_text(demonstration: Demonstration) -> bool:
    """Whether ``contains`` compares replies with the answer as it stands: it has words, and is not read as a list."""
    text = demonstration.answer
    try:
        return answers_in(text, "contains", demonstration) == [text] and bool(words_of(text))
    except RowError:
        return False


def as_text(expected: Any, scorer: str, demonstration: Demonstration) -> str:
    """An answer that is text or a number, as text.

    Raises:
        UserError: it is neither, or a number of too many digits.
    """
    if isinstance(expected, int | float) and not isinstance(expected, bool):
        try:
            return str(expected)
        except ValueError:
            raise _too_long(demonstration) from None
    if not isinstance(expected, str):
        raise unusable(scorer, demonstration, "it is not text or a number")
    return expected


def unusable(scorer: str, demonstration: Demonstration, reason: str) -> RowError:
    """The error that a scorer cannot use the row's answer, or the completion in its place."""
    column = "completion" if demonstration.answer is None else "answer"
    value = getattr(demonstration, column)
    try:
        shown = json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:
        return _too_long(demonstration)
    before = f"scorer '{scorer}' cannot use {column} "
    return RowError(demonstration.source, before, shortened(shown, 60), f": {reason}")


def _too_long(demonstration: Demonstration) -> RowError:
    """For numbers that Python does not write as text, because that would take quadratic time."""
    limit = sys.get_int_max_str_digits()
    problem = f"column 'answer': found a number of more than {limit:,} digits, expected fewer; write it as text"
    return RowError(demonstration.source, problem)
