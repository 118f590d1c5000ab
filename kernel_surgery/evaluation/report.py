"""results.json as one self-contained HTML page: plots, tables, texts side by side, and the configuration.

Nothing is loaded from the network: the style and the plots are in the page. It is readable on a phone, and
right-to-left text runs right to left. Its building blocks are in `evaluation.page`.
"""

import html
import json
from collections.abc import Iterable
from pathlib import Path

from kernel_surgery.certify import render
from kernel_surgery.certify.tables import across_legend, across_sampled, across_table
from kernel_surgery.common.files import write_atomic
from kernel_surgery.damage.measure import HEAD, cells, rows_of
from kernel_surgery.damage.words import BROKEN, RULE
from kernel_surgery.evaluation.controls import MEASURE_WORDS, verdict
from kernel_surgery.evaluation.page import STYLE, panels, table, texts_table
from kernel_surgery.evaluation.plots import accuracy, budget_curves, controls, damage, probes, spectrum
from kernel_surgery.evaluation.tables import answered_sooner


def leak_table(found: dict) -> str:
    """Return the leak as a table: what is left in the subspace, by edited layer and site.

    See `evaluation.effects.leaks`.
    """
    columns = {f"{mode}, {site}": by for mode, sites in (found.get("leak") or {}).items() for site, by in sites.items()}
    if not columns:
        return ""
    layers = sorted(next(iter(columns.values())), key=int)
    rows = [[layer, *(f"{by[layer]:.2g}" if layer in by else "-" for by in columns.values())] for layer in layers]
    return (
        "<p>Leak: norm(U<sup>T</sup> y) / norm(U<sup>T</sup> x), the share of the part inside the subspace that is "
        "left. 0 means that nothing is left. At mlp_out this is what the edit left. In the residual stream "
        "(resid_post) it is mostly what attention and the other layers write.</p>" + table(["layer", *columns], rows)
    )


def summary(results: dict) -> str:
    """Return the outcome in one sentence, and one line per comparison. The words follow the corrected interval."""
    if not results["paired"]:
        return ""
    modes_of: dict[str, list[str]] = {}
    for r in results["paired"]:
        where = "all languages together" if r["language"] == "all" else r["language"]
        small = f", less than {r['margin']:g} in either direction" if r.get("equivalent") else ""
        line = (
            f"{where}: {r['verdict']}{small} (difference {r['delta']:+.3f}, 95% interval {r['ci95'][0]:+.3f} to "
            f"{r['ci95'][1]:+.3f}, Holm-corrected p {r['holm_p']:.3f})"
        )
        # Modes that make the same edit often have the same figures.
        modes_of.setdefault(line, []).append(r["mode"])
    items = "".join(
        f"<li>{html.escape(', '.join(modes))}{' alike' * (len(modes) > 1)}, {html.escape(line)}</li>"
        for line, modes in modes_of.items()
    )
    could = "; ".join(
        f"{r['language']} " + ("none" if r["smallest_shown"] is None else f"{r['smallest_shown']:.3f}")
        for r in results.get("power", [])
    )
    return (
        f"<p><strong>{outcome(results['paired'])}</strong></p><ul>{items}</ul>"
        f"<p class=small>Smallest difference that these numbers of problems and comparisons can detect: {could}.</p>"
    )


def outcome(paired: list[dict]) -> str:
    """Return the outcome of all comparisons in one sentence."""
    counts = {word: sum(r["verdict"] == word for r in paired) for word in ("improved", "worse")}
    same = len(paired) - sum(counts.values())
    if not any(counts.values()):
        return f"Result: none of the {len(paired)} comparisons shows a difference in accuracy."
    return (
        f"Result: of {len(paired)} comparisons, accuracy improved in {counts['improved']} and got worse in "
        f"{counts['worse']}; {same} show no difference."
    )


def subject(results: dict) -> str:
    """Return the sentences that say which models answered which problems."""
    config, space = results["config"], results.get("subspace") or {}
    counts = sorted({r["n"] for by in results["modes"].values() for r in by.values()})
    problems = f"{' to '.join(map(str, counts))} maths problems in each language ({', '.join(config['languages'])})"
    answered = f"Texts were decoded greedily, with at most {config['max_new_tokens']} new tokens."
    modes = list(results["modes"])[1:]
    if not modes:
        return f"The original model answered {problems}. No edited model was compared. {answered}"
    layers = f" from the MLP outputs of layers {ranges(space['layers'])}" if space.get("layers") else ""
    rank, strength = f"rank {space.get('rank', 'unknown')}", config.get("strength", 1)
    edit = "removed" if strength == 1 else f"edited at strength {strength:g}"
    ways = f" The edit was made in {len(modes)} ways: {', '.join(modes)}." if len(modes) > 1 else f" Mode: {modes[0]}."
    return (
        f"This page compares the original model with the same model after an edit: its language subspace ({rank}) is "
        f"{edit}{layers}.{ways} They answered the same {problems}. {answered}"
    )


def ranges(layers: list[int]) -> str:
    """Return layers as "2 to 5", or as a list if there are gaps."""
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def answers(results: dict) -> str:
    """Return the rates by mode and language, and the paired differences."""
    rates = [
        [
            mode,
            language,
            f"{r['correct']}/{r['n']}",
            f"{r['accuracy']:.3f} ({r['ci95'][0]:.3f} to {r['ci95'][1]:.3f})",
            f"{r['fat_tokens']:.1f}",
            "-" if r["language_fidelity"] is None else f"{r['language_fidelity']:.3f}",
            f"{r['coverage']:.3f}",
            f"{r['mean_tokens']:.1f}",
            f"{r['stopped']:.3f}",
            f"{r['repetition']:.3f}",
        ]
        for mode, by in results["modes"].items()
        for language, r in by.items()
    ]
    head = ["mode", "language", "correct", "accuracy (95% interval)", "FAT", "fidelity", "judged"]
    out = table([*head, "tokens", "finished", "repeated"], rates, 2)
    out += (
        f"<p class=small>FAT (first answer token): mean number of tokens until the right answer is complete. A problem "
        f"that was not solved counts as {results['config']['max_new_tokens']}. Fidelity: share of the judged texts "
        "with no line in another language. Judged: share of the texts whose language could be judged. Tokens: mean "
        "length of a text. Finished: share of the texts that ended before the limit. Repeated: share of four-word "
        "runs that occurred before in the same text.</p>"
    )
    paired = [
        [
            r["mode"],
            r["language"],
            r["n"],
            f"{r['gained']} / {r['lost']}",
            f"{r['delta']:+.3f} ({r['ci95'][0]:+.3f} to {r['ci95'][1]:+.3f})",
            f"{r.get('mcnemar_p', r.get('p')):.3f}",
            f"{r['holm_p']:.3f}",
            answered_sooner(r).partition(f"{r['mode']} {r['language']} ")[2],
            r["same_text"],
            r["verdict"] + (f", within {r['margin']:g}" if r.get("equivalent") else ""),
        ]
        for r in results["paired"]
    ]
    if paired:
        head = [
            "mode",
            "language",
            "n",
            "gained / lost",
            "difference (95% interval)",
            "p",
            "Holm p",
            "FAT change",
            "same texts",
            "verdict",
        ]
        out += "<p>Differences in accuracy, edited minus original:</p>" + table(head, paired, 2, words=[9])
        out += (
            "<p class=small>n: problems. Gained, lost: answers that only the edited model or only the original model "
            "got right. p: McNemar's exact test; for all languages together, a test over problems. Holm p: the same, "
            "corrected for all comparisons. FAT change: on the problems that both models solved. Same texts: texts "
            "that the edit did not change.</p>"
        )
    categories = list(next(iter(next(iter(results["modes"].values())).values()))["by_category"])
    by_category = [
        [mode, language, *(f"{r['by_category'][c]['correct']}/{r['by_category'][c]['n']}" for c in categories)]
        for mode, by in results["modes"].items()
        for language, r in by.items()
    ]
    title = "<h2>By category</h2><p class=small>Correct answers and problems, by kind of problem.</p>"
    return out + title + table(["mode", "language", *categories], by_category, 2)


def subspace_section(results: dict) -> str:
    """Return the spectrum and the captured variance, if the subspace records them."""
    info = results.get("subspace") or {}
    if not info.get("captured"):
        return ""
    pictures = spectrum(info["captured"], info["spectrum"], info["rank"])
    return (
        f"<h2>The subspace</h2><p>Rank {info['rank']}, fitted at {html.escape(str(info['site']))}. First: the share of "
        "the variance between languages that the subspace holds, by layer. Second: the singular values, relative to "
        f"the first; the red line marks the rank.</p>{panels(pictures)}"
    )


def damage_section(results: dict) -> str:
    """Return the damage beside the yardsticks: the rule, a picture and the table."""
    found = results.get("damage")
    if found and found.get("losses"):
        return losses_section(found["losses"])
    if not found or not found.get("yardsticks"):
        return ""
    rows = [cells(row) for row in rows_of(found)]
    return (
        f"<h2>Damage</h2><p>What the edit did to the model's predictions on {found['sentences']} everyday sentences "
        f"per language without any maths (the {found['split']} half), beside known changes of the same model. "
        "KL(original || changed) is in nats per token, with its 95% interval; 0 means the same predictions. A random "
        "edit has the rank, layers and strength of the edit: uniform, or matched to the activations' covariance.</p>"
        + panels(damage(found), list(found["neutral"]), ["grey: known changes, to compare with"])
        + table(HEAD, rows, 2, words=[6])
        + f"<p class=small>{html.escape(RULE)}</p>"
    )


def losses_section(losses: dict) -> str:
    """Return what an engine's log probabilities say of the damage: the ratio of perplexities."""
    rows = []
    for mode, by in losses.items():
        for language, r in by.items():
            low, high = r["perplexity_ratio_ci95"]
            ratio = f"{r['perplexity_ratio']:.4g} ({low:.4g} to {high:.4g})"
            rows.append([mode, language, f"{r['original_perplexity']:.4g}", f"{r['perplexity']:.4g}", ratio])
    sentences = next(iter(next(iter(losses.values())).values()))["sentences"]
    return (
        f"<h2>Damage</h2><p>Perplexity of {sentences} everyday sentences per language without any maths, from the "
        "engine's log probabilities of prompts. An engine gives no logits, which KL and the words for damage need.</p>"
        + table(["mode", "language", "original", "edited", "ratio (95% CI)"], rows, 2)
    )


def erasure_section(results: dict) -> str:
    """Return what the probes still read, and the leak."""
    found = results.get("damage")
    if not found or "probes" not in found:
        return ""
    return (
        "<h2>Erasure</h2><p>Accuracy of a linear probe that reads the language at the last prompt token, on held-out "
        "problems:</p>" + panels(probes(found), list(found["probes"])) + leak_table(found)
    )


def controls_section(results: dict) -> str:
    """Return the plot of the controls and the verdicts on them."""
    data = results.get("controls")
    if not data:
        return ""

    rows = [
        [
            language,
            MEASURE_WORDS[measure],
            f"{data['real'][language][measure]:.3f}",
            f"{p['percentile']:.2f}",
            f"{p['p']:.3f}",
            f"{p['holm_p']:.3f}",
            verdict(p),
        ]
        for language, measures in data["percentiles"].items()
        for measure, p in measures.items()
        if "holm_p" in p
    ]
    return (
        f"<h2>Controls</h2><p>{data['count']} random subspaces ({html.escape(data['kind'])}) of the same rank, at "
        f"the same layers and site, on {data['problems']} problems per language. If they have the same effect, it does "
        "not come from language.</p>"
        + panels(controls(data), more=["◆ fitted subspace", "| original model", "● random subspace"])
        + table(["language", "measure", "fitted", "percentile", "p", "Holm p", "verdict"], rows, 2, words=[6])
    )


def certificate_section(results: dict) -> str:
    """Return the certificate's verdict, plots and figures, if there is a certificate."""
    certificate = results.get("certificate")
    if not certificate:
        return ""

    def paragraphs(lines: Iterable[str]) -> str:
        return "".join(f"<p class=small>{html.escape(line)}</p>" for line in lines)

    pictures, modes = render.panels(certificate)
    model = certificate.get("model")
    figures = ""
    if certificate["tensors"]:
        figures += table(*render.tensor_table(certificate["tensors"]), keys=1, words=[1, 2])
    if model:
        figures += paragraphs(render.sampled(model).split("\n"))
        figures += "<p>Error over its bound, by layer (a check fails above 1):</p>"
        figures += table(*render.layer_table(model), words=[len(model["modes"]) + 7]) + paragraphs(render.LAYER_LEGEND)
        figures += "<p>Logits against the oracle's:</p>"
        figures += table(*render.logit_table(model), keys=1, words=[1, 9]) + paragraphs(render.LOGIT_LEGEND)
    if across := certificate.get("across_engines"):
        figures += paragraphs(across_sampled(across)) + table(*across_table(across))
        figures += paragraphs(across_legend(across))
    faults = "".join(f"<li class=bad>{html.escape(fault)}</li>" for fault in certificate["faults"])
    return (
        f"<h2>Certificate</h2><p><strong>{html.escape(render.verdict(certificate))}</strong></p><ul>{faults}</ul>"
        f"{panels(pictures, modes, render.MARKS)}"
        f"<details><summary>Figures</summary>{figures}</details>"
    )


def changed_texts(texts: dict, modes: list[str], limit: int = 12) -> str:
    """Return the original and the edited texts side by side, with their differences marked.

    Pairs in which only one text is right come first. limit: pairs per mode and language.
    """
    blocks = []
    for mode in modes[1:]:
        for (cell_mode, language), cell in texts.items():
            if cell_mode != mode:
                continue
            pairs = list(zip(texts["original", language], cell, strict=True))
            pairs.sort(key=lambda p: (p[0]["correct"] == p[1]["correct"], p[0]["text"] == p[1]["text"]))
            blocks.append(texts_table(mode, language, pairs[:limit]))
    return "".join(blocks)


def headline(results: dict) -> str:
    """Return the damage in words, which is the first paragraph."""
    words = results.get("damage_in_words", "")
    verdicts = (results.get("damage") or {}).get("verdict", {}).values()
    broken = any(verdict["word"] == BROKEN for verdict in verdicts)
    return f"<p class='note{' bad' * broken}'><strong>{html.escape(words)}</strong></p>" if words else ""


def write_report(path: Path, results: dict, texts: dict) -> None:
    """Write the page as one file that loads nothing else."""
    config = results["config"]
    title = f"{results['model']['id']} with and without its language subspace"
    if not results["paired"]:
        title = f"{results['model']['id']}, not edited"
    if config["protocol"] != "strict":
        title += f" ({config['protocol']} protocol)"
    everything = {k: results[k] for k in ("config", "environment", "model", "subspace", "provider")}
    command = results.get("command")
    page = f"""<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{headline(results)}
<p>{html.escape(subject(results))}</p>
{"".join(f"<p class=note>{html.escape(note)}</p>" for note in results["notes"])}
{summary(results)}
{damage_section(results)}
{panels(accuracy(results), list(results["modes"]))}
<h2>Answers</h2>
{answers(results)}
<h2>Accuracy by budget</h2>
<p class=small>The accuracy if every text were cut off after fewer tokens.</p>
{panels(budget_curves(results), list(results["modes"]))}
{controls_section(results)}
{erasure_section(results)}
{subspace_section(results)}
{certificate_section(results)}
<h2>Texts</h2>
<p class=small>Green: right. Red: wrong. Differences are marked. Problems that only one model solved come first.</p>
{changed_texts(texts, list(results["modes"]))}
<h2>Reproduce</h2>
{f"<pre>{html.escape(command)}</pre>" if command else ""}
<details><summary>Configuration</summary><pre>{html.escape(json.dumps(everything, indent=2, ensure_ascii=False))}</pre>
</details></body></html>
"""
    write_atomic(path, page)
