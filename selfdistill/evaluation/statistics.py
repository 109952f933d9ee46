"""How sure a number is: intervals, paired tests, pass@k, and what a set of items is able to show.

Intervals are of 95%, tests are two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from scipy import optimize, stats

CONFIDENCE = 0.95
RESAMPLES = 10_000
"""Bootstrap samples; their seed is fixed, so the same items give the same interval."""

Interval = tuple[float, float]


def share_interval(right: int, items: int) -> Interval:
    """Confidence interval of a share: Wilson's score interval.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the American
    Statistical Association 22 (1927) 209-212. Unlike the normal approximation it holds for few items and shares of 0
    or 1.
    """
    low, high = stats.binomtest(right, items).proportion_ci(CONFIDENCE, method="wilson")
    return float(low), float(high)


def mean_interval(*groups: Sequence[float]) -> Interval:
    """Confidence interval of a mean of shares: percentile bootstrap (Efron 1979) of ``RESAMPLES`` samples of the items.

    Of several groups it is that of the mean of their means, each group resampled on its own. Where all items are 0, or
    all 1, nothing can be resampled, and it is Wilson's.
    """
    everything = numpy.concatenate([numpy.asarray(group, dtype=float) for group in groups])
    if numpy.ptp(everything) == 0 and everything[0] in (0, 1):
        return share_interval(int(everything.sum()), len(everything))
    return _bootstrap(*groups)


def difference_interval(*groups: Sequence[float]) -> Interval:
    """The same of a mean of paired differences; where no item differs, as far to both sides as Wilson's for none."""
    if not any(map(any, groups)):
        high = share_interval(0, sum(map(len, groups)))[1]
        return -high, high
    return _bootstrap(*groups)


def _bootstrap(*groups: Sequence[float]) -> Interval:
    # scipy wants two items; one item twice varies as little as one.
    samples = [numpy.resize(numpy.asarray(group, dtype=float), max(len(group), 2)) for group in groups]
    found = stats.bootstrap(
        samples,
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
    """Mean over seeds and its interval by Student's t; no bounds for a single seed, of which nothing can be said."""
    mean = float(numpy.mean(values))
    if len(values) < 2:
        return mean, None, None
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Paired:
    """Two models on the same items."""

    difference: float
    """Mean of the second minus mean of the first."""
    low: float
    high: float
    """Interval of the difference: Newcombe's where every item is right or wrong, bootstrap over items otherwise."""
    p: float
    """Probability of a difference at least as large if neither were better: McNemar's exact test where every item is
    right or wrong, :func:`sign_test` otherwise."""
    unlike: float
    """Share of items on which the two differ."""


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare two models item by item.

    Args:
        first: score of each item, 0 or 1, or a share such as pass@k.
        second: the other model's, in the same order.
    """
    a, b = numpy.asarray(first, dtype=float), numpy.asarray(second, dtype=float)
    assert a.shape == b.shape, "paired scores are of the same items"
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
    """Interval of the difference of two paired shares, second less first: method 10 of R. G. Newcombe, "Improved
    confidence intervals for the difference between binomial proportions based on paired data", Statistics in Medicine
    17 (1998) 2635-2650.

    Args:
        both: items that both have right.
        first: items that only the first has right.
        second: items that only the second has right.
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
    """Probability of a mean at least as far from 0 if every value were as likely to have the other sign.

    All signs are tried where there are at most ``RESAMPLES`` ways, else so many are drawn.
    """
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
    """Smallest true difference between two models that a paired test on so many items finds about 3 times in 4.

    d with sqrt(items) d = z(.975) sqrt(unlike) + z(.8) sqrt(unlike - d^2): the normal approximation of McNemar's test
    for a power of 0.8 (R. J. Connor, Biometrics 43, 1987, 207-211), of which the exact test keeps 0.73 to 0.78 with 20
    to 200 items. None where even the largest difference, ``unlike``, is not found.

    Args:
        items: questions that both answer.
        unlike: share of items on which one is right and the other wrong. 0.5, two unrelated models at one half, is the
            least favourable that is likely.
    """
    z_level, z_power = stats.norm.ppf((1 + CONFIDENCE) / 2), stats.norm.ppf(0.8)

    def lacking(d: float) -> float:
        return float(z_level * math.sqrt(unlike) + z_power * math.sqrt(max(unlike - d * d, 0)) - math.sqrt(items) * d)

    return None if lacking(unlike) > 0 else float(optimize.brentq(lacking, 0.0, unlike))


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Probability that at least one of k samples is right: the unbiased estimate 1 - C(n-c, k) / C(n, k).

    M. Chen et al., "Evaluating large language models trained on code" (arXiv 2107.03374), equation 1.

    Args:
        right: c, samples that are right.
        samples: n, at least k.
    """
    assert 1 <= k <= samples
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
