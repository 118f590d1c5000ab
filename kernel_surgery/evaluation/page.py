"""The building blocks of the report: the style, tables, pictures with their legends, and texts side by side.

A table that is wider than a phone becomes a list there: one block per row, with the column's name before each value.
Pictures come in panels of at most PANEL inches, which is the width of a phone: side by side where there is room, else
below each other. So nothing is scrolled sideways, shrunk or cut off.
"""

import difflib
import html
import re
from collections.abc import Sequence

from kernel_surgery.common.plotting import COLOURS

# The width of a panel in inches. At 96 pixels an inch it fits a screen of 390 pixels with its margins.
PANEL = 3.7

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
p,ul{max-width:48rem} h1,h2{line-height:1.2}
table{border-collapse:collapse;width:100%;font-size:.875rem;margin:1rem 0}
th,td{text-align:start;padding:.35rem .5rem;border-bottom:1px solid #ddd;vertical-align:top}
td.n,th.n{text-align:end} td.n,th{white-space:nowrap} td.n{font-variant-numeric:tabular-nums}
table.texts{table-layout:fixed} table.texts td{overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font-size:.85rem}
details{margin:1rem 0} summary{cursor:pointer;font-weight:600} .bad{color:#a3261b} .good{color:#19692c}
.panels{display:flex;flex-wrap:wrap;gap:.5rem 1.5rem;margin:1rem 0} svg{max-width:100%;height:auto}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;font-size:.875rem;margin:.5rem 0}
.legend i{display:inline-block;width:.9em;height:.9em;margin-inline-end:.4em;vertical-align:-.1em}
.note{background:#fff6d8;padding:.6rem .8rem;border-left:4px solid #d9a400}
mark{background:#ffe08a;color:inherit} .small{font-size:.85rem;color:#555}
@media(max-width:60rem){
 thead{display:none} table,tbody,tr,td{display:block} tr{padding:.5rem 0;border-bottom:1px solid #ddd}
 td{display:flex;justify-content:space-between;gap:1rem;padding:.1rem 0;border:0;text-align:end}
 td::before{content:attr(data-label);color:#555;text-align:start;white-space:normal} td:empty{display:none}
 td.k{display:inline-block;font-weight:600;padding-inline-end:.75rem} td.k::before{content:none}
 table.texts td{display:block;text-align:start;padding:.3rem 0} table.texts td::before{display:block;font-size:.8rem}
}
"""


def table(head: Sequence[str], rows: Sequence[Sequence[object]], keys: int = 1, words: Sequence[int] = ()) -> str:
    """Return an HTML table. Every cell is escaped.

    keys: the first columns, which say what the row is about. words: columns of words, which may wrap. The others hold
    numbers: they are set to the right and never wrap on a wide screen.
    """
    kinds = ["k" if i < keys else "" if i in words else "n" for i in range(len(head))]

    def opened(tag: str, kind: str) -> str:
        return f"<{tag} class={kind}" if kind else f"<{tag}"

    heads = "".join(f"{opened('th', kind)}>{html.escape(name)}</th>" for name, kind in zip(head, kinds, strict=True))
    body = ""
    for row in rows:
        cells = zip(head, row, kinds, strict=True)
        body += "<tr>" + "".join(_cell(opened("td", kind), name, str(value)) for name, value, kind in cells) + "</tr>"
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _cell(opened: str, name: str, value: str) -> str:
    return f'{opened} data-label="{html.escape(name)}">{html.escape(value)}</td>'


def panels(pictures: Sequence[str], modes: Sequence[str] = (), more: Sequence[str] = ()) -> str:
    """Return SVG pictures in a row that wraps, under a legend with the colour of each mode and `more` entries."""
    entries = [f'<span><i style="background:{COLOURS[mode]}"></i>{html.escape(mode)}</span>' for mode in modes]
    entries += [f"<span>{html.escape(entry)}</span>" for entry in more]
    legend = f"<div class=legend>{''.join(entries)}</div>" if entries else ""
    return f"{legend}<div class=panels>{''.join(f'<div>{picture}</div>' for picture in pictures)}</div>"


def texts_table(mode: str, language: str, pairs: Sequence[tuple[dict, dict]]) -> str:
    """Return pairs of samples side by side, folded, with their differences marked."""
    rows = ""
    for before, after in pairs:
        columns = "".join(
            f"<td dir=auto class={'good' if s['correct'] else 'bad'} data-label={name}><pre dir=auto>{text}</pre></td>"
            for name, s, text in zip(
                ("original", mode), (before, after), marked(before["text"], after["text"]), strict=True
            )
        )
        prompt = html.escape(f"{before['prompt']}  [{before['answer']}]")
        rows += f'<tr><td dir=auto data-label="prompt [answer]">{prompt}</td>{columns}</tr>'
    return (
        f"<details><summary>{html.escape(mode)}, {html.escape(language)}: texts</summary><table class=texts>"
        f"<thead><tr><th>prompt [answer]</th><th>original</th><th>{html.escape(mode)}</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></details>"
    )


Piece = tuple[str, bool]  # of a text, and whether it differs from the other text


def pieces_of(before: str, after: str) -> tuple[list[Piece], list[Piece]]:
    """Return two texts as pieces that differ or are the same.

    They are compared by words, or by characters in scripts without spaces.
    """
    pieces = [
        re.findall(r"[A-Za-z\u00c0-\u024f\u0600-\u06ff\uac00-\ud7af]+|\d+|\s+|.", text) for text in (before, after)
    ]
    matcher = difflib.SequenceMatcher(a=pieces[0], b=pieces[1], autojunk=False)
    out: tuple[list[Piece], list[Piece]] = ([], [])
    for tag, a, b, c, d in matcher.get_opcodes():
        for side, (start, stop) in enumerate(((a, b), (c, d))):
            if text := "".join(pieces[side][start:stop]):
                out[side].append((text, tag != "equal"))
    return out


def marked(before: str, after: str) -> tuple[str, str]:
    """Return two texts as HTML with their differences marked, as `pieces_of` finds them."""

    def written(pieces: list[Piece]) -> str:
        texts = ((html.escape(text), differs) for text, differs in pieces)
        return "".join(f"<mark>{text}</mark>" if differs else text for text, differs in texts)

    one, other = pieces_of(before, after)
    return written(one), written(other)
