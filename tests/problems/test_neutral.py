"""The neutral text: enough of it, two splits, parallel, each in its own language, and without any maths."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence

import pytest
from scipy.stats import spearmanr

from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.problems.neutral import SPLITS, neutral
from kernel_surgery.problems.wordings import EXPAG_WORDINGS, WORDINGS
from kernel_surgery.scoring.language import judge

Text = Mapping[str, Sequence[str]]
MARKS = {".": "stop", "。": "stop", "?": "question", "？": "question", "؟": "question"}
QUOTES = re.compile("[“”«»「」]")
# Names of people and places. Each language spells a name in one way, and uses it in the same sentence.
NAMES = tuple(
    dict(zip(("en", "zh", "es", "ar", "ja", "ko", "sw"), line.split(), strict=True))
    for line in (
        "Maria 玛丽亚 María ماريا マリア 마리아 Maria",
        "Mombasa 蒙巴萨 Mombasa مومباسا モンバサ 몸바사 Mombasa",
        "Amina 阿米娜 Amina أمينة アミナ 아미나 Amina",
        "Kyoto 京都 Kioto كيوتو 京都 교토 Kyoto",
        "Romans 罗马人 romanos الرومان ローマ人 로마인 Warumi",
    )
)
# Beginnings of words that ask for arithmetic. Every kind of problem uses some of them in every language.
MATHS = {
    "en": r"\b(plus|minus|times|add(ing|s)?\b|sums?\b|multipl|divid|remainder|equals|number|comput|calculat|combination"
    r"|binomial|area|rectang|sequence|progression|terms?\b)",
    "zh": "加上|减去|乘|除以|等于|余数|相加|总和|计算|结果是|组合数|面积|长方形|数列",
    "es": r"\b(más {|suma|resta|multiplic|divid|calcul|halla|número|combinacion|binomi|área|superficie|rectáng"
    r"|progresión|sucesión|término)",
    "ar": "زائد|ناقص|مضروب|اضرب|اجمع|قسمة|اقسم|باقي|يساوي|ناتج|احسب|العدد|معامل|التوافيق|مساحة|مستطيل|متتالية",
    "ja": "足す|足し|掛け|割り|割る|余り|計算|合計|答えな|二項|組合せ|面積|長方形|数列",
    "ko": "더하|곱하|나누기|나머지|계산|이항|조합|넓이|직사각형|수열|의 합|의 곱|의 값",
    "sw": r"\b(jumlisha|jumla|zidisha|gawanya|kugawanywa|baki|kokotoa|namba|michanganyiko|kombinesheni|eneo|mstatili"
    r"|mfululizo)",
}


def unparallel(text: Text) -> list[str]:
    """Every sign that sentence i of a language is not a translation of sentence i in English.

    The signs are the final mark, quotation marks, names, and lengths. No two languages have the same lengths, but a
    long sentence has long translations.
    """
    english, faults = text["en"], []
    lengths = [len(sentence) for sentence in english]
    for language, sentences in text.items():
        if len(sentences) != len(english):
            faults.append(f"{language}: {len(sentences)} sentences, English has {len(english)}")
            continue
        for i, (ours, theirs) in enumerate(zip(english, sentences, strict=True)):
            if MARKS.get(ours[-1], ours[-1]) != MARKS.get(theirs[-1], theirs[-1]):
                faults.append(f"{language} {i}: ends with {theirs[-1]!r}, English with {ours[-1]!r}")
            if len(QUOTES.findall(ours)) != len(QUOTES.findall(theirs)):
                faults.append(f"{language} {i}: quotation marks differ")
            faults += [f"{language} {i}: {n['en']}" for n in NAMES if (n["en"] in ours) != (n[language] in theirs)]
        theirs = [len(sentence) for sentence in sentences]
        ratios = [math.log(one / other) for one, other in zip(theirs, lengths, strict=True)]
        usual = statistics.median(ratios)
        faults += [
            f"{language} {i}: {math.exp(ratio - usual):.2f} times as long as expected"
            for i, ratio in enumerate(ratios)
            if abs(ratio - usual) > math.log(1.8)
        ]
        # The order fits better than any order in which the list starts elsewhere.
        fits = [spearmanr(lengths, theirs[k:] + theirs[:k]).statistic for k in range(len(theirs))]
        if max(fits) > fits[0] or fits[0] < 0.5:
            best = max(fits[1:])
            faults.append(f"{language}: lengths correlate with English by {fits[0]:.2f}, shifted by {best:.2f}")
    return faults


def runs(sentence: str, language: str) -> set[tuple[str, ...]]:
    """Return all runs of three words. Where no spaces are written, all runs of seven characters."""
    spaced = language not in ("zh", "ja")
    length, found = (3 if spaced else 7), set()
    for piece in re.split(r"\{\w+\}|[^\w\s]", sentence.lower()):
        units = piece.split() if spaced else [*"".join(piece.split())]
        found |= {tuple(units[i : i + length]) for i in range(len(units) - length + 1)}
    return found


def wordings(language: str) -> dict[str, list[str]]:
    """Return {kind: everything that asks this kind of problem}."""
    return {kind: [*by[language], *filter(None, [EXPAG_WORDINGS[kind].get(language)])] for kind, by in WORDINGS.items()}


def test_two_splits_of_equal_length_in_seven_languages_without_a_sentence_twice():
    assert SPLITS == ("dev", "test")
    dev, test = (neutral(split) for split in SPLITS)
    assert set(dev) == set(test) == set(LANGUAGES)
    assert {len(sentences) for text in (dev, test) for sentences in text.values()} == {22}
    for language in LANGUAGES:
        both = [*dev[language], *test[language]]
        assert len(both) >= 40 and len({" ".join(sentence.lower().split()) for sentence in both}) == len(both)
    assert all(9 <= len(sentence.split()) <= 25 for text in (dev, test) for sentence in text["en"])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_each_sentence_is_in_its_language_and_has_no_digit(language, split):
    for sentence in neutral(split)[language]:
        verdict = judge(sentence, language)
        assert verdict.passed and verdict.found == (language,), sentence
        assert not any(character.isdigit() for character in sentence), sentence
        assert sentence == sentence.strip() and sentence[-1] in MARKS and "\n" not in sentence, sentence


@pytest.mark.parametrize("split", SPLITS)
def test_sentence_i_says_the_same_in_every_language(split):
    assert unparallel(neutral(split)) == []


def test_both_splits_ask_and_quote():
    for split in SPLITS:
        assert any(sentence.endswith("?") for sentence in neutral(split)["en"])
        assert any("“" in sentence for sentence in neutral(split)["en"])


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_parallel_check_sees_a_shifted_list_and_two_exchanged_sentences(split, language):
    english, right = neutral(split)["en"], list(neutral(split)[language])
    assert unparallel({"en": english, language: right}) == []
    for shift in range(1, len(right)):
        assert unparallel({"en": english, language: right[shift:] + right[:shift]}), shift
    order = sorted(range(len(right)), key=lambda i: len(right[i]))
    exchanged = list(right)
    exchanged[order[0]], exchanged[order[-1]] = right[order[-1]], right[order[0]]
    assert unparallel({"en": english, language: exchanged})
    missing = {"en": english, language: right[1:]}
    assert unparallel(missing) == [f"{language}: 21 sentences, English has 22"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_shares_nothing_with_the_problems_and_asks_for_no_arithmetic(language):
    asked = wordings(language)
    problem_runs = set().union(*(runs(text, language) for texts in asked.values() for text in texts))
    assert len(problem_runs) > 10
    for split in SPLITS:
        for sentence in neutral(split)[language]:
            assert not runs(sentence, language) & problem_runs, sentence
            assert not re.search(MATHS[language], sentence.lower()), sentence
    # The pattern finds every kind of problem, so it would see one here.
    for kind, texts in asked.items():
        assert any(re.search(MATHS[language], text.lower()) for text in texts), kind


def test_an_unknown_split_is_an_error_and_a_caller_cannot_change_the_text():
    for split in ("fit", "all", ""):
        with pytest.raises(UserError, match=f"unknown split '{split}' of the neutral text; known: dev, test"):
            neutral(split)
    neutral("dev").clear()
    assert set(neutral("dev")) == set(LANGUAGES)
