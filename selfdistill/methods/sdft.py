"""SDFT: self-distillation fine-tuning (Shenfeld, Damani, Huebotter, Agrawal 2026, arXiv 2601.19897).

    x -> y ~ p(.|x);   L = mean_t D( p(.|x, y_<t), q(.|x, c, y_<t) )

p is the student. q is the teacher: the same network, with weights that follow the student's, given the demonstration c.
D is forward KL, KL(q||p), by default: equation 1 of the paper has reverse KL, but its published results use forward KL.
"""

from __future__ import annotations

from dataclasses import replace

from selfdistill.config import TrainConfig
from selfdistill.methods.examples import DemonstrationExamples
from selfdistill.methods.on_policy import on_policy
from selfdistill.methods.sequences import ColdStart, StudentSamples
from selfdistill.methods.slots import Method, divergence_of, target_of, teacher_of


def sdft(config: TrainConfig) -> tuple[Method, ...]:
    """Student samples, a teacher with the demonstration, a divergence."""
    method = on_policy(config, replace(divergence_of(config), target=target_of(config)), teacher_of(config))
    if not config.cold_start_steps:
        return (method,)
    assert isinstance(method.sequence, StudentSamples)
    assert isinstance(method.examples, DemonstrationExamples)
    examples = replace(method.examples, completion_must_fit=True)
    return (replace(method, examples=examples, sequence=ColdStart(method.sequence, config.cold_start_steps)),)
