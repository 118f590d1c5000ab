"""What language a text is in, line by line: zh en es ar ja ko sw.

Script decides first (kana: ja, hangul: ko, Arabic script: ar, Han without kana: zh); only a line in Latin script is
put to an identifier, restricted to en, es and sw. That identifier is py3langid and not lingua: of the 383 fragments of
two to five words that 36 short maths sentences hold (tests/scoring/test_language.py), at a confidence of 0.8 py3langid
judges 360 and lingua 322, neither gets one wrong, and py3langid is 4.5 MB where lingua is 96 MB.

A response passes if no judged line is in a wrong language: the line-level pass rate of the language confusion benchmark
(Marchisio et al. 2024, arXiv:2406.20052). Lines too short to judge are not judged, so `fidelity` always reports
coverage beside it. LaTeX, code and single letters (variables) are never judged.

What is not covered: a line counts as the one language that most of it is in, so a foreign word inside a line passes;
a language outside the seven is named "other" where its script gives it away, and else the nearest of the seven
(French reads as Spanish, Persian as Arabic). Kanji without kana may be Chinese or a Japanese heading: see `judge`.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.common.names import LANGUAGES

OTHER = "other"
# Fewer is a label, a unit or a name ("cm", "Solution:", "解:"): not evidence of the language a line is in.
MIN_LETTERS = 2
MIN_LATIN_WORDS = 2
MIN_OTHER_LETTERS = 4
# Least probability of the identifier's first choice among en, es and sw: the figures above are at this one.
MIN_CONFIDENCE = 0.8
# A Japanese sentence of this many kanji in a row has kana in it; a heading or a compound noun is shorter.
MAX_KANJI_RUN = 7
_LATIN = ("en", "es", "sw")
_MATHS_WORDS = frozenset(
    {"sin", "cos", "tan", "log", "ln", "exp", "lim", "max", "min", "mod", "gcd", "lcm", "mcd", "mcm"}
    | {"mm", "cm", "km", "kg", "dx", "dy", "ab", "abc", "xy", "ii", "iii", "iv", "vi", "vii"}
)
# Kanji that Chinese sentences are made of and that Japanese writes in hardly any word without kana.
_CHINESE_ONLY = frozenset("是你她吗呢也哪那把我就")
_LATEX = (
    re.compile(r"\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\)", re.DOTALL),
    # The rule of Markdown writers for inline maths, which leaves "$5 and $6" alone.
    re.compile(r"\$(?=\S)[^$\n]*?(?<=\S)\$(?!\d)"),
    re.compile(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", re.DOTALL),
    re.compile(r"\\(?:text|mathrm|operatorname|boxed|begin|end)\s*\{[^{}\n]*\}"),
    re.compile(r"\\[A-Za-z]+"),
)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class LanguageVerdict:
    """judged: some line could be judged. passed: none is in a wrong language (None where nothing was judged).

    found: the languages of the judged lines, each once, in order of appearance; "other" is none of the seven.
    """

    judged: bool
    passed: bool | None
    found: tuple[str, ...]


def strip_maths(text: str) -> str:
    """`text` without LaTeX and code. Line breaks between what remains are kept."""
    text = _CODE.sub("\n", text)
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
    """Letters of each script that count as language, and the Latin words among them."""
    letters: Counter = Counter()
    words = []
    for run in _WORD.findall(unicodedata.normalize("NFKC", line)):
        by_script = Counter(_script(c) for c in run)
        if by_script["latin"] == len(run):
            if len(run) > 1 and run.lower() not in _MATHS_WORDS:
                words.append(run)
                letters["latin"] += len(run)
        elif len(run) > 1 or by_script[OTHER] == 0:
            # A letter alone of a script that is none of ours is a symbol: α, π.
            letters += by_script
    return letters, words


@functools.cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    # An own instance: restricting the library's shared one would change it for other callers.
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(_LATIN)
    return identifier


def _judge_latin(words: Sequence[str]) -> str | None:
    if len(words) < MIN_LATIN_WORDS:
        return None
    language, confidence = _identifier().classify(" ".join(words))
    return language if confidence >= MIN_CONFIDENCE else None


def judge_line(line: str) -> str | None:
    """The language that most of a line is in: one of LANGUAGES or "other"; None if too short or only maths.

    Han without kana is "zh". LaTeX is stripped where it begins and ends within the line.
    """
    letters, words = _evidence(strip_maths(line))
    # What carries about a word in each script; a tie goes to the script that formulas and names do not bring along.
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
    """Whether a line of Han without kana could stand in a Japanese text: short compounds of kanji that Japan uses."""
    runs = re.findall(r"[^\W\d_a-zA-Z]+", unicodedata.normalize("NFKC", line))
    kanji = "".join(runs)
    if max(map(len, runs), default=0) > MAX_KANJI_RUN or _CHINESE_ONLY.intersection(kanji):
        return False
    try:
        # Shift JIS lacks the simplified characters: 积 们 长 and the like are Chinese.
        kanji.encode("shift_jis")
    except UnicodeEncodeError:
        return False
    return True


def judge(text: str, language: str) -> LanguageVerdict:
    """Whether every line of a response that can be judged is in `language`, one of LANGUAGES.

    A line of kanji alone is not judged in a Japanese response where it could be Japanese (面積計算, 等差数列): at most
    MAX_KANJI_RUN characters in a row, none of them simplified or a Chinese function word. Anything else without kana
    counts as zh, in a Japanese response too. Raises ValueError for an unknown language.
    """
    if language not in LANGUAGES:
        raise KernelSurgeryError(f"cannot judge a text in {language!r}: known languages are {', '.join(LANGUAGES)}.")
    found: dict[str, None] = {}
    for line in strip_maths(text).splitlines():
        verdict = judge_line(line)
        if verdict is None or (verdict == "zh" and language == "ja" and _may_be_japanese(line)):
            continue
        found[verdict] = None
    return LanguageVerdict(
        judged=bool(found), passed=all(f == language for f in found) if found else None, found=tuple(found)
    )


def fidelity(verdicts: Sequence[LanguageVerdict]) -> dict[str, float | None]:
    """{"language_fidelity": passes / judged, "coverage": judged / all}; None where the divisor is 0.

    Either alone misleads: a model that writes numbers only has coverage 0, not fidelity 1.
    """
    judged = [v for v in verdicts if v.judged]
    return {
        "language_fidelity": sum(bool(v.passed) for v in judged) / len(judged) if judged else None,
        "coverage": len(judged) / len(verdicts) if verdicts else None,
    }
