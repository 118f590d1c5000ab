"""The exact numbers in a text: all digit scripts, thousands separators, LaTeX, a x 10^n, fractions.

`Plain` turns a text into plain text. It has one kind of digit, space and operator, and neither LaTeX nor Markdown. It
records the place of every character in the original. `numbers` reads plain text, and returns each number as an exact
`fractions.Fraction`. It marks the operands: numbers in an expression (12 + 7, 12/4, 2^10) and arguments (C(12, 3)).

    text         in Spanish       in other languages
    1.234        1234             1.234
    1,234        1234             1234
    12,5         12.5             12 and 5
    1.234.567    1234567          1234567

A plain space groups digits, unless an operator beside it separates two numbers.

Not supported: numbers in words, percentages (50% is 50), and digit groups of four or in the Indian style.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd

_HARD_SPACES = "\u00a0\u2007\u2009\u202f"
_SAME = {"−": "-", "–": "-", "‐": "-", "⋅": "×", "·": "×", "∙": "×", "✕": "×", "∶": ":", "⇒": "→", "⟹": "→", "⟶": "→"}
_SAME |= {"٫": ".", "٬": ",", "’": "'", "ـ": "", "آ": "ا", "أ": "ا", "إ": "ا"} | dict.fromkeys(_HARD_SPACES, "\u00a0")
# Each rule is a pattern and the pieces that replace a match. An int is a group of the match, which keeps its place.
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
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)"), ("°",)),
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


# Digits in groups of three. All separators of a number are equal. Outside Spanish, points need at least two groups.
_COMMAS = r"[1-9]\d{0,2}(?P<mark>[,' \u00a0])\d{3}(?:(?P=mark)\d{3})*(?!(?P=mark)?\d)(?:\.\d+)?"
_POINTS = r"[1-9]\d{0,2}(?:\.\d{3}){2,}(?![.]?\d)(?:,\d+)?"
_SPANISH_POINTS = r"[1-9]\d{0,2}(?:\.\d{3})+(?![.]?\d)(?:,\d+)?"
_DECIMAL, _SPANISH_DECIMAL = r"\d+(?:\.\d+)?|(?<!\d)\.\d+", r"\d+(?:[.,]\d+(?![.,]?\d))?|(?<!\d)\.\d+"
_START, _EXPONENT = r"(?<![A-Za-z0-9_])(?<!\d\.)", r"(?:[eE][+-]?\d+(?!\w))?"
_LITERAL = {
    False: re.compile(f"{_START}(?:{_COMMAS}|{_POINTS}|{_DECIMAL}){_EXPONENT}"),
    True: re.compile(f"{_START}(?:{_COMMAS}|{_SPANISH_POINTS}|{_SPANISH_DECIMAL}){_EXPONENT}"),
}
# In "=10 103+5", the space separates two numbers. This is so if the grouped number ("#") has a digit before it or an
# operator after it.
_TWO_NUMBERS = re.compile(r"[\d.,] #|# ?[-+×*/÷^=(→]")
_POWER = re.compile(r" ?[×x*] ?10 ?(?:\^|\*\*) ?\(?([+-]?\d+)\)?")
_TEN = re.compile(r" ?(?:\^|\*\*) ?\(?([+-]?\d+)\)?")
_FRACTION = re.compile(r"(?:\((\d{1,99})\)|(\d{1,99})) ?[⁄/] ?(?:\((\d{1,99})\)|(\d{1,99}))(?!\d|\.\d|\s?[⁄/])")
_MIXED = re.compile(r" ?\(?(\d{1,9})\)?⁄\(?(\d{1,9})\)?(?!\d)")
# The largest exponent and the longest literal that are read. Longer ones are noise, and slow to compare.
_LARGEST_EXPONENT, _LONGEST = 400, 400
# Operators in words. They count only between numbers: "12 plus 7", "12 加 7".
_WORDS = (
    r"plus|minus|times|divided by|multiplied by|más|menos|por|entre|jumlisha|toa|mara|kugawanywa kwa"
    r"|زائد|ناقص|مضروبا? في|على|加上?|减去?|減去?|乘以?|除以|足す|引く|掛ける|かける|割る|더하기|빼기|곱하기|나누기"
)
UNIT = r"(?>(?:(?:mm|cm|km|kg|m|g|s|厘米|米)(?![A-Za-z])(?:\^?\(?[23]\)?(?!\d))?)?)"
_OPERAND_BEFORE = re.compile(
    rf"(?:[×÷^_√⁄]|(?:[\d)\]!%]|(?<![^\W_])[A-Za-z]) ?[-+*/]|\bmod|\d {{0,2}}(?:{_WORDS}))[ (\[]*$", re.IGNORECASE
)
_OPERAND_AFTER = re.compile(
    rf" {{0,3}}(?:[)\]] ?)?{UNIT} {{0,3}}(?:[×÷^⁄]|[-+*/] ?(?:[\d(\[√]|[A-Za-z](?![A-Za-z])|\s?\Z)|mod\b|!\s?[=×*÷/)+-]"
    rf"|(?:{_WORDS}) ?[(\[]?\d)|[CPx]\(?\d",
    re.IGNORECASE,
)
_ARGUMENTS = re.compile(r"(?<![A-Za-z])(?:[A-Za-z]|gcd|lcm|mcd|mcm|comb|binom|sqrt|log|ln|range)\([^()\n]*\)")


@dataclass
class Number:
    """A number at [begin, end) of a plain text.

    value: its exact value. operand: whether it belongs to an expression or is an argument. parts: the numerator and
    denominator of a fraction.
    """

    value: Fraction
    begin: int
    end: int
    operand: bool = False
    parts: tuple[Fraction, ...] = ()


def numbers(text: str, spanish: bool = False) -> list[Number]:
    """Return every number in plain `text`, in order. spanish: whether to read 1.234 and 12,5 as Spanish does."""
    arguments = [m.span() for m in _ARGUMENTS.finditer(text)]
    result: list[Number] = []
    at = 0
    while match := _LITERAL[spanish].search(text, at):
        begin, at, literal = match.start(), match.end(), match.group()
        if match["mark"] == " " and _TWO_NUMBERS.search(text[max(0, begin - 2) : begin] + "#" + text[at : at + 2]):
            at = text.index(" ", begin)
            literal = text[begin:at]
        value = _literal_value(literal, spanish)
        if value is None:
            continue
        number = Number(value, begin, at)
        _extend(number, text)
        at = number.end
        before = text[max(0, begin - 24) : begin]
        if before.endswith("-") and not re.search(r"(?:[\dA-Za-z)\]]|[\d)\]] +)-$", before):
            number.value, number.begin, before = -number.value, begin - 1, before[:-1]
        if (
            _OPERAND_BEFORE.search(before)
            or _OPERAND_AFTER.match(text, at)
            or any(start <= begin < end for start, end in arguments)
        ):
            number.operand = True
        result.append(number)
    return result


def _literal_value(literal: str, spanish: bool) -> Fraction | None:
    mantissa, _, exponent = literal.lower().partition("e")
    mantissa = re.sub(r"[' \u00a0]", "", mantissa)
    if re.fullmatch(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?", mantissa):
        mantissa = mantissa.replace(",", "")
    elif re.fullmatch(rf"[1-9]\d{{0,2}}(?:\.\d{{3}}){{{1 if spanish else 2},}}(?:,\d+)?", mantissa):
        mantissa = mantissa.replace(".", "").replace(",", ".")
    if len(literal) > _LONGEST or abs(power := int(exponent or 0)) > _LARGEST_EXPONENT:
        return None
    return Fraction(mantissa.replace(",", ".")) * Fraction(10) ** power


def _extend(number: Number, text: str) -> None:
    """Extend a number by a power of ten, by its denominator, or by the fraction of a mixed number."""
    if match := _POWER.match(text, number.end) or (number.value == 10 and _TEN.match(text, number.end)):
        if len(match[1]) <= 4 and abs(exponent := int(match[1])) <= _LARGEST_EXPONENT:
            factor = number.value if match.re is _POWER else 1
            number.value, number.end = factor * Fraction(10) ** exponent, match.end()
        return
    outer = number.begin - (text[number.begin - 1 : number.begin] == "(")
    if match := _FRACTION.match(text, outer) or _FRACTION.match(text, number.begin):
        top, bottom = int(match[1] or match[2]), int(match[3] or match[4])
        number.end, number.parts = match.end(), (Fraction(top), Fraction(bottom))
        if bottom > 1 and gcd(top, bottom) == 1:
            number.value = Fraction(top, bottom)
        else:
            number.operand = True  # 12/4: a division that is not evaluated
    elif (match := _MIXED.match(text, number.end)) and int(match[2]):
        number.value += Fraction(int(match[1]), int(match[2]))
        number.end = match.end()
