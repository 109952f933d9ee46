"""Generate a model's replies and score them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from selfdistill.data import (
    CODE,
    JUDGE,
    SCORER_NAMES,
    ChatFormat,
    Demonstration,
    RowError,
    Verdict,
    by_reason,
    by_tests,
    check_scorer,
    default_scorer,
    reference,
    score,
    scored_text,
    thought_and_said,
    verdicts,
)
from selfdistill.errors import UserError
from selfdistill.evaluation.judge import Judge
from selfdistill.methods import Completion
from selfdistill.model import LoadedModel, Rollout, Sampling, prompts_at_a_time, sample
from selfdistill.runtime import ProgressBar

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Answers:
    """Scored replies to a set of demonstrations."""

    replies: list[str]
    correct: list[bool]
    lenient: list[bool] | None
    """Correct by the judge's lenient standard; None without a judge."""
    ids: list[list[int]]
    """Tokens of each reply, including its end token."""
    thinking: list[int]
    """Number of thinking tokens in each reply."""
    truncated: int
    """Number of replies truncated at the length limit, or of episodes that were cut."""
    episodes: Sequence[Completion] = ()
    """With an environment, the whole episodes; ``ids`` are then all their tokens, ``replies`` their last replies."""

    @property
    def is_own(self) -> list[list[bool]] | None:
        """Whether each token is the model's own; None if all are."""
        return [episode.is_own for episode in self.episodes] or None

    @property
    def lengths(self) -> list[int]:
        """Number of the model's own tokens in each reply, or episode."""
        return [len(ids) for ids in self.ids] if self.is_own is None else [sum(own) for own in self.is_own]

    @property
    def accuracy(self) -> float:
        """Share of correct replies."""
        return sum(self.correct) / len(self.correct)

    @property
    def turns(self) -> float | None:
        """Mean number of the model's turns in an episode; None without an environment."""
        return _mean([episode.turns for episode in self.episodes])

    @property
    def invalid_calls(self) -> float | None:
        """Mean number of invalid calls in an episode; None without an environment."""
        return _mean([episode.invalid_calls for episode in self.episodes])


def _mean(counts: Sequence[int]) -> float | None:
    return sum(counts) / len(counts) if counts else None


def check_answers(demonstrations: Sequence[Demonstration], scorer: str | None) -> None:
    """Reject a scorer that cannot be used, and answers that their scorers cannot use.

    Args:
        demonstrations: rows to check.
        scorer: scorer for rows that name none.

    Raises:
        UserError: names the scorer, or counts the rows and names the first for each reason.
    """
    check_scorer(scorer)
    coded = [row for row in demonstrations if default_scorer(row, scorer) == CODE]
    bad = [error.problem for error in by_tests([("", row) for row in coded]) if isinstance(error, RowError)]
    for row in demonstrations:
        name = default_scorer(row, scorer)
        try:
            if name in SCORER_NAMES:
                score(name, "", row)
            elif name == JUDGE:
                reference(name, row)  # a user-defined function need not handle an empty reply
        except RowError as error:
            bad.append(error.problem)
    if bad:
        raise UserError(("" if len(bad) == 1 else f"{len(bad)} rows cannot be scored: ") + by_reason(bad))


def answer(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    demonstrations: Sequence[Demonstration],
    chat: ChatFormat,
    sampling: Sampling,
    *,
    batch_size: int,
    scorer: str | None = None,
    judge: Judge | None = None,
    seeds: Sequence[int] | None = None,
    what: str | None = None,
    scored: bool = True,
) -> Answers:
    """Generate and score a reply to each prompt; thinking is not scored.

    Answers that scorers cannot use are the caller's to refuse (:func:`check_answers`).

    Args:
        loaded: the model.
        prompts: token ids, the student's or the teacher's, one per demonstration.
        demonstrations: what the replies are scored against.
        chat: the model's chat format.
        sampling: how the replies are sampled.
        batch_size: prompts per batch; an engine forms its own batches.
        scorer: scorer for rows that name none.
        judge: required if a scorer is ``judge``.
        seeds: one per reply, for sampling.
        what: label of the progress bar; None: silent.
        scored: whether to score the replies; if not, ``correct`` is empty.
    """

    def sampled(batch: list[int]) -> list[Rollout]:
        chosen = None if seeds is None else [seeds[i] for i in batch]
        return sample(loaded, [prompts[i] for i in batch], sampling, chosen)

    done = in_batches(sampled, [len(ids) for ids in prompts], prompts_at_a_time(loaded, batch_size), what)
    replies = [chat.decode(rollout.ids) for rollout in done]
    parts = [thought_and_said(chat, prompt, rollout.ids) for prompt, rollout in zip(prompts, done, strict=True)]
    names = [default_scorer(row, scorer) for row in demonstrations]
    ids = [rollout.ids for rollout in done]
    texts = [scored_text(chat, *reply) for reply in zip(prompts, ids, demonstrations, names, strict=True)]
    found, lenient = grade(list(zip(names, texts, demonstrations, strict=True)), judge) if scored else ([], None)
    correct = [verdict.reward == 1 for verdict in found]
    thinking = [len(chat.encode_text(thought)) for thought, _ in parts]
    return Answers(replies, correct, lenient, ids, thinking, sum(r.truncated for r in done))


def in_batches(
    compute: Callable[[list[int]], Sequence[_Result]], lengths: Sequence[int], size: int, what: str | None
) -> list[_Result]:
    """Compute one result per item, in batches of items of similar length, so that little is padding.

    Args:
        compute: from the indices of a batch's items to their results.
        lengths: one per item.
        size: items per batch.
        what: label of the progress bar; None: silent.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    results: dict[int, _Result] = {}
    with ProgressBar(f"{what}, batch", len(batches), quiet=what is None) as reporter:
        for number, batch in enumerate(batches, 1):
            results |= zip(batch, compute(batch), strict=True)
            reporter.advance(number)
    return [results[i] for i in range(len(lengths))]


def grade(
    given: Sequence[tuple[str, str, Demonstration]], judge: Judge | None
) -> tuple[list[Verdict], list[bool] | None]:
    """The verdict on each reply, and whether it is correct by the lenient standard; the latter is None without a judge.

    Args:
        given: for each reply its scorer, its text as the scorer compares it, and the row.
        judge: required if a scorer is ``judge``.
    """
    compared = iter(verdicts([one for one in given if one[0] != JUDGE]))
    judged = [(row, reply) for name, reply, row in given if name == JUDGE]
    if not judged:
        return list(compared), None
    assert judge is not None, "the settings reject a judge without an address"
    grades = iter(judge.grades([row for row, _ in judged], [reply for _, reply in judged]))
    strict, lenient = [], []
    for name, *_ in given:
        if name == JUDGE:
            found = next(grades)
            strict.append(Verdict(float(found == "strict")))
            lenient.append(found in ("strict", "lenient"))
        else:
            verdict = next(compared)
            strict.append(verdict)
            lenient.append(verdict.reward == 1)
    return strict, lenient
