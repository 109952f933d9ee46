"""The slots that a method fills."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from selfdistill.config import TrainConfig
from selfdistill.data import ChatFormat
from selfdistill.loss import CrossEntropy, Divergence, Target, Weighting
from selfdistill.methods.examples import ExampleSource
from selfdistill.methods.sequences import Completion, SequenceSource, TeacherSamples
from selfdistill.model import Sampling, TeacherRule

Reward = Callable[[Sequence[Completion], ChatFormat], list[float]]
"""Of each completion, from what it says."""


@dataclass(frozen=True)
class Method:
    """One method as the loop sees it, or one stage of a method that has several."""

    examples: ExampleSource
    """What is learnt from, and what the teacher is shown."""
    sequence: SequenceSource
    """Whose tokens are scored."""
    loss: Divergence | CrossEntropy
    """How the gap is measured, per token."""
    teacher: TeacherRule | None = None
    """Whose weights score them; None: nothing but the sequence itself is learnt from."""
    fixed: TeacherSamples | None = None
    """Replaces the rows' completions, once, before the first step."""
    skip_first_tokens: int = 0
    """First tokens of each completion that have no weight."""
    importance_cap: float | None = None
    """Each completion is weighed by its truncated importance ratio (see :mod:`selfdistill.loss.token_weights`)."""
    weighting: Weighting | None = None
    """A factor for each token from what is known of it (:func:`selfdistill.loss.divergence.token_statistics`)."""
    reward: Reward | None = None
    """Each completion is weighed by its advantage (:func:`selfdistill.loss.token_weights.group_advantages`)."""
    group_size: int = 1
    """Completions in a row that belong to one prompt."""


def divergence_of(config: TrainConfig) -> Divergence:
    """The divergence that the settings describe."""
    target = Target(config.target_teacher, config.target_student, config.target_base)
    own: dict[str, Any] = {"weight": config.jsd_weight} if config.divergence == "jsd" else {}
    if config.support == "top_k":
        own |= {"top_k": config.support_top_k, "tail": config.support_tail}
    if config.support == "sampled":
        own |= {"baseline": config.sampled_baseline}
    return Divergence(config.divergence, config.support, target=None if target == Target() else target, **own)


def sampling_of(config: TrainConfig) -> Sampling:
    """The policy by which completions are sampled."""
    return Sampling(config.max_completion_length, config.temperature, config.top_p, config.top_k)


def teacher_of(config: TrainConfig) -> TeacherRule:
    """The teacher that the settings describe."""
    if config.teacher == "ema":
        return TeacherRule("ema", ema_rate=config.ema_rate)
    if config.teacher == "snapshot":
        return TeacherRule("snapshot", snapshot_steps=config.snapshot_steps)
    return TeacherRule(config.teacher)


FROZEN = TeacherRule("frozen")
"""The model as it is before the first step."""
