"""The reference script's arithmetic, quirks included, for continuity with its figures alone."""

import re


def expag_check(text: str, answer: int | str) -> bool:
    """The script's check_answer: the answer's string is among the numbers. "220." is another string than "220"."""
    return str(answer) in re.findall(r"-?\d+\.?\d*", text)


def expag_fat(text: str, answer: int | str) -> int:
    """The script's find_first_answer_token: index of the first whitespace token holding the answer, or -1."""
    return next((i for i, token in enumerate(text.split()) if expag_check(token, answer)), -1)


def expag_language(text: str) -> str:
    """The script's detect_output_language: "zh" if CJK outnumbers ASCII letters, else "en", or "unknown"."""
    cjk = sum("\u4e00" <= c <= "\u9fff" for c in text)
    latin = sum(c.isascii() and c.isalpha() for c in text)
    return "zh" if cjk > latin else "en" if latin else "unknown"
