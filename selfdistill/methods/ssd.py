"""SSD: simple self-distillation, SFT on the model's own samples (arXiv 2604.01193).

    y ~ p_0(.|x), once per prompt;   L = -mean_t log p(y_t | x, y_<t)

p_0 is the model before training. Samples have temperature 1.5, top-k 20 and top-p 0.8. The shortest 10% of them are
left out. There is no demonstration, teacher or checker: prompts suffice. The model learns to be as certain as truncated
sampling; the authors then sample at a temperature tuned for it.

Differences: lengths are in tokens, the authors' in characters. A sample that was cut at the limit is learnt unchanged.
"""

from __future__ import annotations

from pydantic import Field

from selfdistill.config import Settings, TrainConfig
from selfdistill.loss import CrossEntropy
from selfdistill.methods.examples import DemonstrationExamples
from selfdistill.methods.sequences import DatasetCompletions, DrawnSamples
from selfdistill.methods.slots import Method, own_settings
from selfdistill.model import Sampling


class SsdSettings(Settings):
    """Settings of SSD alone. It has its own sampling settings, because the other methods' defaults would undo it."""

    temperature: float = Field(default=1.5, gt=0)
    """Sampling temperature."""
    top_k: int = Field(default=20, ge=0)
    """Sample from the k most likely tokens; 0: from all."""
    top_p: float = Field(default=0.8, gt=0, le=1)
    """Sample from the smallest set of tokens with at least this mass."""
    drop_shortest: float = Field(default=0.1, ge=0, lt=1)
    """Share of the samples that is left out, the shortest first."""


def ssd(config: TrainConfig) -> tuple[Method, ...]:
    """A fixed set of the model's samples, and cross-entropy."""
    own = own_settings(config, SsdSettings)
    sampling = Sampling(config.max_completion_length, own.temperature, own.top_p, own.top_k)
    return (
        Method(
            examples=DemonstrationExamples(config),
            sequence=DatasetCompletions(),
            loss=CrossEntropy(),
            drawn=DrawnSamples(sampling, config.seed, config.batch_size, own.drop_shortest),
        ),
    )
