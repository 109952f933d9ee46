"""vOPD: policy gradient of the reverse KL with a closed-form baseline (arXiv 2605.07865).

    x -> y ~ p(.|x);   A_t = sg[ log q(y_t) - log p(y_t) + KL(p||q) ];   L = -mean_t A_t log p(y_t)

The expected gradient is that of KL(p||q) over the whole vocabulary. The baseline KL(p||q) does not change the
expectation and lowers the variance. It may be computed over the student's k most likely tokens, renormalised (authors'
code, k = 100), without bias, because it does not depend on y_t.

Differences: the paper distils from a larger teacher on the same prompt. Here q is the model itself, or
``teacher_model``, given the demonstration. The teacher's logits over the whole vocabulary are available here, so a
top-k baseline saves no time; it exists for comparison. Samples are used for one update, so no ratio is clipped.
"""

from __future__ import annotations

from pydantic import Field

from selfdistill.config import UNTEMPERED, Settings, TrainConfig
from selfdistill.errors import UserError
from selfdistill.loss import Divergence
from selfdistill.methods.on_policy import on_policy
from selfdistill.methods.slots import Method, own_settings, teacher_of


class VopdSettings(Settings):
    """Settings of vOPD alone."""

    baseline_top_k: int | None = Field(default=None, ge=1)
    """Take the baseline over the student's k most likely tokens; default: over the whole vocabulary."""


def vopd(config: TrainConfig) -> tuple[Method, ...]:
    """Untempered student samples, a teacher with the demonstration, the sampled token's reverse KL."""
    if not config.is_untempered:
        raise UserError(f"setting 'method': vopd needs {UNTEMPERED}")
    own = own_settings(config, VopdSettings)
    loss = Divergence("reverse_kl", "sampled", baseline_top_k=own.baseline_top_k)
    return (on_policy(config, loss, teacher_of(config)),)
