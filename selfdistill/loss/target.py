"""The distribution that the student is trained towards, where it is not the teacher itself.

Legend: N tokens, V vocabulary. p is the student, q the teacher; ``log_p`` is in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selfdistill.errors import UserError
from selfdistill.loss.log_probs import log_softmax


@dataclass(frozen=True)
class Target:
    """softmax(a log q + b log sg[p] + d log p_0).

    By default the teacher q alone. b > 0 keeps the target near the student (Veto, arXiv 2601.07155, decays b from 0.8
    to 0). d > 0 keeps it near p_0, the model before training, given the student's prompt, or the teacher's context
    where the method says so.
    """

    teacher: float = 1.0
    """a"""
    student: float = 0.0
    """b"""
    base: float = 0.0
    """d"""

    def log_probs(self, log_q_NV: Tensor, log_p_NV: Tensor, log_base_NV: Tensor | None) -> Tensor:
        """Log-probabilities of the target, (N, V), detached."""
        total_NV = self.teacher * log_q_NV + self.student * log_p_NV.detach()
        if log_base_NV is not None:
            total_NV += self.base * log_base_NV
        return log_softmax(total_NV)


@dataclass(frozen=True)
class ProximalTarget:
    """The distribution nearest to the student that has a given share of the teacher's information (iSDFT).

    q* = argmin KL(q*||sg[p]) with E_{q*}[log q - log p] >= share * KL(q||p). So q* is the softmax of
    (1-l) log p + l log q, with l in [0, 1] solved for each token. At share 1, q* is q.

    Raises:
        UserError: ``share`` is outside [0, 1].
    """

    share: float
    """rho. At 0, the target is not the student: the condition still requires E_{q*}[log q - log p] >= 0."""

    base = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(f"target share: found {self.share}; use a number from 0 to 1")

    def log_probs(self, log_q_NV: Tensor, log_p_NV: Tensor, log_base_NV: Tensor | None) -> Tensor:
        """Log-probabilities of the target, (N, V), detached.

        E_{q*}[log q - log p] rises with l, from -KL(p||q) at 0 to KL(q||p) at 1, and its slope is a variance. So
        Newton's method finds l, with bisection wherever a step would leave the bracket.
        """
        log_p_NV = log_p_NV.detach()
        gap_NV = (log_q_NV - log_p_NV).clamp(-_WIDEST, _WIDEST)
        squared_NV = gap_NV.square()
        wanted_N1 = self.share * _sum(log_q_NV.exp() * gap_NV)
        low_N1, high_N1 = torch.zeros_like(wanted_N1), torch.ones_like(wanted_N1)
        l_N1 = high_N1
        for _ in range(_MOST_STEPS):
            mixed_NV = log_p_NV.lerp(log_q_NV, l_N1).softmax(-1)
            found_N1 = _sum(mixed_NV * gap_NV)
            slope_N1 = _sum(mixed_NV * squared_NV) - found_N1.square()
            too_low_N1 = found_N1 < wanted_N1
            low_N1, high_N1 = torch.where(too_low_N1, l_N1, low_N1), torch.where(too_low_N1, high_N1, l_N1)
            newton_N1 = l_N1 - (found_N1 - wanted_N1) / slope_N1
            inside_N1 = (low_N1 <= newton_N1) & (newton_N1 <= high_N1)
            before_N1, l_N1 = l_N1, torch.where(inside_N1, newton_N1, (low_N1 + high_N1) / 2)
            if not bool(((l_N1 - before_N1).abs() > _SMALLEST_STEP).any()):
                break
        return log_softmax(log_p_NV.lerp(log_q_NV, l_N1))


def _sum(values_NV: Tensor) -> Tensor:
    return values_NV.sum(-1, keepdim=True)


_WIDEST = 1e15
"""Nats. A wider gap, where a token has probability 0, is clamped, so that its square stays finite."""
_MOST_STEPS = 24
"""Five or six are typical."""
_SMALLEST_STEP = 1e-5
"""Newton's next step is of the order of its square."""
