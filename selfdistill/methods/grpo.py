"""GRPO: group relative policy optimisation (DeepSeekMath, arXiv 2402.03300), with the scorer as reward.

    x -> y_1..y_G ~ p(.|x);   A_i = (r_i - mean r) / (std r + 1e-4);   L = -mean_i A_i mean_t log p(y_it | x, y_i<t)

r is the scorer's reward: 1 for a reply that it accepts, mostly 0 for others. There is no teacher, and the demonstration
is not used.

Differences: each batch of samples is used for one update, TRL's default. So the ratio of new to old probability is 1,
clipping never applies, and the gradient equals that of the clipped objective. There is no KL penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from selfdistill.config import TrainConfig
from selfdistill.data import JUDGE, ContextEncoder, Example, Verdict
from selfdistill.errors import UserError
from selfdistill.loss import CrossEntropy, group_advantages
from selfdistill.methods.checking import ScorerChecker
from selfdistill.methods.examples import ScoredExamples
from selfdistill.methods.sequences import Completion, StudentSamples
from selfdistill.methods.slots import Method, engine_cap, sampling_of

GROUP = 8
"""Default rollouts per prompt."""


def grpo(config: TrainConfig) -> tuple[Method, ...]:
    """Groups of student samples, advantages from a scorer, cross-entropy."""
    return (grpo_method(config),)


def grpo_method(config: TrainConfig) -> Method:
    """GRPO itself, from which its relatives are made."""
    group = config.num_generations or GROUP
    if group < 2:
        raise UserError(
            f"setting 'num_generations': {config.method} compares the rollouts of a prompt, found 1, "
            "expected at least 2"
        )
    if config.scorer == JUDGE:
        raise UserError(
            f"setting 'scorer': {config.method} scores at every step, for which the judge is too slow; use another"
        )
    return Method(
        examples=ScoredExamples(config),
        sequence=StudentSamples(sampling_of(config), group, config.seed),
        loss=CrossEntropy(),
        checker=ScorerChecker(config.scorer),
        select=GroupAdvantages(group),
        importance_cap=engine_cap(config),
    )


@dataclass(frozen=True)
class GroupAdvantages:
    """Every sample, with its advantage over the others for its prompt as the factor on its loss."""

    group: int
    """Samples per prompt."""
    gates = False

    def __call__(
        self, samples: Sequence[Completion], verdicts: Sequence[Verdict], encode: ContextEncoder
    ) -> list[Completion]:
        advantages = group_advantages([verdict.reward for verdict in verdicts], self.group)
        return [replace(sample, factor=factor) for sample, factor in zip(samples, advantages, strict=True)]

    def longest(self, example: Example, tokens: int, encode: ContextEncoder) -> Example:
        return example
