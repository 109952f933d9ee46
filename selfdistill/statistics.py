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
    """Confidence interval of a mean over items: percentile bootstrap (Efron 1979) of ``RESAMPLES`` samples.

    Of several groups it is that of the mean of their means, each group resampled on its own.
    """
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
    """Interval of the difference: bootstrap over items."""
    p: float
    """Probability of a difference at least as large if neither were better: McNemar's exact test where every item is
    right or wrong, a test by random signs otherwise."""


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare two models item by item.

    Args:
        first: score of each item, 0 or 1, or a share such as pass@k.
        second: the other model's, in the same order.
    """
    a, b = numpy.asarray(first, dtype=float), numpy.asarray(second, dtype=float)
    assert a.shape == b.shape, "paired scores are of the same items"
    differences = b - a
    low, high = mean_interval(differences.tolist())
    if numpy.isin(differences, (-1, 0, 1)).all():
        better, worse = int((differences > 0).sum()), int((differences < 0).sum())
        p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    else:
        flips = stats.permutation_test(
            (b, a),
            lambda x, y, axis: (x - y).mean(axis=axis),
            permutation_type="samples",
            n_resamples=RESAMPLES,
            batch=100,
            rng=0,
        )
        p = float(flips.pvalue)
    return Paired(float(differences.mean()), low, high, p)


def smallest_difference(items: int, unlike: float = 0.5) -> float:
    """Smallest true difference between two models that a paired test on so many items finds 4 times in 5.

    d with sqrt(items) d = z(.975) sqrt(unlike) + z(.8) sqrt(unlike - d^2): the normal approximation of McNemar's test
    (R. J. Connor, Biometrics 43, 1987, 207-211). 1.0 where even the largest difference is not found.

    Args:
        items: questions that both answer.
        unlike: share of items on which one is right and the other wrong. 0.5, two unrelated models at one half, is the
            least favourable that is likely.
    """
    z_level, z_power = stats.norm.ppf((1 + CONFIDENCE) / 2), stats.norm.ppf(0.8)

    def lacking(d: float) -> float:
        return float(z_level * math.sqrt(unlike) + z_power * math.sqrt(max(unlike - d * d, 0)) - math.sqrt(items) * d)

    largest = min(unlike, 1.0)
    return 1.0 if lacking(largest) > 0 else float(optimize.brentq(lacking, 0.0, largest))


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Probability that at least one of k samples is right: the unbiased estimate 1 - C(n-c, k) / C(n, k).

    M. Chen et al., "Evaluating large language models trained on code" (arXiv 2107.03374), equation 1.

    Args:
        right: c, samples that are right.
        samples: n, at least k.
    """
    assert 1 <= k <= samples
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
