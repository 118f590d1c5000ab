"""results.json as one self-contained page: a plot, the tables, texts side by side, and the configuration."""

import html
import io
import json
from pathlib import Path

from kernel_surgery import cli

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
table{border-collapse:collapse;width:100%;font-size:.9rem;margin:1rem 0}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid #ddd;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap} th.n{text-align:right}
.wide{overflow-x:auto} pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font-size:.85rem}
details{margin:1rem 0} summary{cursor:pointer;font-weight:600} .bad{color:#a3261b} .good{color:#19692c}
img{max-width:100%;height:auto} .note{background:#fff6d8;padding:.6rem .8rem;border-left:4px solid #d9a400}
"""


def accuracy_plot(results: dict) -> str:
    """Accuracy with 95% Wilson intervals by language and mode, as inline SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    modes, languages = list(results["modes"]), results["config"]["languages"]
    figure = Figure(figsize=(1.6 + 1.3 * len(languages), 3.2), layout="constrained")
    axes = figure.subplots()
    colours = ("#6b7280", "#0b6e99", "#c2571a", "#4b7a2b")
    width = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        cells = [results["modes"][mode][language] for language in languages]
        at = [j - 0.4 + width * (i + 0.5) for j in range(len(languages))]
        heights = [c["accuracy"] for c in cells]
        error = [
            [c["accuracy"] - c["ci95"][0] for c in cells],
            [c["ci95"][1] - c["accuracy"] for c in cells],
        ]
        axes.bar(at, heights, width * 0.92, yerr=error, capsize=3, label=mode, color=colours[i % len(colours)])
    axes.set_xticks(range(len(languages)), languages)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("accuracy (95% Wilson interval)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(modes), frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def table(head: list[str], rows: list[list], numeric_from: int = 1) -> str:
    """An HTML table; every cell is escaped, columns from `numeric_from` on are set as numbers."""

    def cells(tag: str, row: list) -> str:
        return "".join(
            f"<{tag}{' class=n' if i >= numeric_from else ''}>{html.escape(str(c))}</{tag}>" for i, c in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<div class=wide><table><tr>{cells('th', head)}</tr>{body}</table></div>"


def summary(results: dict) -> str:
    """One sentence a comparison: the words follow the corrected interval."""
    if not results["paired"]:
        return "<p>The original model alone was asked; nothing is compared.</p>"
    items = "".join(
        f"<li>{html.escape(r['mode'])}, {html.escape(r['language'])}: {html.escape(r['verdict'])} "
        f"(difference {r['delta']:+.3f}, 95% interval {r['ci95'][0]:+.3f} to {r['ci95'][1]:+.3f}, "
        f"Holm-corrected p {r['holm_p']:.3f}; {r['same_text']} of {r['n']} texts are the same)</li>"
        for r in results["paired"]
    )
    return f"<p>Accuracy against the original model, on the same problems:</p><ul>{items}</ul>"


def changed_texts(cells: dict, modes: list[str], limit: int = 12) -> str:
    """Original and edited text side by side, where one is right and the other wrong first."""
    blocks = []
    for mode in modes[1:]:
        for (cell_mode, language), cell in cells.items():
            if cell_mode != mode:
                continue
            pairs = list(zip(cells["original", language], cell, strict=True))
            pairs.sort(key=lambda p: (p[0]["correct"] == p[1]["correct"], p[0]["text"] == p[1]["text"]))
            rows = ""
            for before, after in pairs[:limit]:
                columns = "".join(
                    f"<td dir=auto class={'good' if s['correct'] else 'bad'}><pre>{html.escape(s['text'])}</pre></td>"
                    for s in (before, after)
                )
                asked = html.escape(f"{before['prompt']}  [{before['answer']}]")
                rows += f"<tr><td dir=auto>{asked}</td>{columns}</tr>"
            blocks.append(
                f"<details><summary>{html.escape(mode)}, {html.escape(language)}: texts</summary><div class=wide>"
                f"<table><tr><th>prompt [answer]</th><th>original</th><th>{html.escape(mode)}</th></tr>{rows}</table>"
                "</div></details>"
            )
    return "".join(blocks)


def write_report(path: Path, results: dict, cells: dict) -> None:
    """Write the page: one file, nothing fetched."""
    modes = list(results["modes"])
    rates = [
        [
            mode,
            language,
            f"{r['correct']}/{r['n']}",
            f"{r['accuracy']:.3f} ({r['ci95'][0]:.3f} to {r['ci95'][1]:.3f})",
            f"{r['fat_tokens']:.1f}",
            "-" if r["language_fidelity"] is None else f"{r['language_fidelity']:.3f}",
            f"{r['coverage']:.3f}",
        ]
        for mode, by in results["modes"].items()
        for language, r in by.items()
    ]
    categories = list(next(iter(next(iter(results["modes"].values())).values()))["by_category"])
    by_category = [
        [mode, language, *(f"{r['by_category'][c]['correct']}/{r['by_category'][c]['n']}" for c in categories)]
        for mode, by in results["modes"].items()
        for language, r in by.items()
    ]
    config = results["config"]
    title = f"{results['model']['id']}: {config['mode']}, {config['protocol']} protocol"
    everything = {k: results[k] for k in ("config", "environment", "model", "subspace", "provider")}
    page = f"""<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{"".join(f"<p class=note>{html.escape(note)}</p>" for note in results["notes"])}
{summary(results)}
{accuracy_plot(results)}
<h2>Answers</h2>
{table(["mode", "language", "correct", "accuracy (95% interval)", "FAT", "fidelity", "coverage"], rates, 2)}
<p>FAT: tokens until the right answer is complete, a problem not solved counting {config["max_new_tokens"]}.
Fidelity: share of judged texts without a line in another language; coverage: share that could be judged.</p>
<h2>By category</h2>
{table(["mode", "language", *categories], by_category, 2)}
<h2>Texts</h2>
{changed_texts(cells, modes)}
<details><summary>Configuration</summary><pre>{html.escape(json.dumps(everything, indent=2, ensure_ascii=False))}</pre>
</details></body></html>
"""
    cli.write_atomic(path, page)
