"""What is learnt of prompts without a right sample, where group advantages are all 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from selfdistill.data import ContextEncoder, Demonstration, Example, Verdict, with_guide
from selfdistill.methods.grpo import ScoredExamples
from selfdistill.methods.sequences import Completion


def failed_groups(verdicts: Sequence[Verdict], group: int) -> list[int]:
    """The first sample of each group of which none has a reward of 1."""
    starts = range(0, len(verdicts), group)
    return [first for first in starts if all(found.reward < 1 for found in verdicts[first : first + group])]


@dataclass(frozen=True)
class PlannedExamples(ScoredExamples):
    """Prompts with a completion to learn, and, unless ``planned`` is False, a plan for it."""

    planned: bool = True

    def lacks(self, demonstration: Demonstration) -> str | None:
        if self.planned and demonstration.privileged_context is None:
            return (
                f"column 'privileged_context': missing, the plan that method {self.config.method!r} shows; add it, or "
                "give method_settings with plan 0"
            )
        return super().lacks(demonstration)


@dataclass(frozen=True)
class References:
    """In place of each group without a right sample its prompt's completion, with the share of such groups as factor.

    So the mean of their losses is one over all groups, in which those with a right sample count as 0.
    """

    group: int
    """Samples per prompt, which are adjacent."""
    planned: bool
    """Whether a teacher sees the prompt with ``privileged_context`` as a guide."""
    gates = True

    def __call__(
        self, samples: Sequence[Completion], verdicts: Sequence[Verdict], encode: ContextEncoder
    ) -> list[Completion]:
        failed = [samples[first].example for first in failed_groups(verdicts, self.group)]
        if self.planned:
            shown = [replace(x, teacher_ids=self._shown(x, encode)) for x in failed]
            failed = [x for x in shown if x.teacher_ids is not None]
        factor = len(failed) * self.group / len(samples)
        return [Completion(x, x.completion_ids, None, False, factor) for x in failed]

    @staticmethod
    def _shown(example: Example, encode: ContextEncoder) -> list[int] | None:
        row = example.demonstration
        return encode(row, with_guide(row.prompt, row.privileged_context or ""))

    def longest(self, example: Example, tokens: int, encode: ContextEncoder) -> Example:
        if not self.planned:
            return example
        ids = self._shown(example, replace(encode, max_prompt_length=None, window=None))
        return replace(example, teacher_ids=(ids or [])[: encode.limit])
