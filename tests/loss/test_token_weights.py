"""Masks and weights against sums written out by hand. Dimensions in names: B batch, T completion tokens."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import per_token
from torch import Tensor

from selfdistill.errors import UserError
from selfdistill.loss.chunked import chunked_loss
from selfdistill.loss.divergence import Divergence
from selfdistill.loss.token_weights import check_skip, completion_mask, importance_weights, token_weights

LENGTHS = [5, 2, 0, 8, 3, 1, 8, 4]


def test_completion_mask():
    expected = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    assert torch.equal(completion_mask([2, 0, 3], 3), expected)
    assert torch.equal(completion_mask(torch.tensor([2, 0, 3]), 3), expected)


@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("normalisation", ["sequence", "token"])
def test_token_weights(skip, normalisation):
    found = token_weights(completion_mask(LENGTHS, 8), skip_first_tokens=skip, normalisation=normalisation)
    kept = [max(0, length - skip) for length in LENGTHS]
    sequences = sum(k > 0 for k in kept)
    for b, length in enumerate(LENGTHS):
        for t in range(8):
            expected = 0.0
            if skip <= t < length:
                expected = 1 / sum(kept) if normalisation == "token" else 1 / (kept[b] * sequences)
            assert found[b, t].item() == pytest.approx(expected, rel=1e-6), (b, t)
    assert found.dtype == torch.float32
    assert found.sum().item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
def test_nothing_kept_weighs_nothing(normalisation):
    found = token_weights(completion_mask([2, 3, 0], 4), skip_first_tokens=3, normalisation=normalisation)
    assert torch.equal(found, torch.zeros(3, 4))


def test_skip_counts_completion_tokens_not_positions():
    mask = torch.tensor([[False, False, True, True, True], [True, True, True, False, False]])
    found = token_weights(mask, skip_first_tokens=2, normalisation="token")
    assert torch.equal(found, torch.tensor([[0, 0, 0, 0, 0.5], [0, 0, 0.5, 0, 0]]) * 1.0)


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("normalisation", ["sequence", "token"])
def test_eight_batches_of_one_equal_one_batch_of_eight(normalisation, skip):
    """Value and gradient, through the fused head, with sequences that keep nothing among them."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 8, 6, generator=random, dtype=torch.float64)
    teacher_hidden = torch.randn(8, 8, 6, generator=random, dtype=torch.float64)
    tokens = torch.randint(11, (8, 8), generator=random)
    teacher_head = torch.nn.Linear(6, 11, dtype=torch.float64)
    head = torch.nn.Linear(6, 11, dtype=torch.float64)
    weights = token_weights(completion_mask(LENGTHS, 8), skip_first_tokens=skip, normalisation=normalisation)

    def run(rows: slice) -> Tensor:
        kept = weights[rows] > 0
        return chunked_loss(
            Divergence(),
            hidden[rows][kept],
            head,
            list(head.parameters()),
            tokens[rows][kept],
            weights[rows][kept],
            (teacher_hidden[rows][kept], teacher_head),
            chunk_size=4,
        )[0]

    # By hand: the mean that the name promises, of losses over full logits.
    loss = per_token(Divergence(), head(hidden), teacher_head(teacher_hidden), tokens)
    kept = [loss[b, skip:length] for b, length in enumerate(LENGTHS) if length > skip]
    mean = torch.cat(kept).mean() if normalisation == "token" else torch.stack([x.mean() for x in kept]).mean()
    expected = torch.autograd.grad(mean, list(head.parameters()))

    for parts in ([slice(None)], [slice(b, b + 1) for b in range(8)], [slice(0, 3), slice(3, 8)]):
        head.zero_grad()
        total = 0.0
        for rows in parts:
            value = run(rows)
            value.backward()
            total += value.item()
        assert total == pytest.approx(mean.item(), rel=1e-6)  # weights are float32
        for parameter, gradient in zip(head.parameters(), expected, strict=True):
            assert (parameter.grad - gradient).abs().max() < 1e-6 * gradient.abs().max()


def test_importance_weights():
    student = torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -0.1, -torch.inf], [0.0, 0.0, 0.0]], requires_grad=True)
    sampler = torch.tensor([[-1.5, -1.0, -3.0], [-1.0, -4.0, -torch.inf], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
    found = importance_weights(student, sampler, mask, cap=2.0)
    assert found.tolist() == pytest.approx([(math.exp(0.5) + math.exp(-1) + 2) / 3, (1 + 2) / 2, 1.0], rel=1e-6)
    assert not found.requires_grad
    uncapped = importance_weights(student, sampler, mask, cap=100.0)
    assert uncapped[0].item() == pytest.approx((math.exp(0.5) + math.exp(-1) + math.exp(2)) / 3, rel=1e-6)
    assert importance_weights(student.detach().bfloat16(), sampler, mask, cap=2.0).dtype == torch.float32


@pytest.mark.parametrize(
    ("skip", "lengths"),
    [
        (3, [6, 6, 6]),  # exactly half of the tokens
        (3, [3, 3, 100, 100]),  # exactly half of the completions
        (0, [1, 1]),
        (3, []),
        (3, [0, 0, 0, 50]),  # empty completions have nothing to mask
    ],
)
def test_a_skip_that_leaves_enough(skip, lengths):
    check_skip(skip, lengths)


@pytest.mark.parametrize(
    ("skip", "lengths", "numbers", "largest"),
    [
        (3, [5, 5, 5], "mask 9 of 15 completion tokens and all of 0 of 3 completions", 2),
        (3, [2, 3, 100], "mask 8 of 105 completion tokens and all of 2 of 3 completions", 2),
        (3, [1, 1, 1, 0], "mask 3 of 3 completion tokens and all of 3 of 3 completions", 0),
        (10**9, [40, 40], "mask 80 of 80 completion tokens and all of 2 of 2 completions", 20),
    ],
)
def test_a_skip_that_masks_too_much(skip, lengths, numbers, largest):
    with pytest.raises(UserError) as caught:
        check_skip(skip, lengths)
    message = str(caught.value)
    assert message.startswith(f"skip_first_tokens: {skip} would {numbers}")
    assert f"set it to at most {largest}" in message
    assert "\n" not in message
    check_skip(largest, lengths)
    with pytest.raises(UserError):
        check_skip(largest + 1, lengths)
