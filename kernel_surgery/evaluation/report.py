"""results.json as one self-contained HTML page: plots, tables, texts side by side, and the configuration.

Nothing is loaded from the network: the style and the plots are in the page. It is readable on a phone, and
right-to-left text runs right to left.
"""

import difflib
import html
import json
import re
from pathlib import Path

from kernel_surgery.certify.render import plot, shown
from kernel_surgery.common.files import write_atomic
from kernel_surgery.evaluation.controls import MEASURE_WORDS, verdict
from kernel_surgery.evaluation.plots import accuracy, budget_curves, controls, probes, spectrum
from kernel_surgery.evaluation.tables import answered_sooner

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
table{border-collapse:collapse;width:100%;font-size:.9rem;margin:1rem 0}
th,td{text-align:start;padding:.35rem .6rem;border-bottom:1px solid #ddd;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap} th.n{text-align:right}
.wide{overflow-x:auto} .wide svg{max-width:none;width:100%;min-width:38rem} td:last-child:not(.n){min-width:13rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font-size:.85rem}
details{margin:1rem 0} summary{cursor:pointer;font-weight:600} .bad{color:#a3261b} .good{color:#19692c}
svg{max-width:100%;height:auto} .note{background:#fff6d8;padding:.6rem .8rem;border-left:4px solid #d9a400}
mark{background:#ffe08a;color:inherit} .small{font-size:.85rem;color:#555}
"""


def table(head: list[str], rows: list[list], numeric_from: int = 1) -> str:
    """Return an HTML table. Every cell is escaped; columns from `numeric_from` on are set as numbers."""

    def cells(tag: str, row: list) -> str:
        # Cells with words may wrap; cells with numbers may not.
        numeric = [i >= numeric_from and (tag == "th" or not re.search("[a-z]{5}", str(c))) for i, c in enumerate(row)]
        return "".join(
            f"<{tag}{' class=n' if n else ''}>{html.escape(str(c))}</{tag}>" for c, n in zip(row, numeric, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<div class=wide><table><tr>{cells('th', head)}</tr>{body}</table></div>"


def wide(picture: str) -> str:
    """Wrap a picture so that a narrow screen scrolls it instead of shrinking it."""
    return f"<div class=wide>{picture}</div>"


def leak_table(found: dict) -> str:
    """Return the leak as a table: what is left in the subspace, by edited layer and site.

    See `evaluation.effects.leaks`.
    """
    rows = [
        [mode, site, *(f"{value:.2g}" for _, value in sorted(by.items(), key=lambda item: int(item[0])))]
        for mode, sites in (found.get("leak") or {}).items()
        for site, by in sites.items()
    ]
    if not rows:
        return ""
    layers = sorted(next(iter(next(iter(found["leak"].values())).values())), key=int)
    return (
        "<p>Leak: norm(U<sup>T</sup> y) / norm(U<sup>T</sup> x), the share of the part inside the subspace that is "
        "left. 0 means that nothing is left. At mlp_out this is what the edit left. In the residual stream "
        "(resid_post) it is mostly what attention and the other layers write.</p>"
        + table(["mode", "site", *(f"layer {layer}" for layer in layers)], rows, 2)
    )


def summary(results: dict) -> str:
    """Return the outcome in one sentence, and one line per comparison. The words follow the corrected interval."""
    if not results["paired"]:
        return ""
    items = ""
    for r in results["paired"]:
        where = "all languages together" if r["language"] == "all" else r["language"]
        small = f", less than {r['margin']:g} in either direction" if r.get("equivalent") else ""
        items += (
            f"<li>{html.escape(r['mode'])}, {html.escape(where)}: {html.escape(r['verdict'])}{small} "
            f"(difference {r['delta']:+.3f}, 95% interval {r['ci95'][0]:+.3f} to {r['ci95'][1]:+.3f}, "
            f"Holm-corrected p {r['holm_p']:.3f})</li>"
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
            "change in FAT, both solved",
            "same texts",
            "verdict",
        ]
        out += "<p>Differences in accuracy, edited minus original:</p>" + table(head, paired, 2)
        out += (
            "<p class=small>n: problems. Gained, lost: answers that only the edited model or only the original model "
            "got right. p: McNemar's exact test; for all languages together, a test over problems. Holm p: the same, "
            "corrected for all comparisons. Change in FAT: on the problems that both models solved. Same texts: texts "
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
    picture = spectrum(info["captured"], info["spectrum"], info["rank"])
    return (
        f"<h2>The subspace</h2><p>Rank {info['rank']}, fitted at {html.escape(str(info['site']))}. Left: the share of "
        "the variance between languages that the subspace holds, by layer. Right: the singular values, relative to the "
        f"first; the red line marks the rank.</p>{wide(picture)}"
    )


def damage_section(results: dict) -> str:
    """Return the divergence and perplexity on neutral text, and the probes."""
    effects = results.get("damage")
    if not effects or not effects["neutral"]:
        return ""
    rows = [
        [
            *(mode, language, f"{r['kl_mean']:.4f}", f"{r['kl_p99']:.3f}"),
            *(f"{r['original_perplexity']:.4g}", f"{r['perplexity']:.4g}", r["tokens"]),
        ]
        for mode, by in effects["neutral"].items()
        for language, r in by.items()
    ]
    head = ["mode", "language", "KL mean", "KL 99th percentile", "perplexity, original", "perplexity, edited", "tokens"]
    return (
        "<h2>Damage and erasure</h2><p>What else the edit changed, on eight neutral sentences per language: the "
        "divergence KL(original || edited) in nats per token, and the perplexity of both models.</p>"
        + table(head, rows, 2)
        + "<p>Accuracy of a linear probe that reads the language at the last prompt token, on held-out problems:</p>"
        + wide(probes(effects))
        + leak_table(effects)
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
        "not come from language. Diamond: the fitted subspace. Bar: the original model. Dots: random subspaces.</p>"
        f"{wide(controls(data))}"
        + table(["language", "measure", "fitted", "percentile", "p", "Holm p", "verdict"], rows, 2)
    )


def certificate_section(results: dict) -> str:
    """Return the certificate's plot and verdict, if there is a certificate."""
    certificate = results.get("certificate")
    if not certificate:
        return ""

    return (
        f"<h2>Certificate</h2>{plot(certificate)}<details><summary>Figures</summary>"
        f"<pre class=wide>{html.escape(shown(certificate))}</pre></details>"
    )


def marked(before: str, after: str) -> tuple[str, str]:
    """Return two texts as HTML with their differences marked.

    They are compared by words, or by characters in scripts without spaces.
    """
    pieces = [
        re.findall(r"[A-Za-z\u00c0-\u024f\u0600-\u06ff\uac00-\ud7af]+|\d+|\s+|.", text) for text in (before, after)
    ]
    matcher = difflib.SequenceMatcher(a=pieces[0], b=pieces[1], autojunk=False)
    out = ["", ""]
    for tag, a, b, c, d in matcher.get_opcodes():
        for side, (start, stop) in enumerate(((a, b), (c, d))):
            text = html.escape("".join(pieces[side][start:stop]))
            out[side] += f"<mark>{text}</mark>" if tag != "equal" and text else text
    return out[0], out[1]


def changed_texts(cells: dict, modes: list[str], limit: int = 12) -> str:
    """Return the original and the edited texts side by side, with their differences marked.

    Pairs in which only one text is right come first. limit: pairs per mode and language.
    """
    blocks = []
    for mode in modes[1:]:
        for (cell_mode, language), cell in cells.items():
            if cell_mode != mode:
                continue
            pairs = list(zip(cells["original", language], cell, strict=True))
            pairs.sort(key=lambda p: (p[0]["correct"] == p[1]["correct"], p[0]["text"] == p[1]["text"]))
            rows = ""
            for before, after in pairs[:limit]:
                texts = marked(before["text"], after["text"])
                columns = "".join(
                    f"<td dir=auto class={'good' if s['correct'] else 'bad'}><pre dir=auto>{text}</pre></td>"
                    for s, text in zip((before, after), texts, strict=True)
                )
                prompt = html.escape(f"{before['prompt']}  [{before['answer']}]")
                rows += f"<tr><td dir=auto>{prompt}</td>{columns}</tr>"
            blocks.append(
                f"<details><summary>{html.escape(mode)}, {html.escape(language)}: texts</summary><div class=wide>"
                f"<table><tr><th>prompt [answer]</th><th>original</th><th>{html.escape(mode)}</th></tr>{rows}</table>"
                "</div></details>"
            )
    return "".join(blocks)


def write_report(path: Path, results: dict, cells: dict) -> None:
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
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(subject(results))}</p>
{"".join(f"<p class=note>{html.escape(note)}</p>" for note in results["notes"])}
{summary(results)}
{accuracy(results)}
<h2>Answers</h2>
{answers(results)}
<h2>Accuracy by budget</h2>
<p class=small>The accuracy if every text were cut off after fewer tokens.</p>
{wide(budget_curves(results)) if len(results["config"]["languages"]) > 2 else budget_curves(results)}
{controls_section(results)}
{damage_section(results)}
{subspace_section(results)}
{certificate_section(results)}
<h2>Texts</h2>
<p class=small>Green: right. Red: wrong. Differences are marked. Problems that only one model solved come first.</p>
{changed_texts(cells, list(results["modes"]))}
<h2>Reproduce</h2>
{f"<pre>{html.escape(command)}</pre>" if command else ""}
<details><summary>Configuration</summary><pre>{html.escape(json.dumps(everything, indent=2, ensure_ascii=False))}</pre>
</details></body></html>
"""
    write_atomic(path, page)
