"""Offline distillation: the teacher's samples and distributions, off-policy (baseline of SDFT, arXiv 2601.19897).

    y ~ p_0(.|x, c), once per demonstration;   L = mean_t D( p(.|x, y_<t), p_0(.|x, c, y_<t) )

SDFT without the student's own samples. p_0 is the model before training. D is forward KL, KL(q||p), by default.
"""

from __future__ import annotations

from dataclasses import replace

from selfdistill.config import TrainConfig
from selfdistill.methods.sft_from_teacher import sft_from_teacher
from selfdistill.methods.slots import FROZEN, Method, divergence_of, target_of


def offline_distillation(config: TrainConfig) -> tuple[Method, ...]:
    """The fixed set of samples, a frozen teacher with the demonstration, a divergence."""
    loss = replace(divergence_of(config), target=target_of(config))
    return tuple(
        replace(stage, teacher=FROZEN, loss=loss, skip_first_tokens=config.skip_first_tokens)
        for stage in sft_from_teacher(config)
    )
