"""Measure the damage of edits: the passes over neutral text, the verdict, and what is printed of both."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kernel_surgery.common.names import BATCH_TOKENS, LANGUAGES
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.damage.neutral import NeutralText, Reading, encoded, tokens_in
from kernel_surgery.damage.words import (
    BITS4,
    BITS8,
    BROKEN,
    CONSTANT,
    HAAR,
    MATCHED,
    PRECISION,
    WORDS,
    judged,
    with_intervals,
)
from kernel_surgery.damage.yardsticks import (
    haar_edits,
    in_other_precision,
    matched_edits,
    other_precision,
    rounded_weights,
)
from kernel_surgery.edit.modes import applied
from kernel_surgery.models.padding import token_batches
from kernel_surgery.problems.neutral import Split
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.moments import Moments
from kernel_surgery.subspace.reading import reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Block = Callable[[], AbstractContextManager[object]]


def measure_damage(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    languages: Sequence[str],
    modes: Sequence[str],
    subspace: Subspace,
    *,
    strength: float = 1.0,
    force: bool = False,
    split: Split = "test",
    controls: bool = True,
) -> dict[str, Any]:
    """Measure an edit in each of `modes`, beside the yardsticks, on the same neutral text. Return it as JSON.

    languages: of the neutral text. split: "test" to report an edit, "dev" to choose one. controls: also draw the two
    random edits, which no word depends on.

    Returns {"split", "sentences", "precision", "neutral": {mode: {language: figures}}, "yardsticks": {name: the same},
    "verdict": {mode: `words.judged`}}. The model is unchanged afterwards. "no_text" is there if the subspace was fitted
    in languages without neutral text, and lists them.

    Numerics: the model's own dtype; figures in float64.
    """
    blocks: dict[str, Block] = {mode: partial(applied, mode, model, subspace, strength, force) for mode in modes}
    names = [PRECISION, BITS8, BITS4, *((HAAR, MATCHED) if controls else ())]
    # One pass more: the original.
    passes, total = len(blocks) + len(names) + 1, tokens_in(encoded(tokenizer, languages, split))
    with progress_bar(passes * total, "damage", unit="token", unit_scale=True, leave=False) as bar:
        text = NeutralText(model, tokenizer, languages, split, bar.update)
        yardsticks = {CONSTANT: text.read(text.constant_predictions)}
        for name, block in yardstick_blocks(text, names, subspace, strength, force):
            with block():
                yardsticks[name] = text.read()
        edits: dict[str, dict[str, Reading]] = {}
        for mode, block in blocks.items():
            with block():
                edits[mode] = text.read()
    fitted = (subspace.fit or {}).get("languages") or ()
    no_text = [language for language in fitted if language not in LANGUAGES]
    return {
        **{"split": split, "sentences": text.sentences, "precision": other_precision(model)},
        **({"no_text": no_text} if no_text else {}),
        "neutral": {mode: _figures(by) for mode, by in edits.items()},
        "yardsticks": {name: _figures(yardsticks[name]) for name in (*names, CONSTANT)},
        "verdict": {mode: judged(by, yardsticks) for mode, by in edits.items()},
    }


def rounding_blocks(model: "PreTrainedModel") -> dict[str, Block]:
    """Return {name: a function that returns a context manager with that rounding}: the yardsticks of the words."""
    return {
        PRECISION: partial(in_other_precision, model),
        BITS8: partial(rounded_weights, model, 8),
        BITS4: partial(rounded_weights, model, 4),
    }


def yardstick_readings(text: NeutralText) -> dict[str, dict[str, Reading]]:
    """Return {name: readings} of the yardsticks that words depend on. They are the same for every edit."""
    found = {CONSTANT: text.read(text.constant_predictions)}
    for name, block in rounding_blocks(text.model).items():
        with block():
            found[name] = text.read()
    return found


def yardstick_blocks(
    text: NeutralText, names: Sequence[str], subspace: Subspace, strength: float, force: bool
) -> Iterator[tuple[str, Block]]:
    """Yield (name, a function that returns a context manager with that change) for every yardstick."""
    model = text.model
    rounding = rounding_blocks(model)
    for name in names:
        if name in rounding:
            yield name, rounding[name]
            continue
        yield name, partial(applied, "hook", model, random_edits(text, subspace, name), strength, force)


def random_edits(text: NeutralText, subspace: Subspace, kind: str, seed: int = 0) -> Subspace:
    """Return random edits of the same rank, form, layers and strengths as the subspace's.

    kind: HAAR or MATCHED, of `damage.words`. text: what they are matched to.
    """
    edits, moments = subspace.projections, None
    if kind == MATCHED or subspace.offsets:
        moments = neutral_moments(text, subspace)
    if kind == HAAR:
        return subspace.with_edits(haar_edits(edits, seed, moments))
    assert moments is not None
    return subspace.with_edits(matched_edits(edits, moments, seed))


def neutral_moments(text: NeutralText, subspace: Subspace) -> dict[int, Moments]:
    """Return the moments of the activations that are edited, over the tokens of the text but for each first one.

    The first token is an attention sink in many models: its activations are tens of times larger than all others.
    """
    found: dict[int, Moments] = {}

    def take(layer: int, states: Tensor, mask: Tensor) -> None:
        counted = states[(mask * mask.cumsum(-1)) > 1]
        found.setdefault(layer, Moments.empty(1, states.shape[-1], states.device)).add(counted, 0)

    with reading(text.model, text.tokenizer, subspace.layers, subspace.edited_site, take) as read:
        for encoded in text.encoded.values():
            for batch in token_batches([len(ids) for ids in encoded], BATCH_TOKENS):
                read([encoded[i] for i in batch])
    return found


def _figures(readings: Mapping[str, Reading]) -> dict[str, dict[str, Any]]:
    return {language: with_intervals(reading) for language, reading in readings.items()}


# --- what is printed ---

LISTED = 3  # languages whose figures fit into a sentence


def named(name: str, damage: Mapping[str, Any]) -> str:
    """Return a yardstick's name as it is printed."""
    names = {
        PRECISION: f"run in {damage['precision']}",
        BITS8: "8-bit weights",
        BITS4: "4-bit weights",
        HAAR: "uniform random edit",
        MATCHED: "random edit by covariance",
        CONSTANT: "no context (unigram)",
    }
    return names.get(name, name)


def headline(damage: Mapping[str, Any] | None, why: str = "") -> str:
    """Return the first line of every output: the damage in words, and the figures that the words rest on.

    damage: a result of `measure_damage`; None or one without a verdict if it was not measured, for the reason `why`.
    """
    if not damage or not damage.get("verdict"):
        return f"damage: not measured{f' ({why})' if why else ''}"
    modes: dict[str, list[str]] = {}
    for mode, verdict in damage["verdict"].items():
        modes.setdefault(verdict["word"], []).append(mode)
    word = max(modes, key=WORDS.index)
    mode = max(modes[word], key=lambda m: max(r["kl_mean"] for r in damage["neutral"][m].values()))
    figures = damage["neutral"][mode]
    kl, ratio = listed(figures, "kl_mean"), f"Perplexity {listed(figures, 'perplexity_ratio', 'x')}"
    if lost := beyond(damage):
        these = "any of them" if len(lost) == len(figures) > LISTED else ", ".join(lost)
        ratio = f"Perplexity says nothing in {these}: the original predicts that text worse than without context"
    others = "; ".join(f"{', '.join(by)}: {other}" for other, by in modes.items() if other != word)
    beside = CONSTANT if word == BROKEN else BITS4
    said = "BROKEN: the edited model no longer predicts ordinary text" if word == BROKEN else word
    where, many, no_text = "", len(figures) > LISTED, damage.get("no_text")
    known = damage["yardsticks"][beside]
    yardstick = f". {named(beside, damage).capitalize()}: {listed(known, 'kl_mean')}"
    # Two ranges, of different languages, would invite a wrong division.
    if many and all(r["kl_mean"] > 0 for r in known.values()):
        times = {lang: {"times": r["kl_mean"] / known[lang]["kl_mean"]} for lang, r in figures.items()}
        yardstick = f", {listed(times, 'times')} times that of {named(beside, damage)}"
    worst = [lang for lang, found in damage["verdict"][mode]["languages"].items() if found["word"] == word]
    if len(worst) < len(figures):
        where = f" in {', '.join(worst)}" + (f" (of {len(figures)} languages)" if many else "")
    elif many:
        where = f" in all {len(figures)} languages"
    return (
        f"damage, {', '.join(modes[word])}: {said}{where}. KL {kl} nats per token{yardstick}. "
        + ratio
        + (f". {others[0].upper()}{others[1:]}" if others else "")
        + (f". Not measured in the fit's {', '.join(no_text)}: there is no neutral text" if no_text else "")
    )


def listed(figures: Mapping[str, Mapping[str, Any]], key: str, sign: str = "") -> str:
    """Return a figure of every language, or the smallest and the largest if there are more than `LISTED`."""
    values = sorted((row[key], language) for language, row in figures.items())
    if len(values) <= LISTED:
        return ", ".join(f"{language} {sign}{row[key]:.3g}" for language, row in figures.items())
    return " to ".join(f"{sign}{value:.3g} ({language})" for value, language in (values[0], values[-1]))


def beyond(damage: Mapping[str, Any]) -> list[str]:
    """Return the languages that the original predicts worse than without context: text that it was not made for."""
    constant = damage["yardsticks"][CONSTANT]
    return [lang for lang, r in constant.items() if r["original_perplexity"] >= r["perplexity"]]


def rows_of(damage: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any], str]]:
    """Return (name, language, figures, word) of every edit and yardstick, in the order of the tables."""
    rows = []
    for mode, by in damage["neutral"].items():
        words = damage["verdict"][mode]["languages"]
        rows += [(mode, language, r, words[language]["word"]) for language, r in by.items()]
    for name, by in damage["yardsticks"].items():
        rows += [(named(name, damage), language, r, "") for language, r in by.items()]
    return rows


HEAD = ("changed model", "lang", "KL (95% CI)", "99% of tokens", "perplexity", "ratio (95% CI)", "in words")


def cells(row: tuple[str, str, dict[str, Any], str]) -> list[str]:
    """Return a row of the table as text."""
    name, language, r, word = row
    low, high = r["kl_ci95"]
    least, most = r["perplexity_ratio_ci95"]
    return [
        *(name, language, f"{r['kl_mean']:.3g} ({low:.3g} to {high:.3g})", f"{r['kl_p99']:.3g}"),
        *(f"{r['perplexity']:.4g}", f"{r['perplexity_ratio']:.3g} ({least:.3g} to {most:.3g})", word),
    ]


def table(damage: Mapping[str, Any]) -> str:
    """Return the table of an edit's damage beside the yardsticks."""
    rows = [list(HEAD), *map(cells, rows_of(damage))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    original = next(iter(damage["neutral"].values()), next(iter(damage["yardsticks"].values())))
    before = ", ".join(f"{language} {r['original_perplexity']:.4g}" for language, r in original.items())
    return "\n".join(
        [
            f"damage on {damage['sentences']} neutral sentences per language ({damage['split']} half): KL(original || "
            f"changed), nats per token; perplexity of the original: {before}",
            *(
                "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                for row in rows
            ),
        ]
    )
