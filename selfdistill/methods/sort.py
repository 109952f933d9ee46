"""SORT: learning from the reference where no sample is right, weighted with a plan (arXiv 2605.11505).

    x -> y_1..y_G ~ p(.|x);   L = L_GRPO + g L_ref;   L_ref = -mean_t w_t log p(d_t | x, d_<t)   if no y_i is right
    w_t = sg[ p(d_t | x, d_<t)^(1-a) p(d_t | x, plan, d_<t)^a ],   a = 1/2: the geometric mean

GRPO learns nothing from such a group. SORT then learns the reference d, the row's completion, and most where it follows
from the plan or from the question alone. The plan is the row's ``privileged_context``, shown to the student itself.

Differences: the paper's abstract says neither where plans come from nor how L_ref is weighted against GRPO. Here plans
are a column of the data, and g is a setting, 1 by default. L_ref is averaged over all prompts of a batch, so each
prompt counts the same, however many fail. Right means a reward of ``success_reward``, by default 1. a is a setting; at
0 the plan is not needed, and L_ref is DFT's on these prompts. Which references are learnt is in
:mod:`selfdistill.methods.failures`.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field
from torch import Tensor

from selfdistill.config import Settings, TrainConfig
from selfdistill.loss import Pair, pick
from selfdistill.methods.failures import PlannedExamples, References
from selfdistill.methods.grpo import grpo_method
from selfdistill.methods.slots import Method, own_settings
from selfdistill.model import TeacherRule


class SortSettings(Settings):
    """Settings of SORT alone."""

    plan: float = Field(default=0.5, ge=0, le=1)
    """a, the exponent of the probability given the plan."""
    weight: float = Field(default=1.0, gt=0)
    """g, the weight of the loss on references."""


def sort(config: TrainConfig) -> tuple[Method, ...]:
    """GRPO plus weighted cross-entropy on references."""
    own = own_settings(config, SortSettings)
    rewarded = grpo_method(config)

    def weight(pair: Pair, tokens_N: Tensor) -> Tensor:
        logp_N = pick(pair.log_p_NV, tokens_N)
        return (logp_N if pair.log_q_NV is None else logp_N.lerp(pick(pair.log_q_NV, tokens_N), own.plan)).exp()

    rewarded = replace(rewarded, examples=PlannedExamples(config, completion_must_fit=True, planned=bool(own.plan)))
    planned = replace(
        rewarded,
        teacher=TeacherRule("live") if own.plan else None,
        weighting=weight,
        select=References(rewarded.sequence.per_example, bool(own.plan), config.success_reward),
        importance_cap=None,
        weight=own.weight,
    )
    return (replace(rewarded, also=(("references", planned),)),)
