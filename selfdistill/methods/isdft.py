"""iSDFT: self-distillation towards a target near the student (arXiv 2609.24646).

    x -> y ~ p(.|x);   L = mean_t KL( q*_t || p_t ) + m KL( p_0 || p_t )
    q* = argmin KL(q*||sg[p])  with  E_{q*}[log q - log p] >= r KL(q||p);   q* ~ p^(1-l) q^l, l solved per token

q is the teacher, given the demonstration. r rises linearly from 0.25 at the first step to 1 at step 150, where q* is q.
The second term, m = 0.002, holds the student near p_0, the model before training, on the same samples.

Differences: l is found by Newton's steps within a bracket in place of 40 bisections, to the same root, and the
divergence is the setting's, KL(q*||p) by default, as in the authors' code. That code masks the first 3 tokens and its
teacher follows at a rate of 0.01: ``skip_first_tokens`` and ``ema_rate``.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from selfdistill.config import Settings, TrainConfig
from selfdistill.loss import Divergence, ProximalTarget
from selfdistill.methods.on_policy import on_policy
from selfdistill.methods.slots import Method, divergence_of, own_settings, teacher_of


class IsdftSettings(Settings):
    """Settings of iSDFT alone."""

    first_share: float = Field(default=0.25, ge=0, le=1)
    """r at the first step: share of the teacher's information in the target."""
    share: float = Field(default=1.0, ge=0, le=1)
    """r from step ``ramp_steps`` on."""
    ramp_steps: int = Field(default=150, ge=0)
    """Steps in which r goes linearly from the one to the other; 0: ``share`` from the start."""
    pull: float = Field(default=2e-3, ge=0)
    """m, the weight of KL(p_0||p); 0: none, and the model before training is not run."""


def isdft(config: TrainConfig) -> tuple[Method, ...]:
    """Student samples, a teacher with the demonstration, a target nearer to the student, a pull to the base."""
    own, divergence = own_settings(config, IsdftSettings), divergence_of(config)

    def loss_at(step: int, steps: int) -> Divergence:
        done = min(1.0, step / own.ramp_steps) if own.ramp_steps else 1.0
        share = own.first_share + (own.share - own.first_share) * done
        return replace(divergence, target=ProximalTarget(share), pull=own.pull)

    return (replace(on_policy(config, loss_at(0, 1), teacher_of(config)), loss_at=loss_at),)
