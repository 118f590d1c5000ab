"""What an answer is: one number taken from a text, compared exactly.

The order is boxed, then a localized "the answer is", then the last number that states something. Numbers are compared
as fractions: 12.0 is 12, 1,234 is 1234, ١٢ is 12, 2 × 10^3 is 2000, and no float is involved. What merely repeats the
question, asks another one, or is an expression nobody evaluated is no answer.

The expag_* functions are the reference script's scoring, quirks included, for continuity with its figures.
"""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

# One number: digits with thousands separators or without, a decimal part, a power of ten. Commas group by threes
# only; NO-BREAK SPACE, NARROW NO-BREAK SPACE and THIN SPACE separate thousands, a plain space does so after a marker
# only.
_PLAIN = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:[\u00a0\u202f\u2009]\d{3})+(?!\d)|\d+"
_SPACED = r"\d{1,3}(?: \d{3})+(?!\d)|" + _PLAIN
_TAIL = r"(?:\.\d+)?(?:\s*(?:×|x|\*|·)\s*10\s*(?:\^|\*\*)\s*\{?\s*(?P<exponent>-?\d+)\s*\}?)?"
_OVER = r"(?:/(?P<denominator>\d+)(?![\d./]))?"


def _pattern(digits: str) -> re.Pattern:
    # A minus is a sign only where it cannot be a subtraction. "1.2.3" is no number, and neither is the 3 of "x3".
    return re.compile(
        rf"(?<![\w.])(?P<sign>(?<![\d)\]}}])-\s?)?(?<!\d\.)(?P<digits>(?:{digits}))(?P<tail>{_TAIL}){_OVER}(?!\.?\d)"
    )


_NUMBER, _SPACED_NUMBER = _pattern(_PLAIN), _pattern(_SPACED)

_MARKER = re.compile(
    r"(?:\b(?:final\s+)?answer\b\s*(?:is|:|=|\bto\b[^.\n]*?\bis\b)|"  # en
    r"(?:答案|结果|结论|得数|答)\s*(?:是|为|為|等于|[:=])|"  # zh
    r"\b(?:respuesta|soluci[oó]n|resultado)\b(?:\s+(?:final|correcta))?\s*(?:es|[:=])|"  # es
    r"(?:الجواب|الإجابة|الاجابة|النتيجة|الناتج)(?:\s+(?:النهائي|النهائية|الصحيح|الصحيحة))?\s*(?:هو|هي|[:=])|"  # ar
    r"(?:答え|解答|正解)\s*(?:は|が|[:=])|"  # ja
    r"(?:정답|답)\s*(?:은|는|이|[:=])|"  # ko
    r"\b(?:jibu|majibu)\b(?:\s+(?:lake|la\s+mwisho|sahihi))?\s*(?:ni|[:=]))",  # sw
    re.IGNORECASE,
)
_QUESTION_START = re.compile(
    r"^[\s#*]*(?:Q\s*\d*\s*[:.]|Questions?\b|Problem\b|Exercise\b|问题|問題|问\s*[:：]|題目|题目|练习|Pregunta\b|Problema\b|Ejercicio\b|"
    r"سؤال|السؤال|مسألة|質問|질문|문제|Swali\b|Tatizo\b)",
    re.IGNORECASE | re.MULTILINE,
)
# Right before a number, these say that it is a result.
_STATES = re.compile(
    r"(?:[=≈→⇒:：]|\b(?:is|are|equals?|gives?|get|es|son|igual\s+a|da|ni|sawa\s+na)|是|为|為|等于|得|は|が|은|는|이|هو|هي|يساوي)\s*\$?\s*(?:\\boxed\{)?-?$",
    re.IGNORECASE,
)
_OPERATOR_BEFORE, _OPERATOR_AFTER = re.compile(r"[+\-−×*·÷/^]\s*$"), re.compile(r"^\s*[+−×*·÷/^!]|^\s*-\s*\d")
_OPTION = re.compile(r"(?<![A-Za-z])\(?(?P<letter>[A-E])\s*[.):]\s*(?=[-\d$])")
_CHOSEN = re.compile(
    r"^\W{0,4}(?:(?:option|choice|选项?|選択肢|opción|الخيار|보기)\s*)?\(?(?P<letter>[A-E])\)?(?![A-Za-z])",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_SENTENCE_END = re.compile(r"[.。]\s|[.。]$|[!！\n]", re.MULTILINE)


@dataclass(frozen=True)
class Extracted:
    """The final answer, the text it was read from, and how: "boxed", "marker", "last", or "none" with value None."""

    value: Fraction | None
    source: str
    how: str


def _ascii_digits(text: str) -> str:
    """Digits of every script as 0-9, one character for one; Arabic separators and the minus sign likewise."""
    table = {"٫": ".", "٬": ",", "−": "-", "﹣": "-", "－": "-", "．": ".", "，": ",", "＝": "=", "：": ":"}
    return "".join(
        table.get(c) or (str(unicodedata.digit(c)) if not c.isascii() and unicodedata.digit(c, None) is not None else c)
        for c in text
    )


def normalize(text: str) -> str:
    """Digits, full-width forms and LaTeX brought to one plain form (NFKC; separators of thousands stay)."""
    for space in "\u00a0\u202f\u2009":  # NFKC would make them plain spaces
        text = re.sub(rf"(?<=\d){space}(?=\d)", "\ue000", text)
    text = unicodedata.normalize("NFKC", _ascii_digits(text)).replace("\ue000", "\u00a0")
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}", r"\1/\2", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = text.replace("\\times", "×").replace("\\cdot", "·").replace("\\div", "÷").replace("{,}", ",")
    text = re.sub(r"(?<=\d)\\[,!;: ](?=\d{3})", ",", text)
    return re.sub(r"(?<=\d)\\[,!;]|\\(?:left|right|quad|qquad)\b|\*\*", "", text)


def _value(match: re.Match) -> Fraction:
    digits = re.sub(r"[,\s\u00a0\u202f\u2009]", "", match["digits"])
    decimal = re.match(r"\.\d+", match["tail"])
    value = Fraction(digits + (decimal[0] if decimal else ""))
    if match["exponent"]:
        # An exponent of thousands of digits is a loop, not a number: it would fill the memory.
        value *= Fraction(10) ** max(-400, min(400, int(match["exponent"])))
    if match["denominator"] and int(match["denominator"]):
        value /= int(match["denominator"])
    return -value if match["sign"] else value


def _numbers(text: str, spaced: bool = False) -> list[re.Match]:
    return list((_SPACED_NUMBER if spaced else _NUMBER).finditer(text))


def _options(text: str) -> dict[str, Fraction]:
    """The values of a multiple-choice list, {"A": 12, ...}."""
    found = {}
    for option in _OPTION.finditer(text):
        if number := _NUMBER.match(text, option.end()):
            found.setdefault(option["letter"], _value(number))
    return found if len(found) > 1 else {}


def _stated_after(text: str, options: dict[str, Fraction]) -> Fraction | None:
    """The value that the sentence beginning with `text` gives: a chosen option, or a number that is not a term."""
    end = _SENTENCE_END.search(text, 1)
    sentence = text[: end.start() + 1] if end else text
    chosen = _CHOSEN.match(sentence)
    if chosen and options.get(chosen["letter"].upper()) is not None and chosen["letter"].isupper():
        return options[chosen["letter"]]
    numbers = _numbers(sentence, spaced=True)
    if not numbers:
        return None
    # "the answer is 12 × 5 = 60": what stands after the last sign of equality. Otherwise the first number.
    equals = sentence.rfind("=")
    chosen_numbers = [n for n in numbers if n.start() > equals] or numbers
    if _OPERATOR_AFTER.match(sentence[chosen_numbers[0].end() :]):
        return None  # an expression that nobody evaluated
    return _value(chosen_numbers[0])


def _cut(text: str) -> str:
    """The text up to where a new question starts (not counting one that it begins with)."""
    first = re.search(r"\S", text)
    for match in _QUESTION_START.finditer(text, first.end() if first else 0):
        return text[: match.start()]
    return text


def _last_stated(text: str, echoed: set[Fraction]) -> re.Match | None:
    """The last number that states something: not in a question, not an unevaluated term, not only the prompt's."""
    for number in reversed(_numbers(text)):
        before, after = text[: number.start()], text[number.end() :]
        rest_of_line = after.split("\n", 1)[0]
        ending = re.search(r"[.。!！?？؟]", rest_of_line)
        if ending and ending[0] in "?？؟":
            continue
        states = _STATES.search(before)
        if _OPERATOR_AFTER.match(after) or (_OPERATOR_BEFORE.search(before) and not states):
            continue
        if _value(number) in echoed and not states:
            continue
        return number
    return None


def extract_answer(text: str, prompt: str = "") -> Extracted:
    """The final answer of `text` to `prompt`; value None where it gives none."""
    plain = _cut(normalize(text))
    options = _options(normalize(prompt)) or _options(plain)
    if boxed := _BOXED.findall(plain):
        content = boxed[-1].replace("$", "").strip()
        letter = re.fullmatch(r"\(?([A-E])\)?", content)
        if letter and letter[1] in options:
            return Extracted(options[letter[1]], content, "boxed")
        if (value := _stated_after(content, options)) is not None:
            return Extracted(value, content, "boxed")
    for marker in reversed(list(_MARKER.finditer(plain))):
        rest = plain[marker.end() :].replace("$", " ")
        if (value := _stated_after(rest.lstrip(), options)) is not None:
            return Extracted(value, rest.strip().split("\n")[0][:80], "marker")
    if number := _last_stated(plain.replace("$", " "), {_value(n) for n in _numbers(normalize(prompt))}):
        return Extracted(_value(number), number[0], "last")
    return Extracted(None, "", "none")


def is_correct(text: str, answer: int, prompt: str = "") -> bool:
    """Whether the final answer of `text` is `answer`, exactly. Nothing found is wrong."""
    return extract_answer(text, prompt).value == answer


def _answer_end(text: str, answer: int, prompt: str) -> int | None:
    """Where, in characters of `text`, the answer first stands complete (digits are replaced one for one)."""
    plain = _ascii_digits(text)
    echoed = answer in {_value(n) for n in _numbers(normalize(prompt))}
    for number in _numbers(plain):
        if _value(number) == answer and (not echoed or _STATES.search(plain[: number.start()])):
            return number.end()
    return None


def first_answer_character(text: str, answer: int, prompt: str = "") -> int | None:
    """FAT in Unicode characters: how many it takes until `answer` stands complete in `text`; None if it never does.

    The whole text decides what a number is, so the 12 in 123 does not count; nor does an answer that only repeats a
    number of the prompt, until a marker (=, :, is, 是 ...) states it.
    """
    return _answer_end(text, answer, prompt)


def first_answer_token(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str], answer: int, prompt: str = ""
) -> int | None:
    """FAT in generated tokens: the smallest t with the complete answer in decode(ids[:t]); None if it never is there.

    Decodes once for a text without the answer, and otherwise a logarithmic number of prefixes.
    """
    end = _answer_end(decode(ids), answer, prompt)
    if end is None:
        return None
    return bisect_left(range(len(ids) + 1), end, key=lambda t: len(decode(ids[:t])))


def restricted_mean(values: Iterable[int | None], budget: int) -> float:
    """Mean FAT over all problems, a miss (None) or anything later counting as the budget. NaN for no problems."""
    censored = [budget if value is None else min(value, budget) for value in values]
    return sum(censored) / len(censored) if censored else float("nan")


_EXPAG_NUMBER = re.compile(r"-?\d+\.?\d*")


def expag_check(text: str, answer: int) -> bool:
    """The script's verdict: the answer's digits are among the numbers it finds. "is 220." is 220., so it is wrong."""
    return str(answer) in _EXPAG_NUMBER.findall(text)


def expag_fat(text: str, answer: int) -> int:
    """The script's FAT: index of the first whitespace-separated piece that holds the answer, -1 if none does."""
    for index, piece in enumerate(text.split()):
        if str(answer) in _EXPAG_NUMBER.findall(piece):
            return index
    return -1


def expag_language(text: str) -> str:
    """The script's language: "zh" with more CJK than ASCII letters, else "en" with any, else "unknown"."""
    cjk = sum("\u4e00" <= c <= "\u9fff" for c in text)
    latin = sum(c.isascii() and c.isalpha() for c in text)
    return "zh" if cjk > latin else "en" if latin else "unknown"
