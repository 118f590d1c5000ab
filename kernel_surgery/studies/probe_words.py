"""What `probe` says in words and as the terminal's table, made from probe.json alone."""

from collections.abc import Mapping
from typing import Any

from kernel_surgery.damage.words import BITS4, BROKEN
from kernel_surgery.models.architectures import spans
from kernel_surgery.studies.randoms import KINDS, SCALED

ORIGINAL, EDIT = "original", "edit"
MORE, NO_MORE, NOTHING = "hides more", "hides no more", "hides nothing"
UNREAD, FEW, UNCOMPARED = "nothing to hide", "too few problems", "not compared"
# With fewer problems, more than one in twenty intervals lies below 0 where there is no difference; 1 in 40 is meant.
PROBLEMS = 10
SHOWN_P = 0.05
MOSTLY = 0.5  # of the prompts: from here on the verdict says that they are worded as those of the fit


def hidden(found: Mapping[str, Any]) -> float:
    """Return the share that the edit hides of what the probe reads above chance: 0 is nothing, 1 is all."""
    original, chance = found["measured"][ORIGINAL]["probe"], found["asked"]["chance"]
    return min((original - found["measured"][EDIT]["probe"]) / (original - chance), 1.0) if original > chance else 0.0


def percent(share: float) -> str:
    """Return a share in percent: of small ones a decimal."""
    return f"{100 * share:.0f}%" if share >= 0.0995 else f"{100 * share:.1f}%"


def sentence(found: Mapping[str, Any]) -> str:
    """Return the verdict: how much of the language the edit hides, whether random edits hide as much, and whether it
    breaks the model."""
    broken = f" It breaks the model{of_the_word(found)}." if found["measured"][EDIT]["word"] == BROKEN else ""
    return _of_the_language(found) + broken


def of_the_word(found: Mapping[str, Any]) -> str:
    """Return " in es, sw (of 7 languages)": those in which the edit's damage has its word.

    A word depends on what the language would lose at most, so it need not be that of the largest KL.
    """
    edit = found["measured"][EDIT]
    own = [language for language, word in edit["words"].items() if word == edit["word"]]
    if len(own) < len(edit["words"]):
        return f" in {', '.join(own)} (of {len(edit['words'])} languages)"
    return f" in all {len(own)} languages" if len(own) > 2 else " in both languages"


def worst(found: Mapping[str, Any]) -> str:
    """Return the language in which the edit's KL is largest."""
    kl = found["measured"][EDIT]["kl"]
    return max(kl, key=lambda language: kl[language])


def _of_the_language(found: Mapping[str, Any]) -> str:
    asked, original = found["asked"], found["measured"][ORIGINAL]
    if found["verdict"] == UNREAD:
        return (
            f"Without an edit the probe reads {original['probe']:.3f} of the tokens, and chance is "
            f"{asked['chance']:.3f}: it is not shown to read the language, so there is nothing to hide."
        )
    if found["verdict"] == FEW:
        return (
            f"{asked['problems']} problems are too few to say how much of the language the edit hides: a probe needs "
            f"{PROBLEMS} at least."
        )
    if found["verdict"] == NOTHING:
        return "This edit is not shown to hide anything of the language from a linear probe."
    # Of problems from the file of the fit: with their wordings the edit may know the template, and not the language.
    where = "On wordings that it was fitted on, this" if asked.get("worded_as_fitted", 0) >= MOSTLY else "This"
    said = f"{where} edit hides {percent(hidden(found))} of what a linear probe reads of the language above chance."
    more, others = (_counted(found, more) for more in (True, False))
    if found["verdict"] == UNCOMPARED:
        return said + " No random edit that takes directions away was measured beside it."
    said += f" That is more than these random edits of its rank hide: {more}." if more else ""
    return said + (f" It is not shown to be more than these hide: {others}." if others else "")


def _counted(found: Mapping[str, Any], more: bool) -> str:
    """Return the kinds of random edits that the fitted one is, or is not, shown to hide more than, with their p.

    Without `SCALED`, whose edits take no direction away.
    """
    kinds = {name.partition(":")[0]: interval for name, interval in found["difference"].items()}
    kinds = {kind: interval for kind, interval in kinds.items() if kind not in (ORIGINAL, SCALED)}
    chosen = [kind for kind, (_, _, high) in kinds.items() if (high < 0) == more]
    rows = ((kind, found["beside"][kind]["probe"]) for kind in chosen)
    return ", ".join(f"{by['n']} {KINDS[kind]} (p = {by['p']:.2f})" for kind, by in rows)


def read_words(found: Mapping[str, Any]) -> str:
    """Return what the probe reads at the edited layers: after the edit, before it, and after random edits."""
    edit, original, beside = found["measured"][EDIT], found["measured"][ORIGINAL], found["beside"]["all"]["probe"]
    low, high = edit["probe_ci95"]
    return (
        f"a linear probe at layers {spans(found['asked']['layers'])} reads the language of {edit['probe']:.3f} "
        f"({low:.3f} to {high:.3f}) of the tokens; without the edit {original['probe']:.3f}, after random edits "
        f"{ranged(beside)}, by chance {found['asked']['chance']:.3f}"
    )


def stream_words(found: Mapping[str, Any]) -> str:
    """Return what the probe reads in the residual stream, by layer."""
    edit, original = found["measured"][EDIT], found["measured"][ORIGINAL]
    each = "; ".join(
        f"after layer {layer} {value:.3f} (without the edit {original['streams'][layer]:.3f})"
        for layer, value in edit["streams"].items()
    )
    return f"in the residual stream: {each}"


def damage_words(found: Mapping[str, Any]) -> str:
    """Return the damage in the language where it is largest, beside that of random edits and of 4-bit weights."""
    edit, beside, language = found["measured"][EDIT], found["beside"]["all"]["damage"], worst(found)
    fours = found["yardsticks"].get(BITS4, {})
    own = max((name for name in edit["kl"] if edit["words"][name] == edit["word"]), key=lambda name: edit["kl"][name])
    first = f"KL {edit['kl'][own]:.3g} nats per token in {own}; " if own != language else ""
    said = f"{first}largest KL {edit['damage']:.3g} nats per token, in {language}; random edits {ranged(beside, '.3g')}"
    four = f", 4-bit weights {fours[language]:.3g}" if language in fours else ""
    return f"{edit['word']}{of_the_word(found)}: {said}{four}"


def rank_words(found: Mapping[str, Any]) -> str:
    """Return what the numbers of random edits allow: the p-value of each kind, and how many would show less."""
    kinds = [(kind, by["probe"]) for kind, by in found["beside"].items() if kind != "all"]
    each = ", ".join(f"{KINDS[kind]} {by['as_low']} of {by['n']} (p = {by['p']:.2f})" for kind, by in kinds)
    needed = round(1 / SHOWN_P) - 1
    few = [by["n"] for _, by in kinds if by["n"] < needed]
    more = f"; it takes {needed} of a kind to show p = {SHOWN_P:g}" if few else ""
    return f"random edits after which the probe reads as little: {each}{more}"


def text_words(found: Mapping[str, Any]) -> str:
    """Return what was measured on."""
    asked = found["asked"]
    text = "neutral sentences" if asked["text"] == "neutral" else "prompts"
    return (
        f"the probe: {asked['tokens']} tokens of {asked['problems']} test problems in {len(asked['languages'])} "
        f"languages ({', '.join(asked['languages'])}); the damage: {asked['sentences']} {text} in each"
    )


def name_of(name: str) -> str:
    """Return an edit's name as it is shown."""
    kind, _, number = name.partition(":")
    return f"random {KINDS[kind]} {number}" if number else "fitted edit" if name == EDIT else name


def summary(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the head and a row for the original, the fitted edit and every kind of random edits, with their range."""
    layers = list(found["measured"][EDIT]["streams"])
    head = ["", "largest KL", "probe", "means left", *(f"residual stream after {layer}" for layer in layers)]
    head += ["in words"]
    rows = [head]
    for name in (ORIGINAL, EDIT):
        by = found["measured"][name]
        low, high = by["probe_ci95"]
        rows.append(
            [
                *(name_of(name), f"{by['damage']:.3g}", f"{by['probe']:.3f} ({low:.3f} to {high:.3f})"),
                *(f"{by['means']:.3f}", *(f"{by['streams'][layer]:.3f}" for layer in layers)),
                by["word"] if name == EDIT else "",
            ]
        )
    for kind, by in found["beside"].items():
        if kind == "all":
            continue
        ranges = (ranged(by[name]) for name in by if name != "damage")
        said = dict.fromkeys(r["word"] for name, r in found["measured"].items() if name.startswith(f"{kind}:"))
        rows.append([f"{by['probe']['n']} random {KINDS[kind]}", ranged(by["damage"], ".3g"), *ranges, ", ".join(said)])
    return rows


def ranged(by: Mapping[str, float], form: str = ".3f") -> str:
    """Return the range of a figure over random edits: one number where they agree."""
    low, high = (format(by[end], form) for end in ("low", "high"))
    return low if low == high else f"{low} to {high}"


def layer_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the head and a row for every layer: what the probe reads, and what is left of the means."""
    measured = found["measured"]
    random = [by for name, by in measured.items() if name not in (ORIGINAL, EDIT)]
    rows = [["layer", "probe, original", "fitted", "random", "means left, fitted", "random"]]
    for layer, before in measured[ORIGINAL]["probes"].items():
        edit = measured[EDIT]
        probes, left = ([by[name][layer] for by in random] for name in ("probes", "left"))
        rows.append(
            [
                *(layer, f"{before:.3f}", f"{edit['probes'][layer]:.3f}"),
                *(ranged({"low": min(probes), "high": max(probes)}), f"{edit['left'][layer]:.3f}"),
                ranged({"low": min(left), "high": max(left)}),
            ]
        )
    return rows


def shown(found: Mapping[str, Any]) -> str:
    """Return the text that the command prints."""
    return "\n".join(
        [
            sentence(found),
            *found["notes"],
            text_words(found),
            read_words(found),
            stream_words(found),
            f"damage: {damage_words(found)}",
            rank_words(found),
            _aligned(summary(found)),
            "by layer:",
            _aligned(layer_rows(found)),
        ]
    )


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
