"""SDFT: self-distillation fine-tuning (Shenfeld, Damani, Huebotter, Agrawal 2026, arXiv 2601.19897).

    x -> y ~ p(.|x);   L = mean_t D( p(.|x, y_<t), q(.|x, c, y_<t) )

p is the student, q the teacher: the same network with weights that follow the student's, shown the demonstration c.
D is forward KL, KL(q||p), by default: equation 1 of the paper has the reverse, its published results the forward.
"""

from __future__ import annotations

from selfdistill.config import TrainConfig
from selfdistill.methods.slots import Method, StudentSamples, divergence_of
from selfdistill.rollouts import Sampling


def sdft(config: TrainConfig) -> Method:
    """Student samples, a teacher with the demonstration, a divergence."""
    sampling = Sampling(config.max_completion_length, config.temperature, config.top_p, config.top_k)
    return Method(
        sequence=StudentSamples(sampling, config.num_generations, config.seed),
        teacher=config.teacher,
        loss=divergence_of(config),
        skip_first_tokens=config.skip_first_tokens,
        importance_cap=config.importance_cap,
    )
