"""DFT: dynamic fine-tuning (arXiv 2508.05629).

    L = -mean_t sg[p(d_t | x, d_<t)] log p(d_t | x, d_<t)

SFT with each token weighted by its detached probability under the student, so tokens that the student considers
unlikely contribute little.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from selfdistill.config import TrainConfig
from selfdistill.loss import Pair, pick
from selfdistill.methods.sft import sft
from selfdistill.methods.slots import Method


def dft(config: TrainConfig) -> tuple[Method, ...]:
    """SFT's slots plus per-token weights."""
    return tuple(replace(stage, weighting=_probability) for stage in sft(config))


def _probability(pair: Pair, tokens_N: Tensor) -> Tensor:
    return pick(pair.log_p_NV, tokens_N).exp()
