"""SFT + Re-invoke: SFT, then distillation from the base on general prompts (baseline of SDFT, arXiv 2601.19897).

    first half of the steps:  L = -mean_t log p(d_t | x, d_<t)
    second half:              z -> y ~ p(.|z);   L = mean_t KL( p(.|z, y_<t) || p_0(.|z, y_<t) )

z are general prompts without demonstrations; p_0 is the model before training. Each half has its own learning rate
schedule.
"""

from __future__ import annotations

from selfdistill.config import TrainConfig
from selfdistill.data import PACKAGE
from selfdistill.loss import Divergence
from selfdistill.methods.examples import PromptExamples
from selfdistill.methods.sequences import StudentSamples
from selfdistill.methods.sft import sft
from selfdistill.methods.slots import FROZEN, Method, engine_cap, sampling_of


def sft_reinvoke(config: TrainConfig) -> tuple[Method, ...]:
    """SFT's slots, then student samples with the base as teacher."""
    second = Method(
        examples=PromptExamples(config, config.general_prompts or PACKAGE),
        sequence=StudentSamples(sampling_of(config), 1, config.seed),
        loss=Divergence("reverse_kl"),
        teacher=FROZEN,
        importance_cap=engine_cap(config),
    )
    return (*sft(config), second)
