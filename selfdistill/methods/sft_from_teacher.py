"""SFT from the teacher: SFT on the model's samples given the demonstration (baseline of SDFT, arXiv 2601.19897).

    y ~ p_0(.|x, c), once per demonstration;   L = -mean_t log p(y_t | x, y_<t)

p_0, the model before training, is the teacher. Its samples are used without its distributions, and off-policy: all are
drawn before the first step.
"""

from __future__ import annotations

from selfdistill.config import TrainConfig
from selfdistill.loss import CrossEntropy
from selfdistill.methods.examples import DemonstrationExamples
from selfdistill.methods.sequences import DatasetCompletions, DrawnSamples
from selfdistill.methods.slots import Method, sampling_of


def sft_from_teacher(config: TrainConfig) -> tuple[Method, ...]:
    """A fixed set of the teacher's samples, and cross-entropy."""
    return (
        Method(
            examples=DemonstrationExamples(config, config.context),
            sequence=DatasetCompletions(),
            loss=CrossEntropy(),
            drawn=DrawnSamples(sampling_of(config), config.seed, config.batch_size),
        ),
    )
