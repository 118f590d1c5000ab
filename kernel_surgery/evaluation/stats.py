"""Intervals and exact tests for paired right/wrong answers, and the words that they allow.

The original and the edited model answer the same problems, so the differences are paired. Only the problems on which
the two disagree (the discordant pairs) carry information about a change. With b gained and c lost of n problems:

    delta        (b - c) / n
    p            exact McNemar test: b ~ Binomial(b + c, 1/2) if the edit changed nothing; p = 1 if b + c = 0
    interval     Newcombe's square-and-add of two Wilson intervals (1998b, method 10). A bootstrap is not used: without
                 discordant pairs it would return [0, 0], a certainty that n problems cannot give
    correction   Holm, over all comparisons of a run
    pooled       over languages, with a problem and its translations as one cluster. The interval is a bootstrap over
                 problems, widened if few problems changed. The test flips the signs of whole problems
                 (`clustered_difference`)
    equivalence  two one-sided tests (Schuirmann 1987): the interval at level 1 - 2 alpha lies within the margin on both
                 sides, with alpha divided by the number of comparisons (`equivalent`)

Only `verdict` turns numbers into words. "improved" and "worse" need both the interval and the corrected test. "No
difference shown" does not mean "no difference": `smallest_shown` says which difference n problems could have shown at
best. Only `equivalent` can say that a difference, if there is one, is small.

Newcombe, R. G. (1998a), Statistics in Medicine 17:857-872 (Wilson); (1998b) 17:2635-2650 (paired).
Holm, S. (1979), Scandinavian Journal of Statistics 6:65-70.
Schuirmann, D. J. (1987), Journal of Pharmacokinetics and Biopharmaceutics 15:657-680.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernel_surgery.common.errors import KernelSurgeryError


def restricted_mean(values: Sequence[float | None], budget: float) -> float | None:
    """Return the mean over all problems of min(value, budget), where None (not solved) counts as the budget.

    This is the restricted mean time to the answer. A mean over the solved problems alone would reward failing at the
    problems that take long. Returns None for no values.
    """
    if not values:
        return None
    return sum(budget if v is None else min(v, budget) for v in values) / len(values)


@dataclass(frozen=True)
class PairedDifference:
    """Edited minus original on the same n problems.

    delta: difference of the two accuracies; None if n is 0.
    ci95: 95% interval of delta (Newcombe 1998b, method 10); (-1, 1) if n is 0.
    mcnemar_p: exact two-sided p, before any correction; 1 without discordant pairs.
    gained: problems that only the edited model solved. lost: problems that only the original solved.
    """

    n: int
    delta: float | None
    ci95: tuple[float, float]
    mcnemar_p: float
    gained: int
    lost: int


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a rate (Newcombe 1998a), by default at 95%.

    It is (0, 1) if n is 0, because nothing is known then. Raises KernelSurgeryError unless 0 <= correct <= n.
    """
    if not 0 <= correct <= n:
        raise KernelSurgeryError(f"cannot give an interval for {correct} correct of {n}: it takes 0 <= correct <= n.")
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence_level=confidence, method="wilson")
    # At 0 and n correct the exact bound is 0 or 1, but rounding may leave it 1e-17 away.
    return (0.0 if correct == 0 else float(interval.low)), (1.0 if correct == n else float(interval.high))


def mcnemar_exact(b: int, c: int) -> float:
    """Return the exact two-sided McNemar p for b and c discordant pairs.

    It is 1 without discordant pairs, which give no evidence either way. Raises KernelSurgeryError for a negative count.
    """
    if b < 0 or c < 0:
        raise KernelSurgeryError(f"cannot test {b} and {c} discordant pairs: counts are not negative.")
    if b + c == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(b, b + c, 0.5).pvalue)


def holm(pvalues: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values, in the order given (Holm 1979).

    Each p is multiplied by the number of tests that are not yet rejected, and limited to 1. Raises KernelSurgeryError
    for a value outside [0, 1], including NaN.
    """
    for place, p in enumerate(pvalues):
        if not 0 <= p <= 1:
            raise KernelSurgeryError(f"cannot correct p-value number {place}: got {p}, it takes a number from 0 to 1.")
    adjusted, largest = [0.0] * len(pvalues), 0.0
    for rank, place in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        # Keep the values monotone: a test is rejected only if all tests with a smaller p were rejected.
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[place]))
        adjusted[place] = largest
    return adjusted


def newcombe_paired(both: int, gained: int, lost: int, neither: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of (gained - lost) / n for paired proportions, by default at 95%.

    Method 10 of Newcombe (1998b): two Wilson intervals, combined with the correlation phi of the pairs, which is
    corrected by n/2 towards 0. It is (-1, 1) if n is 0. Raises KernelSurgeryError for a negative count.
    """
    if min(both, gained, lost, neither) < 0:
        raise KernelSurgeryError(
            f"cannot give an interval for {(both, gained, lost, neither)}: counts are not negative."
        )
    n = both + gained + lost + neither
    if n == 0:
        return -1.0, 1.0
    edited, original = both + gained, both + lost
    edited_low, edited_high = wilson(edited, n, confidence)
    original_low, original_high = wilson(original, n, confidence)
    agreement: float = both * neither - gained * lost
    if agreement > 0:
        agreement = max(agreement - n / 2, 0)
    margins = edited * (n - edited) * original * (n - original)
    phi = agreement / math.sqrt(margins) if margins else 0.0
    return _square_and_add(edited / n, (edited_low, edited_high), original / n, (original_low, original_high), phi)


def _square_and_add(
    one: float, one_ends: tuple[float, float], other: float, other_ends: tuple[float, float], phi: float
) -> tuple[float, float]:
    """Return Newcombe's interval of one - other, limited to (-1, 1).

    one_ends, other_ends: the interval of each. phi: their correlation.
    """

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    low = one - other - distance(one - one_ends[0], other_ends[1] - other)
    high = one - other + distance(one_ends[1] - one, other - other_ends[0])
    return max(-1.0, low), min(1.0, high)


def paired_difference(original: Sequence[bool], edited: Sequence[bool]) -> PairedDifference:
    """Compare the right and wrong answers [n] of two models to the same problems, in the same order.

    Raises KernelSurgeryError if the lengths differ.
    """
    if len(original) != len(edited):
        raise KernelSurgeryError(
            f"cannot pair {len(original)} answers of the original with {len(edited)} of the edited model: "
            "give both the same problems, in the same order."
        )
    n = len(original)
    gained = sum(bool(e) and not o for o, e in zip(original, edited, strict=True))
    lost = sum(bool(o) and not e for o, e in zip(original, edited, strict=True))
    both = sum(bool(o) and bool(e) for o, e in zip(original, edited, strict=True))
    return PairedDifference(
        n=n,
        delta=(gained - lost) / n if n else None,
        ci95=newcombe_paired(both, gained, lost, n - gained - lost - both),
        mcnemar_p=mcnemar_exact(gained, lost),
        gained=gained,
        lost=lost,
    )


@dataclass(frozen=True)
class ClusteredDifference:
    """Edited minus original over problems asked in several languages, with each problem as one cluster.

    n: number of problems.
    delta: mean over problems of the mean over languages; None if n is 0.
    ci95: percentile bootstrap over the problems (10,000 resamples), at least as wide as `gains_and_losses`.
    p: two-sided test that flips the sign of whole problems, exact or by Monte Carlo.
    moved: problems whose answers changed in any language.
    """

    n: int
    delta: float | None
    ci95: tuple[float, float]
    p: float
    moved: int


def gains_and_losses(means: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return an interval of the mean of n values in [-1, 1] that is still valid if few of them are not 0.

    The gains and the losses are two rates, each with a Wilson interval. Values below 1 vary less, so a rate counts as n
    over (sum x^2 / sum x) trials. Newcombe's square-and-add combines the two. Their correlation follows from the fact
    that a value is never both a gain and a loss. If all values changed, or none, a bootstrap would give a single point;
    this does not. Returns (-1, 1) for no values. The default level is 95%.
    """
    n = len(means)
    if not n:
        return -1.0, 1.0
    rates, ends = [], []
    for values in ([max(m, 0.0) for m in means], [max(-m, 0.0) for m in means]):
        total = sum(values)
        trials = n * total / sum(x * x for x in values) if total else n
        rates.append(total / n)
        ends.append(_wilson_of(total / n, trials, confidence))
    gain, loss = rates
    spread = (1 - gain) * (1 - loss)
    phi = -math.sqrt(gain * loss / spread) if spread > 0 else 0.0
    return _square_and_add(gain, ends[0], loss, ends[1], phi)


def _wilson_of(rate: float, trials: float, confidence: float) -> tuple[float, float]:
    """Return Wilson's interval of a rate. The number of trials need not be an integer."""
    from scipy.stats import norm

    z = float(norm.ppf(0.5 + confidence / 2))
    middle = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def clustered_difference(differences: Sequence[Sequence[int]], resamples: int = 10_000) -> ClusteredDifference:
    """Pool paired differences over languages, with each problem as one cluster.

    differences: [problems][languages], 1 for gained, -1 for lost, 0 for no change.
    resamples: of the bootstrap, and of the test if it cannot be exact. Both are seeded, so the figures are
    reproducible.

    If few problems changed, a bootstrap interval is too narrow: [0, 0] if none did, and one end at 0 if one did. So the
    interval is never narrower than `gains_and_losses`.

    Uses scipy.stats.bootstrap and scipy.stats.permutation_test. Raises KernelSurgeryError for rows of different
    lengths.
    """
    from scipy.stats import bootstrap, permutation_test

    if len({len(row) for row in differences}) > 1:
        raise KernelSurgeryError("cannot pool languages that were asked different numbers of problems.")
    n = len(differences)
    means = np.array([sum(row) / len(row) for row in differences])
    moved = sum(any(row) for row in differences)
    floor = gains_and_losses(means.tolist())
    if not np.any(means):
        return ClusteredDifference(n, 0.0 if n else None, floor, 1.0, moved)
    options = {"n_resamples": resamples, "vectorized": True, "rng": np.random.default_rng(0)}
    interval = bootstrap((means,), np.mean, method="percentile", **options).confidence_interval
    # Problems that did not change contribute nothing under any sign. With one that did, both signs are equally likely.
    signed, p = means[means != 0], 1.0
    if len(signed) > 1:
        p = float(min(1.0, permutation_test((signed,), np.sum, permutation_type="samples", **options).pvalue))
    ends = min(float(interval.low), floor[0]), max(float(interval.high), floor[1])
    return ClusteredDifference(n, float(means.mean()), ends, p, moved)


def mean_difference(differences: Sequence[float], resamples: int = 10_000) -> dict:
    """Return {"n", "mean_difference", "ci95"} of paired differences.

    ci95 is a seeded percentile bootstrap over the pairs (scipy.stats.bootstrap). It is None for fewer than two pairs,
    or if all are equal, because resampling says nothing then.
    """
    from scipy.stats import bootstrap

    n, values = len(differences), np.asarray(differences, dtype=float)
    summary = {"n": n, "mean_difference": float(values.mean()) if n else None, "ci95": None}
    if n < 2 or np.ptp(values) == 0:
        return summary
    options = {"n_resamples": resamples, "vectorized": True, "rng": np.random.default_rng(0), "method": "percentile"}
    interval = bootstrap((values,), np.mean, **options).confidence_interval
    return summary | {"ci95": [float(interval.low), float(interval.high)]}


def equivalent(
    both: int, gained: int, lost: int, neither: int, margin: float, comparisons: int = 1, alpha: float = 0.05
) -> bool:
    """Return whether the accuracies differ by less than `margin` in both directions.

    Two one-sided tests, each at alpha / comparisons, with the interval of `newcombe_paired`. Raises KernelSurgeryError
    for a margin that is not positive.
    """
    if not margin > 0:
        raise KernelSurgeryError(f"an equivalence test needs a positive margin, got {margin}.")
    low, high = newcombe_paired(both, gained, lost, neither, confidence=1 - 2 * alpha / comparisons)
    return -margin < low and high < margin


def verdict(delta: float | None, ci: Sequence[float], holm_p: float, n: int, alpha: float = 0.05) -> str:
    """Return the words that the numbers allow: "improved", "worse", or "no difference shown (n=...)".

    A direction needs two things: the interval `ci` (low, high) excludes 0 on the side of `delta`, and `holm_p` <
    `alpha`.
    """
    low, high = ci
    if delta is not None and holm_p < alpha:
        if delta > 0 and low > 0:
            return "improved"
        if delta < 0 and high < 0:
            return "worse"
    return f"no difference shown (n={n})"


def smallest_shown(n: int, alpha: float = 0.05, comparisons: int = 1) -> float | None:
    """Return the smallest |delta| that n problems can show, or None if they can show no difference.

    At best every discordant pair goes the same way. m such pairs have p = 2^(1-m). The first of `comparisons` tests
    must bring that below alpha / comparisons. With alpha = 0.05 and one comparison m is 6, so a difference of 5
    problems out of 20 is indistinguishable from chance.

    Raises KernelSurgeryError for an alpha outside (0, 1) or for less than one comparison.
    """
    if not 0 < alpha < 1 or comparisons < 1:
        raise KernelSurgeryError(
            f"alpha={alpha} and comparisons={comparisons}: it takes 0 < alpha < 1 and at least one."
        )
    needed = 1
    while 2.0 ** (1 - needed) >= alpha / comparisons:
        needed += 1
    return needed / n if needed <= n else None
