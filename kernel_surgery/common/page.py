"""The building blocks of every report page: the document, its style and script, cards, tables and pictures.

A page is one file that fetches nothing; its content security policy forbids it. It follows the reader's light or dark
setting. A table that is wider than a phone becomes a list there: one block per row, with the column's name before each
value. Pictures come in panels of at most PANEL inches, which is the width of a phone: side by side where there is room,
else below each other. So nothing is scrolled sideways, shrunk or cut off. Intervals are in `common.intervals`.
"""

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kernel_surgery.common.plotting import variables

# The width of a panel in inches. At 96 pixels an inch it fits a screen of 390 pixels with its margins.
PANEL = 3.6

STYLE = f"""
:root{{color-scheme:light dark;{variables(False)}}}
@media(prefers-color-scheme:dark){{:root{{{variables(True)}}}}}
""" + """
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:74rem;margin:0 auto;padding:1.25rem 1rem 4rem;color:var(--ink);
 background:var(--ground)}
h1{font-size:1.6rem;line-height:1.2;margin:.1rem 0 .5rem;overflow-wrap:anywhere} h2{font-size:1.25rem;line-height:1.2;
 margin:2.5rem 0 .5rem;padding-top:1rem;border-top:1px solid var(--line)} h3{font-size:1rem;margin:1.25rem 0 .25rem}
p,ul{max-width:48rem} a{color:var(--fused)}
.over{color:var(--quiet);font-size:.85rem;margin:0} .small{font-size:.85rem;color:var(--quiet)}
.bad{color:var(--limit)} .good{color:var(--good)} .caution{color:var(--caution)}
dl.facts{display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;margin:0 0 1rem;font-size:.9rem} dl.facts div{display:flex;
 gap:.4rem} dl.facts dt{color:var(--quiet)} dl.facts dd{margin:0;font-weight:600;overflow-wrap:anywhere}
.verdict{font-size:1.15rem;font-weight:600;max-width:none;margin:.5rem 0 1rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(12.5rem,1fr));gap:.75rem;margin:1rem 0}
.card{background:var(--card);border-radius:.5rem;padding:.7rem .9rem;border-inline-start:4px solid var(--line)}
.card.bad{border-color:var(--limit);color:inherit} .card.good{border-color:var(--good);color:inherit}
.card.caution{border-color:var(--caution);color:inherit}
.card h3{margin:0;font-size:.8rem;font-weight:400;color:var(--quiet)} .card strong{display:block;font-size:1.15rem;
 line-height:1.3} .card p{margin:.2rem 0 0;font-size:.8rem;color:var(--quiet)}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));gap:0 2.5rem}
.two>*{min-width:0} .two h3{margin-top:.75rem}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.9rem;margin:1rem 0}
table{border-collapse:collapse;width:100%;font-size:.875rem;margin:1rem 0}
th,td{text-align:start;padding:.35rem .5rem;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--quiet);font-weight:600} td.n,th.n{text-align:end} td.n{white-space:nowrap;
 font-variant-numeric:tabular-nums}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font:.85rem/1.5 ui-monospace,monospace}
.block{background:var(--card);border-radius:.5rem;padding:.7rem .9rem}
details{margin:1rem 0} summary{cursor:pointer;font-weight:600}
.panels{display:flex;flex-wrap:wrap;gap:.5rem 1.5rem;margin:1rem 0}
.panels svg{max-width:100%;height:auto;display:block}
svg text{fill:var(--ink)}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;font-size:.875rem;margin:.5rem 0}
.legend i{display:inline-block;width:.9em;height:.9em;margin-inline-end:.4em;vertical-align:-.1em;border-radius:2px}
.note{background:var(--card);padding:.6rem .9rem;border-inline-start:4px solid var(--caution);border-radius:.25rem}
mark{background:var(--mark);color:inherit;border-radius:2px}
.forest{display:grid;grid-template-columns:fit-content(13rem) minmax(8rem,1fr) auto;gap:0 .9rem;font-size:.85rem;
 align-items:center;margin:.5rem 0;font-variant-numeric:tabular-nums}
.forest>*{min-width:0} .forest svg{display:block;width:100%;height:1.7rem;overflow:visible}
.forest .value{color:var(--quiet);text-align:end;line-height:1.3}
.forest .group{grid-column:1/-1;font-weight:600;margin-top:.4rem}
.forest .unit{grid-column:2/-1;color:var(--quiet);font-size:.8rem} .forest svg.axis{height:1.4rem}
.forest svg.axis text{font-size:.75rem;fill:var(--quiet)} .forest .edit{font-weight:600}
@media(max-width:60rem){
 thead{display:none} table,tbody,tr,td{display:block} tr{padding:.5rem 0;border-bottom:1px solid var(--line)}
 td,td.n{display:flex;justify-content:space-between;gap:1rem;padding:.1rem 0;border:0;text-align:end;
  white-space:normal} td::before{content:attr(data-label);color:var(--quiet);text-align:start} td:empty{display:none}
 td.k{display:inline-block;font-weight:600;padding-inline-end:.75rem} td.k::before{content:none}
}
@media(max-width:34rem){
 .forest{grid-template-columns:minmax(0,1fr) auto;grid-auto-flow:dense;gap:0 .5rem}
 .forest svg{grid-column:1/-1;height:1.3rem} .forest .unit,.forest .group{grid-column:1/-1}
 .forest>span:empty{display:none}
 .cards{grid-template-columns:1fr 1fr;gap:.5rem} .card{padding:.5rem .6rem} .card strong{font-size:1rem}
 h1{font-size:1.3rem}
}
@media print{
 :root{LIGHT} body{max-width:none;padding:0;font-size:11pt} nav{display:none} .card,.panels>div,.pair,tr,
 .forest{break-inside:avoid} h2,h3{break-after:avoid} a{color:inherit;text-decoration:none}
 .card,.note,mark,.forest svg{print-color-adjust:exact}
}
""".replace("LIGHT", variables(False))

# What is folded is printed too.
SCRIPT = """
addEventListener("beforeprint",()=>document.querySelectorAll("details").forEach(d=>d.open=true));
"""


def document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """Return a whole page.

    title: plain text. body: HTML. style, script: more CSS and JavaScript of the page's own; both may not be closed by
    anything in them.
    """
    script = SCRIPT + script
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv=content-security-policy content="{policy}">'
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head><body>\n{body}\n"
        f"<script>{script}</script></body></html>\n"
    )


@dataclass(frozen=True)
class Card:
    """One finding of the first screen. label: what it is about. big: the finding. more: its figures.

    tone: "", "good", "caution" or "bad".
    """

    label: str
    big: str
    more: str = ""
    tone: str = ""


def opening(over: str, title: str, facts: Iterable[tuple[str, str]], verdict: str, cards: Sequence[Card]) -> str:
    """Return the top of the first screen: what was edited, the verdict in a sentence, and the findings as cards.

    over: the line above the title. facts: (name, value); those without a value are left out.
    """
    listed = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts if value
    )
    boxes = "".join(
        f'<div class="card {card.tone}"><h3>{html.escape(card.label)}</h3><strong>{html.escape(card.big)}</strong>'
        + (f"<p>{html.escape(card.more)}</p>" if card.more else "")
        + "</div>"
        for card in cards
    )
    return (
        f"<header><p class=over>{html.escape(over)}</p><h1>{html.escape(title)}</h1><dl class=facts>{listed}</dl>"
        f"<p class=verdict>{html.escape(verdict)}</p></header>" + (f"<div class=cards>{boxes}</div>" if boxes else "")
    )


def section(name: str, body: str) -> str:
    """Return a section with its heading and an anchor, or nothing if its body is empty."""
    return f"<section id={anchor(name)}><h2>{html.escape(name)}</h2>{body}</section>" if body else ""


def anchor(name: str) -> str:
    """Return the anchor of a section."""
    return name.lower().replace(" ", "-")


def contents(sections: Iterable[tuple[str, str]]) -> str:
    """Return the line of links to the sections that have a body, and the sections. sections: (name, HTML)."""
    there = [(name, body) for name, body in sections if body]
    links = "".join(f'<a href="#{anchor(name)}">{html.escape(name)}</a>' for name, _ in there)
    return f"<nav>{links}</nav>" + "".join(section(name, body) for name, body in there)


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
    """Return SVG pictures in a row that wraps, under a legend with the colour of each mode and `more` entries.

    One mode needs no legend where `more` is empty: a caption says what the line is.
    """
    entries = [f'<span><i style="background:var(--{mode})"></i>{html.escape(mode)}</span>' for mode in modes]
    entries += [f"<span>{html.escape(entry)}</span>" for entry in more]
    legend = f"<div class=legend>{''.join(entries)}</div>" if entries else ""
    return f"{legend}<div class=panels>{''.join(f'<div>{picture}</div>' for picture in pictures)}</div>"


def folded(summary: str, body: str) -> str:
    """Return HTML that is folded under its summary. It is unfolded in print."""
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>" if body else ""


def paragraphs(lines: Iterable[str]) -> str:
    """Return lines of plain text as small print."""
    return "".join(f"<p class=small>{html.escape(line)}</p>" for line in lines)
