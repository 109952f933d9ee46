"""MSD: multilingual self-distillation with weighted tokens (arXiv 2605.02971).

    x -> y ~ p(.|x);   L = mean_t w_t / (mean_s w_s) KL( p_t || q_t )
    w_t = sg[ (1 - H_20(q_t) / ln 20) (1 - p_t(y_t)) ]

H_20 is the entropy of the 20 most likely tokens, renormalised. A token counts where the teacher is sure and the student
would have said something else. The mean of the weights is over the sequence, so each sequence counts as in SDFT.
The paper's teacher q sees the query in English with an instruction to be safe, the student the query in another
language: the context ``rewritten``, with that text as ``privileged_context``. Other contexts also work.

Differences: the weights are inferred from the paper's abstract, which names the two factors but not K: 20, as in EAFT,
is a setting. Either factor can be left out; without both, this is SDFT with the reverse KL. The abstract does not say
which weights teach: ``teacher`` chooses, a moving average by default.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from selfdistill.config import Settings, TrainConfig
from selfdistill.loss import Divergence, Pair, pick, top_k_entropy
from selfdistill.methods.on_policy import on_policy
from selfdistill.methods.slots import Method, own_settings, teacher_of


class MsdSettings(Settings):
    """Settings of MSD alone."""

    entropy_top_k: int = Field(default=20, ge=2)
    """K: the number of the teacher's most likely tokens, whose entropy measures its uncertainty."""
    confidence: bool = True
    """Weigh tokens by the teacher's confidence."""
    disagreement: bool = True
    """Weigh tokens by how unlikely they are to the student."""


def msd(config: TrainConfig) -> tuple[Method, ...]:
    """Student samples, a teacher with the context, the reverse KL with weights of mean 1."""
    own = own_settings(config, MsdSettings)

    def weight(pair: Pair, tokens_N: Tensor) -> Tensor:
        assert pair.log_q_NV is not None
        weight_N = torch.ones_like(tokens_N, dtype=pair.log_p_NV.dtype)
        if own.confidence:
            weight_N = weight_N * (1 - top_k_entropy(pair.log_q_NV, own.entropy_top_k))
        if own.disagreement:
            weight_N = weight_N * -pick(pair.log_p_NV, tokens_N).expm1()
        return weight_N

    method = on_policy(config, Divergence("reverse_kl"), teacher_of(config))
    return (replace(method, weighting=weight, relative_weights=True),)
