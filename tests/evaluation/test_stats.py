"""What a difference is worth: worked examples from the literature, theorems, and the words that follow."""

import functools
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_surgery.evaluation import summary
from kernel_surgery.evaluation.judging import score
from kernel_surgery.evaluation.stats import (
    PairedDifference,
    clustered_difference,
    equivalent,
    gains_and_losses,
    holm,
    mcnemar_exact,
    mean_difference,
    newcombe_paired,
    paired_difference,
    smallest_shown,
    verdict,
    wilson,
)
from kernel_surgery.evaluation.summary import pair
from kernel_surgery.models.load import POLYGLOT, load_model, load_tokenizer

counts = st.integers(0, 60)


def answers(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    """(original, edited) with these four counts."""
    original = [True] * both + [False] * gained + [True] * lost + [False] * neither
    edited = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return original, edited


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe (1998a), table I, method 3, four decimals.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_the_published_interval(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_equation_and_holds_the_estimate(case):
    """A bound p that is not 0 or 1 satisfies |k/n - p| = z sqrt(p (1-p) / n)."""
    k, n = case
    low, high = wilson(k, n)
    assert 0 <= low <= high <= 1
    if n == 0:
        assert (low, high) == (0, 1)
        return
    assert low <= k / n <= high
    assert (low == 0) == (k == 0) and (high == 1) == (k == n)
    z = 1.959963984540054
    for p in {low, high} - {0.0, 1.0}:
        assert abs(k / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n), rel=1e-9)
    mirrored = wilson(n - k, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(-1, 4), (5, 4), (0, -1)])
def test_wilson_refuses_impossible_counts(correct, n):
    with pytest.raises(ValueError, match=f"interval for {correct} correct of {n}: it takes 0 <= correct <= n"):
        wilson(correct, n)


def test_mcnemar_worked_examples():
    assert mcnemar_exact(5, 0) == 0.0625  # 3 -> 8 of 20 right: not significant
    assert mcnemar_exact(6, 0) == 0.03125
    assert mcnemar_exact(1, 7) == pytest.approx(0.0703125)  # 2 (C(8,0) + C(8,1)) / 2^8
    assert mcnemar_exact(0, 0) == 1.0
    with pytest.raises(ValueError, match="cannot test -1 and 3 discordant pairs: counts are not negative"):
        mcnemar_exact(-1, 3)


@given(counts, counts)
def test_mcnemar_is_the_doubled_binomial_tail(b, c):
    n = b + c
    tail = sum(math.comb(n, i) for i in range(min(b, c) + 1)) / 2**n
    assert mcnemar_exact(b, c) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    assert mcnemar_exact(b, c) == mcnemar_exact(c, b)


def test_holm_worked_example():
    """Holm's procedure on .01 .04 .03 .005: 4(.005), 3(.01), 2(.03), and the last raised to its predecessor."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.2]) == [0.2]
    assert holm([0.9, 0.9]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_order_and_lies_between_p_and_bonferroni(pvalues):
    adjusted = holm(pvalues)
    assert len(adjusted) == len(pvalues)
    for p, a in zip(pvalues, adjusted, strict=True):
        assert p <= a <= min(1.0, len(pvalues) * p)  # never above Bonferroni
    for i, j in itertools.product(range(len(pvalues)), repeat=2):
        if pvalues[i] <= pvalues[j]:
            assert adjusted[i] <= adjusted[j]
    if pvalues:
        assert min(adjusted) == min(1.0, len(pvalues) * min(pvalues))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_rejects_what_the_step_down_procedure_rejects(pvalues, alpha):
    """Adjusted < alpha exactly where Holm's procedure, as he states it, rejects."""
    rejected, remaining = set(), sorted(range(len(pvalues)), key=lambda i: pvalues[i])
    while remaining and len(remaining) * pvalues[remaining[0]] < alpha:
        rejected.add(remaining.pop(0))
    assert {i for i, a in enumerate(holm(pvalues)) if a < alpha} == rejected


@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan])
def test_holm_refuses_what_is_no_probability(bad):
    with pytest.raises(ValueError, match="cannot correct p-value number 1: got"):
        holm([0.5, bad])


def test_newcombe_worked_example():
    """Airway hyper-responsiveness in 21 children (Bentur et al. 2009), the example of Fagerland, Lydersen and Laake.

    Their figures: estimate -0.286, Newcombe's interval -0.507 to -0.026.
    """
    assert newcombe_paired(1, 1, 7, 12) == pytest.approx((-0.507, -0.026), abs=5e-4)
    original, edited = answers(1, 1, 7, 12)
    difference = paired_difference(original, edited)
    assert difference.delta == pytest.approx(-0.286, abs=5e-4)
    assert (difference.n, difference.gained, difference.lost) == (21, 1, 7)


@given(counts, counts, counts, counts)
def test_the_paired_interval_holds_the_difference_and_turns_round(both, gained, lost, neither):
    n = both + gained + lost + neither
    low, high = newcombe_paired(both, gained, lost, neither)
    assert -1 <= low <= high <= 1
    if n == 0:
        assert (low, high) == (-1, 1)
        return
    assert low <= (gained - lost) / n <= high
    back = newcombe_paired(both, lost, gained, neither)
    assert (-back[1], -back[0]) == pytest.approx((low, high), abs=1e-12)


def test_no_discordant_pair_is_not_a_certainty():
    """All 40 alike: p is 1, and the interval still has width (a bootstrap would say [0, 0])."""
    for right in (0, 13, 40):
        alike = [i < right for i in range(40)]
        difference = paired_difference(alike, alike)
        assert (difference.delta, difference.mcnemar_p) == (0.0, 1.0)
        assert difference.ci95[0] < -0.02 and difference.ci95[1] > 0.02
    assert paired_difference([], []) == PairedDifference(0, None, (-1.0, 1.0), 1.0, 0, 0)


def test_unpaired_answers_are_refused():
    with pytest.raises(ValueError, match="cannot pair 2 answers of the original with 1 of the edited model"):
        paired_difference([True, False], [True])


def test_words_follow_numbers():
    assert verdict(0.2, (0.1, 0.3), 0.01, 50) == "improved"
    assert verdict(-0.2, (-0.3, -0.1), 0.01, 50) == "worse"
    assert verdict(0.2, (0.1, 0.3), 0.05, 50) == "no difference shown (n=50)"  # the corrected test does not reject
    assert verdict(0.2, (-0.01, 0.4), 0.01, 50) == "no difference shown (n=50)"  # the interval holds 0
    assert verdict(-0.2, (-0.4, 0.0), 0.01, 50) == "no difference shown (n=50)"
    assert verdict(None, (-1.0, 1.0), 1.0, 0) == "no difference shown (n=0)"
    assert verdict(0.2, [0.1, 0.3], 0.01, 50, alpha=0.005) == "no difference shown (n=50)"


def test_the_records_three_to_eight_of_twenty_shows_nothing():
    """3 -> 8 of 20 right is five discordant pairs at best: p = 0.0625, however it is put."""
    difference = paired_difference(*answers(3, 5, 0, 12))
    assert (difference.delta, difference.mcnemar_p) == (0.25, 0.0625)
    assert verdict(difference.delta, difference.ci95, difference.mcnemar_p, 20) == "no difference shown (n=20)"


def test_the_smallest_difference_that_can_be_shown():
    assert smallest_shown(20) == 6 / 20
    assert smallest_shown(200, comparisons=6) == 8 / 200  # 2^-7 < 0.05/6 < 2^-6
    assert smallest_shown(5) is None and smallest_shown(0) is None
    with pytest.raises(ValueError, match="alpha=0 and comparisons=1: it takes 0 < alpha < 1 and at least one"):
        smallest_shown(20, alpha=0)


@given(st.integers(6, 300), st.integers(1, 20))
def test_the_smallest_difference_is_the_first_that_is_significant(n, comparisons):
    smallest = smallest_shown(n, comparisons=comparisons)
    if smallest is None:
        assert holm([mcnemar_exact(n, 0), *[1.0] * (comparisons - 1)])[0] >= 0.05
        return
    m = round(smallest * n)
    assert holm([mcnemar_exact(m, 0), *[1.0] * (comparisons - 1)])[0] < 0.05
    assert holm([mcnemar_exact(m - 1, 0), *[1.0] * (comparisons - 1)])[0] >= 0.05


def exact_coverage(both: float, gained: float, lost: float, n: int) -> float:
    """Exact probability that the interval holds the true difference: a sum over every table of n pairs."""
    covered = 0.0
    p = (both, gained, lost, 1 - both - gained - lost)
    for a in range(n + 1):
        for b in range(n + 1 - a):
            for c in range(n + 1 - a - b):
                table = (a, b, c, n - a - b - c)
                low, high = newcombe_paired(*table)
                if low <= gained - lost <= high:
                    ways = math.factorial(n) / math.prod(math.factorial(x) for x in table)
                    covered += ways * math.prod(q**x for q, x in zip(p, table, strict=True))
    return covered


@pytest.mark.parametrize("truth", [(0.5, 0.1, 0.1), (0.2, 0.3, 0.05), (0.85, 0.03, 0.02)])
def test_the_paired_interval_covers_what_it_says(truth):
    """All tables of 12 pairs, weighted by their probability; 2 points below 0.95 are allowed for discreteness."""
    coverage = exact_coverage(*truth, 12)
    print(f"coverage {coverage:.4f} of a nominal 0.95")
    assert coverage >= 0.93


def test_one_language_pooled_is_mcnemar():
    """With one language a problem is a pair, and flipping signs is the exact test."""
    for gained, lost in ((6, 0), (9, 2), (5, 5), (1, 0), (0, 1), (2, 0)):
        rows = [[1]] * gained + [[-1]] * lost + [[0]] * 30
        found = clustered_difference(rows)
        assert found.p == pytest.approx(mcnemar_exact(gained, lost), abs=1e-9)
        assert (found.n, found.moved) == (len(rows), gained + lost)
        assert found.delta == pytest.approx((gained - lost) / len(rows))
        assert found.ci95[0] <= found.delta <= found.ci95[1]


def test_translations_of_one_problem_are_one_piece_of_evidence():
    one, seven = clustered_difference([[1]] * 6 + [[0]] * 20), clustered_difference([[1] * 7] * 6 + [[0] * 7] * 20)
    assert (one.p, one.ci95, one.delta) == (seven.p, seven.ci95, seven.delta)
    # Counted as independent they would be forty-two gained.
    assert mcnemar_exact(42, 0) < 1e-9 < seven.p


def test_where_nothing_moved_the_interval_is_not_a_point():
    found = clustered_difference([[0, 0]] * 50)
    assert (found.delta, found.p, found.moved) == (0.0, 1.0, 0)
    assert found.ci95 == (-wilson(0, 50)[1], wilson(0, 50)[1])
    moved = clustered_difference([[1, -1]] * 3 + [[0, 0]] * 50)
    assert moved.moved == 3 and moved.delta == 0 and moved.p == 1
    with pytest.raises(ValueError, match="different numbers of problems"):
        clustered_difference([[1], [1, 0]])


@given(counts, counts, counts, counts)
def test_equivalence_is_the_inner_interval_within_the_margin(both, gained, lost, neither):
    low, high = newcombe_paired(both, gained, lost, neither, confidence=0.9)
    wide = newcombe_paired(both, gained, lost, neither)
    assert wide[0] <= low <= high <= wide[1]
    assert equivalent(both, gained, lost, neither, 0.1) == (low > -0.1 and high < 0.1)
    # More comparisons ask for more.
    assert equivalent(both, gained, lost, neither, 0.1, comparisons=9) <= equivalent(both, gained, lost, neither, 0.1)


def test_an_equivalence_is_corrected_for_the_comparisons():
    assert equivalent(196, 2, 2, 0, 0.03) and not equivalent(196, 2, 2, 0, 0.03, comparisons=20)


def test_an_equivalence_needs_a_margin():
    with pytest.raises(ValueError, match="positive margin, got 0"):
        equivalent(1, 1, 1, 1, 0)


@pytest.fixture(scope="module")
def real_pairs():
    """{language: [(original right, edited right)]} of the embedded model, cut short and reflected: some of each."""
    import torch

    from kernel_surgery import Subspace, hooked
    from kernel_surgery.evaluation.generate import generate
    from kernel_surgery.problems.generator import problems

    model, tokenizer = load_model("polyglot", torch.float32), load_tokenizer("polyglot")
    subspace = Subspace.load(POLYGLOT.parent / "subspace.safetensors")
    asked, pairs = problems("test", 20), {}
    for language in ("en", "zh"):
        prompts, right = [p.prompts[language] for p in asked], []
        for strength in (0.0, 2.0):
            with hooked(model, subspace, strength):
                made = generate(model, tokenizer, prompts, max_new_tokens=72, batch_size=100)
            cell = [score(p, language, "", t, tokenizer.decode) for p, t in zip(asked, made, strict=True)]
            right.append([s["correct"] for s in cell])
        pairs[language] = list(zip(*right, strict=True))
    return pairs


@pytest.mark.slow
def test_a_thousand_studies_without_an_effect_find_one_no_more_often_than_stated(real_pairs, monkeypatch):
    """Problems drawn again with all their languages, and original and edited swapped for half of them: no effect, and
    the clusters are the real ones. A study errs if any of its comparisons says "improved" or "worse"."""
    monkeypatch.setattr(summary, "clustered_difference", functools.partial(clustered_difference, resamples=999))
    moved = {language: sum(a != b for a, b in pairs) for language, pairs in real_pairs.items()}
    rng, n, false = random.Random(0), len(real_pairs["en"]), 0
    for _ in range(1000):
        drawn = [(rng.randrange(n), rng.random() < 0.5) for _ in range(n)]
        cells = {}
        for language, pairs in real_pairs.items():
            for which, mode in ((0, "original"), (1, "fused")):
                cells[mode, language] = [
                    {"id": i, "correct": pairs[p][which ^ swap], "text": "", "fat_tokens": None}
                    for i, (p, swap) in enumerate(drawn)
                ]
        false += any(row["verdict"] in ("improved", "worse") for row in pair(cells))
    # Three standard deviations of the count itself above the level.
    allowed = 0.05 + 3 * (0.05 * 0.95 / 1000) ** 0.5
    print(f"pairs that moved: {moved}; false verdicts in {false} of 1000 studies, {false / 1000:.4f}, stated 0.05")
    assert min(moved.values()) >= 10 and false / 1000 <= allowed


def test_an_interval_over_few_moved_problems_is_no_certainty():
    """What a bootstrap alone gives there: a point, or an end at exactly 0."""

    def interval(rows):
        return clustered_difference(rows).ci95

    still = interval([(0, 0)] * 200)
    one = interval([(1, 0)] + [(0, 0)] * 199)
    assert still == pytest.approx((-wilson(0, 200)[1], wilson(0, 200)[1]))
    assert one[0] < 0 < one[1] and one[1] - one[0] >= (still[1] - still[0]) / 2
    lost = interval([(-1, -1)] * 5)
    assert lost == pytest.approx(newcombe_paired(0, 0, 5, 0)) and lost[1] < -0.3
    few = [(-1, -1)] + [(-1, 0)] * 3 + [(0, 0)] * 196
    found = clustered_difference(few)
    assert found.p == 0.125 and found.ci95[0] < 0 < found.ci95[1]
    # One cluster, one language: Newcombe's own interval for pairs that are never both right.
    assert gains_and_losses([1.0] * 7 + [-1.0] * 3 + [0.0] * 40) == pytest.approx(
        newcombe_paired(0, 7, 3, 40), abs=0.02
    )
    assert gains_and_losses([]) == (-1.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.002, 0.01, 0.03, 0.2])
def test_the_pooled_interval_covers_what_is_true(rate):
    """200 problems in two languages that move together half the time; half as often up as down."""
    rng, inside, runs = np.random.default_rng(3), 0, 300
    true = rate / 3 - 2 * rate / 3
    for _ in range(runs):
        moved = rng.random(200) < rate
        sign = np.where(rng.random(200) < 1 / 3, 1, -1)
        together = rng.random(200) < 0.5
        first = rng.random(200) < 0.5
        rows = [
            ((s if t or f else 0), (s if t or not f else 0)) if m else (0, 0)
            for m, s, t, f in zip(moved, sign, together, first, strict=True)
        ]
        low, high = clustered_difference(rows, resamples=500).ci95
        inside += low <= true * 0.75 <= high
    print(f"rate {rate}: the interval holds the truth in {inside / runs:.3f} of {runs} runs, stated .95")
    assert inside / runs >= 0.95 - 3 * (0.05 * 0.95 / runs) ** 0.5


def test_a_mean_of_pairs_has_an_interval_where_resampling_says_something():
    found = mean_difference([1.0, 2.0, 3.0, 2.0] * 10)
    assert found["n"] == 40 and found["mean_difference"] == 2.0 and 1.7 < found["ci95"][0] < 2 < found["ci95"][1] < 2.3
    for values, mean in (([], None), ([3.0], 3.0), ([2.0, 2.0], 2.0)):
        assert mean_difference(values) == {"n": len(values), "mean_difference": mean, "ci95": None}
