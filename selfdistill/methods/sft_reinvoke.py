"""SFT + Re-invoke: SFT, then back towards the base on general prompts (baseline of SDFT, arXiv 2601.19897).

    first half of the steps:  L = -mean_t log p(d_t | x, d_<t)
    second half:              z -> y ~ p(.|z);   L = mean_t KL( p(.|z, y_<t) || p_base(.|z, y_<t) )

z are general prompts without demonstrations; p_base is the model as it was before the first step. Each half has a
learning rate schedule of its own.
"""

from __future__ import annotations

from selfdistill.config import TrainConfig
from selfdistill.loss import Divergence
from selfdistill.methods.examples import GeneralPromptExamples
from selfdistill.methods.sequences import StudentSamples
from selfdistill.methods.sft import sft
from selfdistill.methods.slots import FROZEN, Method, sampling_of


def sft_reinvoke(config: TrainConfig) -> tuple[Method, ...]:
    """SFT's slots, then student samples with the base as teacher."""
    second = Method(
        examples=GeneralPromptExamples(config, config.general_prompts),
        sequence=StudentSamples(sampling_of(config), 1, config.seed),
        loss=Divergence("reverse_kl"),
        teacher=FROZEN,
    )
    return (*sft(config), second)
