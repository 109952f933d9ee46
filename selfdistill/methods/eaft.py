"""EAFT: entropy-adaptive fine-tuning (arXiv 2601.02151).

    L = -mean_t sg[ H_20(p_t) / ln 20 ] log p(d_t | x, d_<t)

H_20 is the entropy of the 20 most likely tokens, renormalised. SFT with each token weighted by the student's own
uncertainty: where the student is sure of another token than the demonstration's, it is left alone.

Differences: the authors' code divides by 3.0, nearly ln 20, and has a power of the weight, 1 by default, which is not
offered.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field
from torch import Tensor

from selfdistill.config import Settings, TrainConfig
from selfdistill.loss import Pair, top_k_entropy
from selfdistill.methods.sft import sft
from selfdistill.methods.slots import Method, own_settings


class EaftSettings(Settings):
    """Settings of EAFT alone."""

    entropy_top_k: int = Field(default=20, ge=2)
    """Most likely tokens whose entropy is the weight."""


def eaft(config: TrainConfig) -> tuple[Method, ...]:
    """SFT's slots plus per-token weights."""
    own = own_settings(config, EaftSettings)

    def doubt(pair: Pair, tokens_N: Tensor) -> Tensor:
        return top_k_entropy(pair.log_p_NV, own.entropy_top_k)

    return tuple(replace(stage, weighting=doubt) for stage in sft(config))
