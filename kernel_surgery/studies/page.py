"""study.json of a search as one self-contained HTML page, report.html. Its building blocks are in `evaluation.page`."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernel_surgery.common.files import write_atomic
from kernel_surgery.damage.words import RULE
from kernel_surgery.evaluation.page import STYLE, panels, table
from kernel_surgery.studies.front import difference_in_words, pictures

REPORT = "report.html"


def write_page(study: Mapping[str, Any], folder: Path) -> None:
    """Write the page of a search into its folder. A grid has none."""
    if "search" in study:
        write_atomic(folder / REPORT, page(study))


def page(study: Mapping[str, Any]) -> str:
    """Return the page."""
    search, measured, declared = study["search"], study["measured"], study["declared"]
    rows = {row["number"]: row for row in search["rows"]}
    chosen = rows[search["chosen"]]
    languages = list(measured["original"]["kl"])
    kl = [f"KL {language}" for language in languages]
    head = ["edit, on test", *kl, "probe", "95% interval", "means left", "in words"]
    body = [
        [
            *(name, *(f"{by['kl'][language]:.4f}" for language in languages)),
            *(f"{by['probe']:.4f}", "{:.4f} to {:.4f}".format(*by["probe_ci95"]), f"{by['means']:.3f}"),
            by["word"] if name != "original" else "",
        ]
        for name, by in measured.items()
    ]
    objectives = list(dict.fromkeys([*search["objectives"], "damage", "probe", "means"]))
    tried = [
        [row["name"], *(f"{row[name]:.4f}" if name in row else "-" for name in objectives), _kind(row, search)]
        for row in sorted(search["rows"], key=lambda row: row.get(search["objectives"][0], float("inf")))
    ]
    return f"""<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>Search: {html.escape(declared["model"])}</title><style>{STYLE}</style></head><body>
<h1>Search on {html.escape(declared["model"])}</h1>
<p>Chosen: <strong>{html.escape(chosen["name"])}</strong></p>
<p class=note>{html.escape(study["damage_in_words"])}</p>
<p>Beside the baseline ({html.escape(search["baseline"])}), on test:
{html.escape(difference_in_words(study["difference"]))}. The intervals are 95%, each its own, paired over sentences
and problems.</p>
{panels(pictures(study))}
<p>{len(search["rows"]) - 1} settings were tried on the dev half, and the choice was made there:
{html.escape(search["rule"])}. Its hash was written down before any figure of the test half was taken:
{html.escape(study["frozen"]["sha256"][:16])}. "probe" is the held-out accuracy of a linear probe for the language over
prompt tokens, at the MLPs' outputs of the baseline's layers; "means left" is how much of the covariance with the
language is left there. {html.escape(RULE)}</p>
<h2>On test</h2>{table(head, body, words=(len(head) - 1,))}
<h2>All settings, on dev</h2>{table(["setting", *objectives, ""], tried, words=(len(objectives) + 1,))}
</body></html>
"""


def _kind(row: Mapping[str, Any], search: Mapping[str, Any]) -> str:
    kinds = ["chosen"] * (row["number"] == search["chosen"]) + ["baseline"] * (row["number"] == -1)
    kinds += ["front"] * (row["number"] in search["front"])
    kinds += [f"refused: {row['refused'].splitlines()[0]}"] if "refused" in row else []
    return ", ".join(kinds)
