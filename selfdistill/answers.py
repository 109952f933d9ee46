"""Answers: a model's greedy replies to rows, each scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfdistill.contexts import ChatFormat
from selfdistill.demonstrations import Demonstration
from selfdistill.errors import UserError
from selfdistill.models import LoadedModel
from selfdistill.rollouts import Sampling, sample
from selfdistill.rows import first_ten
from selfdistill.scorers import default_scorer, score
from selfdistill.tracking import Reporter


@dataclass(frozen=True)
class Answers:
    """Greedy replies to a set of rows."""

    replies: list[str]
    correct: list[bool]
    lengths: list[int]
    """Tokens of each reply."""
    truncated: int
    """Replies stopped by the length limit."""

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)


def check_answers(demonstrations: Sequence[Demonstration], scorer: str | None) -> None:
    """Refuse rows whose answers their scorers cannot use.

    Args:
        scorer: for rows that name none.

    Raises:
        UserError: names the first ten of them and their number.
    """
    bad: list[str] = []
    for row in demonstrations:
        try:
            score(default_scorer(row, scorer), "", row)
        except UserError as error:
            bad.append(str(error))
    if bad:
        raise UserError(bad[0] if len(bad) == 1 else f"{len(bad)} rows cannot be scored: {first_ten(bad)}")


def answer(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    demonstrations: Sequence[Demonstration],
    chat: ChatFormat,
    *,
    max_completion_length: int,
    batch_size: int,
    scorer: str | None = None,
    what: str | None = None,
) -> Answers:
    """Greedy replies to ``prompts``, each scored against its row.

    Args:
        prompts: token ids, the student's or the teacher's, one per row.
        scorer: for rows that name none.
        what: label of the progress; None: silent.

    Raises:
        UserError: before the first reply, where :func:`check_answers` finds an answer that cannot be used.
    """
    check_answers(demonstrations, scorer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # rows of like length together: less padding
    replies, lengths, truncated = [""] * len(prompts), [0] * len(prompts), 0
    sampling = Sampling(max_completion_length, temperature=0)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    with Reporter(what or "", len(batches), quiet=what is None, every=max(len(batches) // 4, 1)) as reporter:
        for number, batch in enumerate(batches):
            rollouts = sample(loaded, [prompts[i] for i in batch], sampling)
            for i, rollout in zip(batch, rollouts, strict=True):
                replies[i], lengths[i] = chat.decode(rollout.ids), len(rollout.ids)
                truncated += rollout.truncated
            reporter.advance(number + 1)
    correct = [score(default_scorer(d, scorer), r, d) for r, d in zip(replies, demonstrations, strict=True)]
    return Answers(replies, correct, lengths, truncated)
