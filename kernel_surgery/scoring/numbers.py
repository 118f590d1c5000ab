"""The exact numbers in a plain text: signs, thousands separators, a x 10^n, fractions, and 万 or "million".

`numbers` reads a text that `scoring.plain` made plain, and returns each number as an exact `fractions.Fraction`. It
marks the operands: numbers in an expression (12 + 7, 12/4, 2^10) and arguments (C(12, 3)).

    text         in Spanish       in other languages
    1.234        1234             1.234
    1,234        1234             1234
    12,5         12.5             not certain, except between Arabic digits: 12.5
    1.234.567    1234567          1234567

A plain space groups digits, unless an operator beside it separates two numbers.

A number is **not certain** where its sign or its digits can be read in two ways: a dash that may be a minus sign, ±58,
12,5 outside Spanish, the ratio 3:4. Such a number is never an answer.

Not supported: numbers in words, percentages (50% is 50), and digit groups of four.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

# Digits in groups of three. All separators of a number are equal. Outside Spanish, points need at least two groups, or
# a decimal comma after them.
_COMMAS = r"[1-9]\d{0,2}(?P<mark>[,' \u00a0_])\d{3}(?:(?P=mark)\d{3})*(?!(?P=mark)?\d)(?:\.\d+|(?<![,]\d{3}),\d+)?"
_INDIAN = r"[1-9]\d?(?:,\d{2})+,\d{3}(?![,.]?\d)"
_POINTS = r"[1-9]\d{0,2}(?:(?:\.\d{3}){2,}(?![.]?\d)(?:,\d+)?|\.\d{3},\d{1,2}(?!\d))"
_SPANISH_POINTS = r"[1-9]\d{0,2}(?:\.\d{3})+(?![.]?\d)(?:,\d+)?"
_DECIMAL, _SPANISH_DECIMAL = r"\d+(?:\.\d+)?|(?<!\d)\.\d+", r"\d+(?:[.,]\d+(?![.,]?\d))?|(?<!\d)\.\d+"
_ARABIC_GROUPS = r"[1-9]\d{0,2}(?:،\d{3})+(?!،?\d)|\d+،\d+(?!،?\d)"
_START, _EXPONENT = r"(?<![A-Za-z0-9_])(?<!\d[.،])", r"(?:[eE][+-]?\d+(?!\w))?"
_LITERAL = {
    False: re.compile(f"{_START}(?:{_COMMAS}|{_INDIAN}|{_POINTS}|{_ARABIC_GROUPS}|{_DECIMAL}){_EXPONENT}"),
    True: re.compile(f"{_START}(?:{_COMMAS}|{_SPANISH_POINTS}|{_SPANISH_DECIMAL}){_EXPONENT}"),
}
# In "=10 103+5", the space separates two numbers. This is so if the grouped number ("#") has a digit before it or an
# operator after it.
_TWO_NUMBERS = re.compile(r"[\d.,] #|# ?[-+×*/÷^=(→]")
_POWER = re.compile(r" ?[×x*] ?10 ?(?:\^|\*\*) ?\(?([+-]?\d+)\)?")
_TEN = re.compile(r" ?(?:\^|\*\*) ?\(?([+-]?\d+)\)?")
_PART = r"(?:\( ?([+-]?\d{1,99}) ?\)|(\d{1,99}))"
_FRACTION = re.compile(rf"{_PART} ?[⁄/] ?{_PART}(?!\d|\.\d|\s?[⁄/])")
_MIXED = re.compile(
    r" ?\(?(\d{1,9})\)?⁄\(?(\d{1,9})\)?(?!\d)"
    r"|(?: | ?[と又과와] ?| (?:and|y|na"
    r"|و) ?)(\d{1,3})[/⁄](\d{1,3})(?![\d/]|\.\d)"
)
# The largest exponent and the longest literal that are read. Longer ones are noise, and slow to compare.
_LARGEST_EXPONENT, _LONGEST = 400, 400
_MULTIPLIERS = (
    (2, r"百(?!分)|백"),
    (3, r"千(?![米克瓦卡])|천|\bthousand\b|\bmil\b|الف\b|الاف\b"),
    (4, r"[万萬]|만(?!에)"),
    (6, r"\bmillion\b|\bmill[oó]n(?:es)?\b|مليون\b|ملايين\b"),
    (8, r"[亿億]|억"),
    (9, r"\bbillion\b|مليار\b"),
    (12, r"兆|조(?![가-힣])"),
)
_MULTIPLIER = re.compile(" ?(?:" + "|".join(f"(?P<e{power}>{words})" for power, words in _MULTIPLIERS) + ")")
_MULTIPLIER_BEFORE = re.compile(r"\b(?:(elfu)|(laki)|(milioni))(?: za| ya)? $", re.IGNORECASE)
# Operators in words. They count only between numbers: "12 plus 7", "12 加 7".
_WORDS = (
    r"plus|minus|times|divided by|multiplied by|más|menos|por|entre|jumlisha|toa|mara|kugawanywa kwa"
    r"|زائد|ناقص|مضروبا? في|على|加上?|减去?|減去?|乘以?|除以|足す|引く|掛ける|かける|割る|더하기|빼기|곱하기|나누기"
)
UNIT = (
    r"(?>(?:(?:mm|cm|km|kg|ml|m|g|s|h|厘米|千米|米)(?![A-Za-z])(?:\^?\(?[23]\)?(?!\d))?"
    r"(?:/(?:s|h|min|m|kg|g|l)(?![A-Za-z])(?:\^?\(?[23]\)?(?!\d))?)?)?)"
)
_OPERAND_BEFORE = re.compile(
    rf"(?:[×÷^_√⁄]|(?:[\d)\]!%]|(?<![^\W_])[A-Za-z]) ?[-+*/]|\bmod|\d {{0,2}}(?:{_WORDS}))[ (\[]*$", re.IGNORECASE
)
_OPERAND_AFTER = re.compile(
    rf" {{0,3}}(?:[)\]] ?)?{UNIT} {{0,3}}(?:[×÷^⁄]|[-+*/] ?(?:[\d(\[√]|[A-Za-z](?![A-Za-z])|\s?\Z)|mod\b|!\s?[=×*÷/)+-]"
    rf"|(?:{_WORDS}) ?[(\[]?\d)|[CPx]\(?\d",
    re.IGNORECASE,
)
_ARGUMENTS = re.compile(r"(?<![A-Za-z])(?:[A-Za-z]|gcd|lcm|mcd|mcm|comb|binom|sqrt|log|ln|range)\([^()\n]*\)")
# --- signs
_CURRENCY = r"(?:(?:US|R|[KT]?[Ss]h|Rs|USD|EUR)\b\.? {0,2})?"
_DASH = re.compile(rf"([-±—―<>≤≥≠])( {{0,3}}){_CURRENCY}$")
# What may stand before a minus sign and a space. After other words the dash may be punctuation.
_BEFORE_MINUS = re.compile(
    r"(?:[=:→≈~(\[⟦{,;|]|\b(?:is|are|be|equals?|to|get|gives?|es|son|ni|ndiyo|ndio|sawa na|igual a)|是|为|為"
    r"|等于|等於|得"
    r"|は|が|은|는|이|가|هو|هي|يساوي|تساوي)[ *]*$",
    re.IGNORECASE,
)
_NEGATIVE = re.compile(
    r"(?:(?<!non-)\b(?:negative|minus)|(?<!al )(?<!lo )(?<!\bo )\b(?:menos|negativo)|\b(?:hasi|kasoro)|[负負]の?"
    r"|マイナス"
    r"|零下|氷点下|마이너스|음수|음의|영하|سالب|ناقص|تحت الصفر)[ -]?\(?$",
    re.IGNORECASE,
)
_BELOW_ZERO = re.compile(
    r" ?(?:° ?C?|degrees?|grados?|درجات?|درجة|nyuzi)? ?(?:below zero|bajo cero|تحت الصفر|chini ya sifuri)",
    re.IGNORECASE,
)
# The sign may belong to the number or to the next word.
_SIGN_AFTER = re.compile(
    r" ?\(?(?:negative|negativ[oa]|minus|menos|hasi|سالب|سالبة|负数|負数|マイナス|음수)\b(?! {0,2}\(?\d)", re.IGNORECASE
)
_UNCERTAIN_AFTER = re.compile(
    r"[,.،:_]\d| ?~ ?\d| (?:or|o|au|او) -?\d| ?(?:或|または|또는) ?-?\d|[kKM](?![\w])|-(?![\w\s(>])"
)
_UNCERTAIN_BEFORE = re.compile(
    r"(?:\d(?:[,،:_]| ?~ ?| (?:or|o|au|او) )|\d ?(?:或|または|또는) ?"
    r"|\b(?:between|entre|kati ya|بين) \S{1,12} (?:and|y|na|و) ?)$",
    re.IGNORECASE,
)
_ARABIC_LETTER = re.compile("[\u0621-\u064a]")


@dataclass
class Number:
    """A number at [begin, end) of a plain text.

    value: its exact value. operand: whether it belongs to an expression or is an argument. parts: the numerator and
    denominator of a fraction. certain: whether its sign and digits can be read in one way only.
    """

    value: Fraction
    begin: int
    end: int
    operand: bool = False
    parts: tuple[Fraction, ...] = ()
    certain: bool = True


def numbers(text: str, spanish: bool = False) -> list[Number]:
    """Return every number in plain `text`, in order. spanish: whether to read 1.234 and 12,5 as Spanish does."""
    arguments = [m.span() for m in _ARGUMENTS.finditer(text)]
    bullets = len(re.findall(r"^[ \t]*- ", text, re.MULTILINE)) > 1
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
        _multiply(number, text)
        argument = any(start <= begin < end for start, end in arguments)
        if not argument and (
            _UNCERTAIN_AFTER.match(text, number.end) or _UNCERTAIN_BEFORE.search(text[max(0, begin - 28) : begin])
        ):
            number.certain = False
        before = _sign(number, text, bullets)
        at = number.end
        if _OPERAND_BEFORE.search(before) or _OPERAND_AFTER.match(text, at) or argument:
            number.operand = True
        result.append(number)
    return result


def _literal_value(literal: str, spanish: bool) -> Fraction | None:
    mantissa, _, exponent = literal.lower().partition("e")
    grouped = re.sub(r"(?<=\d)[' \u00a0_](?=\d)", "", mantissa)
    if grouped == mantissa and re.fullmatch(
        r"[1-9]\d{0,2}(?:[,،]\d{3})+(?:\.\d+)?|[1-9]\d?(?:,\d{2})+,\d{3}", mantissa
    ):
        grouped = re.sub("[,،]", "", mantissa)
    elif re.fullmatch(r"[1-9]\d{0,2}(?:\.\d{3})+,\d+", mantissa) or re.fullmatch(
        rf"[1-9]\d{{0,2}}(?:\.\d{{3}}){{{1 if spanish else 2},}}", mantissa
    ):
        grouped = mantissa.replace(".", "")
    if len(literal) > _LONGEST or abs(power := int(exponent or 0)) > _LARGEST_EXPONENT:
        return None
    return Fraction(re.sub("[,،]", ".", grouped)) * Fraction(10) ** power


def _extend(number: Number, text: str) -> None:
    """Extend a number by a power of ten, by its denominator, or by the fraction of a mixed number."""
    if match := _POWER.match(text, number.end) or (number.value == 10 and _TEN.match(text, number.end)):
        if len(match[1]) <= 4 and abs(exponent := int(match[1])) <= _LARGEST_EXPONENT:
            factor = number.value if match.re is _POWER else 1
            number.value, number.end = factor * Fraction(10) ** exponent, match.end()
        return
    bracket = re.search(r"\( ?[+-]?$", text[max(0, number.begin - 3) : number.begin])
    outer = number.begin - len(bracket.group()) if bracket else number.begin
    if match := _FRACTION.match(text, outer) or _FRACTION.match(text, number.begin):
        top, bottom = int(match[1] or match[2]), int(match[3] or match[4])
        number.begin, number.end = match.start(), match.end()
        number.parts = (Fraction(top), Fraction(bottom))
        if abs(bottom) > 1 and gcd(top, bottom) == 1:
            number.value = Fraction(top, bottom)
        else:
            number.operand = True  # 12/4: a division that is not evaluated
    elif match := _MIXED.match(text, number.end):
        top, bottom = int(match[1] or match[3]), int(match[2] or match[4])
        if (match[1] and bottom) or 0 < top < bottom:
            number.value += Fraction(top, bottom)
            number.end = match.end()


def _multiply(number: Number, text: str) -> None:
    """Read the multiples after a number (3.6万, 3万6000, 5百万, 36 thousand), and those that Swahili has before it."""
    if before := _MULTIPLIER_BEFORE.search(text[max(0, number.begin - 16) : number.begin]):
        number.value *= 10 ** (3 if before[1] else 5 if before[2] else 6)
        number.begin -= len(before.group())
        # "elfu 36 na mia 5" goes on in words.
        number.certain = not re.match(r" na (?:mia|elfu|\d)", text[number.end : number.end + 8])
        return
    total, last = Fraction(0), 99
    value, end = number.value, number.end
    while match := _MULTIPLIER.match(text, end):
        power = 0
        while match:
            power += int(match.lastgroup[1:])  # type: ignore[index]
            end = match.end()
            match = _MULTIPLIER.match(text, end)
        if power >= last:
            number.certain = False
            return
        total, last = total + value * 10**power, power
        number.value, number.end = total, end
        more = re.match(rf"\d{{1,4}}(?![\d.,])| ?\d{{1,4}}(?={_MULTIPLIER.pattern})", text[end : end + 24])
        if not more:
            return
        value, end = Fraction(int(more.group())), end + more.end()
        if not _MULTIPLIER.match(text, end):
            if value >= 10**power:
                number.certain = False
            number.value, number.end = total + value, end
            return


def _sign(number: Number, text: str, bullets: bool) -> str:
    """Read the sign of a number into its value. Return the text before the number and its sign.

    A minus sign next to the number counts, unless it follows a number or a letter: then it is an operator or a hyphen.
    A minus sign with a space counts after "=", ":" and "is". Elsewhere it may be a dash, so the number is not certain.
    """
    begin, end = number.begin, number.end
    start = max(0, begin - 32)
    before = text[start:begin]
    opened = re.search(r"(?<=[-±—])[ (]*\( *$", before)
    if opened and text[end : end + 4].lstrip(" ").startswith(")"):
        before = before[: opened.start()]
    if match := _DASH.search(before):
        mark, space, lead = match[1], match[2], before[: match.start()]
        if mark == "-" and re.search(r"[\d)\]⟧!%] *$", lead):
            return before  # an operator
        if mark == "-" and not space and re.search(r"[A-Za-z]$", lead):
            if not re.search(r"(?<![A-Za-z])[A-Za-z]$", lead):
                number.operand = True  # COVID-19
            return before
        if mark == "—" and lead.endswith("—"):
            return before  # the Chinese dash
        if bullets and space and re.search(r"(?:^|\n)[ \t]*$", lead):
            return before  # an item of a list
        if (
            mark != "-"
            or lead.endswith("-")
            or ((space or re.search(r"[^\W\d_]$", lead)) and not _BEFORE_MINUS.search(lead))
        ):
            number.certain = False
        number.value, number.begin = -number.value, start + match.start()
        return lead
    if (match := _NEGATIVE.search(before)) and not re.search(r"\d ?$", before[: match.start()]):
        number.value, number.begin = -number.value, start + match.start()
        return before[: match.start()]
    if match := _BELOW_ZERO.match(text, end):
        number.value, number.end = -number.value, match.end()
    elif _SIGN_AFTER.match(text, end):
        number.certain = False
    elif (
        text[end : end + 1] == "-"
        and not re.match(r"-[\w(]|- ?\d", text[end : end + 3])
        and _ARABIC_LETTER.search(before)
    ):
        # Written from right to left, the sign may be stored after the digits.
        number.value, number.end, number.certain = -number.value, end + 1, True
    return before
