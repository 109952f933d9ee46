"""Intervals, tests and pass@k against published numbers, enumeration and simulation."""

from __future__ import annotations

from itertools import combinations, product
from math import comb

import numpy
import pytest

from selfdistill.evaluation.statistics import (
    difference_interval,
    mean_interval,
    paired,
    pass_at_k,
    seeds_interval,
    share_interval,
    smallest_difference,
)


@pytest.mark.parametrize(
    ("right", "items", "low", "high"), [(8, 10, 0.490, 0.943), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0)]
)
def test_share_interval_is_wilsons(right: int, items: int, low: float, high: float) -> None:
    assert share_interval(right, items) == pytest.approx((low, high), abs=5e-4)


@pytest.mark.parametrize(("right", "samples", "k"), [(0, 5, 2), (1, 5, 1), (2, 6, 3), (5, 6, 2), (6, 6, 6), (1, 6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(right: int, samples: int, k: int) -> None:
    outcomes = [i < right for i in range(samples)]
    subsets = [any(chosen) for chosen in combinations(outcomes, k)]
    assert pass_at_k(right, samples, k) == pytest.approx(sum(subsets) / len(subsets))


def test_pass_at_k_has_no_bias() -> None:
    share, samples, k = 0.3, 4, 2
    expected = sum(
        share ** sum(drawn) * (1 - share) ** (samples - sum(drawn)) * pass_at_k(sum(drawn), samples, k)
        for drawn in product((0, 1), repeat=samples)
    )
    assert expected == pytest.approx(1 - (1 - share) ** k)


def test_mean_interval_is_near_the_normal_one_and_covers() -> None:
    generator = numpy.random.default_rng(1)
    values = generator.normal(size=400)
    low, high = mean_interval(values.tolist())
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)
    covered = 0
    for _ in range(100):
        low, high = mean_interval(generator.exponential(size=60).tolist())
        covered += low <= 1 <= high
    assert 86 <= covered <= 99
    assert mean_interval([0.0] * 10) == share_interval(0, 10)  # nothing to resample
    assert mean_interval([1.0] * 10) == pytest.approx(share_interval(10, 10))
    assert difference_interval([0] * 10) == (-share_interval(0, 10)[1], share_interval(0, 10)[1])
    assert difference_interval([1, 0, -1, 0] * 9)[0] < 0 < difference_interval([1, 0, -1, 0] * 9)[1]


def test_mean_interval_of_groups_resamples_each_on_its_own() -> None:
    generator = numpy.random.default_rng(2)
    a, b = generator.normal(0, 1, 200), generator.normal(1, 3, 50)
    low, high = mean_interval(a.tolist(), b.tolist())
    half = 1.96 * (a.var() / 200 + b.var() / 50) ** 0.5 / 2
    middle = (a.mean() + b.mean()) / 2
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=0.03)


@pytest.mark.parametrize(
    ("found", "least", "most"),
    [
        (mean_interval([True] * 10, [False] * 10), 0.5, 0.5),
        (mean_interval([0.5] * 20), 0.5, 0.5),
        (mean_interval([0.25]), 0.25, 0.25),
        (mean_interval([0.1 + 0.2, 0.3]), 0.3, 0.3),
        (mean_interval([1] * 30, [1, 0] * 15), 0.70, 0.75),
        (difference_interval([0] * 3, [0] * 3, [-1] * 3), -0.34, -0.33),
        (difference_interval([0.5] * 4), 0.5, 0.5),
    ],
)
def test_equal_items_leave_an_interval(found: tuple[float, float], least: float, most: float) -> None:
    assert found[0] < least - 0.05
    assert found[1] > most + 0.05
    assert -1 <= found[0] < found[1] <= 1


def test_the_interval_of_nearly_equal_groups_covers() -> None:
    generator = numpy.random.default_rng(5)
    covered = 0
    for _ in range(100):
        groups = [(generator.random(20) < share).astype(float).tolist() for share in (0.99, 0.98, 0.03)]
        low, high = mean_interval(*groups)
        covered += low <= 2 / 3 <= high
    assert covered >= 90


def test_seeds_interval_is_students() -> None:
    mean, low, high = seeds_interval([0.5, 0.6, 0.7])
    half = 4.302653 * 0.1 / 3**0.5  # t(.975) with two degrees of freedom
    assert (mean, low, high) == pytest.approx((0.6, 0.6 - half, 0.6 + half))
    assert seeds_interval([0.5]) == (0.5, None, None)
    mean, low, high = seeds_interval([0.8 - 0.7, 0.9 - 0.8, 0.1])  # equal up to rounding
    assert mean == low == high == pytest.approx(0.1)


def test_right_and_wrong_items_are_compared_by_mcnemars_exact_test() -> None:
    first = [1] * 10 + [0] * 10 + [1, 0] * 5
    second = [1] * 10 + [1] * 8 + [0] * 2 + [0, 0] * 5
    found = paired(first, second)  # 8 became right, 5 wrong
    expected = 2 * sum(comb(13, i) for i in range(6)) / 2**13
    assert found.p == pytest.approx(expected)
    assert found.difference == pytest.approx(3 / 30)
    assert found.low < found.difference < found.high
    assert found.unlike == pytest.approx(13 / 30)
    same = paired([1, 0], [1, 0])
    assert (same.difference, same.p, same.unlike) == (0, 1, 0)
    assert paired([0] * 5, [1] * 5).low < 0.5  # five items are few, however clear


@pytest.mark.parametrize(
    ("both", "first", "second", "neither"), [(0.6, 0.05, 0.1, 0.25), (0.02, 0.01, 0.05, 0.92), (0.3, 0.2, 0.2, 0.3)]
)
def test_the_interval_of_a_paired_difference_covers(both: float, first: float, second: float, neither: float) -> None:
    generator = numpy.random.default_rng(4)
    covered = 0
    for counts in generator.multinomial(60, [both, first, second, neither], size=300):
        a = numpy.repeat([1, 1, 0, 0], counts)
        b = numpy.repeat([1, 0, 1, 0], counts)
        found = paired(a.tolist(), b.tolist())
        covered += found.low <= second - first <= found.high
    assert 0.92 <= covered / 300 <= 0.99


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((36, 12, 2, 0), -0.3404, -0.0569),
        ((20, 12, 2, 16), -0.3292, -0.0562),
        ((59, 6, 16, 80), 0.0046, 0.1186),
        ((43, 0, 0, 7), -0.0638, 0.0638),
    ],
)
def test_the_interval_of_a_paired_difference_is_newcombes(
    counts: tuple[int, int, int, int], low: float, high: float
) -> None:
    """Numbers by the formula as R's biostatUZH has it in confIntPairedProportion, which subtracts the second."""
    found = paired(numpy.repeat([1, 1, 0, 0], counts).tolist(), numpy.repeat([1, 0, 1, 0], counts).tolist())
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_shares_are_compared_by_random_signs() -> None:
    first, second = [0.25, 0.5, 0.0, 0.75, 0.5, 0.25], [0.5, 0.75, 0.5, 0.5, 0.75, 1.0]
    differences = [b - a for a, b in zip(first, second, strict=True)]
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in product((-1, 1), repeat=6)]
    expected = sum(abs(s) >= abs(sum(differences)) - 1e-12 for s in sums) / 64
    assert paired(first, second).p == pytest.approx(expected)
    assert paired([0.25], [0.5]).p == 1  # a single item: both signs are as extreme


def test_smallest_difference_is_found_three_times_in_four() -> None:
    items, unlike = 200, 0.5
    difference = smallest_difference(items)
    assert difference is not None
    generator = numpy.random.default_rng(3)
    shares = [(unlike + difference) / 2, (unlike - difference) / 2, 1 - unlike]
    found = 0
    for better, worse, _ in generator.multinomial(items, shares, size=400):
        found += paired([0] * better + [1] * worse, [1] * better + [0] * worse).p < 0.05
    assert found / 400 == pytest.approx(0.76, abs=0.06)
    assert smallest_difference(5) is smallest_difference(5, 1.0) is smallest_difference(1000, 0.003) is None
    assert smallest_difference(90, 0.1) < smallest_difference(90)
