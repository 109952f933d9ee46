"""Per-token divergence between the student's and the teacher's next-token distributions.

Legend: B batch, T completion tokens, N flattened tokens, n those of one chunk, V vocabulary, K top-k.

p is the student, q the teacher; ``log_p`` is in nats. All computation is in float32 (float64 for float64 logits),
whatever the model's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from selfdistill.errors import UserError
from selfdistill.loss.log_probs import dot, kl, log_softmax, pick
from selfdistill.loss.target import ProximalTarget, Target

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
Support = Literal["full", "top_k", "sampled"]
Tail = Literal["bucket", "renormalise"]


def _differentiable(value_N: Tensor, slope_NV: Tensor, log_p_NV: Tensor) -> Tensor:
    """The detached value, with ``slope_NV`` as its gradient with respect to ``log_p_NV``."""
    return value_N + dot(slope_NV, log_p_NV - log_p_NV.detach())


def _reverse_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(p||q) = sum_v p_v (log p_v - log q_v): equation 1 of SDFT (arXiv 2601.19897).

    Entries with p_v = 0 contribute 0. Where the teacher's logit is -inf and the student's is not, log q is -1.7e38.
    """
    p_NV, gap_NV = log_p_NV.detach().exp(), log_p_NV.detach() - log_q_NV
    value_N = dot(p_NV, gap_NV)
    return _differentiable(value_N, _reverse_kl_slope(p_NV, gap_NV, value_N), log_p_NV)


def _reverse_kl_slope(p_NV: Tensor, gap_NV: Tensor, value_N: Tensor) -> Tensor:
    """Gradient of KL(p||q) with respect to log p, up to a multiple of p; overwrites the gap log p - log q."""
    return gap_NV.sub_(value_N.unsqueeze(-1)).mul_(p_NV)


def _jsd(log_p_NV: Tensor, log_q_NV: Tensor, weight: float) -> Tensor:
    """Generalised Jensen-Shannon divergence b KL(q||M) + (1-b) KL(p||M) with M = (1-b) p + b q, b = ``weight``.

    Used by SDPO (arXiv 2601.20802) and OPSD (arXiv 2601.18734) with b = 0.5. As b approaches 0, the value approaches
    b * forward KL; as b approaches 1, (1-b) * reverse KL.
    """
    p_NV, gap_NV = log_p_NV.detach().exp(), log_p_NV.detach() - log_q_NV
    return _differentiable(*_jsd_and_slope(p_NV, log_q_NV.exp(), gap_NV, weight), log_p_NV)


def _jsd_and_slope(p_NV: Tensor, q_NV: Tensor, gap_NV: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """JSD and its gradient with respect to log p, up to a multiple of p; overwrites the gap log p - log q.

    JSD = sum_v (1-b) p r + b q (r - gap) with m = (1-b) p + b q and r = log p - log m; the gradient is (1-b) p r. With
    x = gap - log(b/(1-b)), r is log sigmoid(x) - log(1-b) and r - gap is log sigmoid(-x) - log b. Where p and q are
    near each other, r is -log1p(b expm1(-gap)), or r - gap is -log1p((1-b) expm1(gap)): no constants that cancel.
    """
    log_p_share, log_q_share = math.log1p(-weight), math.log(weight)
    x_NV = gap_NV - (log_q_share - log_p_share)
    likeliest_N1 = p_NV.argmax(-1, keepdim=True)
    # A constant per token cancels in the gradient on the logits. Where p is far above q, r is -log(1-b) plus a small
    # term that float32 would lose. log sigmoid(x) is that term alone.
    near_N1 = logsigmoid(x_NV.gather(-1, likeliest_N1)) < log_p_share / 2
    left_out_N1 = torch.where(near_N1, 0.0, -log_p_share).to(gap_NV.dtype)
    student_NV = logsigmoid(x_NV).sub_(left_out_N1 + log_p_share)
    teacher_NV = logsigmoid(x_NV.neg_()).sub_(log_q_share)
    share, sign = (weight, -1) if weight <= 0.5 else (1 - weight, 1)
    change_NV = torch.mul(gap_NV, sign, out=x_NV).expm1_().mul_(share)  # m/p - 1, or m/q - 1 where m is nearer to q
    near_NV = (change_NV.abs() <= 0.5) & near_N1
    smaller_NV = change_NV.log1p_().neg_()
    larger_NV = gap_NV.mul_(sign).add_(smaller_NV)
    near_student_NV, near_teacher_NV = (smaller_NV, larger_NV) if weight <= 0.5 else (larger_NV, smaller_NV)
    torch.where(near_NV, near_student_NV, student_NV, out=student_NV)
    torch.where(near_NV, near_teacher_NV, teacher_NV, out=teacher_NV)
    value_N = weight * teacher_NV.mul_(q_NV).sum(-1)
    # A confident student's gradient comes from its other tokens, so the likeliest one should add no rounding error.
    likeliest_r_N1 = student_NV.gather(-1, likeliest_N1)
    slope_NV = student_NV.sub_(likeliest_r_N1).mul_(p_NV)
    value_N += (1 - weight) * (slope_NV.sum(-1) + (likeliest_r_N1 + left_out_N1).squeeze(-1))
    return value_N, slope_NV.mul_(1 - weight)


def _through_log_softmax(slope_NV: Tensor, p_NV: Tensor) -> Tensor:
    """The gradient on the logits from that on log p, which is overwritten; multiples of p cancel."""
    return slope_NV.addcmul_(p_NV, slope_NV.sum(-1, keepdim=True), value=-1)


def _divergence(kind: Kind, weight: float, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    if kind == "forward_kl":
        return kl(log_q_NV, log_p_NV)
    if kind == "reverse_kl":
        return _reverse_kl(log_p_NV, log_q_NV)
    return _jsd(log_p_NV, log_q_NV, weight)


def _entries(kind: Kind, weight: float, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """Contribution of each vocabulary entry to the divergence, (N, V)."""
    if kind == "forward_kl":
        return log_q_NV.exp() * (log_q_NV - log_p_NV)
    if kind == "reverse_kl":
        return log_p_NV.exp() * (log_p_NV - log_q_NV)
    log_m_NV = torch.logaddexp(log_p_NV + math.log1p(-weight), log_q_NV + math.log(weight))
    teacher_NV = log_q_NV.exp() * (log_q_NV - log_m_NV)
    return weight * teacher_NV + (1 - weight) * log_p_NV.exp() * (log_p_NV - log_m_NV)


def _renormalised(log_p_NV: Tensor, support_NK: Tensor) -> Tensor:
    """Log-probabilities of the support alone, rescaled to sum to 1: (N, K)."""
    return log_p_NV.gather(-1, support_NK).log_softmax(-1)


def _with_tail(log_p_NV: Tensor, support_NK: Tensor) -> Tensor:
    """Log-probabilities of the support, plus one entry for the rest of the vocabulary: (N, K+1)."""
    # log(1 - sum of the support) has an error of 1e-7 in float32, more than a confident model's whole tail, and is
    # infinite at 0. A chunk holds the full vocabulary anyway, so sum the rest directly.
    rest_NV = log_p_NV.scatter(-1, support_NK, torch.finfo(log_p_NV.dtype).min / 2)
    return torch.cat([log_p_NV.gather(-1, support_NK), rest_NV.logsumexp(-1, keepdim=True)], dim=-1)


def forward_kl(student_logits_BTV: Tensor, teacher_logits_BTV: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v q_v (log q_v - log p_v) per token, over the whole vocabulary.

    The divergence behind the published SDFT results (arXiv 2601.19897, authors' statement and code).

    Args:
        student_logits_BTV: unnormalised logits, any leading dimensions, any float dtype; carries the gradient.
        teacher_logits_BTV: same shape; detached here.

    Returns:
        Nats per token, shape (B, T), float32 (float64 for float64 logits). Entries with q_v = 0 contribute 0. Where the
        student's logit is -inf and the teacher's is not, log p is taken as -1.7e38: huge, never NaN.
    """
    return kl(log_softmax(teacher_logits_BTV.detach()), log_softmax(student_logits_BTV))


@dataclass(frozen=True)
class Divergence:
    """A per-token loss between student p and teacher q.

    Supports:

    - ``full``: the whole vocabulary.
    - ``top_k``: the k most likely tokens of the distribution that weights the terms, so the dropped terms are small:
      the teacher's for forward KL (terms q_v (...)), the student's for reverse KL and JSD (terms p_v (...), where the
      gradient on a logit is proportional to p_v, as in SDPO). ``tail`` sets how the rest is treated. k >= V is the full
      divergence.
    - ``sampled``: reverse KL on the sampled token y alone, as a policy gradient (vOPD, arXiv 2605.07865):
      A = sg[log q(y) - log p(y) + KL(p||q)], loss = -A log p(y). Its expected gradient over y ~ p equals that of the
      full reverse KL; its value is not a divergence. The baseline KL(p||q) lowers the variance and leaves the
      expectation unchanged.

    Raises:
        UserError: a setting is out of range, or ``sampled`` is combined with a kind other than ``reverse_kl``.
    """

    kind: Kind = "forward_kl"
    """``forward_kl`` = KL(q||p), ``reverse_kl`` = KL(p||q), or ``jsd``."""
    support: Support = "full"
    """Vocabulary entries that are compared: ``full``, ``top_k`` or ``sampled``."""
    weight: float = 0.5
    """JSD only: b in (0, 1), the teacher's share of the mixture."""
    top_k: int = 100
    """``top_k`` only: size of the support."""
    tail: Tail = "bucket"
    """``top_k`` only: ``bucket`` keeps the rest as one entry with its exact mass; ``renormalise`` drops it and rescales
    p and q to sum to 1 on the support."""
    baseline: bool = True
    """``sampled`` only: add KL(p||q) to the advantage."""
    baseline_top_k: int | None = None
    """``sampled`` only: take this KL over the student's k most likely tokens, with p and q renormalised on them. The
    expected gradient is the same, because the baseline does not depend on the sampled token."""
    clip: float | None = None
    """Not with ``sampled``: each vocabulary entry contributes at most this many nats to the sum (OPSD, arXiv
    2601.18734). A clipped entry has no gradient. The tail's bucket counts as one entry."""
    target: Target | ProximalTarget | None = None
    """Replaces q; None: q itself."""
    pull: float = 0.0
    """Add this times KL(p_0||p), with p_0 the model before training, given the student's prompt."""

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("kind", self.kind, get_args(Kind)),
            ("support", self.support, get_args(Support)),
            ("tail", self.tail, get_args(Tail)),
        ):
            if value not in choices:
                raise UserError(f"divergence {name}: found {value!r}; use one of {', '.join(choices)}")
        if not 0 < self.weight < 1:
            raise UserError(f"divergence weight: found {self.weight}; use a number above 0 and below 1, such as 0.5")
        if self.top_k < 1:
            raise UserError(f"divergence top_k: found {self.top_k}; use 1 or more, such as 100")
        if self.support == "sampled" and self.kind != "reverse_kl":
            raise UserError(
                f"divergence support: 'sampled' has no {self.kind} form; use kind reverse_kl, or support full or top_k"
            )
        if self.support == "sampled" and self.clip is not None:
            raise UserError(
                "divergence clip: 'sampled' has no sum over the vocabulary to clip; use support full or top_k"
            )

    @property
    def needs_base(self) -> bool:
        """Whether the loss includes p_0, the model before training."""
        return self.pull > 0 or (self.target is not None and self.target.base > 0)

    def from_log_probs(self, log_p_NV: Tensor, log_q_NV: Tensor | None, tokens_N: Tensor) -> Tensor:
        """Per-token loss, shape (N,), in nats, with q itself as the target, and without a pull.

        A subclass that overrides it is a new loss. Training then takes its gradient by autograd.

        Args:
            log_p_NV: log-probabilities of the student, any leading dimensions; carries the gradient.
            log_q_NV: those of the teacher or the target, detached.
            tokens_N: ids of the completion tokens; used by ``sampled`` only.
        """
        if log_q_NV is None:
            raise ValueError("a divergence needs the teacher's logits")
        if self.support == "sampled":
            return self._sampled(log_p_NV, log_q_NV, tokens_N)
        if self.support == "top_k" and self.top_k < log_p_NV.shape[-1]:
            leader_NV = log_q_NV if self.kind == "forward_kl" else log_p_NV.detach()
            support_NK = leader_NV.topk(self.top_k, dim=-1).indices
            if self.tail == "bucket":
                log_p_NV, log_q_NV = _with_tail(log_p_NV, support_NK), _with_tail(log_q_NV, support_NK)
            else:
                log_p_NV, log_q_NV = _renormalised(log_p_NV, support_NK), _renormalised(log_q_NV, support_NK)
        if self.clip is not None:
            return _entries(self.kind, self.weight, log_p_NV, log_q_NV).clamp(max=self.clip).sum(-1)
        return _divergence(self.kind, self.weight, log_p_NV, log_q_NV)

    def value_and_slope(self, pair: Pair, statistics: dict[str, Tensor], tokens_N: Tensor) -> tuple[Tensor, Tensor]:
        """Per-token loss (N,) and its gradient with respect to the student's logits (N, V); overwrites ``pair``.

        Args:
            pair: student and teacher, and the base if the loss needs it.
            statistics: of the pair.
            tokens_N: ids of the completion tokens.
        """
        pulled = self._pulled(pair) if self.pull else None
        if self.target is not None:
            pair = pair.towards(self.target)
            statistics = pair.statistics(tokens_N)
        value_N, slope_NV = self._value_and_slope(pair, statistics, tokens_N)
        if pulled is not None:
            value_N, slope_NV = value_N + self.pull * pulled[0], slope_NV.add_(pulled[1], alpha=self.pull)
        return value_N, slope_NV

    def _value_and_slope(self, pair: Pair, statistics: dict[str, Tensor], tokens_N: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence from the pair's teacher.

        Over the full vocabulary the gradient has a closed form: p - q for forward KL; p (r - sum_v p r) with
        r = log p - log q for reverse KL; for JSD, (1-b) times the same with r = log p - log m, up to a constant in r.
        """
        own = type(self).from_log_probs is not Divergence.from_log_probs
        plain = self.support == "full" and self.clip is None and not own
        if not plain or pair.gap_NV is None or pair.q_NV is None or pair.log_q_NV is None:
            return _by_autograd(self, pair, tokens_N)
        if self.kind == "forward_kl":
            return statistics["forward_kl"], pair.p_NV.sub_(pair.q_NV)
        if self.kind == "reverse_kl":
            value_N = statistics["reverse_kl"]
            slope_NV = _reverse_kl_slope(pair.p_NV, pair.gap_NV, value_N)
        else:
            value_N, slope_NV = _jsd_and_slope(pair.p_NV, pair.q_NV, pair.gap_NV, self.weight)
        return value_N, _through_log_softmax(slope_NV, pair.p_NV)

    @staticmethod
    def _pulled(pair: Pair) -> tuple[Tensor, Tensor]:
        """KL(p_0||p) and its gradient with respect to the student's logits."""
        assert pair.log_base_NV is not None
        return kl(pair.log_base_NV, pair.log_p_NV), pair.p_NV - pair.log_base_NV.exp()

    def _sampled(self, log_p_NV: Tensor, log_q_NV: Tensor, tokens_N: Tensor) -> Tensor:
        logp_N = pick(log_p_NV, tokens_N)
        advantage_N = pick(log_q_NV, tokens_N) - logp_N.detach()
        if self.baseline:
            advantage_N = advantage_N + self._baseline(log_p_NV.detach(), log_q_NV)
        return -advantage_N * logp_N

    def _baseline(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        if self.baseline_top_k is None:
            return kl(log_p_NV, log_q_NV)
        support_NK = log_p_NV.topk(min(self.baseline_top_k, log_p_NV.shape[-1]), dim=-1).indices
        return kl(_renormalised(log_p_NV, support_NK), _renormalised(log_q_NV, support_NK))


@dataclass(frozen=True)
class CrossEntropy:
    """Negative log-likelihood, -log p(token): the loss of supervised fine-tuning. Needs no teacher."""

    def from_log_probs(self, log_p_NV: Tensor, log_q_NV: Tensor | None, tokens_N: Tensor) -> Tensor:
        """Per-token loss, shape (N,), in nats, as of :meth:`Divergence.from_log_probs`; ``log_q_NV`` is ignored."""
        return -pick(log_p_NV, tokens_N)

    def value_and_slope(self, pair: Pair, statistics: dict[str, Tensor], tokens_N: Tensor) -> tuple[Tensor, Tensor]:
        """Per-token loss (N,) and its gradient with respect to the student's logits (N, V): p - onehot(token)."""
        if type(self).from_log_probs is not CrossEntropy.from_log_probs:
            return _by_autograd(self, pair, tokens_N)
        pair.p_NV[torch.arange(len(tokens_N), device=tokens_N.device), tokens_N] -= 1
        return -statistics["student_logp"], pair.p_NV


class Pair:
    """Detached (log-)probabilities of student and teacher at the same tokens, and log-probabilities of the base.

    ``teacher_logits_NV`` may be log-probabilities, which log-softmax leaves unchanged.
    """

    def __init__(
        self, student_logits_NV: Tensor, teacher_logits_NV: Tensor | None, base_logits_NV: Tensor | None = None
    ) -> None:
        self.log_p_NV = log_softmax(student_logits_NV.detach())
        """log p, of the student"""
        self.p_NV = self.log_p_NV.exp()
        """p"""
        self.log_q_NV: Tensor | None = None
        """log q, of the teacher; None without a teacher, as are the next two"""
        self.q_NV: Tensor | None = None
        """q"""
        self.gap_NV: Tensor | None = None
        """log p - log q"""
        self.log_base_NV = None if base_logits_NV is None else log_softmax(base_logits_NV.detach())
        """log p_0, of the model before training; None if the method does not need it"""
        if teacher_logits_NV is not None:
            self.log_q_NV = log_softmax(teacher_logits_NV.detach())
            self.q_NV = self.log_q_NV.exp()
            self.gap_NV = self.log_p_NV - self.log_q_NV

    def towards(self, target: Target | ProximalTarget) -> Pair:
        """The same student, with the target in place of the teacher."""
        assert self.log_q_NV is not None
        # Log-softmax leaves the student's log-probabilities unchanged.
        return Pair(self.log_p_NV, target.log_probs(self.log_q_NV, self.log_p_NV, self.log_base_NV))

    def statistics(self, tokens_N: Tensor) -> dict[str, Tensor]:
        """Per-token statistics, each of shape (N,), in nats.

        ``entropy`` of the student and ``student_logp`` of the tokens. With a teacher also ``teacher_logp``,
        ``forward_kl`` = KL(q||p) and ``reverse_kl`` = KL(p||q), both over the whole vocabulary.
        """
        found = {"entropy": -dot(self.p_NV, self.log_p_NV), "student_logp": pick(self.log_p_NV, tokens_N)}
        if self.log_q_NV is not None and self.q_NV is not None and self.gap_NV is not None:
            found["teacher_logp"] = pick(self.log_q_NV, tokens_N)
            found["forward_kl"] = -dot(self.q_NV, self.gap_NV)
            found["reverse_kl"] = dot(self.p_NV, self.gap_NV)
        return found


def _by_autograd(loss: Divergence | CrossEntropy, pair: Pair, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf_NV = pair.log_p_NV.requires_grad_()
        value_N = one_per_token(loss.from_log_probs(leaf_NV, pair.log_q_NV, tokens_N), tokens_N, "loss", "value")
        if not value_N.requires_grad:
            raise UserError("slot 'loss': returned values without a gradient, expected ones that depend on log_p_NV")
        (slope_NV,) = torch.autograd.grad(value_N.sum(), leaf_NV)
    return value_N.detach(), _through_log_softmax(slope_NV, pair.p_NV)


def one_per_token(found: Any, tokens_N: Tensor, slot: str, what: str) -> Tensor:
    """What a user's function returned for some tokens, (N,).

    Raises:
        UserError: it has another shape, or is no tensor; names the ``slot``, and ``what`` was expected.
    """
    shape = getattr(found, "shape", None)
    if shape != tokens_N.shape:
        shown = repr(found)[:60] if shape is None else f"shape {tuple(shape)}"
        raise UserError(f"slot {slot!r}: returned {shown}, expected one {what} per token, shape (n,)")
    returned: Tensor = found
    return returned
