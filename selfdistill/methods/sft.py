"""SFT: supervised fine-tuning, the baseline.

    L = -mean_t log p(d_t | x, d_<t)

d is the demonstration, end token included. Nothing is sampled and there is no teacher.
"""

from __future__ import annotations

from selfdistill.config import TrainConfig
from selfdistill.divergence import CrossEntropy
from selfdistill.methods.slots import Demonstrations, Method


def sft(config: TrainConfig) -> Method:
    """Demonstrations and cross-entropy."""
    return Method(sequence=Demonstrations(), teacher=None, loss=CrossEntropy(), trains_on_demonstration=True)
