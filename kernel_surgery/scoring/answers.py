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

- a number that is denied ("not 12", 12ではなく, "12 is wrong") or only supposed ("you might think it is 12")
- what the writer takes back later ("I made a mistake", 算错了)
- a number whose sign or digits are not certain (`scoring.numbers`)

A number of the prompt counts only if the text states it, after "=", ":", "is" or 是, or if a short text offers nothing
else. Of a few-shot prompt, only the last question counts. A text without an answer is wrong.

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
from kernel_surgery.scoring import phrases, prompts
from kernel_surgery.scoring.numbers import UNIT, Number, numbers
from kernel_surgery.scoring.plain import Plain

Answer = int | str | Fraction
# A larger exponent would make an exact number with more digits than any text states.
LARGEST_EXPONENT = 400
_Found = tuple[Fraction | None, int, int]  # (value, begin, end); no value where a number is not certain


@dataclass(frozen=True)
class Extracted:
    """An extracted answer.

    value: the exact number, or None without an answer. span: its place in the original text. how: "boxed", "marker" or
    "last".
    """

    value: Fraction | None
    span: tuple[int, int] | None = None
    how: str | None = None


# Several functions read the same text, so the latest readings are cached.
@lru_cache(maxsize=8)
def _read(text: str, prompt: str, language: str | None) -> "_Reading":
    return _Reading(text, prompt, language)


class _Reading:
    """A text that was read with its prompt: the text up to a new question, its numbers, and the possible answers.

    It is cached, so it must not be changed.
    """

    def __init__(self, text: str, prompt: str, language: str | None):
        self.plain = Plain(text)
        question = prompts.asked(prompt)
        self.spanish = language == "es" if language else bool(phrases.SPANISH.search(question or self.plain.text))
        self.prompt_numbers = prompts.numbers_of(question, self.spanish)
        self.prompt_values = {v for n in self.prompt_numbers for v in (n.value, *n.parts)}
        self.text, repeated = self._cut(prompts.words_of(question), question)
        self.numbers = numbers(self.text, self.spanish)
        self.begins = [n.begin for n in self.numbers]
        self.options, self.listed = prompts.options_in(self.text, self.numbers)
        if not self.options:
            self.options, _ = prompts.options_in(question, self.prompt_numbers)
        excluded = [*self.listed, *repeated, *self._questions(), *self._labels()]
        self.candidates = [
            n
            for n in self.numbers
            if not n.operand
            and not any(a <= n.begin < b for a, b in excluded)
            and not phrases.denied(self.text, n.begin, n.end)
        ]

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
        if question := phrases.QUESTION_END.search(text):
            begin = text.rfind("\n", 0, question.start()) + 1
            if re.fullmatch(r"-?[\d.,' ]*\d[.。]?", text[:begin].strip()):
                text = text[:begin]
        expected = sorted(n.value for n in self.prompt_numbers)
        for match in phrases.NEW_QUESTION.finditer(text):
            line = re.split(r"\n|(?<=[?؟])", text[match.end() :].lstrip(" *\n"), maxsplit=1)[0]
            restates = expected and sorted(n.value for n in numbers(line, self.spanish)) == expected
            if text[: match.start()].strip() or not restates:
                return text[: match.start()], repeated
        return text, repeated

    def _questions(self) -> list[tuple[int, int]]:
        ends = [0, *(m.end() for m in phrases.SENTENCE_END.finditer(self.text))]
        return [
            (ends[bisect.bisect_right(ends, m.start()) - 1], m.end()) for m in phrases.QUESTION_END.finditer(self.text)
        ]

    def _labels(self) -> list[tuple[int, int]]:
        """Return the spans of step numbers, list item numbers and ordinals."""
        spans = [m.span() for m in phrases.STEP.finditer(self.text)]
        spans += [(n.begin, n.end) for n in self.numbers if phrases.ORDINAL.match(self.text, n.end)]
        items = [m.span(1) for m in phrases.LIST_ITEM.finditer(self.text)]
        ranks = [int(self.text[a:b]) for a, b in items]
        # A list counts from 1, so a line "12. This is" without items 1 to 11 is an answer.
        return spans + [s for s, r in zip(items, ranks, strict=True) if set(range(1, max(r, 2) + 1)) <= set(ranks)]

    def stated(self, number: Number) -> bool:
        """Whether the text before the number states it as a result."""
        return bool(phrases.STATED.search(self.text[max(0, number.begin - 24) : number.begin]))

    def echo(self, number: Number) -> bool:
        """Whether the number only repeats the prompt."""
        known = number.value in self.prompt_values or (number.parts and set(number.parts) <= self.prompt_values)
        return bool(known) and not self.stated(number)

    def result(self, begin: int) -> Number | None:
        """Return the value of the expression at `begin`: the number after its last "=". None if it is not evaluated."""
        i = bisect.bisect_left(self.begins, begin)
        if i and self.numbers[i - 1].end > begin:  # its sign stands before it
            i -= 1
        if i == len(self.numbers):
            return None
        while i + 1 < len(self.numbers):
            between = self.text[self.numbers[i].end : self.numbers[i + 1].begin]
            if self.numbers[i].operand and self.numbers[i + 1].operand:
                between = between.replace(",", "")  # C(12, 3)
            words = re.search(r"[^\W\d_]{2,}|[\n;,。]", phrases.LINKS.sub("", between))
            if words or not (self.numbers[i].operand or re.match(rf"[ )]*{UNIT}[ )]*[=→≈]", between)):
                break
            i += 1
        return None if self.numbers[i].operand else self.numbers[i]

    def asked_anew(self, begin: int, end: int, known: Fraction | None) -> bool:
        """Whether a whole line between two answers asks something else: words, other numbers, and no result."""
        for match in re.finditer(r"(?<=\n)[^\n]*\n", self.text[begin:end]):
            line = match.group()
            if re.search(r"[^\W\d_]{2}", line) and not re.search("[=→≈]", line):
                values = {n.value for n in self.numbers if match.start() <= n.begin - begin < match.end()}
                if values - self.prompt_values - {known}:
                    return True
        return False

    def final(self, found: list[_Found], how: str) -> Extracted | None:
        """Return the last of the answers that come before another question. It has no value if it is not certain."""
        answer = None
        for value, begin, end in sorted(found, key=lambda f: f[1:]):
            if answer and self.asked_anew(answer[2], begin, answer[0]):
                break
            answer = (value, begin, end)
        if answer is None:
            return None
        return Extracted(answer[0], self.plain.span(*answer[1:]), how) if answer[0] is not None else Extracted(None)

    def answer(self) -> Extracted:
        """Return the final answer. What the writer takes back later in the text does not count."""
        answer = self.stated_since(0) or self.last(0) or Extracted(None)
        first = min((n.end for n in self.candidates), default=len(self.text))
        back = [m.end() for m in phrases.CORRECTED.finditer(self.text, first)]
        if back:
            return self.stated_since(back[-1]) or self.last(back[-1]) or Extracted(None)
        again = [m.end() for m in phrases.RECONSIDERED.finditer(self.text, first)]
        if again and answer.value is not None:
            since = again[-1]
            later = [n for n in self.candidates if n.begin >= since and not self.echo(n)]
            if stated := self.stated_since(since):
                return stated
            if {n.value for n in later} <= {answer.value}:
                return answer
            # "No, 13.": the new answer comes at once. A calculation may be a check, so it is not certain.
            at_once = bisect.bisect_left(self.begins, later[0].begin) == bisect.bisect_left(self.begins, since)
            if at_once and len(later) == 1 and later[0].begin <= since + 24:
                return self.final([(_value(later[0]), later[0].begin, later[0].end)], "last") or Extracted(None)
            return Extracted(None)
        return answer

    def stated_since(self, since: int) -> Extracted | None:
        """Return the answer that is boxed or stated in the text from `since` on."""
        return self.boxed(since) or self.marked(since)

    def boxed(self, since: int = 0) -> Extracted | None:
        answers: list[_Found] = []
        for match in re.finditer("⟦([^⟦⟧]*)⟧", self.text):
            if match.start() < since or phrases.denied(self.text, match.start(), match.end()):
                continue
            if (letter := match[1].strip(" ().")) in self.options:
                answers.append((self.options[letter], *match.span(1)))
                continue
            inside = [n for n in self.numbers if match.start() < n.begin < match.end()]
            # The exponent of a unit (cm^2) is no number of its own.
            inside = [n for n in inside if not re.search(r"[A-Za-z\u4e00-\u9fff] ?\^\(?$", self.text[: n.begin][-4:])]
            if inside and not inside[-1].operand:
                between = self.text[inside[0].end : inside[-1].begin]
                several = len(inside) > 1 and not inside[0].operand and not re.search("[=≈→]", between)
                number = inside[-1]
                answers.append((None if several else _value(number), number.begin, number.end))
        return self.final(answers, "boxed")

    def marked(self, since: int = 0) -> Extracted | None:
        for pattern in phrases.LETTER_MARKERS if self.options else ():
            letters: list[_Found] = [
                (self.options[match["target"]], *match.span("target"))
                for match in pattern.finditer(self.text, since)
                if match["target"] in self.options and not phrases.DENIED.search(match.group())
            ]
            if letters:
                return self.final(letters, "marker")
        for forward, backward in phrases.NUMBER_MARKERS:
            results = [n for n in self.candidates if n.begin >= since and backward.match(self.text, n.end)]
            for match in forward.finditer(self.text, since):
                if not phrases.DENIED.search(match.group()):
                    results += self.stated_by(match)
            if results:
                return self.final([(_value(n), n.begin, n.end) for n in results], "marker")
        solved = [m.start("target") for m in phrases.SOLVED.finditer(self.text, since)]
        if solved and not re.search("[=→]", self.text[solved[-1] :]):
            results = [n for n in self.candidates if n.begin <= solved[-1] < n.end]
            if results:
                return self.final([(_value(n), n.begin, n.end) for n in results], "marker")
        # A letter at the beginning of the text chooses one of the options in the prompt.
        first = re.match(r"\s*\(?([A-Ha-hابجدアイウエオカ가나다라마바①-⑧])(?:[.):]|\s*$)", self.text, re.MULTILINE)
        if first and first[1] in self.options and not self.listed and not since:
            return self.final([(self.options[first[1]], *first.span(1))], "marker")
        return None

    def stated_by(self, match: re.Match) -> list[Number]:
        """Return the number that a marker states: the next one in the line if it is denied or only supposed."""
        number = self.result(match.start("target"))
        if number is None:
            return []
        if phrases.denied(self.text, number.begin, number.end) or phrases.supposed(self.text, match.start()):
            following = [n for n in self.candidates if n.begin >= number.end]
            near = following and self.text[number.end : following[0].begin]
            if not following or len(near) > 48 or "\n" in near:
                return []
            number = self.result(following[0].begin)
        return [number] if number in self.candidates else []

    def cut_off(self) -> bool:
        """Whether the text ends within a calculation, or within the sentence of its last number after a comma."""
        text = self.text.rstrip()
        if phrases.CUT_OFF.search(text):
            return not (self.numbers and self.numbers[-1].end == len(text))
        end = self.numbers[-1].end if self.numbers else 0
        tail = text[end:]
        return bool(re.search(r"[,、;،]\s*\w[^.。!?؟\n]*$", tail) and not re.search(r"[.。!?؟\n]", tail))

    def last(self, since: int = 0) -> Extracted | None:
        if phrases.UNFINISHED.search(self.text) or self.cut_off():
            return None
        candidates = [n for n in self.candidates if n.begin >= since]
        for number in reversed(candidates):
            if not self.echo(number):
                return self.final([(_value(number), number.begin, number.end)], "last")
        # Where a short text offers nothing else, a number of the prompt is no repetition: "He has 5 apples left."
        alone = len({n.value for n in candidates}) == 1 and len(self.numbers) == len(candidates)
        if alone and len(phrases.SENTENCE_END.findall(self.text.strip())) <= 1:
            return self.final([(_value(n), n.begin, n.end) for n in candidates], "last")
        return None


def _value(number: Number) -> Fraction | None:
    return number.value if number.certain else None


# --- the public functions -------------------------------------------------------------------------------------------


def extract_answer(text: str, prompt: str = "", *, language: str | None = None) -> Extracted:
    """Return the final answer in `text`, or `Extracted(None)` if it has none.

    prompt: the question. It shows which numbers of the text are only repetitions, which options exist, and where the
    text asks the same question again.
    language: "es" reads 1.234 as 1234. None infers Spanish from the words (see the module docstring).
    """
    reading = _read(text, prompt, language)
    return reading.answer()


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


def exact(answer: Answer | float) -> Fraction:
    """Return an answer as an exact number: 390, "390", "1,234", "3/4", 2.5.

    2.5 means the decimal as written, not its binary approximation. Raises KernelSurgeryError for text that is not a
    number and for an exponent beyond LARGEST_EXPONENT, ZeroDivisionError for a zero denominator.
    """
    written = str(answer).strip()
    _, _, exponent = written.lower().partition("e")
    if exponent.lstrip("+-").isdigit() and abs(int(exponent)) > LARGEST_EXPONENT:
        raise KernelSurgeryError(f"{written!r} has more than {LARGEST_EXPONENT} digits")
    try:
        return Fraction(written)
    except ValueError:
        return exact_answer(written)


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
        if number.value == value and number.certain and not reading.echo(number):
            return reading.plain.span(number.begin, number.end)[1]
    extraction = reading.answer()
    return extraction.span[1] if extraction.span and extraction.value == value else None


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
