"""The slots that a method fills, and the sequences: whose tokens are scored.

Legend: B completions of a batch, T completion tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from selfdistill.config import TrainConfig
from selfdistill.contexts import Encoded
from selfdistill.divergence import CrossEntropy, Divergence
from selfdistill.models import LoadedModel
from selfdistill.rollouts import Sampling, sample, sample_seed
from selfdistill.teacher import TeacherKind


@dataclass(frozen=True)
class Completion:
    """Tokens to be scored after a row's prompts."""

    row: Encoded
    ids: list[int]
    logps: list[float] | None
    """Log-probability of each token under the policy that sampled it; None where nothing was sampled."""
    truncated: bool
    """Stopped by the length limit."""


class SequenceSource(Protocol):
    """Whose tokens are scored."""

    def __call__(self, loaded: LoadedModel, rows: Sequence[Encoded], step: int) -> list[Completion]: ...


@dataclass(frozen=True)
class StudentSamples:
    """On-policy: the student's own samples."""

    sampling: Sampling
    num_generations: int
    seed: int

    def __call__(self, loaded: LoadedModel, rows: Sequence[Encoded], step: int) -> list[Completion]:
        expanded = [row for row in rows for _ in range(self.num_generations)]
        seen: Counter[int] = Counter()  # a row may occur twice in a batch that spans the end of an epoch
        seeds = []
        for row in expanded:
            number = row.demonstration.row
            seeds.append(sample_seed(self.seed, step, number, seen[number]))
            seen[number] += 1
        rollouts = sample(loaded, [row.student_ids for row in expanded], self.sampling, seeds)
        return [Completion(row, r.ids, r.logps, r.truncated) for row, r in zip(expanded, rollouts, strict=True)]


@dataclass(frozen=True)
class Demonstrations:
    """Off-policy: the demonstrated completions."""

    def __call__(self, loaded: LoadedModel, rows: Sequence[Encoded], step: int) -> list[Completion]:
        return [Completion(row, row.completion_ids, None, False) for row in rows]


@dataclass(frozen=True)
class Method:
    """One method as the loop sees it."""

    sequence: SequenceSource
    teacher: TeacherKind | None
    """None: nothing but the sequence itself is learnt from, and no context is rendered."""
    loss: Divergence | CrossEntropy
    skip_first_tokens: int = 0
    importance_cap: float | None = None
    trains_on_demonstration: bool = False
    """The demonstration itself is scored, so it must be within the length limit."""


def divergence_of(config: TrainConfig) -> Divergence:
    """The divergence that the settings describe."""
    return Divergence(
        kind=config.divergence,
        support=config.support,
        weight=config.jsd_weight,
        top_k=config.support_top_k,
        tail=config.support_tail,
        baseline=config.sampled_baseline,
    )
