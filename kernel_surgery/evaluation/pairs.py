"""The texts of a run as the report shows them: the original's beside the edited ones, with a filter and a search.

Modes that wrote the same text share an entry. Every text that differs is shown, up to LIMIT per language, those first
whose verdict differs too. Of the others the first SAME are shown, once. Without JavaScript all of these are shown.
"""

import difflib
import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kernel_surgery.evaluation.summary import POOLED

LIMIT, SAME = 300, 30

STYLE = """
.filter{display:flex;flex-wrap:wrap;gap:.4rem .6rem;align-items:center;margin:1rem 0;font-size:.9rem}
.filter button,.filter select,.filter input{font:inherit;color:inherit;background:var(--card);padding:.3rem .7rem;
 border:1px solid var(--line);border-radius:1rem;max-width:100%}
.filter button{cursor:pointer} .filter button[aria-pressed=true]{background:var(--fused);border-color:var(--fused);
 color:var(--ground)} .filter input{flex:1 1 12rem;min-width:0}
.pair{border:1px solid var(--line);border-radius:.5rem;padding:.6rem .9rem;margin:.75rem 0} .pair[hidden]{display:none}
.pair p{margin:.1rem 0;max-width:none} .pair .tags{font-size:.8rem;color:var(--quiet)} .pair .prompt{font-weight:600;
 white-space:pre-wrap;overflow-wrap:anywhere} .pair h4{margin:.5rem 0 .1rem;font-size:.8rem;font-weight:600}
.pair .sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:.25rem 1.5rem}
.pair .sides>*{min-width:0}
@media print{.filter{display:none}}
"""

SCRIPT = """
(()=>{const box=document.querySelector(".filter");if(!box)return;
const pairs=[...document.querySelectorAll(".pair")],count=box.querySelector("output");
const kinds=[...box.querySelectorAll("button")],lang=box.querySelector("select"),find=box.querySelector("input");
let kind=kinds[0].value;
function show(){const words=find.value.toLowerCase();let shown=0;
 for(const p of pairs){const fits=(kind==="all"||p.dataset.kinds.split(" ").includes(kind))
  &&(!lang.value||p.lang===lang.value)&&(!words||p.textContent.toLowerCase().includes(words));
  p.hidden=!fits;shown+=fits}
 count.textContent=shown+" shown";
 for(const b of kinds)b.setAttribute("aria-pressed",String(b.value===kind))}
for(const b of kinds)b.onclick=()=>{kind=b.value;show()};
lang.onchange=find.oninput=show;box.hidden=false;show()})();
"""

Piece = tuple[str, bool]  # of a text, and whether it differs from the other text
Cells = dict[tuple[str, str], list[dict[str, Any]]]


@dataclass(frozen=True)
class Entry:
    """One problem in one language: what the original wrote, and what the modes `modes` wrote."""

    language: str
    modes: tuple[str, ...]
    original: dict[str, Any]
    edited: dict[str, Any]

    @property
    def differs(self) -> bool:
        """Whether the texts differ."""
        return bool(self.original["text"] != self.edited["text"])

    @property
    def outcome(self) -> str:
        """lost: only the original is right. gained: only the edited one is. right, wrong: both."""
        before, after = self.original["correct"], self.edited["correct"]
        return ("right" if after else "lost") if before else ("gained" if after else "wrong")


def entries(texts: Cells, modes: Sequence[str]) -> Iterator[Entry]:
    """Return an entry per problem, language and different text. modes: the original's first."""
    for language in dict.fromkeys(language for _, language in texts):
        cells = {mode: texts[mode, language] for mode in modes if (mode, language) in texts}
        for at, before in enumerate(cells.get(modes[0], [])):
            alike: dict[tuple[str, bool], list[str]] = {}
            for mode in modes[1:]:
                if mode in cells:
                    alike.setdefault((cells[mode][at]["text"], cells[mode][at]["correct"]), []).append(mode)
            for names in alike.values():
                yield Entry(language, tuple(names), before, cells[names[0]][at])


def changed(paired: Sequence[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Return {mode: (texts that differ from the original's, texts)}, over all languages. paired: of results.json."""
    found: dict[str, tuple[int, int]] = {}
    for r in paired:
        if r["language"] != POOLED:
            count, of = found.get(r["mode"], (0, 0))
            found[r["mode"]] = count + r["n"] - r["same_text"], of + r["n"]
    return found


def in_words(found: dict[str, tuple[int, int]]) -> str:
    """Return "7 of 400 texts differ", for each mode if they do not agree."""
    if len(set(found.values())) == 1:
        count, of = next(iter(found.values()))
        return f"{count} of {of} texts {'differs' if count == 1 else 'differ'}"
    return "texts that differ: " + ", ".join(f"{mode} {count} of {of}" for mode, (count, of) in found.items())


def changed_texts(texts: Cells, modes: Sequence[str], counts: dict[str, tuple[int, int]]) -> str:
    """Return the section of the texts as HTML, or nothing if no edited model was asked.

    modes: the original's first. counts: a result of `changed`.
    """
    every = list(entries(texts, modes))
    if not every:
        return ""
    order = {"lost": 0, "gained": 1, "wrong": 2, "right": 2}
    shown: list[Entry] = []
    for language in dict.fromkeys(entry.language for entry in every):
        mine = [entry for entry in every if entry.language == language]
        apart = sorted((entry for entry in mine if entry.differs), key=lambda entry: order[entry.outcome])
        shown += apart[:LIMIT] + [entry for entry in mine if not entry.differs][:SAME]
    kinds = {
        "differ": sum(entry.differs for entry in shown),
        **{kind: sum(entry.outcome == kind for entry in shown) for kind in ("lost", "gained")},
        "all": len(shown),
    }
    buttons = "".join(
        f'<button value={kind} aria-pressed=false title="{_TITLES[kind]}">{kind} ({count})</button>'
        for kind, count in kinds.items()
    )
    languages = "".join(
        f"<option>{html.escape(name)}</option>" for name in dict.fromkeys(entry.language for entry in shown)
    )
    same, other = (
        sum(entry.differs == kind for entry in every) - sum(entry.differs == kind for entry in shown)
        for kind in (False, True)
    )
    more = " and ".join(f"{n} {what}" for n, what in ((other, "that differ"), (same, "that do not")) if n)
    rest = f" Not on this page: {more}; samples.jsonl has them." if more else ""
    return (
        f"<p>{html.escape(in_words(counts))} from the original's. What differs is marked.{rest}</p>"
        f"<div class=filter hidden>{buttons}<select aria-label=language><option value=''>all languages</option>"
        f"{languages}"
        "</select><input type=search placeholder='search prompts and texts' aria-label=search><output></output></div>"
        + "".join(map(_shown, shown))
    )


_TITLES = {
    "differ": "the texts differ",
    "lost": "only the original is right",
    "gained": "only the edited model is right",
    "all": "all texts on this page",
}


def _shown(entry: Entry) -> str:
    before, after = entry.original, entry.edited
    kinds = " ".join(["differ"] * entry.differs + [entry.outcome])
    tags = f"{entry.language} · {', '.join(entry.modes)} · answer {before['answer']}"
    tags += {"lost": " · lost", "gained": " · gained"}.get(entry.outcome, "")
    if entry.differs:
        one, other = marked(before["text"], after["text"])
        sides = _side("original", before["correct"], one) + _side(", ".join(entry.modes), after["correct"], other)
    else:
        sides = _side("the same text", before["correct"], html.escape(before["text"]))
    return (
        f'<article class=pair lang="{html.escape(entry.language)}" data-kinds="{kinds}">'
        f"<p class=tags lang=en>{html.escape(tags)}</p>"
        f"<p class=prompt dir=auto>{html.escape(before['prompt'])}</p><div class=sides>{sides}</div></article>"
    )


def _side(name: str, correct: bool, text: str) -> str:
    tone, mark = ("good", "✓ right") if correct else ("bad", "✗ wrong")
    return f"<div><h4 class={tone} lang=en>{html.escape(name)}: {mark}</h4><pre dir=auto>{text}</pre></div>"


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
