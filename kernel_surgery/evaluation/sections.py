"""The sections of the report below its first screen, as HTML made from results.json."""

import html

from kernel_surgery.common.intervals import Axis, Row, forest, of_sizes
from kernel_surgery.common.page import folded, panels, table
from kernel_surgery.common.plotting import COLOURS
from kernel_surgery.damage.measure import HEAD, cells, named, rows_of
from kernel_surgery.damage.words import RULE
from kernel_surgery.evaluation.controls import MEASURE_WORDS, verdict
from kernel_surgery.evaluation.plots import budget_curves, controls, probes, spectrum
from kernel_surgery.evaluation.tables import answered_sooner


def damage_rows(found: dict, languages: list[str], *, all_modes: bool = True) -> list[Row]:
    """Return the mean KL of the edits and yardsticks in these languages, from mild to severe in each.

    all_modes: every mode, where those with the same printed figure share a row; or only the one with the largest KL,
    which is then called "this edit".
    """
    rows = []
    for language in languages:
        edits = {mode: by[language] for mode, by in found["neutral"].items()}
        worst = max(edits, key=lambda mode: edits[mode]["kl_mean"])
        alike: dict[str, list[str]] = {}
        for mode, r in edits.items() if all_modes else [(worst, edits[worst])]:
            alike.setdefault(f"{r['kl_mean']:.3g}", []).append(mode)
        group, mine = language if len(languages) > 1 else "", []
        for modes in alike.values():
            colour = modes[0] if all_modes and len(modes) == 1 and modes[0] in COLOURS else "fused"
            label = ", ".join(modes) if all_modes else "this edit"
            mine.append(_damage_row(label, edits[modes[0]], colour, group))
        for name, by in found["yardsticks"].items():
            mine.append(_damage_row(named(name, found), by[language], "other", group))
        rows += sorted(mine, key=lambda row: row.value)
    return rows


def _damage_row(label: str, r: dict, colour: str, group: str) -> Row:
    words = f"{r['kl_mean']:.3g}"
    return Row(label, r["kl_ci95"][0], r["kl_mean"], r["kl_ci95"][1], words, colour, colour != "other", group)


KL = "KL(original || changed), nats per token, with its 95% interval"


def damage(results: dict) -> str:
    """Return the damage beside the yardsticks: the rule, a drawing and the table."""
    found = results.get("damage")
    if found and found.get("losses"):
        return losses(found["losses"])
    if not found or not found.get("yardsticks"):
        return ""
    rows = damage_rows(found, list(next(iter(found["neutral"].values()))))
    return (
        f"<p>What the edit did to the model's predictions on {found['sentences']} everyday sentences per language "
        f"without any maths (the {found['split']} half), beside known changes of the same model. 0 nats would mean the "
        "same predictions. A random edit has the rank, layers and strength of the edit: uniform, or matched to the "
        "activations' covariance.</p>"
        + forest(rows, of_sizes(rows, KL))
        + folded("Figures", table(HEAD, [cells(row) for row in rows_of(found)], 2, words=[6]))
        + f"<p class=small>{html.escape(RULE)}</p>"
    )


def losses(found: dict) -> str:
    """Return what an engine's log probabilities say of the damage: the ratio of perplexities."""
    rows = []
    for mode, by in found.items():
        for language, r in by.items():
            low, high = r["perplexity_ratio_ci95"]
            ratio = f"{r['perplexity_ratio']:.4g} ({low:.4g} to {high:.4g})"
            rows.append([mode, language, f"{r['original_perplexity']:.4g}", f"{r['perplexity']:.4g}", ratio])
    sentences = next(iter(next(iter(found.values())).values()))["sentences"]
    return (
        f"<p>Perplexity of {sentences} everyday sentences per language without any maths, from the "
        "engine's log probabilities of prompts. An engine gives no logits, which KL and the words for damage need.</p>"
        + table(["mode", "language", "original", "edited", "ratio (95% CI)"], rows, 2)
    )


def answers(results: dict) -> str:
    """Return accuracy by mode and language, the paired differences, and the accuracy at shorter budgets."""
    drawn = [
        Row(mode, r["ci95"][0], r["accuracy"], r["ci95"][1], f"{r['correct']}/{r['n']}", mode, True, language)
        for language in results["config"]["languages"]
        for mode, by in results["modes"].items()
        for r in [by[language]]
    ]
    low = min(row.low for row in drawn)
    axis = Axis(0.0 if low < 0.5 else int(low * 10) / 10, 1.0, "accuracy, with its 95% interval")
    return (
        forest(drawn, axis)
        + folded("Figures", rates(results) + paired(results))
        + folded("By kind of problem", by_category(results))
        + "<h3>If every text were cut off after fewer tokens</h3>"
        + panels(budget_curves(results), list(results["modes"]))
    )


def rates(results: dict) -> str:
    """Return the table of rates by mode and language."""
    rows = [
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
    return table([*head, "tokens", "finished", "repeated"], rows, 2) + (
        f"<p class=small>FAT (first answer token): mean number of tokens until the right answer is complete. A problem "
        f"that was not solved counts as {results['config']['max_new_tokens']}. Fidelity: share of the judged texts "
        "with no line in another language. Judged: share of the texts whose language could be judged. Tokens: mean "
        "length of a text. Finished: share of the texts that ended before the limit. Repeated: share of four-word "
        "runs that occurred before in the same text.</p>"
    )


def paired(results: dict) -> str:
    """Return the table of the paired differences."""
    rows = [
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
    if not rows:
        return ""
    head = ["mode", "language", "n", "gained / lost", "difference (95% interval)", "p", "Holm p", "FAT change"]
    return (
        "<p>Differences in accuracy, edited minus original:</p>"
        + table([*head, "same texts", "verdict"], rows, 2, words=[9])
        + "<p class=small>n: problems. Gained, lost: answers that only the edited model or only the original model "
        "got right. p: McNemar's exact test; for all languages together, a test over problems. Holm p: the same, "
        "corrected for all comparisons. FAT change: on the problems that both models solved. Same texts: texts "
        "that the edit did not change.</p>"
    )


def by_category(results: dict) -> str:
    """Return the table of correct answers by kind of problem."""
    categories = list(next(iter(next(iter(results["modes"].values())).values()))["by_category"])
    rows = [
        [mode, language, *(f"{r['by_category'][c]['correct']}/{r['by_category'][c]['n']}" for c in categories)]
        for mode, by in results["modes"].items()
        for language, r in by.items()
    ]
    return "<p class=small>Correct answers of problems.</p>" + table(["mode", "language", *categories], rows, 2)


def erasure(results: dict) -> str:
    """Return what the probes still read, and the leak."""
    found = results.get("damage")
    if not found or "probes" not in found:
        return ""
    return (
        "<p>Accuracy of a linear probe that reads the language at the last prompt token, on held-out problems. An edit "
        "that hides the language brings it down to chance. <code>python -m kernel_surgery.probe</code> reads every "
        "token, beside random edits.</p>"
        + panels(probes(found), list(found["probes"]))
        + folded("Leak: what is left inside the subspace", leak_table(found))
    )


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
        "<p>norm(U<sup>T</sup> y) / norm(U<sup>T</sup> x): the share of the part inside the subspace that is "
        "left. 0 means that nothing is left. At mlp_out this is what the edit left. In the residual stream "
        "(resid_post) it is mostly what attention and the other layers write.</p>" + table(["layer", *columns], rows)
    )


def control_figures(results: dict) -> str:
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
        f"<p>{data['count']} random subspaces ({html.escape(data['kind'])}) of the same rank, at "
        f"the same layers and site, on {data['problems']} problems per language. If they have the same effect, it does "
        "not come from language.</p>"
        + panels(controls(data), more=["◆ fitted subspace", "| original model", "● random subspace"])
        + folded(
            "Figures", table(["language", "measure", "fitted", "percentile", "p", "Holm p", "verdict"], rows, 2, [6])
        )
    )


def subspace(results: dict) -> str:
    """Return the spectrum and the captured variance, if the subspace records them."""
    info = results.get("subspace") or {}
    if not info.get("captured"):
        return ""
    pictures = spectrum(info["captured"], info["spectrum"], info["rank"])
    return f"<p>Rank {info['rank']}, fitted at {html.escape(str(info['site']))}.</p>{panels(pictures)}"
