"""The rule that puts damage into words, and its intervals."""

from dataclasses import replace

import numpy as np
import pytest

from kernel_surgery.damage.measure import headline, named, rows_of, table
from kernel_surgery.damage.neutral import Reading
from kernel_surgery.damage.words import (
    BITS4,
    BITS8,
    BROKEN,
    CONSTANT,
    HAAR,
    PRECISION,
    WORDS,
    judged,
    ratio_interval,
    with_intervals,
    word_of,
)

SHAPE = np.random.default_rng(1).uniform(0.8, 1.25, 22)  # sentences differ, in the same way for every model
TOKENS = np.full(22, 20.0)


def reading(kl, *, loss=3.0, original=2.5, spread=SHAPE):
    """A reading with a mean KL and losses per token; KL varies over the sentences by `spread`."""
    return Reading(TOKENS, kl * TOKENS * spread / spread.mean(), loss * TOKENS, original * TOKENS, 4 * kl)


YARDSTICKS = {
    CONSTANT: reading(3.0, loss=6.0),
    PRECISION: reading(0.001),
    BITS8: reading(0.002),
    BITS4: reading(0.1),
    HAAR: reading(0.5),
}


@pytest.mark.parametrize(
    ("kl", "word"),
    [
        *((0.0, WORDS[0]), (0.0009, WORDS[0]), (0.0011, WORDS[1]), (0.0029, WORDS[1]), (0.0031, WORDS[2])),
        *((0.149, WORDS[2]), (0.151, WORDS[3]), (1.49, WORDS[3]), (1.51, BROKEN), (9.0, BROKEN)),
    ],
)
def test_each_word_begins_where_the_rule_says(kl, word):
    """All models share the spread over sentences, so the intervals are points and the limits sharp."""
    assert word_of(reading(kl), YARDSTICKS)["word"] == word


def test_a_mild_word_must_be_shown_and_broken_must_be_excluded():
    """With the same mean KL, a wide interval gives the more severe word."""
    few = np.ones(22)
    few[:2] = 8.0  # two sentences carry most of the damage
    for kl, sure, unsure in ((0.09, WORDS[2], WORDS[3]), (1.0, WORDS[3], BROKEN)):
        assert word_of(reading(kl), YARDSTICKS)["word"] == sure
        found = word_of(reading(kl, spread=few), YARDSTICKS)
        assert found["word"] == unsure, found
        ratio, low, high = found["ratios"][BITS4]
        assert ratio == pytest.approx(kl / 0.1) and low < ratio < high


def test_a_text_that_is_predicted_worse_than_without_context_is_broken():
    assert word_of(reading(0.05, loss=5.9), YARDSTICKS)["word"] == WORDS[2]
    assert word_of(reading(0.05, loss=6.1), YARDSTICKS)["word"] == BROKEN
    # Unless the original predicts it as badly: then its loss says nothing about the edit.
    assert word_of(reading(0.05, loss=6.1, original=6.5), YARDSTICKS)["word"] == WORDS[2]
    # Or gains less from the context than half of the KL without it, which is 3: it knows little of the text.
    assert word_of(reading(0.05, loss=6.1, original=4.6), YARDSTICKS)["word"] == WORDS[2]
    assert word_of(reading(0.05, loss=6.1, original=4.4), YARDSTICKS)["word"] == BROKEN
    # It must be excluded: with the same mean, losses that differ between sentences give the severe word.
    unsure = reading(0.05, loss=5.9)
    unsure = replace(unsure, loss=unsure.loss + 20 * np.where(np.arange(22) % 2, 0.4, -0.4))
    assert unsure.loss.sum() == pytest.approx(22 * 20 * 5.9) and word_of(unsure, YARDSTICKS)["word"] == BROKEN


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_figures_that_are_not_finite_are_broken(bad):
    assert word_of(reading(bad), YARDSTICKS)["word"] == BROKEN
    assert word_of(reading(0.001, loss=bad), YARDSTICKS)["word"] == BROKEN


def test_without_yardsticks_nothing_mild_is_said():
    assert word_of(reading(1e-9), {})["word"] == "worse than 4-bit"
    assert word_of(reading(0.0009), {BITS4: YARDSTICKS[BITS4]})["word"] == "like 4-bit"


def test_the_worst_language_counts():
    edit = {"en": reading(0.0009), "zh": reading(0.05), "sw": reading(0.04)}
    found = judged(edit, {name: dict.fromkeys(edit, by) for name, by in YARDSTICKS.items()})
    assert (found["word"], found["language"]) == ("like 4-bit", "zh")
    assert {lang: r["word"] for lang, r in found["languages"].items()} == {
        "en": "below rounding",
        "zh": "like 4-bit",
        "sw": "like 4-bit",
    }


def test_the_interval_of_a_ratio_covers_the_truth_as_often_as_it_says():
    """1,000 samples of 22 correlated pairs with a known ratio. At 95% nominal, a bootstrap of 22 pairs reaches .90."""
    rng, covered, trials = np.random.default_rng(3), 0, 300
    for _ in range(trials):
        base = rng.gamma(4.0, size=22)
        above, below = 2.0 * base * rng.gamma(6.0, 1 / 6, size=22), base * rng.gamma(6.0, 1 / 6, size=22)
        low, high = ratio_interval(above, below)
        covered += low <= 2.0 <= high
    # Three standard errors below a coverage of .92.
    least = 0.92 - 3 * (0.92 * 0.08 / trials) ** 0.5
    print(f"covered {covered / trials:.3f}, at least {least:.3f}")
    assert covered / trials >= least
    assert ratio_interval([2.0, 4.0], [1.0, 2.0]) == (2.0, 2.0) and ratio_interval([3.0], [2.0]) == (1.5, 1.5)


def damage_of(edits):
    return {
        **{"split": "test", "sentences": 22, "precision": "bfloat16"},
        "neutral": {mode: {lang: with_intervals(r) for lang, r in by.items()} for mode, by in edits.items()},
        "yardsticks": {n: {lang: with_intervals(r) for lang in ("en", "zh")} for n, r in YARDSTICKS.items()},
        "verdict": {
            mode: judged(by, {n: dict.fromkeys(by, r) for n, r in YARDSTICKS.items()}) for mode, by in edits.items()
        },
    }


def test_the_first_line_says_the_worst_and_what_it_rests_on():
    mild = {"en": reading(0.04), "zh": reading(0.05)}
    said = headline(damage_of({"hook": mild, "fused": mild}))
    assert said == (
        "damage, hook, fused: like 4-bit. KL en 0.04, zh 0.05 nats per token. 4-bit weights: en 0.1, zh 0.1. "
        "Perplexity en x1.65, zh x1.65"
    )
    said = headline(damage_of({"hook": mild, "baked": {"en": reading(0.04), "zh": reading(5.0, loss=9.0)}}))
    assert said.startswith("damage, baked: BROKEN: the edited model no longer predicts ordinary text in zh. KL en 0.04")
    assert ". No context (unigram): en 3, zh 3. " in said and said.endswith(". Hook: like 4-bit")
    # Of more than three languages: where the word holds, and the two ends.
    many = {lang: reading(0.01 * number) for number, lang in enumerate(("en", "zh", "es", "sw"), 1)}
    found = damage_of({"hook": many})
    yardsticks = {n: dict.fromkeys(many, by["en"]) for n, by in found["yardsticks"].items()}
    found["yardsticks"] = yardsticks
    assert headline(found) == (
        "damage, hook: like 4-bit in all 4 languages. KL 0.01 (en) to 0.04 (sw) nats per token, "
        "0.1 (en) to 0.4 (sw) times that of 4-bit weights. Perplexity x1.65 (en) to x1.65 (zh)"
    )
    found = damage_of({"hook": many | {"en": reading(0.0009)}}) | {"yardsticks": yardsticks}
    assert headline(found).startswith("damage, hook: like 4-bit in zh, es, sw (of 4 languages). KL 0.0009 (en) to")
    # A yardstick that changes nothing: a model without linear layers, such as GPT-2.
    none = {lang: r | {"kl_mean": 0.0} for lang, r in yardsticks[BITS4].items()}
    said = headline(found | {"yardsticks": yardsticks | {BITS4: none}})
    assert "nats per token. 4-bit weights: 0 (en) to 0 (zh). " in said
    # The toy model's perplexity on text that it was not made for falls with any damage.
    lost = damage_of({"hook": mild})
    for r in lost["yardsticks"][CONSTANT].values():
        r["original_perplexity"] = 500.0
    assert headline(lost).endswith(
        "Perplexity says nothing in en, zh: the original predicts that text worse than without context"
    )
    assert headline(None, "--no-damage") == "damage: not measured (--no-damage)" and "\n" not in said


def test_the_table_has_every_edit_and_yardstick_in_every_language():
    found = damage_of({"fused": {"en": reading(0.04), "zh": reading(2.0)}})
    lines = table(found).splitlines()
    assert len(lines) == 2 + 2 + 2 * len(YARDSTICKS) == 2 + len(rows_of(found))
    assert lines[0].endswith("perplexity of the original: en 12.18, zh 12.18")
    assert lines[3].split()[:2] == ["fused", "zh"] and lines[3].endswith("broken")
    assert any(line.startswith(named(PRECISION, found)) for line in lines) and "run in bfloat16" in table(found)
