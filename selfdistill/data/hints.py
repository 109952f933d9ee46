"""Hints: a context that shows the teacher a part of the demonstration."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from selfdistill.data.contexts import ONE_DEMONSTRATION, Context, must_show_one, parse_context
from selfdistill.data.demonstrations import Demonstration
from selfdistill.data.messages import Message
from selfdistill.data.thinking import TAGS, split_thinking
from selfdistill.data.words import WORD
from selfdistill.errors import UserError

HintPart = Callable[[str, float], str]
"""Maps a demonstration and a share, 0 to 1, to what the teacher sees of it; all of it at 1."""


def first_words(text: str, share: float) -> str:
    """The first floor(share * m) of the text's m words, with the white space between them.

    A word ends at white space. In scripts without spaces each character is a word.
    """
    if share >= 1:
        return text
    ends = [word.end() for word in WORD.finditer(text)]
    return text[: [0, *ends][_count(share, len(ends))]]


def first_steps_and_answer(text: str, share: float) -> str:
    """The first floor(share * m) of the m steps of the reasoning, and always the answer.

    Steps are lines, or sentences of a text of one line. The reasoning is the thought between its tags. Without one it
    is everything before the last step, which is the answer; so a text of a single step is shown whole.
    """
    if share >= 1:
        return text
    thought, said = (half.strip() for half in split_thinking(text))
    reasoning = thought or said
    between = r"\s*\n\s*" if "\n" in reasoning else r"(?<=[.!?])\s+"
    ends = [step.end() for step in re.finditer(between, reasoning)]
    if not thought:
        return reasoning[: [0, *ends][_count(share, len(ends))]] + reasoning[[0, *ends][-1] :]
    kept = reasoning[: [0, *ends][_count(share, len(ends) + 1)]].rstrip()
    begin, end = next(tags for tags in TAGS if tags[1] in text)
    return f"{begin}\n{kept}\n{end}\n\n{said}" if kept else said


def _count(share: float, steps: int) -> int:
    return int(share * steps + 1e-9)  # 0.7 * 10 may be just below 7


@dataclass(frozen=True)
class Hint:
    """A context with a part of the demonstration; with nothing of it, the teacher sees the prompt alone.

    Raises:
        UserError: the context cannot show a part of a demonstration.
    """

    name: ClassVar[str] = "hint"
    one_demonstration: ClassVar[bool] = True
    context: Context
    share: float
    part: HintPart = first_words

    def __post_init__(self) -> None:
        must_show_one(self.context, "a part of a demonstration")

    def messages(self, demonstration: Demonstration, pool: Sequence[Demonstration]) -> list[Message]:
        """See :class:`selfdistill.data.Context`.

        Raises:
            UserError: only a part is shown, and the demonstration has none; see :func:`no_part`.
        """
        if self.share >= 1:
            return self.context.messages(demonstration, pool)
        if problem := no_part(demonstration):
            raise UserError(f"{demonstration.source}: {problem}")
        shown = self.part(demonstration.shown, self.share) if demonstration.has_demonstration else ""
        if not shown:
            return list(demonstration.prompt)
        return self.context.messages(replace(demonstration, privileged_context=shown), pool)

    def lacks(self, demonstration: Demonstration) -> str | None:
        """See :class:`selfdistill.data.Context`."""
        shows = self.context.lacks(demonstration) if self.share else None
        return shows or (no_part(demonstration) if self.share < 1 else None)


def no_part(demonstration: Demonstration) -> str | None:
    """The problem of a demonstration of which no part can be shown: an episode, or a reply with calls; else None."""
    if not demonstration.episode or demonstration.privileged_context is not None:
        return None
    return "the teacher cannot see a part of an episode"


def context_of(spec: str, hint: float) -> Context:
    """The context that ``spec`` names, with this share of the demonstration.

    Raises:
        UserError: as of :func:`parse_context`; or the context cannot show a part of a demonstration.
    """
    context = parse_context(spec)
    return context if hint == 1 else Hint(context, hint)


def hintable(specs: Sequence[str]) -> list[str]:
    """Those of the contexts that can show a part of the demonstration.

    Raises:
        UserError: there is none.
    """
    found = [spec for spec in specs if parse_context(spec).one_demonstration]
    if not found:
        raise UserError(f"hints need a context that shows one demonstration: {', '.join(ONE_DEMONSTRATION)}")
    return found
