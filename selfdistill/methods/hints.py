"""Hints: how much of the demonstration the teacher sees, and what changes it during a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from selfdistill.config import SHORTEST, TrainConfig
from selfdistill.data import (
    JUDGE,
    ChatFormat,
    ContextEncoder,
    Demonstration,
    Example,
    Hint,
    HintPart,
    Verdict,
    first_steps_and_answer,
    first_words,
    parse_context,
    pictures_in,
)
from selfdistill.errors import UserError, number_of
from selfdistill.methods.checking import ScorerChecker, verdicts_on
from selfdistill.methods.encoders import encoder_of
from selfdistill.methods.examples import DemonstrationExamples, ScoredExamples
from selfdistill.methods.samples_file import SamplesFile
from selfdistill.methods.sequences import Completion, DrawnSamples
from selfdistill.methods.slots import Method, Schedule, State
from selfdistill.model import LoadedModel, Sampling, sample


@dataclass(frozen=True)
class HintContexts:
    """Every sample, with a teacher that sees a part of the demonstration; without those whose context does not fit."""

    hint: Hint
    gates = True

    def __call__(
        self, samples: Sequence[Completion], verdicts: Sequence[Verdict], encode: ContextEncoder
    ) -> list[Completion]:
        rows = [sample.example.demonstration for sample in samples]
        seen = [encode(row, self.hint.messages(row, ())) for row in rows]
        return [
            replace(sample, example=replace(sample.example, teacher_ids=ids))
            for sample, ids in zip(samples, seen, strict=True)
            if ids is not None
        ]

    def longest(self, example: Example, tokens: int, encode: ContextEncoder) -> Example:
        """The example itself: it has the longest hint of the run."""
        return example


class HintController:
    """A controller's number as the share of the demonstration that the teacher sees."""

    def applied(self, method: Method, value: float) -> Method:
        """See :class:`selfdistill.methods.slots.Controller`."""
        assert isinstance(method.select, HintContexts)
        return replace(method, select=HintContexts(replace(method.select.hint, share=value)))


@dataclass(frozen=True)
class HintSchedule(HintController, Schedule):
    """The share goes linearly from ``first`` at the first step to ``last`` at the last, and remembers nothing."""

    first: float
    last: float

    def value(self, state: State, step: int, steps: int) -> float:
        return self.first + (self.last - self.first) * min(1.0, step / max(1, steps - 1))


@dataclass(frozen=True)
class ShortestHints(DrawnSamples):
    """Replaces what the teacher sees, before the first step, by the shortest hint with which its reply is right.

    The shares are tenths, from 0. The reply is greedy, of the model before training, and the scorer must accept it. If
    it is right with none, the teacher sees the whole demonstration.
    """

    success_reward: float = field(kw_only=True)
    config: TrainConfig = field(kw_only=True, compare=False)
    what = "shortest hints"
    replaces = "teacher_ids"

    def __call__(self, loaded: LoadedModel, examples: Sequence[Example], file: SamplesFile) -> list[Example]:
        drawn, encode = super().__call__(loaded, examples, file), self._encoder(loaded)
        seen = [self._with_pictures(x, self.prompt(own), encode) for x, own in zip(drawn, examples, strict=True)]
        return [replace(x, teacher_ids=ids) for x, ids in zip(drawn, seen, strict=True)]

    def _encoder(self, loaded: LoadedModel) -> ContextEncoder:
        chat = loaded.chat_for(self.config)
        return encoder_of(self.config, chat, loaded.window)

    def _with_pictures(self, drawn: Example, whole: list[int], encode: ContextEncoder) -> list[int] | None:
        """What the teacher sees; if it has pictures, encoded again, as the file of samples does not keep them."""
        ids, row = drawn.teacher_ids, drawn.demonstration
        if not pictures_in(whole) or pictures_in(ids or ()):
            return ids
        hints = (hint_of(self.config, tenths / 10) for tenths in range(10))
        parts = (encode(row, hint.messages(row, ())) for hint in hints)
        return next((seen for seen in chain([whole], parts) if seen == ids), ids)

    def draw(self, loaded: LoadedModel, examples: Sequence[Example]) -> list[list[int]]:
        config, encode = self.config, self._encoder(loaded)
        check = ScorerChecker(config.scorer)
        found = [self.prompt(example) for example in examples]
        open_ = list(range(len(examples)))
        for tenths in range(10):
            hint = hint_of(config, tenths / 10)
            rows = {i: examples[i].demonstration for i in open_}
            seen = {i: ids for i, row in rows.items() if (ids := encode(row, hint.messages(row, ()))) is not None}
            replies = sample(loaded, list(seen.values()), self.sampling) if seen else []
            made = [Completion(examples[i], r.ids, None, r.truncated) for i, r in zip(seen, replies, strict=True)]
            verdicts = verdicts_on(check, made, encode.chat)
            right = [i for i, verdict in zip(seen, verdicts, strict=True) if verdict.reward >= self.success_reward]
            for i in right:
                found[i] = seen[i]
            open_ = [i for i in open_ if i not in right]
        return found

    def depends_on(self, example: Example) -> list[Any]:
        row = example.demonstration
        own = [row.row, example.student_ids, row.shown, row.answer, row.completion, self.config.context]
        own += [row.scorer] if row.scorer else []
        own += [picture.digest for picture in row.images]
        own += [self.success_reward] if self.success_reward < 1 else []  # folders of earlier versions have none
        return [*own, self.config.scorer, self.sampling.max_completion_length]


@dataclass(frozen=True)
class LastReplies(ScoredExamples):
    """Rows of which the last reply is learnt, the one that the scorer judges; says so of rows with more."""

    def notes(
        self, examples: Sequence[Example], rows: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
    ) -> list[str]:
        whole = [x.demonstration.turn_of or x.demonstration for x in examples]
        more = [row for row in whole if any(turn["role"] == "assistant" for turn in row.episode[:-1])]
        found = [f"hint shortest learns the last reply alone of {number_of(len(more), 'row')} with several"]
        return [*super().notes(examples, rows, loaded, chat), *(found if more else [])]


@dataclass(frozen=True)
class SteppedExamples(DemonstrationExamples):
    """Demonstrations of which the teacher sees the first steps and the answer; says so if no row has two steps."""

    def notes(
        self, examples: Sequence[Example], rows: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
    ) -> list[str]:
        found = super().notes(examples, rows, loaded, chat)
        texts = [example.demonstration.shown for example in examples]
        if any(first_steps_and_answer(text, 0) != first_steps_and_answer(text, 0.999) for text in texts):
            return found
        return [
            *found,
            f"method {self.config.method!r}: no demonstration has two or more steps of reasoning before its answer, so "
            "the teacher sees the same at every share; write each step on a line of its own, or use method sdft",
        ]


def hint_of(config: TrainConfig, share: float, part: HintPart = first_words) -> Hint:
    """A part of the demonstration in the context of the settings; in ``turns`` until ``auto`` is resolved.

    Raises:
        UserError: the context cannot show a part of a demonstration.
    """
    return Hint(parse_context("turns" if config.context == "auto" else config.context), share, part)


def hinted(method: Method, config: TrainConfig) -> Method:
    """The method with the setting ``hint``, which says how much of the demonstration its teacher sees.

    Raises:
        UserError: the context, scorer or teacher does not work with it.
    """
    examples = method.examples
    assert isinstance(examples, DemonstrationExamples)
    if config.hint == SHORTEST:
        return _shortest(method, config)
    shares = [float(share) for share in config.hint.split(":")]
    if min(shares) == 1:
        return method
    hint = hint_of(config, max(shares))
    method = in_parts(replace(method, examples=replace(examples, hint=hint.share)))
    if len(set(shares)) == 1:
        return method
    return replace(method, select=HintContexts(hint), controller=HintSchedule(*shares))


def in_parts(method: Method) -> Method:
    """The method, whose teacher may see a part of each demonstration: rows that have no parts are refused."""
    assert isinstance(method.examples, DemonstrationExamples)
    return replace(method, examples=replace(method.examples, in_parts=True))


def _shortest(method: Method, config: TrainConfig) -> Method:
    if config.scorer == JUDGE:
        raise UserError("setting 'scorer': hint shortest scores many replies, for which the judge is too slow")
    if config.teacher_model is not None:
        raise UserError(
            "setting 'hint': shortest samples from the student, not teacher_model: give a share, or leave one out"
        )
    if config.environment != "none":
        raise UserError("setting 'hint': shortest needs single replies, not episodes: leave it or the environment out")
    hint_of(config, 0)  # refuses a context that cannot show a part
    how: dict[str, Any] = {"success_reward": config.success_reward, "config": config}
    search = ShortestHints(Sampling(config.max_completion_length, 0), config.seed, config.batch_size, **how)
    return replace(method, examples=LastReplies(config, config.context, in_parts=True), drawn=search)


def shows_parts(method: Method) -> bool:
    """Whether the teacher may see a part of a demonstration, which not every context can show."""
    few = isinstance(method.examples, DemonstrationExamples) and method.examples.hint < 1
    return few or isinstance(method.select, HintContexts) or isinstance(method.drawn, ShortestHints)
