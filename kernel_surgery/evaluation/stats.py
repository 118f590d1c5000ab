"""What a difference is worth: intervals and exact tests for paired right/wrong answers, and the words they allow.

The same problems are put to the original and to the edited model, so differences are paired: only the problems on
which the two disagree (the discordant pairs) say anything about a change. With b gained and c lost of n problems:

    delta        (b - c) / n
    p            exact McNemar: b ~ Binomial(b + c, 1/2) if the edit changed nothing; with b + c = 0 it is 1
    interval     Newcombe's square-and-add of two Wilson intervals (1998b, method 10), not a bootstrap: resampling a
                 set without discordant pairs returns [0, 0], a certainty that n problems cannot give
    correction   Holm over all comparisons of a run
    pooled       over languages, a problem and its translations are one cluster: bootstrap of the problems for the
                 interval, widened where few problems moved; sign flips of whole problems for the test
                 (`clustered_difference`)
    equivalence  two one-sided tests: the interval of 1 - 2 alpha (alpha divided by the comparisons) lies within the
                 margin on both sides (`equivalent`)

`verdict` turns them into words, and it alone does: "improved" and "worse" need the interval and the corrected test.
"No difference shown" is not "no difference"; `smallest_shown` says what n problems could have shown at best, and only
`equivalent` says that a difference, if there is one, is small.

Newcombe, R. G. (1998a), Statistics in Medicine 17:857-872 (Wilson); (1998b) 17:2635-2650 (paired).
Holm, S. (1979), Scandinavian Journal of Statistics 6:65-70.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernel_surgery.common.errors import KernelSurgeryError


def restricted_mean(values: Sequence[float | None], budget: float) -> float | None:
    """Mean over all problems of min(value, budget), a miss (None) counting as the budget; None for no values.

    The restricted mean time to the answer: a mean over the solved alone would reward failing at what takes long.
    """
    if not values:
        return None
    return sum(budget if v is None else min(v, budget) for v in values) / len(values)


@dataclass(frozen=True)
class PairedDifference:
    """Edited minus original on the same n problems.

    delta: difference of the two accuracies, None where n is 0.
    ci95: 95% interval of delta (Newcombe 1998b, method 10); (-1, 1) where n is 0.
    mcnemar_p: exact two-sided p, before any correction; 1 where no pair is discordant.
    gained, lost: discordant pairs (only the edited model right; only the original right).
    """

    n: int
    delta: float | None
    ci95: tuple[float, float]
    mcnemar_p: float
    gained: int
    lost: int


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a rate, 95% by default; (0, 1) where n is 0, because nothing was learned.

    Raises ValueError unless 0 <= correct <= n.
    """
    if not 0 <= correct <= n:
        raise KernelSurgeryError(f"cannot give an interval for {correct} correct of {n}: it takes 0 <= correct <= n.")
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence_level=confidence, method="wilson")
    # At the ends the exact bound is the end itself; rounding may leave it 1e-17 away.
    return (0.0 if correct == 0 else float(interval.low)), (1.0 if correct == n else float(interval.high))


def mcnemar_exact(b: int, c: int) -> float:
    """Exact two-sided McNemar p of b and c discordant pairs; 1 where there are none (no evidence either way).

    Raises ValueError for a negative count.
    """
    if b < 0 or c < 0:
        raise KernelSurgeryError(f"cannot test {b} and {c} discordant pairs: counts are not negative.")
    if b + c == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(b, b + c, 0.5).pvalue)


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given: each p times the tests not yet rejected, at most 1.

    Raises ValueError for a value outside [0, 1], NaN included.
    """
    for place, p in enumerate(pvalues):
        if not 0 <= p <= 1:
            raise KernelSurgeryError(f"cannot correct p-value number {place}: got {p}, it takes a number from 0 to 1.")
    adjusted, largest = [0.0] * len(pvalues), 0.0
    for rank, place in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        # Never below the adjusted value of a smaller p: a test is rejected only if those before it were.
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[place]))
        adjusted[place] = largest
    return adjusted


def newcombe_paired(both: int, gained: int, lost: int, neither: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of (gained - lost) / n for paired proportions, 95% by default (Newcombe 1998b, method 10); (-1, 1) for
    n = 0.

    Two Wilson intervals, combined with the correlation phi of the pairs (corrected by n/2 towards 0).
    Raises ValueError for a negative count.
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
    agreement = both * neither - gained * lost
    if agreement > 0:
        agreement = max(agreement - n / 2, 0)
    margins = edited * (n - edited) * original * (n - original)
    phi = agreement / math.sqrt(margins) if margins else 0.0
    return _square_and_add(edited / n, (edited_low, edited_high), original / n, (original_low, original_high), phi)


def _square_and_add(
    one: float, one_ends: tuple[float, float], other: float, other_ends: tuple[float, float], phi: float
) -> tuple[float, float]:
    """Newcombe's interval of one - other from the interval of each and their correlation phi; within (-1, 1)."""

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    low = one - other - distance(one - one_ends[0], other_ends[1] - other)
    high = one - other + distance(one_ends[1] - one, other - other_ends[0])
    return max(-1.0, low), min(1.0, high)


def paired_difference(original: Sequence[bool], edited: Sequence[bool]) -> PairedDifference:
    """Compare right and wrong answers [n] of two models to the same problems, in the same order.

    Raises ValueError where the lengths differ.
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
    """Edited minus original over problems asked in several languages, a problem being one cluster.

    delta: mean over problems of the mean over languages. ci95: bootstrap of the problems, 10,000 times, percentiles,
    and no narrower than `gains_and_losses`.
    p: exact or Monte Carlo two-sided test that flips the sign of whole problems. moved: problems that differ at all.
    """

    n: int
    delta: float | None
    ci95: tuple[float, float]
    p: float
    moved: int


def gains_and_losses(means: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of n values in [-1, 1], 95% by default, that stays honest where few of them are not 0.

    What was gained and what was lost, each a rate with a Wilson interval (with n over sum x^2 / sum x trials, a rate of
    values below 1 varying so much less), put together by Newcombe's square-and-add; a value is never both, which is
    their correlation. Where all or none moved a bootstrap gives a single point, this does not.
    """
    n = len(means)
    if not n:
        return -1.0, 1.0
    rates, ends = [], []
    for part in ([max(m, 0.0) for m in means], [max(-m, 0.0) for m in means]):
        total = sum(part)
        trials = n * total / sum(x * x for x in part) if total else n
        rates.append(total / n)
        ends.append(_wilson_of(total / n, trials, confidence))
    gain, loss = rates
    spread = (1 - gain) * (1 - loss)
    phi = -math.sqrt(gain * loss / spread) if spread > 0 else 0.0
    return _square_and_add(gain, ends[0], loss, ends[1], phi)


def _wilson_of(rate: float, trials: float, confidence: float) -> tuple[float, float]:
    """Wilson's interval of a rate in a number of trials that need not be whole."""
    from scipy.stats import norm

    z = float(norm.ppf(0.5 + confidence / 2))
    middle = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def clustered_difference(differences: Sequence[Sequence[int]], resamples: int = 10_000) -> ClusteredDifference:
    """differences [problems][languages]: 1 gained, -1 lost, 0 the same. Seeded: the same figures every time.

    Where few problems moved, resampling gives an interval that is too narrow (of none [0, 0], of one an end at 0), a
    certainty that n problems cannot give: it is never narrower than `gains_and_losses`. Raises ValueError for rows of
    different lengths.
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
    # Problems that did not move contribute nothing under any sign. One that did is as likely to have gone either way.
    signed, p = means[means != 0], 1.0
    if len(signed) > 1:
        p = float(min(1.0, permutation_test((signed,), np.sum, permutation_type="samples", **options).pvalue))
    ends = min(float(interval.low), floor[0]), max(float(interval.high), floor[1])
    return ClusteredDifference(n, float(means.mean()), ends, p, moved)


def mean_difference(differences: Sequence[float], resamples: int = 10_000) -> dict:
    """{"n", "mean_difference", "ci95"} of paired differences: bootstrap of the pairs, percentiles, seeded.

    ci95 is None for fewer than two pairs, or where all are equal: resampling says nothing about those.
    """
    from scipy.stats import bootstrap

    n, values = len(differences), np.asarray(differences, dtype=float)
    found = {"n": n, "mean_difference": float(values.mean()) if n else None, "ci95": None}
    if n < 2 or np.ptp(values) == 0:
        return found
    options = {"n_resamples": resamples, "vectorized": True, "rng": np.random.default_rng(0), "method": "percentile"}
    interval = bootstrap((values,), np.mean, **options).confidence_interval
    return found | {"ci95": [float(interval.low), float(interval.high)]}


def equivalent(
    both: int, gained: int, lost: int, neither: int, margin: float, comparisons: int = 1, alpha: float = 0.05
) -> bool:
    """Whether the accuracies differ by less than `margin` either way: both one-sided tests at alpha / comparisons.

    Raises ValueError for a margin that is not positive.
    """
    if not margin > 0:
        raise KernelSurgeryError(f"an equivalence test needs a positive margin, got {margin}.")
    low, high = newcombe_paired(both, gained, lost, neither, confidence=1 - 2 * alpha / comparisons)
    return -margin < low and high < margin


def verdict(delta: float | None, ci: Sequence[float], holm_p: float, n: int, alpha: float = 0.05) -> str:
    """The words that the numbers allow: "improved", "worse", or "no difference shown (n=...)".

    A direction needs both: the interval `ci` (low, high) excludes 0 on the side of `delta`, and `holm_p` < `alpha`.
    """
    low, high = ci
    if delta is not None and holm_p < alpha:
        if delta > 0 and low > 0:
            return "improved"
        if delta < 0 and high < 0:
            return "worse"
    return f"no difference shown (n={n})"


def smallest_shown(n: int, alpha: float = 0.05, comparisons: int = 1) -> float | None:
    """The smallest |delta| that n problems can show: every discordant pair goes one way, and p survives Holm.

    m one-sided discordant pairs have p = 2^(1-m), which the first of `comparisons` tests must bring below
    alpha / comparisons. None where even m = n does not. With alpha = 0.05 and one comparison m is 6: a difference
    of 5 problems of 20 cannot be told from chance, whatever its direction.
    Raises ValueError for an alpha outside (0, 1) or less than one comparison.
    """
    if not 0 < alpha < 1 or comparisons < 1:
        raise KernelSurgeryError(
            f"alpha={alpha} and comparisons={comparisons}: it takes 0 < alpha < 1 and at least one."
        )
    needed = 1
    while 2.0 ** (1 - needed) >= alpha / comparisons:
        needed += 1
    return needed / n if needed <= n else None
