"""results.json as one self-contained HTML page.

The first screen says what was edited, the verdict, the damage beside known changes, and the paired differences around
zero. Below it stand the texts that changed, and every figure. Nothing is loaded from the network. Right-to-left text
runs right to left. The building blocks are in `common.page`, the sections in `evaluation.sections`.
"""

import html
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kernel_surgery.certify import page as certificate_page
from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.intervals import Row, around_zero, forest, of_sizes
from kernel_surgery.common.page import Card, contents, document, folded, opening
from kernel_surgery.common.plotting import COLOURS
from kernel_surgery.damage.measure import beyond
from kernel_surgery.damage.words import BELOW, BITS4, BITS8, BROKEN, EIGHT, FOUR, WORDS, WORSE
from kernel_surgery.evaluation import pairs, sections
from kernel_surgery.evaluation.effects import STREAM, reached
from kernel_surgery.evaluation.summary import POOLED
from kernel_surgery.models.architectures import spans

# What a word for the damage is said beside: the yardstick, and its name in a sentence.
BESIDE = {EIGHT: (BITS8, "8-bit weights"), FOUR: (BITS4, "4-bit weights"), WORSE: (BITS4, "4-bit weights")}
TONES = {BELOW: "good", EIGHT: "good", FOUR: "", WORSE: "caution", BROKEN: "bad"}
SHOWN = 2  # languages whose damage is drawn on the first screen


def worst_word(results: Mapping[str, Any]) -> str | None:
    """Return the most severe word of all modes, or None if the damage was not put into words."""
    verdicts = (results.get("damage") or {}).get("verdict") or {}
    return max((verdict["word"] for verdict in verdicts.values()), key=WORDS.index, default=None)


def outcome(paired: list[dict]) -> str:
    """Return the outcome of all comparisons of accuracy, in a few words."""
    counts = {word: sum(r["verdict"] == word for r in paired) for word in ("worse", "improved")}
    said = [f"{word} in {n} of {len(paired)} comparisons" for word, n in counts.items() if n]
    return "accuracy " + " and ".join(said) if said else "no difference in accuracy shown"


def sentence(results: dict) -> str:
    """Return the verdict in a sentence. The words follow the damage's rule and the corrected intervals."""
    if not results["paired"]:
        return "No edited model was compared."
    word, said = worst_word(results), outcome(results["paired"])
    if word is None:
        return f"{said[0].upper()}{said[1:]}. The damage was not measured."
    return f"This edit {damage_said(results['damage'], word)}; {said}."


def damage_said(found: dict, word: str) -> str:
    """Return the damage as the end of a sentence: how many times that of a known change, where that is the most."""
    if word == BROKEN:
        return "breaks the model"
    if word == BELOW:
        return "changes the model less than running it in the other precision"
    yardstick, name = BESIDE[word]
    verdict = next(verdict for verdict in found["verdict"].values() if verdict["word"] == word)
    by = {language: r["ratios"][yardstick] for language, r in verdict["languages"].items() if yardstick in r["ratios"]}
    if not by:
        return f"is {word}"
    language = max(by, key=lambda language: by[language][0])
    where = f" in {language}, where the ratio is the largest" if len(by) > 1 else ""
    return "does {:.2g} times ({:.2g} to {:.2g}) the damage of ".format(*by[language]) + name + where


def facts(results: dict) -> list[tuple[str, str]]:
    """Return what was edited, and how: (name, value)."""
    config, space, model = results["config"], results.get("subspace") or {}, results["model"]
    modes, of = list(results["modes"])[1:], model.get("layers")
    counts = sorted({r["n"] for by in results["modes"].values() for r in by.values()})
    asked = f"{' to '.join(map(str, counts))} in each of {', '.join(config['languages'])}"
    edited = [
        ("layers", spans(space.get("layers") or []) + (f" of {of}" if of else "")),
        ("rank", str(space.get("rank", "")) if space else ""),
        ("method", str((space.get("fit") or {}).get("method", ""))),
        ("strength", f"{config.get('strength', 1):g}"),
        ("mode" if len(modes) == 1 else "modes", ", ".join(modes)),
    ]
    engine = "" if config.get("engine", "transformers") == "transformers" else str(config["engine"])
    run = [("problems", asked), ("at most", f"{config['max_new_tokens']} tokens"), ("dtype", config.get("dtype", ""))]
    return (edited if modes else []) + [*run, ("engine", engine)]


def cards(results: dict) -> Iterator[Card]:
    """Yield the findings of the first screen."""
    found = results.get("damage") or {}
    if (word := worst_word(results)) is not None:
        mode = next(mode for mode, verdict in found["verdict"].items() if verdict["word"] == word)
        kl = ", ".join(f"{lang} {r['kl_mean']:.3g}" for lang, r in found["neutral"][mode].items())
        four = ", ".join(f"{lang} {r['kl_mean']:.3g}" for lang, r in found["yardsticks"].get(BITS4, {}).items())
        more = f"KL {kl} nats per token, on {found['sentences']} sentences each"
        yield Card("Damage", word, more + f". 4-bit weights: {four}" * bool(four), TONES[word])
    if results["paired"]:
        worse = any(r["verdict"] == "worse" for r in results["paired"])
        better = any(r["verdict"] == "improved" for r in results["paired"])
        tone = "bad" if worse else "good" if better else ""
        said = outcome(results["paired"]).removeprefix("accuracy ").removesuffix(" in accuracy shown")
        could = "; ".join(
            f"{r['language']} " + ("none" if r["smallest_shown"] is None else f"{r['smallest_shown']:.3f}")
            for r in results.get("power", [])
        )
        yield Card(
            "Accuracy",
            said + " shown" * said.startswith("no "),
            f"{accuracies(results)}. Smallest difference that can be shown: {could}",
            tone,
        )
    if "probes" in found:
        yield probe_card(found)
    if changed := pairs.changed(results["paired"]):
        mode, (count, of) = max(changed.items(), key=lambda item: item[1][0])
        more = f"in mode {mode}, which changed the most" if len(set(changed.values())) > 1 else "in at least a word"
        yield Card("Texts that changed", f"{count} of {of}", more)
    if certificate := results.get("certificate"):
        faults = certificate["faults"]
        more, tone = (faults[0], "bad") if faults else ("the edit was made within its bounds", "good")
        yield Card("Certificate", f"{len(faults)} failed" if faults else "everything holds", more, tone)


def accuracies(results: dict) -> str:
    """Return the original's accuracy and the edited model's, by language: of the mode that differs most."""
    rows = [r for r in results["paired"] if r["language"] != POOLED]
    mode = max(rows, key=lambda r: abs(r["delta"]))["mode"]
    before, after = results["modes"]["original"], results["modes"][mode]
    each = ((language, before[language]["accuracy"], after[language]["accuracy"]) for language in after)
    return "; ".join(f"{language} {was:.3f}, edited {now:.3f}" for language, was, now in each)


def probe_card(found: dict) -> Card:
    """Return what a linear probe still reads, at the MLP outputs and in the residual stream: the lowest by layer."""
    mode = next(name for name in found["probes"] if name != "original")
    low, before = (
        {site: min(reached(found, mode, by, site).values()) for site, by in found["probes"][name].items()}
        for name in (mode, "original")
    )
    site = next(name for name in low if name != STREAM)
    where = "at the MLP output" if site == "mlp_out" else "after the MLP block's norm"
    return Card(
        "Language, read by a linear probe at the last token",
        f"{low[site]:.2f} (original {before[site]:.2f})",
        f"lowest accuracy over the edited layers {where}, chance {found['chance']:.2f}. "
        f"Residual stream: {low[STREAM]:.2f} ({before[STREAM]:.2f})",
    )


def differences(results: dict, names: Mapping[str, str] | None = None) -> str:
    """Return the paired differences drawn around zero. Modes whose figures are the same share their rows.

    names: what the modes are called, if not by themselves.
    """
    by_mode: dict[str, list[dict]] = {}
    for r in results["paired"]:
        by_mode.setdefault(r["mode"], []).append(r)
    alike: dict[str, list[str]] = {}
    for mode, rows in by_mode.items():
        figures = [(r["language"], r["ci95"], r["delta"], r["verdict"], r.get("equivalent")) for r in rows]
        alike.setdefault(json.dumps(figures), []).append(mode)
    drawn = [_difference(r, modes, names or {}) for modes in alike.values() for r in by_mode[modes[0]]]
    if len(alike) == 1:
        drawn = [replace(row, group="") for row in drawn]
    band = results["paired"][0].get("margin")
    unit = "accuracy, edited minus original, with its 95% interval" + (f"; shaded: within {band:g}" if band else "")
    return "<div><h3>Accuracy: edited minus original</h3>" + forest(drawn, around_zero(drawn, unit, band)) + "</div>"


def _difference(r: dict, modes: list[str], names: Mapping[str, str]) -> Row:
    words = f"{r['delta']:+.3f} {r['verdict'].split(' (')[0]}"
    own = modes[0] if len(modes) == 1 and modes[0] in COLOURS else "fused"
    colour = {"worse": "limit", "improved": "good"}.get(r["verdict"], own)
    group, together = "; ".join(names.get(mode, mode) for mode in modes), r["language"] == POOLED
    where = "all together" if together else r["language"]
    return Row(where, r["ci95"][0], r["delta"], r["ci95"][1], words, colour, not together, group)


def damage_drawn(results: dict) -> str:
    """Return the damage beside the yardsticks, in the two languages with the largest."""
    found = results.get("damage") or {}
    if not found.get("yardsticks") or not found.get("neutral"):
        return ""
    largest = {
        language: max(by[language]["kl_mean"] for by in found["neutral"].values())
        for language in next(iter(found["neutral"].values()))
    }
    languages = sorted(largest, key=lambda language: -largest[language])[:SHOWN]
    rows = sections.damage_rows(found, [language for language in largest if language in languages], all_modes=False)
    more = f" (the worst {SHOWN} of {len(largest)} languages)" if len(largest) > SHOWN else ""
    lost = ", ".join(beyond(found))
    care = f"The original itself predicts this text worse than without context ({lost}): read its damage with care."
    return (
        f"<div><h3>Damage beside known changes{more}</h3>{forest(rows, of_sizes(rows, sections.KL))}"
        + (f"<p class=small>{care}</p>" if lost else "")
        + "</div>"
    )


def first_screen(results: dict) -> str:
    """Return what was edited, the verdict in a sentence, the findings, the damage and the paired differences."""
    over = "Kernel Surgery · evaluation"
    if results["config"]["protocol"] != "strict":
        over += f" · {results['config']['protocol']} protocol"
    drawn = damage_drawn(results) + (differences(results) if results["paired"] else "")
    return (
        opening(over, title(results), facts(results), sentence(results), list(cards(results)))
        + (f"<div class=two>{drawn}</div>" if drawn else "")
        + "".join(f"<p class=note>{html.escape(note)}</p>" for note in results["notes"])
    )


def title(results: dict) -> str:
    """Return the title of the page."""
    name = results["model"]["id"]
    if not results["paired"]:
        return f"{name}, not edited"
    removed = results["config"].get("strength", 1) == 1
    return f"{name}: language subspace " + ("removed from its MLPs" if removed else "edited in its MLPs")


def how(results: dict) -> str:
    """Return the damage as the terminal says it, the command, and the configuration."""
    everything = {k: results[k] for k in ("config", "environment", "model", "subspace", "provider")}
    # The subspace's figures by layer are drawn in its own section, and would fill pages here.
    drawn = ("captured", "spectrum")
    everything["subspace"] = {k: v for k, v in (everything["subspace"] or {}).items() if k not in drawn}
    command, words = results.get("command"), results.get("damage_in_words", "")
    return (
        (f"<p>{html.escape(words)}</p>" if words else "")
        + (f"<pre class=block>{html.escape(command)}</pre>" if command else "")
        + folded("Configuration", f"<pre>{html.escape(json.dumps(everything, indent=2, ensure_ascii=False))}</pre>")
    )


def page(results: dict, texts: pairs.Cells) -> str:
    """Return the report as HTML. texts: {(mode, language): samples}."""
    certificate = results.get("certificate")
    parts = [
        ("Texts", pairs.changed_texts(texts, list(results["modes"]), pairs.changed(results["paired"]))),
        ("Damage", sections.damage(results)),
        ("Erasure", sections.erasure(results)),
        ("Answers", sections.answers(results)),
        ("Controls", sections.control_figures(results)),
        ("Subspace", sections.subspace(results)),
        ("Certificate", certificate_page.body(certificate) if certificate else ""),
        ("How it was run", how(results)),
    ]
    body = first_screen(results) + contents(parts)
    return document(title(results), body, style=pairs.STYLE, script=pairs.SCRIPT)


def write_report(path: Path, results: dict, texts: pairs.Cells) -> None:
    """Write the page as one file that loads nothing else."""
    write_atomic(path, page(results, texts))
