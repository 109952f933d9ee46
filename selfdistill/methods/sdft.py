"""SDFT: self-distillation fine-tuning (Shenfeld, Damani, Huebotter, Agrawal 2026, arXiv 2601.19897).

    x -> y ~ p(.|x);   L = mean_t D( p(.|x, y_<t), q(.|x, c, y_<t) )

p is the student. q is the teacher: the same network, with weights that follow the student's, given the demonstration c.
D is forward KL, KL(q||p), by default: equation 1 of the paper has reverse KL, but its published results use forward KL.
"""

from __future__ import annotations

from selfdistill.config import TrainConfig
from selfdistill.methods.examples import DemonstrationExamples
from selfdistill.methods.sequences import ColdStart, SequenceSource, StudentSamples
from selfdistill.methods.slots import Method, divergence_of, engine_cap, sampling_of, teacher_of


def sdft(config: TrainConfig) -> tuple[Method, ...]:
    """Student samples, a teacher with the demonstration, a divergence."""
    samples = StudentSamples(sampling_of(config), config.num_generations or 1, config.seed)
    sequence: SequenceSource = ColdStart(samples, config.cold_start_steps) if config.cold_start_steps else samples
    return (
        Method(
            examples=DemonstrationExamples(config, config.context, completion_must_fit=config.cold_start_steps > 0),
            sequence=sequence,
            loss=divergence_of(config),
            teacher=teacher_of(config),
            skip_first_tokens=config.skip_first_tokens,
            importance_cap=config.importance_cap or engine_cap(config),
        ),
    )
