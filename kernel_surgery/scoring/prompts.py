"""What a prompt asks: its last question, the numbers and options in it, and its wording with any numbers."""

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from kernel_surgery.scoring import phrases
from kernel_surgery.scoring.numbers import Number, numbers
from kernel_surgery.scoring.plain import Plain


def words_of(prompt: str) -> re.Pattern | None:
    """Return a pattern for the prompt's sentence with any numbers, or None if the prompt is only a formula."""
    if len(re.findall(r"[^\W\d_]", prompt)) < 4 or not re.search(r"[^\W\d_]{2}", prompt) or len(prompt) > 2000:
        return None
    number = r"(\d[\d,.]*(?<=\d))"
    pieces = re.split(rf"{number}|\s+", prompt.strip(" \n\t.。?؟:"))
    # For a separator of white space, re.split gives None as the group.
    pattern = "".join(r"\s*" if p is None else number if p[:1].isdigit() else re.escape(p) for p in pieces)
    return re.compile(pattern, re.IGNORECASE) if number in pattern else None


def options_in(text: str, found: Sequence[Number]) -> tuple[dict[str, Fraction], list[tuple[int, int]]]:
    """Return {letter: value} of a list "A. 12 B. 13 ...", and the spans of its numbers."""
    number_at = {n.begin: n for n in found}
    run: list[tuple[str, Number]] = []
    for match in phrases.OPTION.finditer(text):
        letter = match[1] or match[2]
        number, order = number_at.get(match.end()), next(o for o in phrases.ORDERS if letter in o)
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


# Several texts share a prompt, so the latest readings are cached.
@lru_cache(maxsize=64)
def asked(prompt: str) -> str:
    """Return the plain text of the last question in a prompt. The problems of a few-shot prompt come before it."""
    text = Plain(prompt).text
    headings = [m.start() for m in phrases.NEW_QUESTION.finditer(text) if text[m.end() :].strip()]
    if len(headings) > 1:
        return text[headings[-1] :]
    blocks = re.split(r"\n\s*\n", text.strip())
    answered = [i for i, block in enumerate(blocks[:-1]) if phrases.ASKED_BEFORE.search(block)]
    return "\n\n".join(blocks[answered[-1] + 1 :]) if answered else text


@lru_cache(maxsize=64)
def numbers_of(question: str, spanish: bool) -> tuple[Number, ...]:
    """Return the numbers of a question."""
    return tuple(numbers(question, spanish))
