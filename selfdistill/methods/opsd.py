"""OPSD: on-policy self-distillation from a reference solution (arXiv 2601.18734).

    x -> y ~ p(.|x);   L = mean_t sum_v min( D_v, 0.05 )
    KL(q||p): D_v = q_v (log q_v - log p_v)
    JSD:      D_v = b q_v (log q_v - log m_v) + (1-b) p_v (log p_v - log m_v),   m = (1-b) p + b q

q is the model before training, given the reference solution, which is the demonstration as the context shows it. Style
tokens, where the two differ most, would otherwise outweigh the others; a clipped entry has no gradient. Only the
upper end is clipped, as in the authors' code, so the sum can be negative for KL(q||p), whose entries can be negative.

Differences: the paper's text has JSD with b = 0.5 and no clip. The authors' later code clips, and its scripts use
KL(q||p), temperature 1.1, top-p 0.95 and top-k 20 for the samples, and temperature 1.1 within the divergence, too. Here
the divergence is the setting's, KL(q||p) by default, of the untempered distributions, and samples are untempered by
default. The authors stop near 100 steps, because the gain comes early: set ``max_steps``, or watch ``test`` with
``eval_steps``.
"""

from __future__ import annotations

from dataclasses import replace

from selfdistill.config import TrainConfig
from selfdistill.errors import UserError
from selfdistill.methods.on_policy import on_policy
from selfdistill.methods.slots import FROZEN, Method, divergence_of

CLIP = 0.05
"""Default of ``entry_clip``, in nats."""


def opsd(config: TrainConfig) -> tuple[Method, ...]:
    """Student samples, the frozen model with the demonstration, a clipped divergence."""
    if config.support == "sampled":
        raise UserError(
            "setting 'support': opsd clips each vocabulary entry, found 'sampled', which has none: use full or top_k"
        )
    return (on_policy(config, replace(divergence_of(config), clip=config.entry_clip or CLIP), FROZEN),)
