"""Veto: self-distillation towards a mixture with the student that fades (arXiv 2601.07155).

    x -> y ~ p(.|x);   L = mean_t D( p_t, q'_t );   q' = softmax( log q + b log sg[p] )

q is the teacher, given the demonstration. b falls linearly from 0.8 to 0 over the run, so at first the target has
little mass where the student has none. At b = 0 this is SDFT.

Differences: the paper distils from a larger teacher on the same prompt. Here q is the model itself, or
``teacher_model``, given the demonstration. b starts at 0.8 for the paper's reasoning, 1.0 for code and 0.3 for
summaries. We did not find over how many steps it falls, so that is a setting. The setting ``divergence`` chooses D,
KL(q'||p) by default.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from selfdistill.config import Settings, TrainConfig
from selfdistill.loss import Divergence, Target
from selfdistill.methods.on_policy import on_policy
from selfdistill.methods.slots import Method, divergence_of, own_settings, teacher_of


class VetoSettings(Settings):
    """Settings of Veto alone."""

    student: float = Field(default=0.8, ge=0)
    """b at the first step."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Steps in which b falls to 0; default: all of the run."""


def veto(config: TrainConfig) -> tuple[Method, ...]:
    """Student samples, a teacher with the demonstration, a target that moves away from the student."""
    own, divergence = own_settings(config, VetoSettings), divergence_of(config)

    def loss_at(step: int, steps: int) -> Divergence:
        left = max(0.0, 1 - step / (own.decay_steps or steps))
        return replace(divergence, target=Target(student=own.student * left) if own.student * left else None)

    return (replace(on_policy(config, loss_at(0, 1), teacher_of(config)), loss_at=loss_at),)
