"""SFT: supervised fine-tuning, the baseline.

    L = -mean_t log p(d_t | x, d_<t)

d is the demonstration, including its end token. There is no sampling and no teacher.
"""

from __future__ import annotations

from selfdistill.config import TrainConfig
from selfdistill.loss import CrossEntropy
from selfdistill.methods.examples import DemonstrationExamples
from selfdistill.methods.sequences import DatasetCompletions
from selfdistill.methods.slots import Method


def sft(config: TrainConfig) -> tuple[Method, ...]:
    """Demonstrations and cross-entropy."""
    return (
        Method(
            examples=DemonstrationExamples(config, completion_must_fit=True, replies="episode"),
            sequence=DatasetCompletions(),
            loss=CrossEntropy(),
        ),
    )
