"""POPE: privileged on-policy exploration, from prefixes of a demonstration (arXiv 2601.18779).

    x -> y_1..y_G ~ p(.|x);   x -> z_1..z_G ~ p(.|x, h);   L = GRPO on {y_i} and on {h z_i}, whose targets are z_i alone

h is the shortest prefix of the demonstration after which a sample of the model before training is right, at most a
quarter of it. The search runs once, before the first step. Each group has its own advantages, so a prompt that
is never solved alone is learnt from its prefix. A reply has at most max_completion_length tokens including
its prefix: a sample after a prefix has at most 3/4 of them, a sample of the prompt alone has all.

Differences: the authors put h into the prompt, with the request to build on it; ``where: prompt`` does so. Then z is a
whole reply, which may repeat h, and its loss is under the prompt with h. By default h begins the reply, so the loss
sees the prompt alone, and models need not follow that request. They train only on hard prompts, which none of many
samples solves. Here all rows are learnt, and the prefix of an easy one is empty; choose hard rows in the data. We did
not find which lengths they tried: here four, and the longest if no sample is right. The search, and samples with a
prefix, are in :mod:`selfdistill.methods.prefixes`.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from selfdistill.config import Settings, TrainConfig
from selfdistill.errors import UserError
from selfdistill.methods.examples import ScoredExamples
from selfdistill.methods.grpo import grpo_method
from selfdistill.methods.prefixes import GuidedSamples, ShortestPrefixes, Where
from selfdistill.methods.sequences import StudentSamples
from selfdistill.methods.slots import Method, own_settings


class PopeSettings(Settings):
    """Settings of POPE alone."""

    longest: float = Field(default=0.25, gt=0, le=1)
    """Length of the longest prefix, as a share of the demonstration."""
    lengths: int = Field(default=4, ge=1)
    """Number of lengths that are tried, in equal steps, after the empty prefix."""
    tries: int = Field(default=8, ge=1)
    """Samples after each prefix in the search before the first step."""
    where: Where = "reply"
    """Where the prefix is: it begins the ``reply``, or is at the end of the ``prompt``."""

    def model_post_init(self, _context: object) -> None:
        """Check that samples after a prefix have tokens."""
        if self.where == "reply" and self.longest == 1:
            raise UserError(
                "setting 'longest': found 1, which leaves no tokens for a sample after a prefix; give less, or use "
                "where: prompt"
            )


def pope(config: TrainConfig) -> tuple[Method, ...]:
    """GRPO on two groups per prompt: samples of the prompt alone, and samples that continue a prefix."""
    own = own_settings(config, PopeSettings)
    rewarded = grpo_method(config)
    assert isinstance(rewarded.sequence, StudentSamples)
    group, sampling = rewarded.sequence.num_generations, rewarded.sequence.sampling
    how = own.model_dump() | {"success_reward": config.success_reward}
    search = ShortestPrefixes(sampling, config.seed, config.batch_size, **how, config=config)
    return (
        replace(
            rewarded,
            examples=ScoredExamples(config, completion_must_fit=True),
            sequence=GuidedSamples(sampling, group, config.seed, own.longest, own.where, config=config),
            drawn=search,
        ),
    )
