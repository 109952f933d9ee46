"""Targets other than the teacher, and the pull to the base, against plain float64 code.

Dimensions in names: N tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import per_token
from torch import Tensor

from selfdistill.errors import UserError
from selfdistill.loss import Divergence, ProximalTarget, Target, chunked_loss, top_k_entropy

N, V, D = 40, 31, 6


def kl(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    return (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(-1)


def by_bisection(log_p_NV: Tensor, log_q_NV: Tensor, share: float, steps: int = 60) -> Tensor:
    """The target as the definition has it: the smallest l with E[log q - log p] >= share * KL(q||p)."""
    gap_NV = log_q_NV - log_p_NV
    wanted_N = share * kl(log_q_NV, log_p_NV)
    low_N, high_N = torch.zeros(len(wanted_N), dtype=torch.float64), torch.ones(len(wanted_N), dtype=torch.float64)

    def mixture(l_N: Tensor) -> Tensor:
        return ((1 - l_N)[:, None] * log_p_NV + l_N[:, None] * log_q_NV).log_softmax(-1)

    for _ in range(steps):
        middle_N = (low_N + high_N) / 2
        too_low_N = (mixture(middle_N).exp() * gap_NV).sum(-1) < wanted_N
        low_N, high_N = torch.where(too_low_N, middle_N, low_N), torch.where(too_low_N, high_N, middle_N)
    return mixture(high_N)


def log_probs(seed: int, spread: float, rows: int = N) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(rows, V, generator=random, dtype=torch.float64)).log_softmax(-1)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7, 0.999, 1.0])
@pytest.mark.parametrize("spreads", [(0.1, 0.1), (1, 1), (1, 6), (6, 1), (6, 6), (0.1, 20), (20, 0.1), (20, 20)])
def test_the_target_is_what_bisection_finds(share, spreads):
    log_p, log_q = (log_probs(seed, spread) for seed, spread in enumerate(spreads))
    expected = by_bisection(log_p, log_q, share)
    found = ProximalTarget(share).log_probs(log_q, log_p, None)
    assert (found.exp() - expected.exp()).abs().max() < 1e-6
    rounded = ProximalTarget(share).log_probs(log_q.float(), log_p.float(), None)
    assert rounded.dtype == torch.float32
    assert (rounded.exp() - expected.exp()).abs().max() < (2e-4 if max(spreads) > 6 else 1e-5)


def test_the_target_at_share_1_is_the_teacher_and_nearer_to_the_student_below():
    log_p, log_q = log_probs(2, 2.0), log_probs(3, 3.0)
    assert torch.allclose(ProximalTarget(1.0).log_probs(log_q, log_p, None), log_q, atol=1e-9)
    away = [kl(ProximalTarget(share).log_probs(log_q, log_p, None), log_p) for share in (0.0, 0.3, 0.6, 1.0)]
    assert all((nearer < further).all() for nearer, further in itertools.pairwise(away))
    assert (away[0] > 0).all()  # share 0 is not the student


def test_the_target_of_equals_is_the_same():
    log_p = log_probs(4, 2.0).float()
    assert torch.allclose(ProximalTarget(0.25).log_probs(log_p, log_p, None), log_p, atol=1e-6)


def test_tokens_that_one_side_cannot_say_have_no_part_in_the_target():
    logits, banned = torch.tensor([[0.0, 1.0, 2.0, 0.5]] * 2), torch.tensor([[3], [0]])
    teacher = torch.tensor([[2.0, 0.0, 1.0, 0.3]] * 2).scatter(1, banned, -torch.inf)
    tokens, loss = torch.zeros(2, dtype=torch.long), Divergence(target=ProximalTarget(0.5))
    value, _ = chunked_loss(loss, logits, lambda x: x, [], tokens, torch.ones(2), (teacher, lambda x: x))
    assert value.isfinite()
    log_p, log_q = logits.log_softmax(-1), teacher.log_softmax(-1).clamp(min=-1e30)
    assert (ProximalTarget(0.5).log_probs(log_q, log_p, None).exp().gather(1, banned) == 0).all()


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_out_of_range(share):
    with pytest.raises(UserError, match=rf"^target share: found {share}; use a number from 0 to 1$"):
        ProximalTarget(share)


# --- through the loss ---


def inputs() -> tuple[torch.nn.Linear, Tensor, Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(6)
        head = torch.nn.Linear(D, V, bias=False, dtype=torch.float64)
    hidden, teacher, base = (2 * torch.randn(N, D, generator=random, dtype=torch.float64) for _ in range(3))
    tokens, weights = torch.randint(V, (N,), generator=random), torch.rand(N, generator=random, dtype=torch.float64)
    return head, hidden, teacher, base, tokens, weights


@pytest.mark.parametrize("chunk_size", [1, 7, None])
@pytest.mark.parametrize("pull", [0.0, 0.3])
@pytest.mark.parametrize("target", [None, Target(0.7, 0.4, 0.2), ProximalTarget(0.4)], ids=str)
@pytest.mark.parametrize(
    "plain",
    [
        Divergence(),
        Divergence("reverse_kl"),
        Divergence("jsd", weight=0.3),
        Divergence("jsd", "top_k", top_k=5),
        Divergence("forward_kl", clip=0.02),
        Divergence("reverse_kl", "sampled"),
    ],
    ids=["forward_kl", "reverse_kl", "jsd", "top_k", "clip", "sampled"],
)
def test_loss_and_gradient_of_a_target_and_a_pull(plain, target, pull, chunk_size):
    head, hidden, teacher, base, tokens, weights = inputs()
    loss = replace(plain, target=target, pull=pull)
    assert loss.needs_base == (pull > 0 or isinstance(target, Target))
    hidden.requires_grad_()
    value, found = chunked_loss(
        loss,
        hidden,
        head,
        [head.weight],
        tokens,
        weights,
        (teacher, head),
        chunk_size=chunk_size,
        base=(base, head) if loss.needs_base else None,
    )
    gradients = torch.autograd.grad(value, [hidden, head.weight])

    log_p, log_q, log_base = head(hidden).log_softmax(-1), head(teacher).log_softmax(-1), head(base).log_softmax(-1)
    log_q, log_base = log_q.detach(), log_base.detach()
    aim = log_q
    if isinstance(target, Target):
        aim = (0.7 * log_q + 0.4 * log_p.detach() + 0.2 * log_base).log_softmax(-1)
    if isinstance(target, ProximalTarget):
        aim = by_bisection(log_p.detach(), log_q, 0.4)
    value_N = per_token(plain, log_p, aim, tokens) + pull * kl(log_base, log_p)
    expected = (value_N * weights).sum()
    assert torch.allclose(found["loss"], value_N.detach(), atol=1e-7)
    assert torch.allclose(found["forward_kl"], kl(log_q, log_p).detach(), atol=1e-12)  # of the teacher itself
    for mine, exact in zip(gradients, torch.autograd.grad(expected, [hidden, head.weight]), strict=True):
        assert torch.allclose(mine, exact, atol=1e-6)


# --- the entropy of the top k ---


def test_entropy_of_the_top_k():
    log_p = log_probs(7, 3.0)
    for k in (2, 5, V, 2 * V):
        top = log_p.exp().sort(dim=-1, descending=True).values[:, :k]
        top = top / top.sum(-1, keepdim=True)
        expected = -(top * top.log()).sum(-1) / torch.tensor(float(min(k, V))).log()
        assert torch.allclose(top_k_entropy(log_p, k), expected, atol=1e-7)
    assert torch.allclose(top_k_entropy(torch.zeros(3, V).log_softmax(-1), 20), torch.ones(3), atol=1e-6)
    assert all(top_k_entropy(torch.zeros(1, k).log_softmax(-1), k).item() <= 1 for k in range(2, 30))
    sure = torch.tensor([[0.0, -torch.inf, -torch.inf]]).clamp(min=-1e30)
    assert top_k_entropy(sure, 2).item() == 0
