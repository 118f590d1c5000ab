"""Put an edit's damage into words that people know, by comparing it with known changes of the same model.

The words, from mild to severe, and the rule. KL is KL(original || changed) on neutral text, in nats per token, and
every ratio has a 95% interval, paired over sentences:

    below rounding     KL is at most that of running the model in the other precision
    like 8-bit         at most 1.5 times that of 8-bit weights
    like 4-bit         at most 1.5 times that of 4-bit weights
    worse than 4-bit   none of these
    broken             KL is at least half of what it would be if the model ignored the context, or it predicts the text
                       no better than a model that ignores the context, although the original gains from the context

A text shows the second only if the original gains what it believes to: on average at least half of that KL. Else its
own predictions are poor there, or the text is short beside what a model without context was fitted on, which is the
same text.

A mild word must be shown: the upper end of the interval is compared, and the mildest word that is shown is taken.
"broken" is said whenever the interval cannot rule it out. A figure that is not finite is "broken".
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kernel_surgery.damage.neutral import Reading

BELOW, EIGHT, FOUR, WORSE, BROKEN = WORDS = (
    *("below rounding", "like 8-bit", "like 4-bit", "worse than 4-bit", "broken"),
)
PRECISION, BITS8, BITS4, HAAR, MATCHED, CONSTANT = YARDSTICKS = (
    *("other precision", "8-bit", "4-bit", "haar", "matched", "no context"),
)
# {word: the yardstick that it names, and how many times its damage is allowed}.
LIMITS = {BELOW: (PRECISION, 1.0), EIGHT: (BITS8, 1.5), FOUR: (BITS4, 1.5)}
LOST = 0.5  # of the damage of a model that ignores the context: from here on a model is broken
RESAMPLES = 2000
Values = Sequence[float] | np.ndarray
RULE = (
    f"In words, per language, with 95% confidence over the sentences: {BELOW}: KL at most that of running the model in "
    f"the other precision; {EIGHT}: at most 1.5 times that of 8-bit weights; {FOUR}: at most 1.5 times that of 4-bit "
    f"weights (round to nearest, groups of 32); {WORSE}: none of these; {BROKEN}: at least half of what it would be if "
    "the model ignored the context, or the text predicted no better than without context, where the original gains "
    "from it. The worst language counts."
)


def ratio_interval(above: Values, below: Values) -> tuple[float, float]:
    """Return the 95% interval of sum(above) / sum(below), resampling the pairs (bias-corrected bootstrap, seeded).

    All of `below` are positive. Uses scipy.stats.bootstrap. The ratio is returned twice if all pairs have the same one,
    if there is only one pair, or if one is not finite.
    """
    from scipy.stats import bootstrap

    a, b = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    each, ratio = a / b, float(_ratio(a, b))
    if len(a) < 2 or np.ptp(each) == 0 or not np.isfinite(each).all():
        return ratio, ratio
    options = {"n_resamples": RESAMPLES, "rng": np.random.default_rng(0), "method": "BCa"}
    found = bootstrap((a, b), _ratio, paired=True, vectorized=True, **options).confidence_interval
    return float(found.low), float(found.high)


def _ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> Any:
    return a.sum(axis) / b.sum(axis)


def with_intervals(reading: Reading) -> dict[str, Any]:
    """Return the figures of a reading as JSON, with intervals for the mean KL and the ratio of perplexities."""
    figures = reading.figures()
    kl = ratio_interval(reading.kl, reading.tokens)
    low, high = ratio_interval(reading.loss - reading.original_loss, reading.tokens)
    return figures | {"kl_ci95": list(kl), "perplexity_ratio_ci95": [float(np.exp(low)), float(np.exp(high))]}


def word_of(edit: Reading, yardsticks: Mapping[str, Reading]) -> dict[str, Any]:
    """Return {"word", "ratios": {yardstick: [ratio, low, high]}} for one edit in one language.

    yardsticks: readings of the same sentences. Those that were not measured give no word: a milder one then needs the
    next yardstick.
    """
    if not np.isfinite([edit.kl.sum(), edit.loss.sum()]).all():
        return {"word": BROKEN, "ratios": {}}
    ratios = {}
    for name, other in yardsticks.items():
        if name in (PRECISION, BITS8, BITS4, CONSTANT) and (other.kl > 0).all():
            ratios[name] = [float(edit.kl.sum() / other.kl.sum()), *ratio_interval(edit.kl, other.kl)]
    if edit.kl.sum() == 0:
        return {"word": BELOW, "ratios": ratios}
    if _broken(edit, ratios, yardsticks.get(CONSTANT)):
        return {"word": BROKEN, "ratios": ratios}
    for word, (name, times) in LIMITS.items():
        if name in ratios and ratios[name][2] <= times:
            return {"word": word, "ratios": ratios}
    return {"word": WORSE, "ratios": ratios}


def _broken(edit: Reading, ratios: Mapping[str, Sequence[float]], constant: Reading | None) -> bool:
    if constant is None:
        return False
    if CONSTANT in ratios and ratios[CONSTANT][2] >= LOST:
        return True
    # A model that knows what it does not know gains its KL from the constant one, on average.
    gained = constant.loss.sum() - edit.original_loss.sum()
    if gained <= LOST * constant.kl.sum():
        return False
    return ratio_interval(edit.loss - constant.loss, edit.tokens)[1] >= 0


def judged(
    edit: Mapping[str, Reading], yardsticks: Mapping[str, Mapping[str, Reading]]
) -> dict[str, Any]:
    """Return the verdict on one edit: the most severe word of its languages.

    Returns {"word", "language": the language that has it, "languages": {language: result of `word_of`}}.
    """
    languages = {
        language: word_of(reading, {name: by[language] for name, by in yardsticks.items()})
        for language, reading in edit.items()
    }
    worst = max(languages, key=lambda language: (WORDS.index(languages[language]["word"]), edit[language].kl_mean))
    return {"word": languages[worst]["word"], "language": worst, "languages": languages}
