"""GRPO: group relative policy optimisation (DeepSeekMath, arXiv 2402.03300), with the scorer as reward.

    x -> y_1..y_G ~ p(.|x);   A_i = (r_i - mean r) / (std r + 1e-4);   L = -mean_i A_i mean_t log p(y_it | x, y_i<t)

r is 1 for a reply that the scorer accepts, else 0. Each batch of samples is used for one update, TRL's default. So the
ratio of new to old probability is 1, clipping never applies, and the gradient equals that of the clipped objective.
There is no teacher and no KL penalty, and the demonstration is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfdistill.config import TrainConfig
from selfdistill.data import (
    JUDGE,
    ChatFormat,
    Demonstration,
    default_scorer,
    nothing_to_score,
    score,
    thought_and_said,
)
from selfdistill.errors import UserError
from selfdistill.loss import CrossEntropy
from selfdistill.methods.examples import DemonstrationExamples
from selfdistill.methods.sequences import Completion, StudentSamples
from selfdistill.methods.slots import Method, engine_cap, sampling_of

GROUP = 8
"""Default rollouts per prompt."""


def grpo(config: TrainConfig) -> tuple[Method, ...]:
    """Groups of student samples, advantages from a scorer, cross-entropy."""
    group = config.num_generations or GROUP
    if group < 2:
        raise UserError(
            "setting 'num_generations': grpo compares the rollouts of a prompt, found 1, expected at least 2"
        )
    if config.scorer == JUDGE:
        raise UserError("setting 'scorer': grpo scores at every step, for which the judge is too slow; use another")
    return (
        Method(
            examples=ScoredExamples(config),
            sequence=StudentSamples(sampling_of(config), group, config.seed),
            loss=CrossEntropy(),
            reward=ScorerReward(config.scorer),
            group_size=group,
            importance_cap=engine_cap(config),
        ),
    )


@dataclass(frozen=True)
class ScoredExamples(DemonstrationExamples):
    """The demonstrations' prompts, with what a scorer compares the samples with."""

    def lacks(self, demonstration: Demonstration) -> str | None:
        return nothing_to_score(self.config.scorer)(demonstration)


@dataclass(frozen=True)
class ScorerReward:
    """Reward 1 if the row's scorer accepts the reply, else 0."""

    scorer: str | None

    def __call__(self, completions: Sequence[Completion], chat: ChatFormat) -> list[float]:
        rewards = []
        for completion in completions:
            row = completion.example.demonstration
            _, said = thought_and_said(chat, completion.example.student_ids, completion.ids)
            rewards.append(float(score(default_scorer(row, self.scorer), said, row)))
        return rewards
