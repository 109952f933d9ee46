"""Rows and learning rate as functions of the step."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest

from selfdistill.config.train import TrainConfig
from selfdistill.training.schedule import examples_at, fewest_of_first, learning_rate, positions_of, steps_of


def drawn(rows: list[str], steps: range, batch_size: int, seed: int = 0) -> list[str]:
    return [row for step in steps for row in examples_at(rows, range(step * batch_size, (step + 1) * batch_size), seed)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 10])
def test_each_row_is_used_exactly_once_in_every_epoch_though_batches_run_across_epochs(batch_size: int) -> None:
    rows = list("abcdefg")
    sequence = drawn(rows, range(7), batch_size)  # 7 batches are a whole number of epochs
    assert len(sequence) == 7 * batch_size
    for epoch in range(batch_size):
        assert Counter(sequence[epoch * 7 : epoch * 7 + 7]) == Counter(rows), epoch


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    rows = list("abcdefghij")
    orders = [tuple(drawn(rows, range(epoch, epoch + 1), 10, seed)) for epoch in range(4) for seed in range(3)]
    assert len(set(orders)) == 12
    assert tuple(rows) not in orders


def test_seeds_of_any_size_have_an_order() -> None:
    seeds = [2**64 // 1_000_003 - 1, 2**64 // 1_000_003, 1_790_000_000_123_456_789, 2**64 + 1]
    orders = [tuple(drawn(list("abcdefghij"), range(epoch, epoch + 1), 10, seed)) for seed in seeds for epoch in (0, 1)]
    assert len(set(orders)) == 8


def test_a_batch_depends_on_its_step_and_seed_only() -> None:
    rows = list("abcde")
    forward = [examples_at(rows, range(step * 3, step * 3 + 3), 8) for step in range(6)]
    backward = [examples_at(rows, range(step * 3, step * 3 + 3), 8) for step in reversed(range(6))]
    assert forward == backward[::-1]


def test_a_set_smaller_than_a_batch_is_repeated_within_it() -> None:
    assert Counter(examples_at(["a", "b"], range(5), 0)) in (Counter("aaabb"), Counter("aabbb"))


@pytest.mark.parametrize("share", [0.5, 1 - 0.8, 1 - 0.9])
def test_an_epoch_has_no_step_too_many_where_the_tasks_share_is_rounded(
    settings: Callable[..., TrainConfig], share: float
) -> None:
    config = settings(max_steps=None, num_train_epochs=1, batch_size=10)
    assert steps_of(config, 100, share) == round(10 / share)


def test_warm_up_climbs_in_a_line_and_the_cosine_falls_to_the_closed_form() -> None:
    rates = [learning_rate(s, peak=2.0, max_steps=100, warmup_steps=4, kind="cosine") for s in range(100)]
    assert rates[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert rates[4] == 2.0
    assert rates[4 + 48] == pytest.approx(1.0)  # half way down
    assert rates[4 + 32] == pytest.approx(1.0 + math.cos(math.pi / 3))
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.01


def test_constant_stays_at_the_peak_after_the_warm_up() -> None:
    rates = [learning_rate(s, peak=3.0, max_steps=20, warmup_steps=2, kind="constant") for s in range(20)]
    assert rates == pytest.approx([1.0, 2.0, *[3.0] * 18])


def test_the_warm_up_takes_at_most_a_tenth_of_all_steps() -> None:
    rates = [learning_rate(s, peak=1.0, max_steps=30, warmup_steps=10, kind="constant") for s in range(5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert learning_rate(0, peak=1.0, max_steps=1, warmup_steps=10, kind="cosine") == 1.0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.28, 0.5, 0.7])
@pytest.mark.parametrize("batch_size", [8, 20, 25, 32])
def test_the_fewest_of_the_first_part_are_those_of_some_step(batch_size: int, share: float) -> None:
    shares = [1 - share, share]
    counts = {len(positions_of(shares, step, batch_size, seed=0, unit=1)[0]) for step in range(100)}
    assert min(counts) == fewest_of_first(shares, batch_size, unit=1)
