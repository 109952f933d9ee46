"""TRAPO: trust-region adaptive policy optimisation, from parts of the demonstration (arXiv 2512.17636).

    micro-group i:  h_i = the first l_i of the demonstration if the mean reward so far is below t_i, else nothing
    x -> z ~ p(.|x, h_i);   L = L_GRPO on {z}  +  g mean_t -sg[ min(p(h_t)/a, 1) ] log p(h_t | x, h_<t)

l = (0, .2, .5, 1) and t = (-1, .5, .7, .9), so the first samples come from the prompt alone, and a solved prompt gets
no help. Advantages are those over all samples of the prompt. Tokens of a prefix with p below a = 0.1 would pull hard in
SFT; here the gradient of p/a is as for p itself.

Differences: we did not find the sizes of the micro-groups in paper or code. Here they are 4, 2, 1 and 1 of 8 samples,
because more copies of the same demonstration add little. The authors average over prefix and sample together. Here
prefixes have their own mean over all samples, and g, 1 by default, weighs one loss against the other. A complete
demonstration has an advantage, which affects the others', but no tokens of its own, so L_GRPO is the mean over the
other samples: over 7 of 8 with the default sizes. Micro-groups are in :mod:`selfdistill.methods.prefixes`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field
from torch import Tensor

from selfdistill.config import Settings, TrainConfig
from selfdistill.errors import UserError
from selfdistill.loss import Pair, pick
from selfdistill.methods.examples import ScoredExamples
from selfdistill.methods.grpo import GroupAdvantages, grpo_method
from selfdistill.methods.prefixes import GivenPrefixes, MicroGroups
from selfdistill.methods.slots import Method, own_settings, sampling_of


class TrapoSettings(Settings):
    """Settings of TRAPO alone."""

    sizes: tuple[Annotated[int, Field(ge=1)], ...] = (4, 2, 1, 1)
    """Samples of each micro-group; their sum is the number of samples per prompt."""
    ratios: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.0, 0.2, 0.5, 1.0)
    """l: the part of the demonstration that each micro-group continues."""
    thresholds: tuple[float, ...] = (-1.0, 0.5, 0.7, 0.9)
    """t: a micro-group gets its part if the mean reward of earlier ones is below this."""
    trust: float = Field(default=0.1, gt=0, le=1)
    """a; at 1 prefixes are learnt as by DFT."""
    weight: float = Field(default=1.0, gt=0)
    """g, the weight of the loss on prefixes."""

    def model_post_init(self, _context: object) -> None:
        """Check the micro-groups against each other."""
        if not len(self.sizes) == len(self.ratios) == len(self.thresholds) > 0:
            raise UserError("settings 'sizes', 'ratios' and 'thresholds': expected one value per micro-group in each")
        if sum(self.sizes) < 2:
            raise UserError("setting 'sizes': found 1 sample per prompt, expected at least 2, to compare")


def trapo(config: TrainConfig) -> tuple[Method, ...]:
    """GRPO on micro-groups, plus cross-entropy on their given prefixes."""
    own = own_settings(config, TrapoSettings)
    rewarded = grpo_method(config)
    if config.num_generations not in (None, sum(own.sizes)):
        raise UserError(
            f"setting 'num_generations': found {config.num_generations}, but the micro-groups of trapo have "
            f"{sum(own.sizes)} samples; leave it out, and give sizes in method_settings"
        )

    def weight(pair: Pair, tokens_N: Tensor) -> Tensor:
        return (pick(pair.log_p_NV, tokens_N).exp() / own.trust).clamp(max=1)

    groups = MicroGroups(sampling_of(config), config.seed, own.sizes, own.ratios, own.thresholds, config=config)
    examples = ScoredExamples(config, completion_must_fit=True)
    rewarded = replace(rewarded, examples=examples, sequence=groups, select=GroupAdvantages(groups.per_example))
    given = replace(
        rewarded, checker=None, select=GivenPrefixes(), weighting=weight, importance_cap=None, weight=own.weight
    )
    return (replace(rewarded, also=(("prefixes", given),)),)
