"""NPO: near-future policy optimisation, with right samples of a later checkpoint (arXiv 2604.20733).

    x -> y_1..y_G ~ p(.|x);   where no y_i is right, z replaces y_G, a right sample of the later model;   L = L_GRPO

The later model is ``teacher_model``: a checkpoint of another run from the same start, some steps ahead. It is near
enough for its samples to be likely under the student, and solves more. A prompt without a right sample of either
model is unchanged.

Differences: the authors take the checkpoint 20 to 70 steps ahead of each step, and choose the distance by pass rate
over the variance of importance weights p/p_later. Here it is one model for the whole run, or with ``later`` several in
order, each for an equal part of the steps; the distance is the user's. A run prints the pass rate of each. It does not
print the variance: the large weights are rare among samples of p_later, so 64 samples show too small a variance, and
one near 0 if the models differ much. ``eval --base`` measures their KL instead. Samples are drawn once, before the
first step, so that no later model need stay in memory. We did not find how the authors weight z, which comes from
another policy; here it has a reward of 1, and by default counts as the student's own (``weight``). Right means a reward
of ``success_reward``. The number of tries is a setting. How samples are drawn, and how z replaces y_G, is in
:mod:`selfdistill.methods.failures`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field

from selfdistill.config import Settings, TrainConfig
from selfdistill.errors import UserError
from selfdistill.methods.failures import ModelInTurn, OthersSuccesses, RescuedAdvantages, SuccessesInOrder
from selfdistill.methods.grpo import grpo_method
from selfdistill.methods.slots import Method, own_settings, sampling_of


class NpoSettings(Settings):
    """Settings of NPO alone."""

    tries: int = Field(default=8, ge=1)
    """Maximum samples of the later model per prompt, until one is right."""
    later: tuple[str, ...] = ()
    """Models after ``teacher_model``, in order: the run moves on to them, each for an equal part of its steps."""
    weight: float = Field(default=1.0, gt=0)
    """Factor on the loss of a later model's sample."""


def npo(config: TrainConfig) -> tuple[Method, ...]:
    """GRPO, with a sample of another model where all of the student's fail."""
    own = own_settings(config, NpoSettings)
    rewarded, first = grpo_method(config), config.teacher_model
    if first is None:
        raise UserError("setting 'teacher_model': npo needs a later checkpoint, to learn from its right samples")
    how: dict[str, Any] = {"sampling": sampling_of(config), "seed": config.seed, "batch_size": config.batch_size}
    how |= {"tries": own.tries, "success_reward": config.success_reward, "config": config}
    select = RescuedAdvantages(rewarded.sequence.per_example, config.success_reward, own.weight)
    method = replace(rewarded, select=select)
    if not own.later:
        return (replace(method, drawn=OthersSuccesses(model=first, **how)),)
    found = SuccessesInOrder(model=first, later=tuple(OthersSuccesses(model=x, **how) for x in own.later), **how)
    return (replace(method, drawn=found, controller=ModelInTurn(1 + len(own.later))),)
