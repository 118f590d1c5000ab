r"""What an answer is: one final number out of a text in seven languages, compared exactly.

`extract_answer` looks for, in this order, and takes the last of its kind before the text turns to a new question:

    boxed    \boxed{390}
    marker   "the answer is 390" and its like in zh en es ar ja ko sw, also "390 is the answer" and "Answer: B", where
             the letter stands for its option's value; words for "answer" go before words for "result"
    last     the last number

Digits of every script, full-width forms, thousands separators (1,234 1 234 1'234 1{,}234 ١٬٢٣٤), LaTeX, a x 10^n and
fractions in lowest terms are read as one exact number (`fractions.Fraction`), so 12, 12.0 and ١٢ are equal. These are
never an answer: a part of an expression (the 12 and the 7 of 12 + 7; left unevaluated it states no value, marker or
not), an argument (C(12, 3)), a number in a question, in an option that was not chosen, in the number of a step, in the
problem's own sentence repeated. A number that also stands in the prompt counts only where something states it
("=", ":", "is", 是, ...). Where nothing is found there is no answer, and no answer is wrong.

1.234 is 1234 in Spanish and 1.234 elsewhere; 1,234 is 1234 everywhere; 12,5 is 12.5 in Spanish and two numbers
elsewhere. Spanish is known from `language`, or else from words of the prompt (of the text, where there is no prompt).

Not covered: numbers written as words, intervals, several answers, a percentage as a fraction (50% is 50), an
intermediate result that happens to equal the answer (it counts for the first-answer token).

Not built on math-verify: it knows markers in English only, reads neither other digits nor what the prompt said, takes
operands of an unevaluated expression for its value (12 + 7 is 19), and needs SymPy to compare two rationals.

The `expag_*` functions are the reference script's arithmetic, quirks included, for continuity with its figures alone.
"""

import bisect
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd

Answer = int | str | Fraction


@dataclass(frozen=True)
class Extracted:
    """value: the answer, None where there is none. span: its place in the text as given. how: boxed, marker or last."""

    value: Fraction | None
    span: tuple[int, int] | None = None
    how: str | None = None


# --- plain text: one kind of digit, space and operator; every character knows where it came from ---------------------

_HARD_SPACES = "\u00a0\u2007\u2009\u202f"
_SAME = {"−": "-", "–": "-", "‐": "-", "⋅": "×", "·": "×", "∙": "×", "✕": "×", "∶": ":", "⇒": "→", "⟹": "→", "⟶": "→"}
_SAME |= {"٫": ".", "٬": ",", "’": "'", "ـ": "", "آ": "ا", "أ": "ا", "إ": "ا"} | dict.fromkeys(_HARD_SPACES, "\u00a0")

# What LaTeX becomes: a pattern, then the pieces put in its place, an int being a group that stays where it was.
_WRAPPERS = r"text|textbf|textit|mathrm|mathbf|mathit|operatorname|underline|bm|ensuremath|textcolor|mbox|hbox"
_LATEX_WORDS: list[tuple[re.Pattern, tuple[str | int, ...]]] = [
    (re.compile(r"\{,\}"), (",",)),
    (re.compile(r"\\!"), ("",)),
    (re.compile(r"\\,"), ("\u00a0",)),
    (re.compile(r"\\(?:times|cdot)\b"), ("×",)),
    (re.compile(r"\\div\b"), ("÷",)),
    (re.compile(r"\\(?:equiv|approx)\b"), ("=",)),
    (re.compile(r"\\(?:Rightarrow|rightarrow|to|implies|longrightarrow)\b"), ("→",)),
    (re.compile(r"\\(?:pmod|bmod|mod)\b"), (" mod ",)),
    (re.compile(r"\\(?:left|right|displaystyle|big|Big|quad|qquad|[;: \\()\[\]{}$])"), (" ",)),
    (re.compile(r"\\%"), ("%",)),
    (re.compile(r"[$~&]"), (" ",)),
]
_LATEX_GROUPS: list[tuple[re.Pattern, tuple[str | int, ...]]] = [
    (re.compile(rf"\\(?:{_WRAPPERS})\s*\{{([^{{}}]*)\}}"), (1,)),
    (re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))"), ("(", 1, 2, ")⁄(", 3, 4, ")")),
    (re.compile(r"\\[dt]?binom\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), ("C(", 1, ",", 2, ")")),
    (re.compile(r"\^\s*\{([^{}]*)\}"), ("^(", 1, ")")),
    (re.compile(r"_\s*\{([^{}]*)\}"), ("_(", 1, ")")),
    (re.compile(r"\\f?boxed\s*\{([^{}]*)\}"), ("⟦", 1, "⟧")),
]
_BRACES = (re.compile(r"\{([^{}]*)\}"), (1,))
# Markdown: bold and headings; ** between two operands is a power and stays.
_MARKDOWN = (re.compile(r"(?<![0-9A-Za-z)])\*\*|\*\*(?![0-9A-Za-z(])|__|^#+", re.MULTILINE), (" ",))


class _Plain:
    """`text` made plain, with the span in the original, [starts[i], ends[i]), of each of its characters."""

    def __init__(self, original: str):
        pieces: list[tuple[str, int, int]] = []
        raised = ""
        i = 0
        while i < len(original):
            j = i + 1
            while j < len(original) and unicodedata.combining(original[j]):
                j += 1
            plain, level = _plain_cluster(original[i:j])
            if level and level != raised:
                plain = level + plain
            elif plain[1:2] == "⁄" and original[i - 1 : i].isdigit():
                plain = " " + plain
            raised = level
            pieces.append((plain, i, j))
            i = j
        self.text = "".join(p for p, _, _ in pieces)
        self.starts = [start for p, start, _ in pieces for _ in p]
        self.ends = [end for p, _, end in pieces for _ in p]
        if "\\" in self.text or "$" in self.text or "{" in self.text:
            self._read_latex()
        self._replace(*_MARKDOWN)

    def _read_latex(self) -> None:
        for pattern, pieces in _LATEX_WORDS:
            self._replace(pattern, pieces)
        changed = True
        while changed:  # innermost groups first; the braces that remain mean nothing
            changed = any([self._replace(*rule) for rule in _LATEX_GROUPS]) or self._replace(*_BRACES)

    def _replace(self, pattern: re.Pattern, pieces: tuple[str | int, ...]) -> bool:
        matches = list(pattern.finditer(self.text))
        if not matches:
            return False
        text: list[str] = []
        starts: list[int] = []
        ends: list[int] = []

        def keep(begin: int, end: int) -> None:
            text.append(self.text[begin:end])
            starts.extend(self.starts[begin:end])
            ends.extend(self.ends[begin:end])

        last = 0
        for match in matches:
            keep(last, match.start())
            for piece in pieces:
                if isinstance(piece, int):
                    if match.group(piece) is not None:
                        keep(*match.span(piece))
                else:
                    text.append(piece)
                    starts.extend([self.starts[match.start()]] * len(piece))
                    ends.extend([self.ends[match.end() - 1]] * len(piece))
            last = match.end()
        keep(last, len(self.text))
        self.text, self.starts, self.ends = "".join(text), starts, ends
        return True

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Where the plain characters [begin, end) stand in the original."""
        return self.starts[begin], self.ends[end - 1]


@lru_cache(maxsize=4096)
def _plain_cluster(cluster: str) -> tuple[str, str]:
    """A character with its combining marks, made plain; and "^" or "_" if it is raised or lowered."""
    head = cluster[0]
    if head in _SAME:
        return _SAME[head], ""
    kind = unicodedata.decomposition(head).partition(" ")[0]
    plain = unicodedata.normalize("NFKC", cluster)
    if kind in ("<super>", "<sub>") and (plain[0].isdigit() or plain[0] in "+-−"):
        return _SAME.get(plain, plain), "^" if kind == "<super>" else "_"
    if kind == "<circle>" and plain.isdigit():
        return " ", ""
    if unicodedata.category(head) == "Nd":
        return str(unicodedata.decimal(head)), ""
    if unicodedata.category(head) == "Cf":  # writing direction, zero width
        return "", ""
    if unicodedata.name(head, "").startswith("ARABIC") and unicodedata.combining(head):
        return "", ""
    return _SAME.get(plain, plain), ""
