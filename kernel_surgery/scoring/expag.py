"""The scoring rules of the reference script (expag), with their quirks. They serve only to compare with its figures.

The reference script is the script that this project began with. The other modules of this room are stricter.
"""

import re


def expag_check(text: str, answer: int | str) -> bool:
    """Repeat the script's check_answer: whether the answer's string is among the numbers of the text.

    The strings are compared, so the number "220." at the end of a sentence does not match the answer 220.
    """
    return str(answer) in re.findall(r"-?\d+\.?\d*", text)


def expag_fat(text: str, answer: int | str) -> int:
    """Repeat the script's find_first_answer_token: the index of the first word that holds the answer, or -1.

    Words are separated by white space.
    """
    return next((i for i, token in enumerate(text.split()) if expag_check(token, answer)), -1)


def expag_language(text: str) -> str:
    """Repeat the script's detect_output_language.

    Return "zh" if the text has more CJK characters than ASCII letters. Otherwise return "en" if it has ASCII letters,
    and "unknown" if it has none.
    """
    cjk = sum("\u4e00" <= c <= "\u9fff" for c in text)
    latin = sum(c.isascii() and c.isalpha() for c in text)
    return "zh" if cjk > latin else "en" if latin else "unknown"
