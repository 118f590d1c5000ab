"""What an answer is: one final number out of a text in seven languages, compared exactly.

`extract_answer` looks for these, in this order, and takes the last of its kind before the text turns to a new question
(a heading such as "Question:" or 问题, the problem's wording again, or a line with other numbers between two answers):

    boxed    \boxed{390}
    marker   "the answer is 390" and its like in zh en es ar ja ko sw, also "390 is the answer" and "Answer: B", where
             the letter stands for its option's value; words for "answer" go before words for "result"
    last     the last number, unless the text breaks off at "the answer is"

Digits of every script, full-width forms, thousands separators (1,234 1 234 1'234 1{,}234 ١٬٢٣٤), LaTeX, a x 10^n and
fractions in lowest terms are read as one exact number (`fractions.Fraction`), so 12, 12.0 and ١٢ are equal. These are
never an answer: a part of an expression (the 12 and the 7 of 12 + 7; left unevaluated it states no value, marker or
not), an argument (C(12, 3)), a number in a question, in an option that was not chosen, in the number of a step, in the
problem's own sentence repeated. A number that also stands in the prompt counts only where something states it
("=", ":", "is", 是, ...). Where nothing is found there is no answer, and no answer is wrong.

1.234 is 1234 in Spanish alone (kernel_surgery/plain.py), which is known from `language`, or else from words of the
prompt (of the text, where there is no prompt).

Not covered: numbers written as words, intervals, several answers, a percentage as a fraction (50% is 50), an
intermediate result that happens to equal the answer (it counts for the first-answer token).

Not built on math-verify 0.9: it reads no full-width or Arabic-Indic digits, takes 1.2 × 10^3 for 10 and an unevaluated
12 + 7 for 19, and knows neither the prompt nor options nor where a new question starts.

The `expag_*` functions are the reference script's arithmetic, quirks included, for continuity with its figures alone.
"""

import bisect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.scoring.numbers import UNIT, Number, Plain, numbers

Answer = int | str | Fraction


@dataclass(frozen=True)
class Extracted:
    """value: the answer, None where there is none. span: its place in the text as given. how: boxed, marker or last."""

    value: Fraction | None
    span: tuple[int, int] | None = None
    how: str | None = None


# --- the words around a number ---

_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b|[ ]?(?:番目|번째|단계)")
_STEP = re.compile(
    r"\b(?:step|part|case|paso|hatua|sehemu)[ ]?#?(\d+)|(?:步骤|第|ステップ|手順|الخطوة|خطوة|단계)[ ]?(\d+)",
    re.IGNORECASE,
)
_LIST_ITEM = re.compile(r"^[ \t]*(\d{1,2})[.)、:][ \t]*(?=[^\s\d])", re.MULTILINE)
_SENTENCE_END = re.compile(r"[。!?؟\n]|\.(?=\s|$|[A-Z¿])")
_QUESTION_END = re.compile(r"[?؟]|(?:か|까|呢|吗)[。.]")
# What options are named by. Letters of words need a point or a bracket after them; the others may stand alone.
_ORDERS = ("ABCDEFGH", "abcdefgh", "ابجد", "アイウエオカ", "가나다라마바", "①②③④⑤⑥⑦⑧")
_OPTION = re.compile(
    r"(?<![^\W\d_])\(?(?:([A-Ha-hابجد])\)?[ ]?[.):、]|([アイウエオカ가나다라마바①-⑧])[).:、]?)\s*(?=-?[\d.])"
)
_SPANISH = re.compile(r"[¿¡]|\b(?:el|es|los|las|del|respuesta|resultado|calcula|halla|suma)\b", re.IGNORECASE)
_ANSWER = (
    r"\banswers?\b|\brespuesta\b|\bans\b|\bjibu\b|\bmajibu\b|\bjawabu\b|答案|答え|こたえ"
    r"|(?<![回解])答(?![案え])|جواب|اجابة|정답|답"
)
_RESULT = r"\bresult\b|\bresultado\b|\bmatokeo\b|得数|结果|結果|ناتج|نتيجة|결과"
_CHOICE = r"\boptions?\b|\bchoose\b|\bchoice\b|\bopción\b|\bchaguo\b|选项|選項|选|選|الخيار|선택"
_IS = r"(?:\b(?:is|are|equals|es|son|ni|ndiyo|ndio)\b|是|为|為|等于|等於|は|が|은|는|이|가|هو|هي|يساوي|تساوي)"
_IS_BACKWARD = r"(?:\b(?:is|es|ni|ndiyo|ndio)\b|是|が|は|이|가|هو|هي)"
_MARKS = r"[\s*_\"'“”«»(\[⟦、,]{0,12}"
_NUMBER = r"(?P<target>-?\.?\d)"
_LETTER = (
    r"(?P<target>(?-i:[A-H](?![A-Za-z'(])|[a-h](?=\s*[).]|\s*$))|[ابجد](?!\w)|[アイウエオカ](?![ァ-ヶー])"
    r"|[가나다라마바](?=\))|[①-⑧])"
)


def _forward(nouns: str, target: str) -> re.Pattern:
    """noun ... is ... target, or noun: target. Words stand after "is" only: "Answer: We have 12" states nothing."""
    filler, gap = r"[^\n.。!?؟:=]{0,60}?", r"(?:[^\W\d_]{1,20}[ ,]{1,2}){0,3}?[^\W\d_]{0,20}[ ]?"
    link = rf"(?:{filler}(?:{_IS}{_MARKS}:?{_MARKS}{gap}|[:=]){_MARKS}|{_MARKS})"
    return re.compile(rf"(?:{nouns}){link}{target}", re.IGNORECASE)


def _backward(nouns: str) -> re.Pattern:
    """What follows the target in "390 is the answer"."""
    between = r"(?:(?:the|our|my|la|el|final|correct|right|最终的?|最終的?|正しい|최종|ال) ?){0,3}"
    return re.compile(rf" ?[)\]⟧]? ?{_IS_BACKWARD} ?{between}(?:{nouns})", re.IGNORECASE)


# Words for "answer" say more than words for "result", and letters alone follow words for "option".
_NUMBER_MARKERS = [(_forward(nouns, _NUMBER), _backward(nouns)) for nouns in (_ANSWER, _RESULT)]
_LETTER_MARKERS = [_forward(nouns, _LETTER) for nouns in (_ANSWER, _RESULT, _CHOICE)]
# The text was cut off where the answer would have stood. "That is the answer" and "Answer:" alone are not this.
_UNFINISHED = re.compile(rf"(?:{_ANSWER})[^\n.。!?؟:=]{{0,60}}?{_IS}{_MARKS}:?{_MARKS}$", re.IGNORECASE)
_DENIED = re.compile(
    r"\b(?:because|since|not|no|porque|pues|kwa sababu|si|sio)\b|n't\b|因为|不是|不等|ため|ない|لان|ليس|때문|아니",
    re.IGNORECASE,
)
_STATED = re.compile(
    r"(?:[=:→≈≡]|\b(?:is|equals?|equal to|gives?|get|leaves?|remainder|es|da|quedan?|sobran?|resto|igual a"
    r"|ni|baki|sawa na)\b|是|为|為|等于|等於|得到?|剩下?|余数?|余り|は|은|는|나머지|هو|هي|يساوي|تساوي|باقي)"
    r"[\s*_\"'“«(\[⟦]*$",
    re.IGNORECASE,
)
_LINKS = re.compile(rf"{_IS}|\b(?:mod|mm|cm|km|kg|equal to|igual a|sawa na|gives)\b|厘米", re.IGNORECASE)
_HEADING = (
    r"(?:q|question|problem|exercise|pregunta|problema|ejercicio|swali|zoezi|tatizo)\b"
    r"(?:[ ]*(?:la[ ]+)?#?\d*[ ]*(?:[:.)]|[ *]*(?=\n))|[ ]+(?:la[ ]+)?\d+\b)"
    r"|q\d+[ ]*[:.)]|(?:human|user|usuario|用户|用戶)[ ]*:"
    r"|(?:问题|問題|题目|題目|例题|例題|质问|質問|题|題|问|問|السؤال|سؤال|المسالة|مسالة|질문|문제)"
    r"[ ]*\d*[ ]*(?:[:.)、]|[ *]*(?=\n))"
    r"|第[ ]*[\d一二三四五六七八九十]+[ ]*[题題问問]"
)
# At the beginning of a line or sentence; a capitalised word with a colon also within a line.
_NEW_QUESTION = re.compile(
    rf"(?:^|(?<=[.。!?؟])|(?<=[.。!?؟] ))[ \t>*\-]*(?:{_HEADING})"
    r"|(?<=\s)(?:(?-i:Q|Question|Pregunta|Swali)|问题|問題|السؤال|سؤال|질문|문제) ?\d* ?:",
    re.IGNORECASE | re.MULTILINE,
)


def _words_of(prompt: str) -> re.Pattern | None:
    """The prompt's sentence with any numbers in it, as a pattern; None where it is hardly more than a formula."""
    if len(re.findall(r"[^\W\d_]", prompt)) < 4 or not re.search(r"[^\W\d_]{2}", prompt) or len(prompt) > 2000:
        return None
    number = r"(\d[\d,.]*(?<=\d))"
    pieces = re.split(rf"{number}|\s+", prompt.strip(" \n\t.。?؟:"))
    # re.split gives None for the group where white space was the separator.
    pattern = "".join(r"\s*" if p is None else number if p[:1].isdigit() else re.escape(p) for p in pieces)
    return re.compile(pattern, re.IGNORECASE) if number in pattern else None


def _options(text: str, found: Sequence[Number]) -> tuple[dict[str, Fraction], list[tuple[int, int]]]:
    """{letter: value} of a list "A. 12 B. 13 ...", and the spans of its numbers."""
    at = {n.begin: n for n in found}
    run: list[tuple[str, Number]] = []
    for match in _OPTION.finditer(text):
        letter = match[1] or match[2]
        number, order = at.get(match.end()), next(o for o in _ORDERS if letter in o)
        if number and letter == order[len(run)] and (not run or run[0][0] == order[0]):
            run.append((letter, number))
        elif len(run) > 1:
            break  # "The answer is A. 12" names an option again
        else:
            run = [(letter, number)] if number and letter == order[0] else []
        if len(run) == len(order):
            break
    if len(run) < 2:
        return {}, []
    return {letter: n.value for letter, n in run}, [(n.begin, n.end) for _, n in run]


# One text is asked several things, and one prompt goes with several texts: what was just read is kept.
@lru_cache(maxsize=64)
def _plain(prompt: str) -> str:
    return Plain(prompt).text


@lru_cache(maxsize=64)
def _numbers_of(asked: str, spanish: bool) -> tuple[Number, ...]:
    return tuple(numbers(asked, spanish))


@lru_cache(maxsize=8)
def _read(text: str, prompt: str, language: str | None) -> "_Reading":
    return _Reading(text, prompt, language)


class _Reading:
    """A text read with its prompt: where it ends, its numbers, and which of them can be answers. Never changed."""

    def __init__(self, text: str, prompt: str, language: str | None):
        self.plain = Plain(text)
        asked = _plain(prompt)
        self.spanish = language == "es" if language else bool(_SPANISH.search(asked or self.plain.text))
        self.prompt_numbers = _numbers_of(asked, self.spanish)
        self.prompt_values = {v for n in self.prompt_numbers for v in (n.value, *n.parts)}
        self.text, repeated = self._cut(_words_of(asked), asked)
        self.numbers = numbers(self.text, self.spanish)
        self.begins = [n.begin for n in self.numbers]
        self.options, self.listed = _options(self.text, self.numbers)
        if not self.options:
            self.options, _ = _options(asked, self.prompt_numbers)
        excluded = [*self.listed, *repeated, *self._questions(), *self._labels()]
        self.candidates = [n for n in self.numbers if not n.operand and not any(a <= n.begin < b for a, b in excluded)]

    def _cut(self, words: re.Pattern | None, asked: str) -> tuple[str, list[tuple[int, int]]]:
        """The text up to a new question, and the spans in it that repeat the prompt."""
        text, repeated = self.plain.text, []
        for match in words.finditer(text) if words else ():
            same = match.groups() == words.search(asked).groups()
            line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()] + text[match.end() :].partition("\n")[0]
            # Asked anew: a line of its own, after some number or with others. Else a step, or the problem repeated.
            if not line.strip(" \t.。?؟:*") and (not same or re.search(r"\d", text[: match.start()])):
                text = text[: match.start()]
                break
            if same:
                repeated.append(match.span())
        # A number alone, and then a question: the number was the answer.
        if asks := _QUESTION_END.search(text):
            line = text.rfind("\n", 0, asks.start()) + 1
            if re.fullmatch(r"-?[\d.,' ]*\d[.。]?", text[:line].strip()):
                text = text[:line]
        own = sorted(n.value for n in self.prompt_numbers)
        for match in _NEW_QUESTION.finditer(text):
            line = re.split(r"\n|(?<=[?؟])", text[match.end() :].lstrip(" *\n"), maxsplit=1)[0]
            restated = own and sorted(n.value for n in numbers(line, self.spanish)) == own
            if text[: match.start()].strip() or not restated:
                return text[: match.start()], repeated
        return text, repeated

    def _questions(self) -> list[tuple[int, int]]:
        ends = [0, *(m.end() for m in _SENTENCE_END.finditer(self.text))]
        return [(ends[bisect.bisect_right(ends, m.start()) - 1], m.end()) for m in _QUESTION_END.finditer(self.text)]

    def _labels(self) -> list[tuple[int, int]]:
        """Numbers of steps and of list items, and ordinals."""
        spans = [m.span() for m in _STEP.finditer(self.text)]
        spans += [(n.begin, n.end) for n in self.numbers if _ORDINAL.match(self.text, n.end)]
        items = [m.span(1) for m in _LIST_ITEM.finditer(self.text)]
        ranks = [int(self.text[a:b]) for a, b in items]
        # A list counts 1, 2, ...: a line that begins "12. This is" is an answer.
        return spans + [s for s, r in zip(items, ranks, strict=True) if set(range(1, max(r, 2) + 1)) <= set(ranks)]

    def stated(self, number: Number) -> bool:
        """Whether something says that this is what comes out, rather than the prompt repeated."""
        return bool(_STATED.search(self.text[max(0, number.begin - 24) : number.begin]))

    def echo(self, number: Number) -> bool:
        """Whether the number is only repeated from the prompt."""
        known = number.value in self.prompt_values or (number.parts and set(number.parts) <= self.prompt_values)
        return bool(known) and not self.stated(number)

    def result(self, begin: int) -> Number | None:
        """What an expression beginning at `begin` comes to: the number after its last "=", None if left open."""
        i = bisect.bisect_left(self.begins, begin)
        if i == len(self.numbers):
            return None
        while i + 1 < len(self.numbers):
            between = self.text[self.numbers[i].end : self.numbers[i + 1].begin]
            if self.numbers[i].operand and self.numbers[i + 1].operand:
                between = between.replace(",", "")  # C(12, 3)
            words = re.search(r"[^\W\d_]{2,}|[\n;,。]", _LINKS.sub("", between))
            if words or not (self.numbers[i].operand or re.match(rf"[ )]*{UNIT}[ )]*[=→≈]", between)):
                break
            i += 1
        return None if self.numbers[i].operand else self.numbers[i]

    def asked_anew(self, begin: int, end: int, known: Fraction) -> bool:
        """Whether a line of its own between two answers asks something else: words, other numbers, no result."""
        for match in re.finditer(r"(?<=\n)[^\n]*\n", self.text[begin:end]):
            line = match.group()
            if re.search(r"[^\W\d_]{2}", line) and not re.search("[=→≈]", line):
                values = {n.value for n in self.numbers if match.start() <= n.begin - begin < match.end()}
                if values - self.prompt_values - {known}:
                    return True
        return False

    def final(self, found: list[tuple[Fraction, int, int]], how: str) -> Extracted | None:
        """The last of the answers (value, begin, end) that were given before something else was asked."""
        answer = None
        for value, begin, end in sorted(found, key=lambda f: f[1:]):
            if answer and self.asked_anew(answer[2], begin, answer[0]):
                break
            answer = (value, begin, end)
        return answer and Extracted(answer[0], self.plain.span(*answer[1:]), how)

    def boxed(self) -> Extracted | None:
        found = []
        for match in re.finditer("⟦([^⟦⟧]*)⟧", self.text):
            inside = [n for n in self.numbers if match.start() < n.begin < match.end()]
            if (letter := match[1].strip(" ().")) in self.options:
                found.append((self.options[letter], *match.span(1)))
            elif inside and not inside[-1].operand:
                found.append((inside[-1].value, inside[-1].begin, inside[-1].end))
        return self.final(found, "boxed")

    def marked(self) -> Extracted | None:
        for pattern in _LETTER_MARKERS if self.options else ():
            found = [
                (self.options[match["target"]], *match.span("target"))
                for match in pattern.finditer(self.text)
                if match["target"] in self.options and not _DENIED.search(match.group())
            ]
            if found:
                return self.final(found, "marker")
        for forward, backward in _NUMBER_MARKERS:
            results = [n for n in self.candidates if backward.match(self.text, n.end)]
            for match in forward.finditer(self.text):
                if not _DENIED.search(match.group()):
                    results += [n for n in (self.result(match.start("target")),) if n in self.candidates]
            if results:
                return self.final([(n.value, n.begin, n.end) for n in results], "marker")
        # The text begins with the chosen letter: an answer to options that the prompt lists.
        match = re.match(r"\s*\(?([A-Ha-hابجدアイウエオカ가나다라마바①-⑧])(?:[.):]|\s*$)", self.text, re.MULTILINE)
        if match and match[1] in self.options and not self.listed:
            return self.final([(self.options[match[1]], *match.span(1))], "marker")
        return None

    def last(self) -> Extracted | None:
        if _UNFINISHED.search(self.text):
            return None
        for number in reversed(self.candidates):
            if not self.echo(number):
                return self.final([(number.value, number.begin, number.end)], "last")
        return None


# --- what callers use ------------------------------------------------------------------------------------------------


def extract_answer(text: str, prompt: str = "", *, language: str | None = None) -> Extracted:
    """The one final answer in `text`; `Extracted(None)` where there is none.

    prompt: what was asked, so that a number repeated from it is not taken for an answer, options are known, and the
    text is cut where the same question is asked again. language: "es" reads 1.234 as 1234 (see above).
    """
    reading = _read(text, prompt, language)
    return reading.boxed() or reading.marked() or reading.last() or Extracted(None)


def exact_answer(answer: Answer) -> Fraction:
    """An answer as an exact number. Raises ValueError for a string that is no single number."""
    if not isinstance(answer, str):
        return Fraction(answer)
    plain = Plain(answer.strip()).text.strip()
    found = numbers(plain, spanish=False)
    if len(found) != 1 or (found[0].begin, found[0].end) != (0, len(plain)):
        raise KernelSurgeryError(
            f"cannot compare with the answer {answer!r}: it takes one number (390, 1,234, 3/4, 1.5e3)."
        )
    return found[0].value


def is_correct(text: str, answer: Answer, prompt: str = "", *, language: str | None = None) -> bool:
    """Whether the final answer in `text` equals `answer` exactly. Raises ValueError for an answer that is no number."""
    return extract_answer(text, prompt, language=language).value == exact_answer(answer)


def first_answer_character(text: str, answer: Answer, prompt: str = "", *, language: str | None = None) -> int | None:
    """Unicode characters of `text` up to the end of the first complete correct answer; None where there is none.

    The first number that equals `answer`, is no part of an expression, question, option or label, and is no echo of
    the prompt; it is judged in the whole text, so that 12 in 123 or in 12 + 7 does not count. Where the answer is
    given by an option's letter alone, the letter's end.
    """
    value = exact_answer(answer)
    reading = _read(text, prompt, language)
    for number in reading.candidates:
        if number.value == value and not reading.echo(number):
            return reading.plain.span(number.begin, number.end)[1]
    found = reading.boxed() or reading.marked()
    return found.span[1] if found and found.value == value else None


def first_answer_token(
    ids: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    answer: Answer,
    prompt: str = "",
    *,
    language: str | None = None,
) -> int | None:
    """The first t such that decode(ids[:t]) holds the complete correct answer (`first_answer_character`); else None.

    ids: the generated tokens [n], without the prompt. Decodes the whole once, and about log2(n) prefixes only if the
    answer is there.
    """
    text = decode(ids)
    end = first_answer_character(text, answer, prompt, language=language)
    if end is None:
        return None
    return bisect.bisect_left(range(len(ids)), True, key=lambda t: decode(ids[:t])[:end] == text[:end])
