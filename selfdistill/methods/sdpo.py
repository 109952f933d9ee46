"""SDPO: self-distillation policy optimisation, from a sample that succeeded or feedback (arXiv 2601.20802).

    x -> y_1..y_G ~ p(.|x);   L = (1-g) mean_{i with c_i} mean_t D( p(.|x, y_i<t), q(.|x, c_i, y_i<t) ) + g L_GRPO

c_i is another sample for the prompt, with reward 1, or the scorer's feedback on y_i itself. Samples with neither are
left out. D is JSD on the student's 100 likeliest tokens and one entry with the exact rest. The teacher q follows the
student at a rate of 0.05. With a = ``trust_region`` it is softmax((1-a) z_0 + a z), of the logits z_0 of the model
before training and z of the student, both with c_i and without gradient. Log-probabilities mix like logits.

Differences: the authors choose among several right samples by position, as here: the first. It is shown without its
thoughts, in the words of ``context``. Feedback is shown only on samples with a reward below 1; ``either``, the authors'
default, shows it where no other sample is right. We did not find their a, so there is no default. They use reverse KL
for code. With an engine, a sample has one truncated importance weight in place of one per token. GRPO's loss counts all
samples, D's mean only those with c_i. Feedback of the built-in scorers names the expected answer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from selfdistill.config import Settings, TrainConfig
from selfdistill.errors import UserError
from selfdistill.loss import Divergence, Target
from selfdistill.methods.attempts import AttemptContexts, AttemptExamples, Shown
from selfdistill.methods.grpo import grpo
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
    """Share of the student in the average per step, with teacher ``ema``."""
    trust_region: float | None = Field(default=None, gt=0, lt=1)
    """a, the student's part in the mixture that is the teacher; default: the teacher that ``teacher`` chooses."""
    grpo: float = Field(default=0.0, ge=0, lt=1)
    """g, the weight of GRPO's loss on the same samples; 0: none."""


def sdpo(config: TrainConfig) -> tuple[Method, ...]:
    """GRPO's samples and verdicts, and a teacher that sees what is known after sampling."""
    own, (rewarded,) = own_settings(config, SdpoSettings), grpo(config)
    plays, share = config.environment != "none", own.trust_region
    context = own.context or ("turns" if plays else "example:reasoning=false")
    attempts = AttemptContexts(rewarded.sequence.per_example, own.show, context, plays)
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
    if own.trust_region is None:
        return TeacherRule("ema", ema_rate=own.ema_rate) if averaged else teacher_of(config)
    if not averaged or "ema_rate" in own.model_fields_set:
        others = "'teacher', 'teacher_model' and 'ema_rate'"
        raise UserError(f"setting 'method_settings', 'trust_region' mixes its own teacher: leave {others} out")
    return TeacherRule("live")
