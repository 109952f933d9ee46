"""Verdicts on samples: the scorer's, and how each sample is checked once, by one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfdistill.data import ChatFormat, Demonstration, Verdict, default_scorer, scored_text, verdicts
from selfdistill.methods.sequences import Completion
from selfdistill.methods.slots import Checker
from selfdistill.runtime import gathered, rank_slice


@dataclass(frozen=True)
class ScorerChecker:
    """The verdict of the row's scorer on the reply, or the last reply of an episode."""

    scorer: str | None

    def __call__(self, completions: Sequence[Completion], chat: ChatFormat) -> list[Verdict]:
        return verdicts(to_score(completions, chat, self.scorer))


def to_score(
    completions: Sequence[Completion], chat: ChatFormat, scorer: str | None
) -> list[tuple[str, str, Demonstration]]:
    """For each completion its scorer, what this compares, and the row; ``scorer`` is for rows that name none."""
    given = []
    for completion in completions:
        row = completion.example.demonstration
        name = default_scorer(row, scorer)
        given.append((name, _text_to_score(completion, chat, name), row))
    return given


def _text_to_score(completion: Completion, chat: ChatFormat, scorer: str) -> str:
    """What a scorer compares: the reply with its given beginning, of an episode the last; ``tool_call`` all replies."""
    example = completion.example
    spans = completion.reply_spans if completion.turns > 1 else [(0, len(completion.ids))]
    if scorer != "tool_call":
        spans = spans[-1:]
    return "\n".join(
        scored_text(
            chat,
            [*example.student_ids, *completion.ids[:start]],
            completion.ids[start:end],
            example.demonstration,
            scorer,
        )
        for start, end in spans
    )


def verdicts_on(checker: Checker, completions: Sequence[Completion], chat: ChatFormat) -> list[Verdict]:
    """The verdict of each completion, the same on every rank. The checker sees only those that have none yet.

    Each rank checks its share. That takes less time, and an inexact checker gives the same verdict everywhere.

    Raises:
        RaisedOnAllRanks: the checker's mistake on any rank.
    """
    unchecked = [one for one in completions if one.verdict is None]
    new = iter(gathered(lambda: checker(unchecked[rank_slice(len(unchecked))], chat)))
    return [next(new) if one.verdict is None else one.verdict for one in completions]
