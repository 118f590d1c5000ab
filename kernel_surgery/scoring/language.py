"""The language of a text, line by line: zh, en, es, ar, ja, ko or sw.

The script of a line decides first: kana is ja, hangul is ko, Arabic script is ar, and Han without kana is zh. A line in
Latin script goes to an identifier that knows only en, es and sw.

The identifier is py3langid. The alternative, lingua, was compared on the 383 fragments of two to five words in 36 short
maths sentences (tests/scoring/test_language.py). At a confidence of 0.8, py3langid judges 360 fragments and lingua 322.
Neither makes an error. py3langid takes 4.5 MB, and lingua 96 MB.

A response passes if no judged line is in a wrong language. This is the line-level pass rate of the language confusion
benchmark (Marchisio et al. 2024, arXiv:2406.20052). A line that is too short is not judged, so `fidelity` also reports
the coverage, which is the fraction of responses that were judged. LaTeX, code (`scoring.code`) and single letters
(variables) are never judged.

Limits:

- A line counts as the language of most of its text, so a foreign word inside a line passes.
- A language outside the seven is "other" if its script shows that. Otherwise it counts as the nearest of the seven:
  French as Spanish, Persian as Arabic.
- Kanji without kana may be Chinese or a Japanese heading. See `judge`.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.scoring.code import strip_code

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

OTHER = "other"
# A line with fewer is a label, a unit or a name ("cm", "Solution:", "解:"). It does not show a language.
MIN_LETTERS = 2
MIN_LATIN_WORDS = 2
MIN_OTHER_LETTERS = 4
# The lowest accepted probability of the identifier's first choice among en, es and sw. The figures above use it.
MIN_CONFIDENCE = 0.8
# The longest run of kanji that may be a Japanese heading or compound noun. A longer Japanese text has kana in it.
MAX_KANJI_RUN = 7
_LATIN = ("en", "es", "sw")
_MATHS_WORDS = frozenset(
    {"sin", "cos", "tan", "log", "ln", "exp", "lim", "max", "min", "mod", "gcd", "lcm", "mcd", "mcm"}
    | {"mm", "cm", "km", "kg", "dx", "dy", "ab", "abc", "xy", "ii", "iii", "iv", "vi", "vii"}
)
# Characters that are common in Chinese sentences. Japanese hardly ever writes them in a word without kana.
_CHINESE_ONLY = frozenset("是你她吗呢也哪那把我就")
_LATEX = (
    re.compile(r"\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\)", re.DOTALL),
    # Markdown's rule for inline maths. It does not match "$5 and $6".
    re.compile(r"\$(?=\S)[^$\n]*?(?<=\S)\$(?!\d)"),
    re.compile(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", re.DOTALL),
    re.compile(r"\\(?:text|mathrm|operatorname|boxed|begin|end)\s*\{[^{}\n]*\}"),
    re.compile(r"\\[A-Za-z]+"),
)
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class LanguageVerdict:
    """The verdict on the language of one response.

    judged: whether at least one line was judged.
    passed: whether every judged line is in the right language. None if no line was judged.
    found: the languages of the judged lines without repetitions, in order of appearance. "other" is a language outside
        the seven.
    """

    judged: bool
    passed: bool | None
    found: tuple[str, ...]


def strip_maths(text: str) -> str:
    """Return `text` without LaTeX and code. The other text keeps its line breaks."""
    text = strip_code(text)
    for pattern in _LATEX:
        text = pattern.sub(" ", text)
    return text


@functools.lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "")
    for prefix, script in (
        ("CJK ", "han"),
        ("IDEOGRAPHIC", "han"),
        ("HIRAGANA", "kana"),
        ("KATAKANA", "kana"),
        ("HANGUL", "hangul"),
        ("ARABIC", "arabic"),
        ("LATIN", "latin"),
    ):
        if name.startswith(prefix):
            return script
    return OTHER


def _evidence(line: str) -> tuple[Counter, list[str]]:
    """Count the letters of each script that show a language. Return the counts and the Latin words."""
    letters: Counter = Counter()
    words = []
    for run in _WORD.findall(unicodedata.normalize("NFKC", line)):
        by_script = Counter(_script(c) for c in run)
        if by_script["latin"] == len(run):
            if len(run) > 1 and run.lower() not in _MATHS_WORDS:
                words.append(run)
                letters["latin"] += len(run)
        elif len(run) > 1 or by_script[OTHER] == 0:
            # A single letter of another script is a symbol, such as α or π, so it is not counted.
            letters += by_script
    return letters, words


@functools.cache
def _identifier() -> "LanguageIdentifier":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    # A separate instance. Restricting the library's shared one would change it for other callers.
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(_LATIN)
    return identifier


def _judge_latin(words: Sequence[str]) -> str | None:
    if len(words) < MIN_LATIN_WORDS:
        return None
    language, confidence = _identifier().classify(" ".join(words))
    return language if confidence >= MIN_CONFIDENCE else None


def judge_line(line: str) -> str | None:
    """Return the language of most of a line: one of LANGUAGES, or "other".

    Return None for a line that is too short or holds only maths. Han without kana is "zh". LaTeX is removed if it
    begins and ends within the line.
    """
    letters, words = _evidence(strip_maths(line))
    # Estimate the number of words in each script. max returns the first of equal weights, so Latin comes last: formulas
    # and names are Latin in every language.
    weights = {
        "cjk": (letters["han"] + letters["kana"]) / 2,
        "hangul": letters["hangul"] / 2,
        "arabic": letters["arabic"] / 4,
        OTHER: letters[OTHER] / 5,
        "latin": len(words),
    }
    script = max(weights, key=weights.__getitem__)
    if script == "latin":
        return _judge_latin(words)
    if script == "cjk":
        if letters["han"] + letters["kana"] < MIN_LETTERS:
            return None
        return "ja" if letters["kana"] else "zh"
    if letters[script] < (MIN_OTHER_LETTERS if script == OTHER else MIN_LETTERS):
        return None
    return {"hangul": "ko", "arabic": "ar", OTHER: OTHER}[script]


def _may_be_japanese(line: str) -> bool:
    """Whether a line of Han without kana could be Japanese: short compounds of kanji that Japanese uses."""
    runs = re.findall(r"[^\W\d_a-zA-Z]+", unicodedata.normalize("NFKC", line))
    kanji = "".join(runs)
    if max(map(len, runs), default=0) > MAX_KANJI_RUN or _CHINESE_ONLY.intersection(kanji):
        return False
    try:
        # Shift JIS has no simplified characters such as 积, 们 and 长, which are Chinese.
        kanji.encode("shift_jis")
    except UnicodeEncodeError:
        return False
    return True


def judge(text: str, language: str) -> LanguageVerdict:
    """Judge whether every judged line of a response is in `language`, one of LANGUAGES.

    In a Japanese response, a line of kanji alone is not judged if it could be Japanese, such as 面積計算 or 等差数列.
    It then has at most MAX_KANJI_RUN characters in a row, without simplified characters and Chinese function words.
    Any other line of Han without kana counts as zh. Raises KernelSurgeryError for an unknown language.
    """
    if language not in LANGUAGES:
        raise KernelSurgeryError(f"cannot judge a text in {language!r}: known languages are {', '.join(LANGUAGES)}.")
    languages: dict[str, None] = {}
    for line in strip_maths(text).splitlines():
        verdict = judge_line(line)
        if verdict is None or (verdict == "zh" and language == "ja" and _may_be_japanese(line)):
            continue
        languages[verdict] = None
    return LanguageVerdict(
        judged=bool(languages),
        passed=all(name == language for name in languages) if languages else None,
        found=tuple(languages),
    )


def fidelity(verdicts: Sequence[LanguageVerdict]) -> dict[str, float | None]:
    """Return {"language_fidelity": passed / judged, "coverage": judged / all}, with None for a division by 0.

    Read them together. A model that writes only numbers has no language fidelity, and a coverage of 0.
    """
    judged = [v for v in verdicts if v.judged]
    return {
        "language_fidelity": sum(bool(v.passed) for v in judged) / len(judged) if judged else None,
        "coverage": len(judged) / len(verdicts) if verdicts else None,
    }
