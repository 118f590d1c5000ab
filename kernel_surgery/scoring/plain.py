"""Turn a text into plain text: one kind of digit, space and operator, without LaTeX, Markdown, tags and currency signs.

`Plain` records the place of every character in the original. In the plain text, ⟦ and ⟧ stand around a boxed answer
(\\boxed{}, <answer></answer>, and the line "#### 42"), and → stands for every arrow.
"""

import re
import unicodedata
from functools import lru_cache

_HARD_SPACES = "\u00a0\u2007\u2009\u202f"
_SAME = {"−": "-", "–": "-", "‐": "-", "⋅": "×", "·": "×", "∙": "×", "✕": "×", "∶": ":", "⇒": "→", "⟹": "→", "⟶": "→"}
_SAME |= {"٫": ".", "٬": ",", "’": "'", "ـ": "", "آ": "ا", "أ": "ا", "إ": "ا"} | dict.fromkeys(_HARD_SPACES, "\u00a0")
_SAME |= dict.fromkeys("‑‒˗➖﹣", "-") | dict.fromkeys("`€£¥₩₹₦₽", " ")


def _command(names: str) -> str:
    """Return a pattern for LaTeX commands. As in TeX, a command's name ends before the first character not a letter."""
    return rf"\\(?:{names})(?![A-Za-z])"


# Each rule is a pattern and the pieces that replace a match. An int is a group of the match, which keeps its place.
_WRAPPERS = r"text|textbf|textit|mathrm|mathbf|mathit|operatorname|underline|bm|ensuremath|textcolor|mbox|hbox"
_LATEX_WORDS: list[tuple[re.Pattern, tuple[str | int, ...]]] = [
    (re.compile(r"\{,\}"), (",",)),
    (re.compile(r"\\!"), ("",)),
    (re.compile(r"\\,"), ("\u00a0",)),
    (re.compile(_command("times|cdot|ast")), ("×",)),
    (re.compile(_command("div")), ("÷",)),
    (re.compile(_command("pm|mp")), ("±",)),
    (re.compile(_command("equiv|approx|simeq|cong")), ("=",)),
    (re.compile(_command("neq|ne")), ("≠",)),
    (re.compile(_command("leqslant|leq|le|geqslant|geq|ge|lt|gt")), ("<",)),
    (re.compile(_command("Rightarrow|rightarrow|to|implies|longrightarrow")), ("→",)),
    (re.compile(_command("pmod|bmod|mod")), (" mod ",)),
    (re.compile(rf"{_command('left|right|displaystyle|big|Big|quad|qquad')}|\\[;: \\()\[\]{{}}$]"), (" ",)),
    (re.compile(_command("therefore|because|iff|ldots|dots|cdots|colon")), (" ",)),
    (re.compile(_command("sim")), ("=",)),
    (re.compile(r"\\%"), ("%",)),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))"), ("°",)),
    (re.compile(r"(?<=\d)~(?=\d{3}(?!\d))"), ("\u00a0",)),
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
# Arrows, and the tags that models write around an answer. Other tags are dropped.
_TAGS: list[tuple[re.Pattern, tuple[str | int, ...]]] = [
    (re.compile(r"-+>|=+>"), ("→",)),
    (re.compile(r"<(?:final_?)?answer>([^<>]*)</(?:final_?)?answer>", re.IGNORECASE), ("⟦", 1, "⟧")),
    (re.compile(r"</?[a-z]{1,12}\d?>", re.IGNORECASE), (" ",)),
]
_HASHES = (re.compile(r"^####[ \t]*(-?[ \t$]*\.?\d[^\n]*)$", re.MULTILINE), ("⟦", 1, "⟧"))
# Markdown's bold and headings. ** between two operands is a power and stays.
_MARKDOWN = (re.compile(r"(?<![0-9A-Za-z)])\*\*|\*\*(?![0-9A-Za-z(])|__|^#+", re.MULTILINE), (" ",))


class Plain:
    """A text as plain text. Character i of `text` comes from the span [starts[i], ends[i]) of the original."""

    def __init__(self, original: str):
        pieces: list[tuple[str, int, int]] = []
        previous_level = ""
        i = 0
        while i < len(original):
            j = i + 1
            while j < len(original) and unicodedata.combining(original[j]):
                j += 1
            plain, level = _plain_cluster(original[i:j])
            if level and level != previous_level:
                plain = level + plain
            elif plain[1:2] == "⁄" and original[i - 1 : i].isdigit():
                plain = " " + plain
            previous_level = level
            pieces.append((plain, i, j))
            i = j
        self.text = "".join(p for p, _, _ in pieces)
        self.starts = [start for p, start, _ in pieces for _ in p]
        self.ends = [end for p, _, end in pieces for _ in p]
        if ">" in self.text:
            for rule in _TAGS:
                self._replace(*rule)
        if "####" in self.text:
            self._replace(*_HASHES)
        if "&minus;" in self.text:
            self._replace(re.compile("&minus;"), ("-",))
        if "\\" in self.text or "$" in self.text or "{" in self.text:
            self._read_latex()
        self._replace(*_MARKDOWN)

    def _read_latex(self) -> None:
        for pattern, pieces in _LATEX_WORDS:
            self._replace(pattern, pieces)
        changed = True
        while changed:  # innermost groups first; the remaining braces have no meaning
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
        """Return the span in the original of the plain characters [begin, end)."""
        return self.starts[begin], self.ends[end - 1]


@lru_cache(maxsize=4096)
def _plain_cluster(cluster: str) -> tuple[str, str]:
    """Return the plain form of a character with its combining marks, and "^" or "_" for a superscript or subscript."""
    head = cluster[0]
    if head in _SAME:
        return _SAME[head], ""
    kind = unicodedata.decomposition(head).partition(" ")[0]
    plain = unicodedata.normalize("NFKC", cluster)
    if kind in ("<super>", "<sub>") and (plain[0].isdigit() or plain[0] in "+-−"):
        return _SAME.get(plain, plain), "^" if kind == "<super>" else "_"
    if kind == "<circle>" and plain.isdigit():
        return (head if len(plain) == 1 else " "), ""  # ① may name an option, but is not a number
    if unicodedata.category(head) == "Nd":
        return str(unicodedata.decimal(head)), ""
    if unicodedata.category(head) == "Cf":  # writing direction, zero width
        return "", ""
    if unicodedata.name(head, "").startswith("ARABIC"):  # vowel signs are optional
        plain = "".join(c for c in plain if not unicodedata.combining(c))
    return _SAME.get(plain, plain), ""
