"""The divergences, alone and fused with the head, against explicit float64 sums that share no code with the module.

Dimensions in names: N tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import per_token
from torch import Tensor, nn

from selfdistill.errors import UserError
from selfdistill.loss import chunked
from selfdistill.loss.chunked import chunked_loss
from selfdistill.loss.divergence import (
    CrossEntropy,
    Divergence,
    Pair,
    forward_kl,
)
from selfdistill.loss.target import Target

N, V, D, K = 7, 23, 5, 6
CLIP = 0.03  # cuts one to four entries of most tokens

LOSSES = [
    *(Divergence(kind) for kind in ("forward_kl", "reverse_kl", "jsd")),
    Divergence("jsd", weight=0.2),
    *(
        Divergence(kind, "top_k", top_k=K, tail=tail)
        for kind in ("forward_kl", "reverse_kl", "jsd")
        for tail in ("bucket", "renormalise")
    ),
    Divergence("reverse_kl", "sampled"),
    Divergence("reverse_kl", "sampled", baseline=False),
    Divergence("reverse_kl", "sampled", baseline_top_k=K),
    *(Divergence(kind, clip=CLIP) for kind in ("forward_kl", "reverse_kl", "jsd")),
    *(
        Divergence(kind, "top_k", top_k=K, tail=tail, clip=CLIP)
        for kind in ("forward_kl", "reverse_kl", "jsd")
        for tail in ("bucket", "renormalise")
    ),
    CrossEntropy(),
]


def name(loss: Divergence | CrossEntropy) -> str:
    return re.sub(r"\w+=|[' ]", "", repr(loss))


each_loss = pytest.mark.parametrize("loss", LOSSES, ids=name)


# --- the reference: one token, numpy float64, sums written out ---


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def kl(a: np.ndarray, b: np.ndarray) -> float:
    return sum(x * np.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def divergence_of(kind: str, weight: float, p: np.ndarray, q: np.ndarray, clip: float | None = None) -> float:
    m = (1 - weight) * p + weight * q
    entries = {
        "forward_kl": lambda p, q, m: kl([q], [p]),
        "reverse_kl": lambda p, q, m: kl([p], [q]),
        "jsd": lambda p, q, m: weight * kl([q], [m]) + (1 - weight) * kl([p], [m]),
    }[kind]
    return sum(min(entries(*entry), np.inf if clip is None else clip) for entry in zip(p, q, m, strict=True))


def reference(loss: Divergence | CrossEntropy, student: np.ndarray, teacher: np.ndarray, token: int) -> float:
    p, q = softmax(student), softmax(teacher)
    if isinstance(loss, CrossEntropy):
        return -np.log(p[token])
    if loss.support == "sampled":
        return -advantage(loss, p, q, token) * np.log(p[token])
    if loss.support == "top_k":
        order = np.argsort(-(q if loss.kind == "forward_kl" else p))
        top, rest = order[: loss.top_k], order[loss.top_k :]
        if loss.tail == "bucket":
            p, q = np.append(p[top], p[rest].sum()), np.append(q[top], q[rest].sum())
        else:
            p, q = p[top] / p[top].sum(), q[top] / q[top].sum()
    return divergence_of(loss.kind, loss.weight, p, q, loss.clip)


def advantage(loss: Divergence, p: np.ndarray, q: np.ndarray, token: int) -> float:
    top = np.argsort(-p)[: loss.baseline_top_k]
    baseline = kl(p[top] / p[top].sum(), q[top] / q[top].sum()) if loss.baseline else 0.0
    return np.log(q[token]) - np.log(p[token]) + baseline


def reference_gradient(loss: Divergence | CrossEntropy, student: np.ndarray, teacher: np.ndarray, token: int):
    if isinstance(loss, Divergence) and loss.support == "sampled":  # the advantage is held constant
        p = softmax(student)
        return advantage(loss, p, softmax(teacher), token) * (p - np.eye(len(p))[token])
    step = 1e-5
    bumps = step * np.eye(len(student))
    return np.array(
        [
            (reference(loss, student + bump, teacher, token) - reference(loss, student - bump, teacher, token))
            / (2 * step)
            for bump in bumps
        ]
    )


def references(loss, student: Tensor, teacher: Tensor, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
    rows = [
        (s, t, int(token))
        for s, t, token in zip(student.double().numpy(), teacher.double().numpy(), tokens, strict=True)
    ]
    return np.array([reference(loss, *row) for row in rows]), np.array([reference_gradient(loss, *row) for row in rows])


def error(found: Tensor, expected: np.ndarray | Tensor) -> float:
    """Largest difference, relative to the largest expected entry."""
    expected = torch.as_tensor(expected).detach().double()
    return float((found.detach().double() - expected).abs().max() / expected.abs().max())


def logits(seed: int, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    student = (scale * torch.randn(N, V, generator=random, dtype=torch.float64)).to(dtype)
    teacher = (scale * torch.randn(N, V, generator=random, dtype=torch.float64)).to(dtype)
    return student, teacher, torch.randint(V, (N,), generator=random)


# --- value and gradient ---


@each_loss
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-8), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)], ids=str
)
def test_value_and_gradient_match_explicit_sums(loss, dtype, limit):
    student, teacher, tokens = logits(0, dtype)
    value, gradient = references(loss, student, teacher, tokens)
    leaf = student.clone().requires_grad_()
    loss_N = per_token(loss, leaf, teacher, tokens)
    loss_N.sum().backward()
    assert loss_N.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss_N.shape == (N,)
    assert error(loss_N, value) <= limit
    # A gradient that is handed back in bfloat16 is rounded to 8 bits.
    assert error(leaf.grad, gradient) <= (4e-3 if dtype == torch.bfloat16 else limit)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if "sampled" not in repr(loss)], ids=name)
def test_gradient_matches_finite_differences_of_the_loss_itself(loss):
    """Not for the sampled token, whose loss is not the function that its gradient descends."""
    student, teacher, tokens = logits(1)
    assert torch.autograd.gradcheck(lambda x: per_token(loss, x, teacher, tokens), (student.requires_grad_(),))


def test_forward_kl_takes_leading_dimensions_and_detaches_the_teacher():
    student, teacher, tokens = logits(2)
    teacher.requires_grad_()
    student.requires_grad_()
    value, _ = references(LOSSES[0], student.detach(), teacher.detach(), tokens)
    found = forward_kl(student.expand(2, N, V), teacher.expand(2, N, V))
    assert found.shape == (2, N)
    assert error(found, np.stack([value, value])) < 1e-12
    found.sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("top_k", [V, V + 1, 10 * V])
def test_top_k_of_the_whole_vocabulary_is_the_full_divergence(kind, tail, top_k):
    student, teacher, tokens = logits(4, torch.float32)
    full = per_token(Divergence(kind), student, teacher, tokens)
    assert error(per_token(Divergence(kind, "top_k", top_k=top_k, tail=tail), student, teacher, tokens), full) < 1e-6


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_bucket_never_exceeds_the_full_divergence_and_grows_to_it(kind):
    """Merging outcomes loses information (data processing inequality)."""
    student, teacher, tokens = logits(5)
    full = per_token(Divergence(kind), student, teacher, tokens)
    by_k = [per_token(Divergence(kind, "top_k", top_k=k), student, teacher, tokens) for k in (1, 4, 12, V - 1)]
    for smaller, larger in itertools.pairwise([*by_k, full]):
        assert (smaller <= larger + 1e-12).all()
    assert error(by_k[-1], full) < 1e-12  # the tail of V - 1 is one token: nothing is merged
    assert (by_k[0] < 0.99 * full).all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_bucket_holds_a_tail_below_float32_resolution(kind):
    """Tail masses of 1e-11 and 1e-13, which 1 - sum(top k) in float32 cannot see."""
    student = torch.tensor([[0.0, -1.0, -25.0, -27.0, -29.0]])
    teacher = torch.tensor([[0.0, -1.0, -30.0, -31.0, -32.0]])
    tokens = torch.tensor([0])
    loss = Divergence(kind, "top_k", top_k=2)
    leaf = student.clone().requires_grad_()
    value = per_token(loss, leaf, teacher, tokens)
    value.sum().backward()
    p, q = (softmax(x[0].double().numpy())[2:] for x in (student, teacher))
    tail_p, tail_q = p.sum(), q.sum()
    per_mass = {
        "forward_kl": 1 - tail_q / tail_p,
        "reverse_kl": np.log(tail_p / tail_q),
        "jsd": 0.5 * np.log(tail_p / (0.5 * tail_p + 0.5 * tail_q)),
    }[kind]
    assert error(leaf.grad[0, 2:], p * per_mass) < 1e-5


# --- logits at the edge ---


@each_loss
def test_tokens_that_neither_can_say_count_nothing(loss):
    """-inf on both sides gives what the same logits without these entries give, and no gradient on them."""
    student, teacher, tokens = logits(6, torch.float32)
    tokens = tokens % (V - 3)
    banned = torch.tensor([V - 3, V - 2, V - 1])
    student, teacher = student.index_fill(1, banned, -torch.inf), teacher.index_fill(1, banned, -torch.inf)
    value, gradient = references(loss, student[:, :-3], teacher[:, :-3], tokens)
    leaf = student.clone().requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        loss_N = per_token(loss, leaf, teacher, tokens)
        loss_N.sum().backward()
    assert error(loss_N, value) < 1e-5
    assert error(leaf.grad[:, :-3], gradient) < 1e-5
    assert (leaf.grad[:, -3:] == 0).all()
    for key, statistic_N in Pair(student, teacher).statistics(tokens).items():
        assert error(statistic_N, Pair(student[:, :-3], teacher[:, :-3]).statistics(tokens)[key]) < 1e-5, key


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_top_k_wider_than_what_can_be_said(kind, tail):
    """Fewer finite logits than k: the support reaches into -inf and the tail is empty."""
    student, teacher, tokens = logits(7, torch.float32)
    student[:, 4:], teacher[:, 4:] = -torch.inf, -torch.inf
    expected = per_token(Divergence(kind), student[:, :4], teacher[:, :4], tokens % 4)
    for top_k in (4, K):
        leaf = student.clone().requires_grad_()
        loss_N = per_token(Divergence(kind, "top_k", top_k=top_k, tail=tail), leaf, teacher, tokens % 4)
        loss_N.sum().backward()
        assert error(loss_N, expected) < 1e-5
        assert torch.isfinite(leaf.grad).all()
        assert (leaf.grad[:, 4:] == 0).all()


def test_tokens_that_one_side_cannot_say():
    student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, -torch.inf]])
    third = [1 / 3, 1 / 3, 1 / 3]
    half = [1 / 2, 1 / 2, 0]
    for kind, expected in (
        ("forward_kl", np.log(1.5)),
        ("jsd", divergence_of("jsd", 0.5, np.array(third), np.array(half))),
    ):
        leaf = student.clone().requires_grad_()
        loss_N = per_token(Divergence(kind), leaf, teacher, torch.tensor([0]))
        loss_N.sum().backward()
        assert abs(loss_N.item() - expected) < 1e-6
        assert leaf.grad[0, 2] > 0
        assert leaf.grad[0, 0] < 0
    leaf = student.clone().requires_grad_()
    loss_N = per_token(Divergence("reverse_kl"), leaf, teacher, torch.tensor([0]))
    loss_N.sum().backward()
    assert loss_N.item() > 1e30
    assert not leaf.grad.isnan().any()


@each_loss
def test_extreme_logits(loss):
    """Logits of +-1e4: one-hot distributions, with log-probabilities of -2e4 elsewhere."""
    student = torch.full((N, V), -1e4)
    teacher = torch.full((N, V), -1e4)
    student[range(N), range(N)] = 1e4
    teacher[range(N), [n if n % 2 else n + 1 for n in range(N)]] = 1e4
    teacher_d, student_d = teacher.double(), student.double()
    tokens = torch.arange(N)
    exact = student_d.clone().requires_grad_()
    expected = per_token(loss, exact, teacher_d, tokens)
    expected.sum().backward()
    leaf = student.clone().requires_grad_()
    loss_N = per_token(loss, leaf, teacher, tokens)
    loss_N.sum().backward()
    assert torch.isfinite(loss_N).all()
    assert torch.isfinite(leaf.grad).all()
    assert torch.allclose(loss_N.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.allclose(leaf.grad.double(), exact.grad, rtol=1e-6, atol=1e-6)
    if loss == Divergence("forward_kl"):
        assert torch.equal(loss_N, torch.tensor([2e4, 0.0] * (N // 2) + [2e4]))
    if loss == Divergence("jsd"):
        assert torch.allclose(loss_N, torch.tensor([np.log(2), 0.0] * (N // 2) + [np.log(2)], dtype=torch.float32))


def test_equal_distributions_have_no_divergence_and_no_gradient():
    student, _, tokens = logits(8, torch.float32)
    for loss in LOSSES[:10]:
        leaf = student.clone().requires_grad_()
        loss_N = per_token(loss, leaf, student + 3.0, tokens)
        loss_N.sum().backward()
        assert loss_N.abs().max() < 1e-5, loss
        assert leaf.grad.abs().max() < 1e-6, loss


# --- float32 against float64 ---


PRECISE = [
    *(Divergence(kind) for kind in ("forward_kl", "reverse_kl")),
    *(Divergence("jsd", weight=b) for b in (0.01, 0.1, 0.5, 0.9, 0.99)),
    *(
        Divergence(kind, "top_k", top_k=100, tail=tail)
        for kind in ("forward_kl", "reverse_kl")
        for tail in ("bucket", "renormalise")
    ),
    *(
        Divergence("jsd", "top_k", weight=b, top_k=100, tail=tail)
        for b in (0.01, 0.5, 0.99)
        for tail in ("bucket", "renormalise")
    ),
    Divergence("reverse_kl", "sampled"),
    Divergence("reverse_kl", "sampled", baseline=False),
    *(Divergence(kind, clip=0.005) for kind in ("forward_kl", "reverse_kl", "jsd")),
]


def by_autograd(loss: Divergence, student: Tensor, teacher: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = per_token(loss, leaf, teacher, tokens)
    value.sum().backward()
    return value.detach(), leaf.grad


def by_closed_form(loss: Divergence, student: Tensor, teacher: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    total, statistics = chunked_loss(
        loss,
        leaf,
        lambda x: x,
        [],
        tokens,
        torch.ones(len(tokens)),
        (teacher, lambda x: x),
        chunk_size=25,
        base=(teacher.flip(-1), lambda x: x),
    )
    total.backward()
    return statistics["loss"], leaf.grad


class Backwards(Divergence):
    """KL(p||q), whatever its kind."""

    def from_log_probs(self, log_p_NV, log_q_NV, tokens_N):
        return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


class Doubled(CrossEntropy):
    def from_log_probs(self, log_p_NV, log_q_NV, tokens_N):
        return 2 * super().from_log_probs(log_p_NV, log_q_NV, tokens_N)


@pytest.mark.parametrize(
    ("own", "same", "factor"),
    [
        (Backwards(), Divergence("reverse_kl"), 1),
        (Backwards(target=Target(0.5), pull=0.3), Divergence("reverse_kl", target=Target(0.5), pull=0.3), 1),
        (Doubled(), CrossEntropy(), 2),
    ],
    ids=["divergence", "with a target", "cross-entropy"],
)
def test_a_new_loss_is_what_is_learnt(own, same, factor):
    student, teacher, tokens = logits(8)
    (value, gradient), (expected, slope) = (by_closed_form(loss, student, teacher, tokens) for loss in (own, same))
    assert error(value, factor * expected) < 1e-12
    assert error(gradient, factor * slope) < 1e-12


@pytest.mark.parametrize("spread", [1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("loss", PRECISE, ids=name)
def test_float32_is_within_1e_6_of_float64(loss, spread):
    """Value and gradient, with the L2 norm over all tokens, however far student and teacher lie apart."""
    random = torch.Generator().manual_seed(0)
    student, teacher = (spread * torch.randn(64, 1031, generator=random) for _ in range(2))
    tokens = torch.multinomial(student.softmax(-1), 1, generator=random)[:, 0]
    value, gradient = by_autograd(loss, student.double(), teacher.double(), tokens)
    for found in (by_autograd, by_closed_form):
        value32, gradient32 = found(loss, student, teacher, tokens)
        assert value32.dtype == gradient32.dtype == torch.float32
        assert norm_error(value32, value) < 1e-6, found.__name__
        assert norm_error(gradient32, gradient) < 1e-6, found.__name__


@pytest.mark.parametrize("found", [by_autograd, by_closed_form])
@pytest.mark.parametrize("weight", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("gap", [5.0, 10.0, 30.0, 80.0])
def test_jsd_keeps_the_gradient_of_each_token_where_student_and_teacher_disagree(gap, weight, found):
    """Each is sure of a token to which the other gives next to nothing: the gradient is as small, and not lost."""
    student = torch.tensor([[gap, 0.0, 1.0, 2.0], [0.0, gap / 2, gap, 1.0]])
    teacher = torch.tensor([[0.0, gap, 2.0, 1.0], [gap, 1.0, -gap, 0.0]])
    loss, tokens = Divergence("jsd", weight=weight), torch.zeros(2, dtype=torch.long)
    _, expected = by_autograd(loss, student.double(), teacher.double(), tokens)
    _, gradient = found(loss, student, teacher, tokens)
    for mine, exact in zip(gradient, expected, strict=True):
        assert norm_error(mine, exact) < 1e-5


@pytest.mark.parametrize("found", [by_autograd, by_closed_form])
@pytest.mark.parametrize("weight", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("sure", [5.0, 10.0, 15.0])
def test_jsd_keeps_the_gradient_of_a_confident_student(sure, weight, found):
    """It is that of the unlikely tokens, many times smaller than the likeliest token's term."""
    student = torch.tensor([[sure, 0.0, 1.0, 2.0], [0.0, -1.0, sure, 0.5]])
    teacher = torch.tensor([[1.0, 0.0, 0.5, 0.2], [0.0, -1.5, sure / 2, 1.0]])
    loss, tokens = Divergence("jsd", weight=weight), torch.zeros(2, dtype=torch.long)
    _, expected = by_autograd(loss, student.double(), teacher.double(), tokens)
    _, gradient = found(loss, student, teacher, tokens)
    for mine, exact in zip(gradient, expected, strict=True):
        assert norm_error(mine, exact) < 1e-6


JSDS = [
    *(Divergence("jsd", weight=b) for b in (0.01, 0.1, 0.5, 0.9, 0.99)),
    *(
        Divergence("jsd", "top_k", weight=b, top_k=100, tail=tail)
        for b in (0.1, 0.9)
        for tail in ("bucket", "renormalise")
    ),
]


def from_rounded_log_probabilities(loss: Divergence, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient in float64 from the log-probabilities in float32, which are rounded again on a support."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    support = torch.arange(student.shape[-1]).expand_as(student)
    if loss.support == "top_k" and loss.tail == "renormalise":
        support = student.topk(loss.top_k).indices
        log_p, log_q = (x.gather(-1, support).log_softmax(-1) for x in (log_p, log_q))
        loss = Divergence("jsd", weight=loss.weight)
    leaf = log_p.double().requires_grad_()
    value = loss.from_log_probs(leaf, log_q.double(), torch.zeros(len(leaf), dtype=torch.long))
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    slope = slope - leaf.detach().exp() * slope.sum(-1, keepdim=True)
    return value, torch.zeros_like(student, dtype=torch.float64).scatter_(-1, support, slope)


@pytest.mark.parametrize("noise", [0.01, 0.1, 1.0, 8.0])
@pytest.mark.parametrize("spread", [1.0, 4.0, 8.0])
@pytest.mark.parametrize("loss", JSDS, ids=name)
def test_jsd_of_a_teacher_near_its_student_is_within_1e_6_of_float64(loss, spread, noise):
    """Or within three times what rounding the log-probabilities to float32 costs.

    The value is of second order in the difference, far below the logarithms that it is summed from.
    """
    random = torch.Generator().manual_seed(1)
    student = spread * torch.randn(64, 1031, generator=random)
    teacher = student + noise * torch.randn(64, 1031, generator=random)
    tokens = torch.zeros(64, dtype=torch.long)
    exact = by_autograd(loss, student.double(), teacher.double(), tokens)
    best = from_rounded_log_probabilities(loss, student, teacher)
    limits = [max(1e-6, 3 * norm_error(mine, x)) for mine, x in zip(best, exact, strict=True)]
    for found in (by_autograd, by_closed_form):
        for mine, x, limit in zip(found(loss, student, teacher, tokens), exact, limits, strict=True):
            assert norm_error(mine, x) < limit, found.__name__


@pytest.mark.parametrize("found", [by_autograd, by_closed_form])
@pytest.mark.parametrize("weight", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_jsd_of_equals_is_zero(spread, weight, found):
    logits_NV = spread * torch.randn(16, 1031, generator=torch.Generator().manual_seed(2))
    value, gradient = found(Divergence("jsd", weight=weight), logits_NV, logits_NV, torch.zeros(16, dtype=torch.long))
    assert (value == 0).all()
    assert (gradient == 0).all()


# --- the sampled token ---


@pytest.mark.parametrize(
    "baseline",
    [{"baseline": False}, {}, {"baseline_top_k": 1}, {"baseline_top_k": 4}, {"baseline_top_k": 2 * V}],
    ids=str,
)
def test_sampled_gradient_is_the_reverse_kl_gradient_in_expectation(baseline):
    student, teacher, _ = logits(9)
    p = torch.softmax(student, -1)
    loss = Divergence("reverse_kl", "sampled", **baseline)
    expected = np.array(
        [reference_gradient(LOSSES[1], s, t, 0) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    )
    mean = torch.zeros_like(student)
    for token in range(V):
        leaf = student.clone().requires_grad_()
        per_token(loss, leaf, teacher, torch.full((N,), token)).sum().backward()
        mean += p[:, token, None] * leaf.grad
    assert error(mean, expected) < 1e-8


def test_baseline_lowers_the_variance_of_the_gradient():
    student, teacher, _ = logits(10)
    p = torch.softmax(student, -1)

    def spread(baseline: bool) -> Tensor:
        """E|g|^2 over y ~ p, exactly: the mean of g is the same with and without."""
        loss = Divergence("reverse_kl", "sampled", baseline=baseline)
        total = torch.zeros(N, dtype=torch.float64)
        for token in range(V):
            leaf = student.clone().requires_grad_()
            per_token(loss, leaf, teacher, torch.full((N,), token)).sum().backward()
            total += p[:, token] * leaf.grad.square().sum(-1)
        return total

    assert spread(True).mean() < 0.8 * spread(False).mean()


# --- the clip of each vocabulary entry ---


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("support", ["full", "top_k"])
def test_a_clip_out_of_reach_changes_nothing(kind, support):
    student, teacher, tokens = logits(13)
    plain = Divergence(kind, support, top_k=K, weight=0.3)
    for clip in (1e9, float("inf")):
        found, expected = (
            by_autograd(x, student, teacher, tokens) for x in (dataclasses.replace(plain, clip=clip), plain)
        )
        assert all(error(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


def test_a_cut_entry_has_no_gradient_of_its_own():
    """KL(q||p) has the gradient p - q; without the cut entries, those of the others alone: p * sum q - q."""
    student, teacher, tokens = logits(14)
    p, q = student.softmax(-1), teacher.softmax(-1)
    kept = q * (q.log() - p.log()) < CLIP
    assert (~kept).any(-1).all()
    _, gradient = by_closed_form(Divergence(clip=CLIP), student, teacher, tokens)
    assert error(gradient, p * (q * kept).sum(-1, keepdim=True) - q * kept) < 1e-12


# --- statistics ---


def test_statistics_match_explicit_sums():
    student, teacher, tokens = logits(11, torch.float32)
    student.requires_grad_()
    found = Pair(student, teacher).statistics(tokens)
    assert set(found) == {"forward_kl", "reverse_kl", "entropy", "student_logp", "teacher_logp"}
    for n in range(N):
        p, q = (softmax(x[n].detach().double().numpy()) for x in (student, teacher))
        expected = {
            "forward_kl": kl(q, p),
            "reverse_kl": kl(p, q),
            "entropy": -(p * np.log(p)).sum(),
            "student_logp": np.log(p[tokens[n]]),
            "teacher_logp": np.log(q[tokens[n]]),
        }
        for key, value in expected.items():
            assert found[key][n].item() == pytest.approx(value, rel=1e-5), key
            assert not found[key].requires_grad
    assert set(Pair(student, None).statistics(tokens)) == {"entropy", "student_logp"}


# --- fused with the head ---


class Tied(nn.Module):
    """Hidden states from an embedding whose matrix is the head too, then a trainable layer in between."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.embedding_VD = nn.Parameter(torch.randn(V, D, generator=random, dtype=dtype))
        self.layer_DD = nn.Parameter(torch.randn(D, D, generator=random, dtype=dtype))
        self.rows: list[int] = []

    def hidden(self, ids_N: Tensor) -> Tensor:
        return torch.tanh(self.embedding_VD[ids_N] @ self.layer_DD)

    def head(self, hidden_ND: Tensor) -> Tensor:
        self.rows.append(len(hidden_ND))
        return hidden_ND @ self.embedding_VD.T


def batch(seed: int, size: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids, tokens = (torch.randint(V, (size,), generator=random) for _ in range(2))
    return ids, tokens, torch.rand(size, generator=random, dtype=dtype) / size


def gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters())))


@each_loss
@pytest.mark.parametrize("chunk_size", [1, 3, N, 100, None])
def test_chunked_equals_plain_autograd_with_a_tied_head(loss, chunk_size):
    student, teacher = Tied(0), Tied(1)
    ids, tokens, weights = batch(2)
    teacher_hidden = teacher.hidden(ids)
    plain_N = per_token(loss, student.head(student.hidden(ids)), teacher.head(teacher_hidden), tokens)
    plain = (weights * plain_N).sum()
    value, statistics = chunked_loss(
        loss,
        student.hidden(ids),
        student.head,
        [student.embedding_VD],
        tokens,
        weights,
        (teacher_hidden, teacher.head),
        chunk_size=chunk_size,
    )
    assert error(value, plain) < 1e-12
    assert error(statistics.pop("loss"), plain_N) < 1e-12
    expected = Pair(student.head(student.hidden(ids)), teacher.head(teacher_hidden)).statistics(tokens)
    assert set(statistics) == set(expected)
    for key in expected:
        assert error(statistics[key], expected[key]) < 1e-12
        assert not statistics[key].requires_grad
    for found, wanted in zip(gradients(3.0 * value, student), gradients(3.0 * plain, student), strict=True):
        assert error(found, wanted) < 1e-11
    assert all(parameter.grad is None for parameter in [*student.parameters(), *teacher.parameters()])


@each_loss
@pytest.mark.parametrize("chunk_size", [2, None])
def test_chunked_float32_matches_explicit_sums(loss, chunk_size):
    """The identity as head: logits in place of hidden states."""
    student, teacher, tokens = logits(12, torch.float32)
    weights = torch.rand(N, generator=torch.Generator().manual_seed(0)) / N
    value_N, gradient = references(loss, student, teacher, tokens)
    leaf = student.clone().requires_grad_()
    value, statistics = chunked_loss(
        loss, leaf, lambda x: x, [], tokens, weights, (teacher, lambda x: x), chunk_size=chunk_size
    )
    value.backward()
    assert error(statistics["loss"], value_N) < 1e-5
    assert error(value, (weights.numpy() * value_N).sum()) < 1e-5
    assert error(leaf.grad, weights.numpy()[:, None] * gradient) < 1e-5


def test_chunked_passes_only_the_gradients_that_are_asked_for():
    head = nn.Linear(D, V, dtype=torch.float64)
    ids, tokens, weights = batch(3)
    hidden = Tied(0).hidden(ids).detach()
    teacher_hidden = Tied(1).hidden(ids).detach()

    def run(hidden: Tensor) -> Tensor:
        return chunked_loss(
            Divergence(), hidden, head, list(head.parameters()), tokens, weights, (teacher_hidden, head), chunk_size=2
        )[0]

    def plain(hidden: Tensor) -> Tensor:
        return (weights * per_token(Divergence(), head(hidden), head(teacher_hidden), tokens)).sum()

    head.weight.requires_grad_(False)  # a frozen matrix, a trainable bias, fixed hidden states
    assert (
        error(torch.autograd.grad(run(hidden), head.bias)[0], torch.autograd.grad(plain(hidden), head.bias)[0]) < 1e-11
    )
    head.bias.requires_grad_(False)  # a frozen head, as under adapters
    leaf = hidden.clone().requires_grad_()
    assert error(torch.autograd.grad(run(leaf), leaf)[0], torch.autograd.grad(plain(leaf), leaf)[0]) < 1e-11
    assert not run(hidden).requires_grad
    head.requires_grad_(True)
    with torch.no_grad():
        without = run(leaf)
    assert not without.requires_grad
    assert error(without, plain(leaf)) < 1e-12


def test_chunked_forms_no_gradient_under_no_grad(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a gradient was formed")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    student = Tied(0)
    ids, tokens, weights = batch(4)
    with torch.no_grad():
        chunked_loss(CrossEntropy(), student.hidden(ids), student.head, [student.embedding_VD], tokens, weights)
    with pytest.raises(AssertionError, match="a gradient was formed"):
        chunked_loss(CrossEntropy(), student.hidden(ids), student.head, [student.embedding_VD], tokens, weights)


@each_loss
def test_chunked_without_tokens(loss):
    """A micro-batch that keeps nothing adds 0 to loss and gradients."""
    student = Tied(0)
    ids, tokens, weights = batch(5, size=0)
    hidden = student.hidden(ids)
    value, statistics = chunked_loss(
        loss, hidden, student.head, [student.embedding_VD], tokens, weights, (hidden.detach(), Tied(1).head)
    )
    assert value.item() == 0
    assert all(statistic.shape == (0,) for statistic in statistics.values())
    assert all((gradient == 0).all() for gradient in gradients(value, student))


def test_chunked_holds_logits_of_one_chunk_only():
    """Rows that the head sees, and every tensor that autograd keeps, during the call and until backward."""
    student, teacher = Tied(0), Tied(1)
    ids, tokens, weights = batch(6, size=1000)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    hidden, teacher_hidden = student.hidden(ids), teacher.hidden(ids).detach()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value, _ = chunked_loss(
            Divergence("jsd", "top_k", top_k=K),
            hidden,
            student.head,
            [student.embedding_VD],
            tokens,
            weights,
            (teacher_hidden, teacher.head),
            chunk_size=32,
        )
    calls = len(student.rows)
    value.backward()
    assert calls == len(teacher.rows) == 32  # 31 chunks of 32 and one of 8
    assert max(student.rows) == max(teacher.rows) == 32
    assert sum(student.rows) == sum(teacher.rows) == 1000
    assert len(student.rows) == calls, "backward ran the head again"
    assert max(sizes) == 1000 * D, "only the gradient of the hidden states is as long as the batch"
    assert 32 * V in sizes


def test_default_chunk_bounds_the_logits(monkeypatch):
    ids, tokens, weights = batch(7, size=50)
    monkeypatch.setattr(chunked, "CHUNK_TOKENS", 4)
    for limit, rows in ((10 * V + 1, 10), (V - 1, 4)):
        monkeypatch.setattr(chunked, "CHUNK_LOGITS", limit)
        student = Tied(0)
        chunked_loss(CrossEntropy(), student.hidden(ids), student.head, [student.embedding_VD], tokens, weights)
        assert max(student.rows) == rows


@pytest.mark.parametrize("micro_batches", [8, 2])
def test_accumulation_is_exact(micro_batches):
    student, teacher = Tied(0), Tied(1)
    ids, tokens, weights = batch(8, size=64)

    def run(part: slice) -> Tensor:
        return chunked_loss(
            Divergence(),
            student.hidden(ids[part]),
            student.head,
            [student.embedding_VD],
            tokens[part],
            weights[part],
            (teacher.hidden(ids[part]), teacher.head),
            chunk_size=5,
        )[0]

    step = 64 // micro_batches
    parts = [run(slice(start, start + step)) for start in range(0, 64, step)]
    whole = run(slice(None))
    assert error(sum(parts), whole) < 1e-12
    for part in parts:
        part.backward()
    for parameter, expected in zip(student.parameters(), gradients(whole, student), strict=True):
        assert error(parameter.grad, expected) < 1e-11


# --- lower precision ---


def exact_gradients(
    loss: Divergence, hidden: Tensor, head: Tensor, teacher_hidden: Tensor, tokens: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = (x.detach().double().requires_grad_() for x in (hidden, head))
    logits_NV, teacher_NV = hidden @ head.T, teacher_hidden.detach().double() @ head.detach().T
    value = (weights.double() * per_token(loss, logits_NV, teacher_NV, tokens)).sum()
    return value, *torch.autograd.grad(value, [hidden, head])


def norm_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


def test_bfloat16_head_gradient_is_summed_in_float32():
    random = torch.Generator().manual_seed(0)
    size = 600
    hidden = torch.randn(size, D, generator=random).bfloat16().requires_grad_()
    head = torch.randn(V, D, generator=random).bfloat16().requires_grad_()
    teacher_hidden = torch.randn(size, D, generator=random).bfloat16()
    tokens, weights = torch.randint(V, (size,), generator=random), torch.full((size,), 1 / size)
    value, statistics = chunked_loss(
        Divergence(),
        hidden,
        lambda x: x @ head.T,
        [head],
        tokens,
        weights,
        (teacher_hidden, lambda x: x @ head.T),
        chunk_size=1,
    )
    found = torch.autograd.grad(value, [hidden, head])
    exact_value, *exact = exact_gradients(Divergence(), hidden, head, teacher_hidden, tokens, weights)
    assert value.dtype == statistics["loss"].dtype == torch.float32
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16]
    assert error(value, exact_value) < 1e-2
    assert norm_error(found[0], exact[0]) < 1e-2
    assert norm_error(found[1], exact[1]) < 1e-2
    naive = torch.zeros_like(head)
    for n in range(size):
        row = slice(n, n + 1)
        naive += exact_gradients(Divergence(), hidden[row], head, teacher_hidden[row], tokens[row], weights[row])[
            2
        ].bfloat16()
    assert norm_error(naive, exact[1]) > 3 * norm_error(found[1], exact[1])


def test_float16_gradients_survive_small_weights_and_a_loss_scale():
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=random).half().requires_grad_()
    head = torch.randn(V, D, generator=random).half().requires_grad_()
    teacher_hidden = torch.randn(N, D, generator=random).half()
    tokens, weights = torch.randint(V, (N,), generator=random), torch.full((N,), 1e-6)
    value, _ = chunked_loss(
        Divergence(), hidden, lambda x: x @ head.T, [head], tokens, weights, (teacher_hidden, lambda x: x @ head.T)
    )
    found = torch.autograd.grad(65536 * value, [hidden, head])
    _, *exact = exact_gradients(Divergence(), hidden, head, teacher_hidden, tokens, weights)
    for gradient, expected in zip(found, exact, strict=True):
        assert norm_error(gradient, 65536 * expected) < 1e-2


def test_autocast():
    """bfloat16 matmuls around a float32 loss, with a live teacher that shares the head."""
    random = torch.Generator().manual_seed(0)
    head = nn.Linear(D, V)
    hidden = torch.randn(N, D, generator=random).requires_grad_()
    teacher_hidden = torch.randn(N, D, generator=random)
    tokens, weights = torch.randint(V, (N,), generator=random), torch.full((N,), 1 / N)

    def run() -> tuple[Tensor, ...]:
        value, statistics = chunked_loss(
            Divergence("reverse_kl"),
            hidden,
            head,
            list(head.parameters()),
            tokens,
            weights,
            (teacher_hidden, head),
            chunk_size=3,
        )
        assert statistics["loss"].dtype == torch.float32
        return value, *torch.autograd.grad(value, [hidden, head.weight, head.bias])

    exact = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run()
        logits_NV = head(hidden.detach())
        assert logits_NV.dtype == torch.bfloat16
        plain = (weights * per_token(Divergence("reverse_kl"), logits_NV, head(teacher_hidden), tokens)).sum()
    assert error(found[0], plain) < 1e-6  # nothing after the head is rounded to bfloat16
    for gradient, expected in zip(found[1:], exact[1:], strict=True):
        assert gradient.dtype == torch.float32
        assert norm_error(gradient, expected.double()) < 2e-2


# --- mistakes ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "kl"}, "divergence kind: found 'kl'; use one of forward_kl, reverse_kl, jsd"),
        ({"support": "half"}, "divergence support: found 'half'"),
        ({"tail": "drop"}, "divergence tail: found 'drop'"),
        ({"kind": "jsd", "weight": 0.0}, "divergence weight: found 0.0"),
        ({"kind": "jsd", "weight": 1.0}, "divergence weight: found 1.0"),
        ({"kind": "jsd", "weight": float("nan")}, "divergence weight: found nan"),
        ({"support": "top_k", "top_k": 0}, "divergence top_k: found 0"),
        ({"kind": "forward_kl", "support": "sampled"}, "'sampled' has no forward_kl form"),
        ({"kind": "jsd", "support": "sampled"}, "'sampled' has no jsd form"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        Divergence(**settings)
    assert "\n" not in str(caught.value)


def test_calls_that_make_no_sense():
    student = Tied(0)
    ids, tokens, weights = batch(9)
    call: Callable[..., object] = chunked_loss
    with pytest.raises(UserError, match="chunk_size: found 0"):
        call(CrossEntropy(), student.hidden(ids), student.head, [], tokens, weights, chunk_size=0)
    with pytest.raises(ValueError, match="needs the teacher's logits"):
        call(Divergence(), student.hidden(ids), student.head, [], tokens, weights)


@each_loss
def test_a_plain_head_gives_the_gradients_of_any_head(loss):
    """One float32 matrix product as head adds its gradients up without autograd."""
    generator = torch.Generator().manual_seed(3)
    head = torch.nn.Linear(D, V, bias=False)
    hidden, teacher = torch.randn(2, N, D, generator=generator)
    tokens = torch.randint(V, (N,), generator=generator)
    weights = torch.rand(N, generator=generator)
    found = []
    for student_head in (head, lambda x: torch.nn.functional.linear(x, head.weight)):
        leaf = hidden.clone().requires_grad_()
        head.weight.grad = None
        value, _ = chunked_loss(
            loss, leaf, student_head, [head.weight], tokens, weights, (teacher, student_head), chunk_size=3
        )
        (3 * value).backward()
        found.append((value.detach(), leaf.grad, head.weight.grad))
    for mine, expected in zip(*found, strict=True):
        assert error(mine, expected) < 1e-6


def test_a_plain_head_sums_in_float32_under_autocast():
    """Only the factors of its products are rounded: 4 in 1,000 at most, and nothing else of the process changes.

    On a CPU they are rounded to bfloat16 where it is fast, on a GPU to TF32, by the same switch.
    """
    generator = torch.Generator().manual_seed(4)
    head = torch.nn.Linear(64, 300, bias=False)
    hidden, teacher = torch.randn(2, 100, 64, generator=generator).bfloat16()
    tokens, weights = torch.arange(100), torch.rand(100, generator=generator)
    found, seen = [], []
    head.register_forward_hook(
        lambda _module, _inputs, logits: seen.append(
            (logits.dtype, torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)
        )
    )
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, True)):
        leaf = hidden.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value, statistics = chunked_loss(
                Divergence(), leaf, head, [head.weight], tokens, weights, (teacher.to(dtype), head)
            )
        assert torch.get_float32_matmul_precision() == precision
        assert seen[-1] == (torch.float32, *(("medium", True) if autocast else (precision, tf32)))
        head.weight.grad = None
        value.backward()
        assert statistics["reverse_kl"].dtype == head.weight.grad.dtype == torch.float32
        found.append((value.detach(), statistics["reverse_kl"], head.weight.grad, leaf.grad))
    for mine, expected in zip(*found, strict=True):
        assert norm_error(mine, expected.double()) < 8e-3


@each_loss
def test_a_bfloat16_head_gives_float32_logits(loss):
    """The products of bfloat16 numbers are exact in float32, so only the gradient handed back is rounded."""
    generator = torch.Generator().manual_seed(5)
    head = torch.nn.Linear(D, V, bias=False).bfloat16()
    hidden, teacher = torch.randn(2, N, D, generator=generator).bfloat16()
    tokens, weights = torch.randint(V, (N,), generator=generator), torch.rand(N, generator=generator)
    leaf = hidden.clone().requires_grad_()
    value, statistics = chunked_loss(loss, leaf, head, [head.weight], tokens, weights, (teacher, head), chunk_size=3)
    exact_value, *exact = exact_gradients(loss, hidden, head.weight, teacher, tokens, weights)
    assert value.dtype == statistics["loss"].dtype == torch.float32
    assert error(value, exact_value) < 1e-5
    value.backward()
    for gradient, expected in zip((leaf.grad, head.weight.grad), exact, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert norm_error(gradient, expected) < 4e-3


def test_a_bfloat16_head_is_cast_in_blocks(monkeypatch):
    monkeypatch.setattr("selfdistill.loss.chunked.CAST_WEIGHTS", 4 * D)
    test_a_bfloat16_head_gives_float32_logits(Divergence("forward_kl"))
