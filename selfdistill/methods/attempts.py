"""Contexts made from samples: what the teacher sees once the samples of a prompt have their verdicts.

As in the authors' code of SDPO, the sibling is the first that is right, without its thoughts, and by default feedback
is shown where there is no sibling.

Differences: in their runs a reward of 0.5 is right, here ``success_reward``, by default 1. They show a sample that was
cut like any other, here only if no other is right. They call the sibling a correct solution, here the words are those
of ``context``. They cut a context that is too long, here its sample is left out. They show whatever feedback there is,
here only on samples with a reward below 1; that of the built-in scorers names the expected answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from selfdistill.config import TrainConfig
from selfdistill.data import (
    Context,
    ContextEncoder,
    Demonstration,
    Example,
    Verdict,
    must_show_one,
    parse_context,
    thought_and_said,
    with_feedback,
    without_thoughts,
)
from selfdistill.errors import UserError
from selfdistill.methods.encoders import cut
from selfdistill.methods.examples import ScoredExamples
from selfdistill.methods.sequences import Completion

Shown = Literal["sibling", "feedback", "either", "both"]
"""A successful sibling, feedback on the sample itself, the sibling or else feedback, or both if available."""


@dataclass(frozen=True)
class AttemptContexts:
    """Samples whose teacher sees a sibling that succeeded or feedback; others are left out.

    The sibling is the first other sample for the prompt that is right, without its thoughts. One that was cut at the
    length limit is shown only if no other is right. Feedback is shown on samples with a reward below 1.

    Raises:
        UserError: the context cannot show another attempt in place of the demonstration.
    """

    group: int
    """Samples per prompt, which are adjacent."""
    show: Shown
    context: str
    """How the teacher sees the sibling: a context, with the sibling in place of the demonstration."""
    episodes: bool = False
    """Whether samples are episodes."""
    success_reward: float = 1.0
    """Smallest reward of a right sample."""
    gates = True

    def __post_init__(self) -> None:
        if self.episodes and self._layout.name != "turns":
            raise UserError(f"context {self.context!r}: found {self._layout.name!r}, and only turns shows episodes")
        must_show_one(self._layout, "another attempt")

    @cached_property
    def _layout(self) -> Context:
        return parse_context(self.context, episodes=self.episodes)

    def __call__(
        self, samples: Sequence[Completion], verdicts: Sequence[Verdict], encode: ContextEncoder
    ) -> list[Completion]:
        learnt = []
        for number, sample in enumerate(samples):
            first = number - number % self.group
            others = (other for other in range(first, first + self.group) if other != number)
            right = [other for other in others if verdicts[other].reward >= self.success_reward]
            succeeded = min(right, key=lambda other: samples[other].truncated, default=None)
            sibling = None if succeeded is None else _demonstrated(samples[succeeded], encode)
            feedback = verdicts[number].feedback if verdicts[number].reward < 1 else ""
            ids = self._encoded(sample.example, sibling, feedback, encode)
            if ids is not None:
                learnt.append(replace(sample, example=replace(sample.example, teacher_ids=ids)))
        return learnt

    def _encoded(
        self, example: Example, sibling: Demonstration | None, feedback: str, encode: ContextEncoder
    ) -> list[int] | None:
        """The teacher's view; None if there is nothing to show, or it cannot be shown."""
        if self.show == "feedback":
            sibling = None
        if self.show == "sibling" or (self.show == "either" and sibling is not None):
            feedback = ""
        if sibling is None and not feedback:
            return None
        row = example.demonstration
        messages = list(row.prompt)
        if sibling is not None:
            messages = self._layout.messages(sibling, ())
        return encode(row, with_feedback(messages, feedback) if feedback else messages)

    def longest(self, example: Example, tokens: int, encode: ContextEncoder) -> Example:
        """With a sibling and feedback of about this many tokens; cut to the allowed length."""
        text = " a" * tokens
        sibling = replace(example.demonstration, privileged_context=text)
        return replace(example, teacher_ids=cut(lambda whole: self._encoded(example, sibling, text, whole), encode))

    def lacks(self, demonstration: Demonstration) -> str | None:
        """The problem of a row for whose prompt the context can show no sibling."""
        if self.show == "feedback":
            return None
        problem = self._layout.lacks(replace(demonstration, privileged_context=""))
        way = "give method_settings with context turns" + (", or use turns last" if demonstration.episode else "")
        return problem and f"{problem.partition(';')[0]}; {way}"  # --context, which it advises, is not used


def attempts_of(config: TrainConfig, group: int, show: Shown, context: str | None) -> AttemptContexts:
    """The contexts of a run; without ``context``, siblings are shown as an example, or as turns in an environment.

    Raises:
        UserError: the context cannot show siblings, or none is shown.
    """
    if show == "feedback" and context is not None:
        raise UserError("setting 'method_settings', 'context' shows siblings, found show 'feedback': leave one out")
    plays = config.environment != "none"
    context = context or ("turns" if plays else "example:reasoning=false")
    return AttemptContexts(group, show, context, plays, config.success_reward)


@dataclass(frozen=True)
class AttemptExamples(ScoredExamples):
    """Rows whose samples are scored and shown to the teacher."""

    attempts: AttemptContexts = field(kw_only=True)

    def lacks(self, demonstration: Demonstration) -> str | None:
        return super().lacks(demonstration) or self.attempts.lacks(demonstration)


def _demonstrated(sample: Completion, encode: ContextEncoder) -> Demonstration:
    """The sample's row with the sample as its demonstration, a reply or an episode, without its thoughts."""
    row = sample.example.demonstration
    if sample.messages:
        return replace(row, episode=tuple(without_thoughts(sample.messages)), privileged_context=None)
    said = thought_and_said(encode.chat, sample.example.student_ids, sample.ids)[1]
    return replace(row, privileged_context=said)
