"""SDPO: self-distillation policy optimisation, from a sample that succeeded or feedback (arXiv 2601.20802).

    x -> y_1..y_G ~ p(.|x);   L = (1-g) mean_{i with c_i} mean_t D( p(.|x, y_i<t), q(.|x, c_i, y_i<t) ) + g L_GRPO

c_i is another sample for the prompt, one that is right, or the scorer's feedback on y_i, if its reward is below 1. D's
mean leaves out samples with neither, L_GRPO counts all. D is JSD on the student's 100 likeliest tokens and one entry
with the exact rest. The teacher q follows the student at a rate of 0.05 per step. With a = ``trust_region`` it is
softmax((1-a) z_0 + a z), of the logits z_0 of the model before training and z of the student, both with c_i.

Differences: the authors' teacher follows at 0.05 once per batch of 32 prompts, so with small batches ours is faster.
Their a is 0.05; here it has no default. Their D is a mean over all tokens, as with ``loss_normalisation`` token, and
their advantages are not divided by the standard deviation. For code they use reverse KL, 20 tokens and a learning rate
of 1e-6, and their script asks for a teacher's rate of 0.01. With an engine, a sample has one truncated importance
weight in place of one per token. The differences of c_i are in :mod:`selfdistill.methods.attempts`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from selfdistill.config import Settings, TrainConfig
from selfdistill.errors import UserError
from selfdistill.loss import Divergence, Target
from selfdistill.methods.attempts import AttemptExamples, Shown, attempts_of
from selfdistill.methods.grpo import grpo_method
from selfdistill.methods.slots import Method, own_settings, teacher_of
from selfdistill.model import TeacherRule


class SdpoSettings(Settings):
    """Settings of SDPO alone, among them loss and teacher's rate, because the other methods' defaults differ."""

    show: Shown = "either"
    """What the teacher sees: ``sibling``, ``feedback``, ``either`` or ``both``, where there are both."""
    context: str | None = None
    """How it sees a sibling, as a context of demonstrations: ``turns``, ``example`` or ``template``, with options.
    Default: ``example:reasoning=false``, or with an environment ``turns``, which alone shows episodes."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "jsd"
    """D; JSD has the weight ``jsd_weight``."""
    top_k: int = Field(default=100, ge=1)
    """Tokens that D compares one by one: the student's likeliest, or for forward KL the teacher's."""
    ema_rate: float = Field(default=0.05, gt=0, le=1)
    """Share of the student in the average per step; only with teacher ``ema``."""
    trust_region: float | None = Field(default=None, gt=0, lt=1)
    """a, the student's part in the mixture that is the teacher; default: the teacher that ``teacher`` chooses."""
    grpo: float = Field(default=0.0, ge=0, lt=1)
    """g, the weight of GRPO's loss on the same samples; 0: none."""


def sdpo(config: TrainConfig) -> tuple[Method, ...]:
    """GRPO's samples and verdicts, and a teacher that sees what is known after sampling."""
    own, rewarded = own_settings(config, SdpoSettings), grpo_method(config)
    attempts, share = attempts_of(config, rewarded.sequence.per_example, own.show, own.context), own.trust_region
    target = None if share is None else Target(teacher=share, base=1 - share)
    method = replace(
        rewarded,
        loss=Divergence(own.divergence, "top_k", weight=config.jsd_weight, top_k=own.top_k, target=target),
        teacher=_teacher(config, own),
        base_sees_context=share is not None,
        examples=AttemptExamples(config, attempts=attempts),
        select=attempts,
        skip_first_tokens=config.skip_first_tokens,
        weight=1 - own.grpo,
    )
    return (replace(method, also=(("grpo", replace(rewarded, weight=own.grpo)),)) if own.grpo else method,)


def _teacher(config: TrainConfig, own: SdpoSettings) -> TeacherRule:
    averaged = config.teacher == "ema" and config.teacher_model is None
    if own.trust_region is not None and (not averaged or "ema_rate" in own.model_fields_set):
        others = "'teacher', 'teacher_model' and 'ema_rate'"
        raise UserError(f"setting 'method_settings', 'trust_region' mixes its own teacher: leave {others} out")
    if "ema_rate" in own.model_fields_set and not averaged:
        raise UserError("setting 'method_settings', 'ema_rate' needs teacher ema: leave it or the other teacher out")
    if own.trust_region is not None:
        return TeacherRule("live")
    return TeacherRule("ema", ema_rate=own.ema_rate) if averaged else teacher_of(config)
