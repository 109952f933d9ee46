"""Uncertainty of results: confidence intervals, paired tests, pass@k, and the power of a test set.

Intervals are 95%; tests are two-sided. SciPy, which takes half a second, is imported by the functions that need it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

CONFIDENCE = 0.95
RESAMPLES = 10_000
"""Number of bootstrap samples. The seed is fixed, so the same items give the same interval."""

Interval = tuple[float, float]


def share_interval(right: int, items: int) -> Interval:
    """Confidence interval of a proportion: Wilson's score interval.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the American
    Statistical Association 22 (1927) 209-212. Unlike the normal approximation, it is valid for few items and for
    proportions of 0 or 1.
    """
    from scipy import stats

    low, high = stats.binomtest(right, items).proportion_ci(CONFIDENCE, method="wilson")
    return float(low), float(high)


def mean_interval(*groups: Sequence[float]) -> Interval:
    """Confidence interval of a mean of shares: percentile bootstrap (Efron 1979) with ``RESAMPLES`` samples of items.

    For several groups: the interval of the mean of their means, with each group resampled separately.

    Resampling n equal shares v is degenerate. Other shares may still be as frequent as u, Wilson's upper bound for 0 of
    n items, and lie from 0 to 1. So the interval of such a group is v - u v to v + u (1 - v): for 0 and 1 Wilson's. If
    there is one among several groups, the groups' own intervals are combined: G. Y. Zou, W. Huang and X. Zhang, "A note
    on confidence interval estimation for a linear function of binomial proportions", Computational Statistics & Data
    Analysis 53 (2009) 1080-1085.
    """
    return _interval(groups, 0.0)


def difference_interval(*groups: Sequence[float]) -> Interval:
    """The same for a mean of paired differences of shares, which lie from -1 to 1."""
    return _interval(groups, -1.0)


def _interval(groups: Sequence[Sequence[float]], least: float) -> Interval:
    """The interval of the mean of the groups' means, whose items lie from ``least`` to 1."""
    if not any(map(_agree, groups)):
        return _bootstrap(*groups)
    own = [_interval_of_equals(group, least) if _agree(group) else _bootstrap(group) for group in groups]
    if len(own) == 1:
        return own[0]
    means = [float(numpy.mean(group)) for group in groups]
    below = math.hypot(*(mean - low for mean, (low, _) in zip(means, own, strict=True)))
    above = math.hypot(*(high - mean for mean, (_, high) in zip(means, own, strict=True)))
    return (sum(means) - below) / len(means), (sum(means) + above) / len(means)


def _agree(values: Sequence[float]) -> bool:
    """Whether all values are equal, up to rounding."""
    return float(numpy.ptp(numpy.asarray(values, dtype=float))) < 1e-9


def _interval_of_equals(group: Sequence[float], least: float) -> Interval:
    value, others = float(group[0]), share_interval(0, len(group))[1]
    return value - others * (value - least), value + others * (1 - value)


def _bootstrap(*groups: Sequence[float]) -> Interval:
    from scipy import stats

    found = stats.bootstrap(
        [numpy.asarray(group, dtype=float) for group in groups],
        lambda *parts, axis: sum(part.mean(axis=axis) for part in parts) / len(parts),
        n_resamples=RESAMPLES,
        batch=100,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=0,
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def seeds_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean over seeds and its Student's t interval; bounds are None for a single seed.

    Seeds with equal values, up to rounding, give both bounds equal to the mean. Student's t knows nothing then, as the
    spread of further seeds cannot be estimated: such an interval is no evidence.
    """
    from scipy import stats

    mean = float(numpy.mean(values))
    if len(values) < 2:
        return mean, None, None
    if _agree(values):
        return mean, mean, mean
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Paired:
    """Two models on the same items."""

    difference: float
    """Mean of the second minus mean of the first."""
    low: float
    high: float
    """Interval of the difference: Newcombe's if all scores are 0 or 1, else bootstrap over items."""
    p: float
    """p-value under the null hypothesis of no difference: McNemar's exact test if all scores are 0 or 1, else
    :func:`sign_test`."""
    unlike: float
    """Share of items on which the two differ."""


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare two models item by item.

    Args:
        first: the first model's score on each item, 0 or 1, or a share such as pass@k.
        second: the second model's scores, in the same order.
    """
    from scipy import stats

    a, b = numpy.asarray(first, dtype=float), numpy.asarray(second, dtype=float)
    assert a.shape == b.shape, "paired scores need the same items"
    differences = b - a
    unlike = float((differences != 0).mean())
    if not numpy.isin((a, b), (0, 1)).all():
        low, high = difference_interval(differences.tolist())
        return Paired(float(differences.mean()), low, high, sign_test(differences.tolist()), unlike)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    low, high = _newcombe(int((a * b).sum()), worse, better, len(a))
    return Paired(float(differences.mean()), low, high, p, unlike)


def _newcombe(both: int, first: int, second: int, items: int) -> Interval:
    """Interval of the difference of two paired proportions, second minus first: method 10 of R. G. Newcombe, "Improved
    confidence intervals for the difference between binomial proportions based on paired data", Statistics in Medicine
    17 (1998) 2635-2650.

    Args:
        both: items that both answer correctly.
        first: items that only the first answers correctly.
        second: items that only the second answers correctly.
        items: all items.
    """
    neither = items - both - first - second
    p1, p2 = (both + first) / items, (both + second) / items
    (low1, high1), (low2, high2) = share_interval(both + first, items), share_interval(both + second, items)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    product = float(both * neither - first * second)
    product = max(product - items / 2, 0) if product > 0 else product  # continuity correction
    phi = product / math.sqrt(margins) if margins else 0.0

    def reach(x: float, y: float) -> float:
        return math.sqrt(x * x - 2 * phi * x * y + y * y)

    difference = p2 - p1
    return difference - reach(p2 - low2, high1 - p1), difference + reach(high2 - p2, p1 - low1)


def sign_test(values: Sequence[float]) -> float:
    """p-value of the mean under random sign flips of the values.

    Exact over all sign patterns if there are at most ``RESAMPLES``; else over that many random ones.
    """
    from scipy import stats

    if len(values) == 1:  # both signs are as extreme
        return 1.0
    found = stats.permutation_test(
        (numpy.asarray(values, dtype=float),),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=100,
        vectorized=True,
        rng=0,
    )
    return float(found.pvalue)


def smallest_difference(items: int, unlike: float = 0.5) -> float | None:
    """Smallest true difference between two models that a paired test on this many items detects about 3 times in 4.

    d with sqrt(items) d = z(.975) sqrt(unlike) + z(.8) sqrt(unlike - d^2): the normal approximation of McNemar's test
    for a power of 0.8 (R. J. Connor, Biometrics 43, 1987, 207-211). The exact test has a power of 0.73 to 0.78 with 20
    to 200 items. None if not even the largest possible difference, ``unlike``, is detected, or if there are fewer than
    6 items, in which the exact test finds nothing.

    Args:
        items: questions that both models answer.
        unlike: share of items on which one is correct and the other is not. 0.5, for two unrelated models at one half,
            is the least favourable likely value.
    """
    from scipy import optimize, stats

    z_level, z_power = stats.norm.ppf((1 + CONFIDENCE) / 2), stats.norm.ppf(0.8)

    def lacking(d: float) -> float:
        return float(z_level * math.sqrt(unlike) + z_power * math.sqrt(max(unlike - d * d, 0)) - math.sqrt(items) * d)

    return None if items < 6 or lacking(unlike) > 0 else float(optimize.brentq(lacking, 0.0, unlike))


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Probability that at least one of k samples is correct: the unbiased estimate 1 - C(n-c, k) / C(n, k).

    M. Chen et al., "Evaluating large language models trained on code" (arXiv 2107.03374), equation 1.

    Args:
        right: c, number of correct samples.
        samples: n, number of samples, at least k.
        k: samples considered.
    """
    assert 1 <= k <= samples
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
