"""Parts of demonstrations: where they are cut, and what a context shows of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from selfdistill.data import (
    Demonstration,
    Hint,
    context_of,
    first_steps_and_answer,
    first_words,
    hintable,
    parse_context,
)
from selfdistill.data.contexts import CONTEXTS, ONE_DEMONSTRATION
from selfdistill.errors import UserError

TEXT = "Ticket 17:  shelf B,\n box 4.\n"


@pytest.mark.parametrize("tenths", range(11))
def test_whole_words_and_never_more_than_the_share(tenths: int) -> None:
    words = [f"w{number}" for number in range(20)]
    assert first_words(" ".join(words), tenths / 10).split() == words[: 2 * tenths]


def test_the_white_space_between_words_stays() -> None:
    assert first_words(TEXT, 0.7) == "Ticket 17:  shelf B,"
    assert first_words(TEXT, 1) == TEXT
    assert first_words(TEXT, 0.1) == ""
    assert first_words("", 0.5) == ""


def test_a_character_of_a_script_without_spaces_is_a_word() -> None:
    assert first_words("日本語です ok", 0.5) == "日本語"
    assert first_words("日本語です ok", 0.9) == "日本語です"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("One is a. Two is b! So 4.", ["So 4.", "One is a. So 4.", "One is a. Two is b! So 4."]),
        ("x = 1\n\ny = 2. Yes.\nSo 4.", ["So 4.", "x = 1\n\nSo 4.", "x = 1\n\ny = 2. Yes.\nSo 4."]),
        (
            "<think>\na\nb\n</think>\n\nSo 4.",
            ["So 4.", "<think>\na\n</think>\n\nSo 4.", "<think>\na\nb\n</think>\n\nSo 4."],
        ),
        ("So 4.", ["So 4."] * 3),
    ],
)
def test_steps_are_lines_or_sentences_and_the_answer_stays(text: str, seen: list[str]) -> None:
    assert [first_steps_and_answer(text, share) for share in (0.4, 0.6, 1)] == seen


@pytest.mark.parametrize("spec", ["turns:repeats=2", "example"])
def test_a_hint_is_the_context_of_a_shorter_demonstration(spec: str) -> None:
    row = Demonstration("q", "one two three four", answer="four")
    context = parse_context(spec)
    short = Demonstration("q", "one two")
    assert context_of(spec, 0.5).messages(row, ()) == context.messages(short, ())
    assert context_of(spec, 1).messages(row, ()) == context.messages(row, ())
    assert context_of(spec, 0).messages(row, ()) == [{"role": "user", "content": "q"}]
    assert Hint(context, 0.1, lambda text, share: f"{text} {share}").messages(row, ()) == context.messages(
        Demonstration("q", "one two three four 0.1"), ()
    )
    assert context_of(spec, 0.5).lacks(Demonstration("q", source="s")) is not None


def test_an_episode_is_shown_whole_or_not_at_all() -> None:
    asks = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    replies = (asks, {"role": "tool", "content": "r"}, {"role": "assistant", "content": "a b"})
    row, turns = Demonstration("q", "a b", episode=replies, source="s"), parse_context("turns")
    whole, part = Hint(turns, 1), Hint(turns, 0.5)
    assert whole.messages(row, ()) == turns.messages(row, ())
    assert whole.lacks(row) is None
    assert part.lacks(row) == "the teacher cannot see a part of an episode"
    with pytest.raises(UserError, match=r"^s: the teacher cannot see a part of an episode$"):
        part.messages(row, ())
    told = replace(row, privileged_context="c d")
    assert part.lacks(told) is None
    assert part.messages(told, ())[1]["content"] == "c"


def test_only_contexts_of_one_demonstration_show_a_part() -> None:
    others = [name for name in CONTEXTS if name not in ONE_DEMONSTRATION]
    for name in others:
        with pytest.raises(UserError, match=f"^context '{name}.*': cannot show a part of a demonstration; use turns, "):
            context_of(name, 0.5)
    assert hintable(["few_shot", "example", "turns"]) == ["example", "turns"]
    names = ", ".join(ONE_DEMONSTRATION)
    with pytest.raises(UserError, match=f"^hints need a context that shows one demonstration: {names}$"):
        hintable(others)
