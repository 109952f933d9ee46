"""DFT: dynamic fine-tuning (arXiv 2508.05629).

    L = -mean_t sg[p(d_t | x, d_<t)] log p(d_t | x, d_<t)

SFT with each token weighed by the probability that the student gives it, through which no gradient flows: what the
student holds for impossible is hardly learnt.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from selfdistill.config import TrainConfig
from selfdistill.methods.sft import sft
from selfdistill.methods.slots import Method


def dft(config: TrainConfig) -> tuple[Method, ...]:
    """SFT's slots with a weight for each token."""
    return tuple(replace(stage, weighting=_probability) for stage in sft(config))


def _probability(statistics: dict[str, Tensor]) -> Tensor:
    return statistics["student_logp"].exp()
