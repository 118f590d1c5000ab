"""Extract the final answer of a text: one number, from a text in one of seven languages, compared exactly.

`extract_answer` looks for these kinds of answer in this order, and takes the last answer of the first kind it finds:

    boxed    \\boxed{390}
    marker   "the answer is 390" and similar phrases in all seven languages, "390 is the answer", and "Answer: B", where
             the letter means the value of its option. Words for "answer" come before words for "result".
    last     the last number, unless the text ends at "the answer is"

Text after a new question is ignored. A heading ("Question:", 问题), the problem's wording, or a line with other numbers
between two answers starts a new question.

One exact number (`fractions.Fraction`) is read from digits of any script, full-width forms, thousands separators
(1,234 1 234 1'234 1{,}234 ١٬٢٣٤), LaTeX, a x 10^n, and fractions in lowest terms. So 12, 12.0 and ١٢ are equal.

These are never an answer, even after a marker:

- a number inside an expression (12 and 7 in 12 + 7) or an argument (C(12, 3))
- a number in a question, in an option that was not chosen, or in the label of a step
- a number in a repetition of the problem

A number of the prompt counts only if the text states it, after "=", ":", "is" or 是. A text without an answer is wrong.

1.234 is 1234 only in Spanish (`scoring.numbers`). `language` decides whether a text is Spanish. Without it, words of
the prompt decide, or of the text if there is no prompt.

Not supported: numbers in words, intervals, several answers, and a percentage as a fraction (50% is 50). An intermediate
result that equals the answer counts for the first-answer token.

math-verify 0.9 is not used. It does not read full-width and Arabic-Indic digits. It reads 1.2 × 10^3 as 10, and an
unevaluated 12 + 7 as 19. It does not know the prompt, the options, or the start of a new question.
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
    """An extracted answer.

    value: the exact number, or None without an answer. span: its place in the original text. how: "boxed", "marker" or
    "last".
    """

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
# The names of options. Letters that also form words need a point or a bracket after them. The others may stand alone.
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
    """Match "noun ... is ... target" or "noun: target". Words may follow only "is", unlike "Answer: We have 12"."""
    filler, gap = r"[^\n.。!?؟:=]{0,60}?", r"(?:[^\W\d_]{1,20}[ ,]{1,2}){0,3}?[^\W\d_]{0,20}[ ]?"
    link = rf"(?:{filler}(?:{_IS}{_MARKS}:?{_MARKS}{gap}|[:=]){_MARKS}|{_MARKS})"
    return re.compile(rf"(?:{nouns}){link}{target}", re.IGNORECASE)


def _backward(nouns: str) -> re.Pattern:
    """Match the text after the target in "390 is the answer"."""
    between = r"(?:(?:the|our|my|la|el|final|correct|right|最终的?|最終的?|正しい|최종|ال) ?){0,3}"
    return re.compile(rf" ?[)\]⟧]? ?{_IS_BACKWARD} ?{between}(?:{nouns})", re.IGNORECASE)


# Words for "answer" come before words for "result". Only a letter may follow a word for "option".
_NUMBER_MARKERS = [(_forward(nouns, _NUMBER), _backward(nouns)) for nouns in (_ANSWER, _RESULT)]
_LETTER_MARKERS = [_forward(nouns, _LETTER) for nouns in (_ANSWER, _RESULT, _CHOICE)]
# The text ends just before the answer. "That is the answer" and "Answer:" alone do not match.
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
# A heading matches at the beginning of a line or sentence. A capitalised word with a colon also matches within a line.
_NEW_QUESTION = re.compile(
    rf"(?:^|(?<=[.。!?؟])|(?<=[.。!?؟] ))[ \t>*\-]*(?:{_HEADING})"
    r"|(?<=\s)(?:(?-i:Q|Question|Pregunta|Swali)|问题|問題|السؤال|سؤال|질문|문제) ?\d* ?:",
    re.IGNORECASE | re.MULTILINE,
)


def _words_of(prompt: str) -> re.Pattern | None:
    """Return a pattern for the prompt's sentence with any numbers, or None if the prompt is only a formula."""
    if len(re.findall(r"[^\W\d_]", prompt)) < 4 or not re.search(r"[^\W\d_]{2}", prompt) or len(prompt) > 2000:
        return None
    number = r"(\d[\d,.]*(?<=\d))"
    pieces = re.split(rf"{number}|\s+", prompt.strip(" \n\t.。?؟:"))
    # For a separator of white space, re.split gives None as the group.
    pattern = "".join(r"\s*" if p is None else number if p[:1].isdigit() else re.escape(p) for p in pieces)
    return re.compile(pattern, re.IGNORECASE) if number in pattern else None


def _options(text: str, found: Sequence[Number]) -> tuple[dict[str, Fraction], list[tuple[int, int]]]:
    """Return {letter: value} of a list "A. 12 B. 13 ...", and the spans of its numbers."""
    number_at = {n.begin: n for n in found}
    run: list[tuple[str, Number]] = []
    for match in _OPTION.finditer(text):
        letter = match[1] or match[2]
        number, order = number_at.get(match.end()), next(o for o in _ORDERS if letter in o)
        if number and letter == order[len(run)] and (not run or run[0][0] == order[0]):
            run.append((letter, number))
        elif len(run) > 1:
            break  # "The answer is A. 12" repeats an option
        else:
            run = [(letter, number)] if number and letter == order[0] else []
        if len(run) == len(order):
            break
    if len(run) < 2:
        return {}, []
    return {letter: n.value for letter, n in run}, [(n.begin, n.end) for _, n in run]


# Several functions read the same text, and several texts share a prompt, so the latest readings are cached.
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
    """A text that was read with its prompt: the text up to a new question, its numbers, and the possible answers.

    It is cached, so it must not be changed.
    """

    def __init__(self, text: str, prompt: str, language: str | None):
        self.plain = Plain(text)
        question = _plain(prompt)
        self.spanish = language == "es" if language else bool(_SPANISH.search(question or self.plain.text))
        self.prompt_numbers = _numbers_of(question, self.spanish)
        self.prompt_values = {v for n in self.prompt_numbers for v in (n.value, *n.parts)}
        self.text, repeated = self._cut(_words_of(question), question)
        self.numbers = numbers(self.text, self.spanish)
        self.begins = [n.begin for n in self.numbers]
        self.options, self.listed = _options(self.text, self.numbers)
        if not self.options:
            self.options, _ = _options(question, self.prompt_numbers)
        excluded = [*self.listed, *repeated, *self._questions(), *self._labels()]
        self.candidates = [n for n in self.numbers if not n.operand and not any(a <= n.begin < b for a, b in excluded)]

    def _cut(self, words: re.Pattern | None, asked: str) -> tuple[str, list[tuple[int, int]]]:
        """Return the text up to a new question, and the spans in it that repeat the prompt."""
        text, repeated = self.plain.text, []
        once = words.search(asked) if words else None
        asked_for = once.groups() if once else None
        for match in words.finditer(text) if words else ():
            same_numbers = match.groups() == asked_for
            line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()] + text[match.end() :].partition("\n")[0]
            # The wording alone in a line is a new question if a number precedes it or its numbers differ. Otherwise it
            # is a step, or a repetition of the problem.
            if not line.strip(" \t.。?؟:*") and (not same_numbers or re.search(r"\d", text[: match.start()])):
                text = text[: match.start()]
                break
            if same_numbers:
                repeated.append(match.span())
        # If only a number precedes a question, the number is the answer.
        if question := _QUESTION_END.search(text):
            begin = text.rfind("\n", 0, question.start()) + 1
            if re.fullmatch(r"-?[\d.,' ]*\d[.。]?", text[:begin].strip()):
                text = text[:begin]
        expected = sorted(n.value for n in self.prompt_numbers)
        for match in _NEW_QUESTION.finditer(text):
            line = re.split(r"\n|(?<=[?؟])", text[match.end() :].lstrip(" *\n"), maxsplit=1)[0]
            restates = expected and sorted(n.value for n in numbers(line, self.spanish)) == expected
            if text[: match.start()].strip() or not restates:
                return text[: match.start()], repeated
        return text, repeated

    def _questions(self) -> list[tuple[int, int]]:
        ends = [0, *(m.end() for m in _SENTENCE_END.finditer(self.text))]
        return [(ends[bisect.bisect_right(ends, m.start()) - 1], m.end()) for m in _QUESTION_END.finditer(self.text)]

    def _labels(self) -> list[tuple[int, int]]:
        """Return the spans of step numbers, list item numbers and ordinals."""
        spans = [m.span() for m in _STEP.finditer(self.text)]
        spans += [(n.begin, n.end) for n in self.numbers if _ORDINAL.match(self.text, n.end)]
        items = [m.span(1) for m in _LIST_ITEM.finditer(self.text)]
        ranks = [int(self.text[a:b]) for a, b in items]
        # A list counts from 1, so a line "12. This is" without items 1 to 11 is an answer.
        return spans + [s for s, r in zip(items, ranks, strict=True) if set(range(1, max(r, 2) + 1)) <= set(ranks)]

    def stated(self, number: Number) -> bool:
        """Whether the text before the number states it as a result."""
        return bool(_STATED.search(self.text[max(0, number.begin - 24) : number.begin]))

    def echo(self, number: Number) -> bool:
        """Whether the number only repeats the prompt."""
        known = number.value in self.prompt_values or (number.parts and set(number.parts) <= self.prompt_values)
        return bool(known) and not self.stated(number)

    def result(self, begin: int) -> Number | None:
        """Return the value of the expression at `begin`: the number after its last "=". None if it is not evaluated."""
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
        """Whether a whole line between two answers asks something else: words, other numbers, and no result."""
        for match in re.finditer(r"(?<=\n)[^\n]*\n", self.text[begin:end]):
            line = match.group()
            if re.search(r"[^\W\d_]{2}", line) and not re.search("[=→≈]", line):
                values = {n.value for n in self.numbers if match.start() <= n.begin - begin < match.end()}
                if values - self.prompt_values - {known}:
                    return True
        return False

    def final(self, found: list[tuple[Fraction, int, int]], how: str) -> Extracted | None:
        """Return the last of the answers (value, begin, end) that come before another question."""
        answer = None
        for value, begin, end in sorted(found, key=lambda f: f[1:]):
            if answer and self.asked_anew(answer[2], begin, answer[0]):
                break
            answer = (value, begin, end)
        return answer and Extracted(answer[0], self.plain.span(*answer[1:]), how)

    def boxed(self) -> Extracted | None:
        answers = []
        for match in re.finditer("⟦([^⟦⟧]*)⟧", self.text):
            inside = [n for n in self.numbers if match.start() < n.begin < match.end()]
            if (letter := match[1].strip(" ().")) in self.options:
                answers.append((self.options[letter], *match.span(1)))
            elif inside and not inside[-1].operand:
                answers.append((inside[-1].value, inside[-1].begin, inside[-1].end))
        return self.final(answers, "boxed")

    def marked(self) -> Extracted | None:
        for pattern in _LETTER_MARKERS if self.options else ():
            answers = [
                (self.options[match["target"]], *match.span("target"))
                for match in pattern.finditer(self.text)
                if match["target"] in self.options and not _DENIED.search(match.group())
            ]
            if answers:
                return self.final(answers, "marker")
        for forward, backward in _NUMBER_MARKERS:
            results = [n for n in self.candidates if backward.match(self.text, n.end)]
            for match in forward.finditer(self.text):
                if not _DENIED.search(match.group()):
                    results += [n for n in (self.result(match.start("target")),) if n in self.candidates]
            if results:
                return self.final([(n.value, n.begin, n.end) for n in results], "marker")
        # A letter at the beginning of the text chooses one of the options in the prompt.
        first = re.match(r"\s*\(?([A-Ha-hابجدアイウエオカ가나다라마바①-⑧])(?:[.):]|\s*$)", self.text, re.MULTILINE)
        if first and first[1] in self.options and not self.listed:
            return self.final([(self.options[first[1]], *first.span(1))], "marker")
        return None

    def last(self) -> Extracted | None:
        if _UNFINISHED.search(self.text):
            return None
        for number in reversed(self.candidates):
            if not self.echo(number):
                return self.final([(number.value, number.begin, number.end)], "last")
        return None


# --- the public functions -------------------------------------------------------------------------------------------


def extract_answer(text: str, prompt: str = "", *, language: str | None = None) -> Extracted:
    """Return the final answer in `text`, or `Extracted(None)` if it has none.

    prompt: the question. It shows which numbers of the text are only repetitions, which options exist, and where the
    text asks the same question again.
    language: "es" reads 1.234 as 1234. None infers Spanish from the words (see the module docstring).
    """
    reading = _read(text, prompt, language)
    return reading.boxed() or reading.marked() or reading.last() or Extracted(None)


def exact_answer(answer: Answer) -> Fraction:
    """Return an answer as an exact number. Raises KernelSurgeryError for a string that is not a single number."""
    if not isinstance(answer, str):
        return Fraction(answer)
    plain = Plain(answer.strip()).text.strip()
    values = numbers(plain, spanish=False)
    if len(values) != 1 or (values[0].begin, values[0].end) != (0, len(plain)):
        raise KernelSurgeryError(
            f"cannot compare with the answer {answer!r}: expected one number, such as 390, 1,234, 3/4 or 1.5e3."
        )
    return values[0].value


def is_correct(text: str, answer: Answer, prompt: str = "", *, language: str | None = None) -> bool:
    """Whether the final answer in `text` equals `answer` exactly. See `extract_answer` and `exact_answer`.

    Raises KernelSurgeryError for an answer that is not a single number.
    """
    return extract_answer(text, prompt, language=language).value == exact_answer(answer)


def first_answer_character(text: str, answer: Answer, prompt: str = "", *, language: str | None = None) -> int | None:
    """Return the number of Unicode characters up to the end of the first correct answer, or None if there is none.

    It is the first number that equals `answer` and can be an answer, as the module docstring defines it. The whole text
    is read, so 12 in 123 or in 12 + 7 does not count. If no number does, a boxed or marked answer counts, such as the
    letter of an option. Raises KernelSurgeryError for an answer that is not a single number.
    """
    value = exact_answer(answer)
    reading = _read(text, prompt, language)
    for number in reading.candidates:
        if number.value == value and not reading.echo(number):
            return reading.plain.span(number.begin, number.end)[1]
    extraction = reading.boxed() or reading.marked()
    return extraction.span[1] if extraction and extraction.span and extraction.value == value else None


def first_answer_token(
    ids: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    answer: Answer,
    prompt: str = "",
    *,
    language: str | None = None,
) -> int | None:
    """Return the smallest t such that decode(ids[:t]) holds the complete correct answer, or None if there is none.

    ids: the n generated token ids, without the prompt. decode: turns token ids into text. `first_answer_character`
    finds the answer. It decodes the whole text once, and about log2(n) prefixes if the answer is there.
    """
    text = decode(ids)
    end = first_answer_character(text, answer, prompt, language=language)
    if end is None:
        return None
    return bisect.bisect_left(range(len(ids)), True, key=lambda t: decode(ids[:t])[:end] == text[:end])
