"""Contexts made from samples: what the teacher sees once the samples of a prompt have their verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

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

    The sibling is the first other sample for the prompt whose reward is 1, without its thoughts. Feedback is shown on
    samples with a reward below 1.

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
            succeeded = next((other for other in others if verdicts[other].reward == 1), None)
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
        return self._layout.lacks(replace(demonstration, privileged_context=""))


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
