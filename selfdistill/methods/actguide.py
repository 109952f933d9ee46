"""ActGuide-RL: samples with the fewest actions of a guide that help, where no sample is right (arXiv 2605.12004).

    x -> y_1..y_G ~ p(.|x);   where no y_i is right, some are replaced:  z ~ p(.|x, g_k)
    k = the smallest number of actions with which a z is right;   L = GRPO on the group, with log p(z_t | x, z_<t)

g_k are the first k actions of the demonstration, shown in the prompt, and k is found by binary search at each step. The
loss is under the prompt without the guide, so the model learns to do without. Where no k helps, the group stays.

Differences: the authors' actions are an agent's; here they are the lines or sentences of a text. We did not find how
many samples of a group are guided. The default is half, so that failed samples of the prompt alone give right ones an
advantage even if all guided samples are right. A try has as many samples. Theirs is for groups without any reward;
here partial ones below ``success_reward`` count as failed, too. The ratio of the probabilities without and with the
guide is not corrected for, unless ``importance_cap`` is set. The search is in :mod:`selfdistill.methods.guides`.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from selfdistill.config import Settings, TrainConfig
from selfdistill.methods.grpo import grpo_method
from selfdistill.methods.guides import GuidedAfterFailure, GuidedExamples, Unit
from selfdistill.methods.slots import Method, own_settings, sampling_of


class ActguideSettings(Settings):
    """Settings of ActGuide-RL alone."""

    actions: Unit = "lines"
    """What counts as an action of the demonstration: ``lines`` or ``sentences``."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Part of a group without a right sample that samples with a guide replace."""


def actguide(config: TrainConfig) -> tuple[Method, ...]:
    """GRPO on groups, some samples of which saw a guide."""
    own = own_settings(config, ActguideSettings)
    rewarded = grpo_method(config)
    group, cap = rewarded.sequence.per_example, config.importance_cap
    groups = GuidedAfterFailure(
        sampling_of(config),
        group,
        config.seed,
        replaced=max(1, round(own.share * group)),
        unit=own.actions,
        weighed=cap is not None,
        success_reward=config.success_reward,
        config=config,
    )
    examples = GuidedExamples(config, unit=own.actions)
    return (replace(rewarded, examples=examples, sequence=groups, importance_cap=cap or rewarded.importance_cap),)
