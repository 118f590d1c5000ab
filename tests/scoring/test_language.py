"""What language a text is in: labelled lines, the script rules, what is too short to judge, and the rates."""

import re
import subprocess
import sys
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.scoring.language import MIN_CONFIDENCE, LanguageVerdict, fidelity, judge, judge_line

# Short sentences of the kind that solutions are made of, written for this test; some are beginnings of a line that a
# number ends.
SENTENCES = {
    "en": (
        "The answer is",
        "So the sum of both numbers is",
        "We add the tens first.",
        "Multiply the length by the width.",
        "First, we subtract the smaller number.",
        "The remainder is what is left over.",
        "There are six ways to choose them.",
        "Divide and keep the rest.",
        "Therefore the area equals",
        "Let us check the result again.",
        "Each term grows by the same amount.",
        "Now we have the total.",
    ),
    "es": (
        "La respuesta es",
        "Por lo tanto el resultado es",
        "Sumamos primero las decenas.",
        "Multiplica el largo por el ancho.",
        "Primero restamos el número menor.",
        "El resto es lo que sobra.",
        "Hay seis maneras de elegirlos.",
        "Dividimos y guardamos el resto.",
        "Entonces el área es igual a",
        "Comprobemos de nuevo el resultado.",
        "Cada término crece en la misma cantidad.",
        "Ahora tenemos el total.",
    ),
    "sw": (
        "Jibu ni",
        "Kwa hiyo jumla ya namba zote mbili ni",
        "Kwanza tunajumlisha makumi.",
        "Zidisha urefu kwa upana.",
        "Tunatoa kwanza namba ndogo zaidi.",
        "Baki ni kile kinachobaki.",
        "Kuna njia sita za kuchagua.",
        "Gawanya kisha chukua baki.",
        "Kwa hiyo eneo ni sawa na",
        "Tuangalie tena jibu letu.",
        "Kila neno linaongezeka kwa kiasi kilekile.",
        "Sasa tumepata jumla yote.",
    ),
    "zh": (
        "答案是",
        "所以两个数的和是",
        "我们先把十位相加。",
        "用长乘以宽。",
        "首先减去较小的数。",
        "余数就是剩下的部分。",
        "一共有六种选法。",
        "因此面积等于",
        "让我们再检查一遍结果。",
        "每一项都增加相同的数。",
    ),
    "ja": (
        "答えは",
        "したがって二つの数の和は",
        "まず十の位を足します。",
        "縦と横を掛けます。",
        "最初に小さい数を引きます。",
        "余りは残った数です。",
        "選び方は六通りあります。",
        "よって面積は次のようになります。",
        "もう一度結果を確かめましょう。",
        "各項は同じ数ずつ増えます。",
    ),
    "ko": (
        "답은",
        "따라서 두 수의 합은",
        "먼저 십의 자리를 더합니다.",
        "가로와 세로를 곱합니다.",
        "먼저 작은 수를 뺍니다.",
        "나머지는 남은 수입니다.",
        "고르는 방법은 여섯 가지입니다.",
        "그러므로 넓이는 다음과 같습니다.",
        "결과를 다시 확인해 봅시다.",
        "각 항은 같은 수만큼 커집니다.",
    ),
    "ar": (
        "الجواب هو",
        "إذن مجموع العددين هو",
        "نجمع العشرات أولا.",
        "نضرب الطول في العرض.",
        "نطرح العدد الأصغر أولا.",
        "الباقي هو ما يتبقى.",
        "هناك ست طرق للاختيار.",
        "إذن المساحة تساوي",
        "لنتحقق من النتيجة مرة أخرى.",
        "كل حد يزيد بنفس المقدار.",
    ),
}

ANSWERS = {
    "zh": "答案是 390。",
    "en": "The answer is 390.",
    "es": "La respuesta es 390.",
    "ar": "الجواب هو 390.",
    "ja": "答えは 390 です。",
    "ko": "답은 390입니다.",
    "sw": "Jibu ni 390.",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_sentence_is_judged_rightly(language):
    assert len(SENTENCES[language]) >= 10
    found = {sentence: judge_line(sentence) for sentence in (*SENTENCES[language], ANSWERS[language])}
    assert set(found.values()) == {language}, found


def test_fragments_are_judged_rightly_or_not_at_all():
    """The figures of the module's docstring: 360 of 383 fragments judged, none wrongly."""
    judged = wrong = total = 0
    for language in ("en", "es", "sw"):
        fragments = set()
        for sentence in SENTENCES[language]:
            words = re.findall(r"\w+", sentence)
            fragments |= {" ".join(words[i : i + n]) for n in (2, 3, 4, 5) for i in range(len(words) - n + 1)}
        total += len(fragments)
        for fragment in fragments:
            found = judge_line(fragment)
            judged += found is not None
            wrong += found not in (None, language)
    print(f"{judged} of {total} fragments judged at confidence {MIN_CONFIDENCE}, {wrong} wrongly")
    assert (total, wrong) == (383, 0)
    assert judged >= 355, "the identifier got worse"


@pytest.mark.parametrize(
    "line",
    [
        "", "   ", "390", "8+2=10 3+5+1=9 2+1=3", "C(12, 3) = 220", "x = 5y", "12 cm × 11 cm = 132 cm²",
        "gcd(12, 18) = 6", "17 mod 5 = 2", r"$\text{the area of it} = 390$",
        r"\[ \text{La respuesta es la suma} = 3 \]", r"\boxed{390}", "`the answer is in code`",
        r"\frac{a}{b} \times \sqrt{2}", "Solution:", "Respuesta: 390", "解：", "α + β + γ + δ = π",
        "答", "①②③", "١٢ + ٣ = ١٥", "**390**", "---",
    ],
)  # fmt: skip
def test_what_is_short_or_only_maths_is_not_judged(line):
    assert judge_line(line) is None


@pytest.mark.parametrize(
    ("line", "language"),
    [
        ("因此 C(12, 3) = 220，所以答案是 220。", "zh"),
        ("使用 C(n, k) 公式 $\\binom{n}{k}$ 得到结果", "zh"),
        ("Por tanto, $C(12, 3) = 220$ es la respuesta.", "es"),
        ("It costs $5 and the other one costs $6 in total", "en"),
        ("따라서 C(12, 3) = 220 입니다", "ko"),
        ("ﾅﾉﾃﾞ 答え", "ja"),
        ("データは10", "ja"),
        ("إذن C(12, 3) = 220", "ar"),
        ("THE ANSWER IS THE SUM", "en"),
        ("Ｔｈｅ ａｎｓｗｅｒ ｉｓ ３９０", "en"),
        ("Ответ равен 390", "other"),
        ("उत्तर है 390", "other"),
        ("คำตอบคือ 390", "other"),
        ("La suma de los números es 答案 390", "es"),
        ("我们用 Python 来计算这个结果", "zh"),
    ],
)
def test_labelled_lines(line, language):
    assert judge_line(line) == language


@pytest.mark.parametrize(("asked", "other"), list(permutations(LANGUAGES, 2)))
def test_one_line_in_another_language_fails(asked, other):
    right = f"\n{SENTENCES[asked][3]}\n8+2=10 3+5+1=9 2+1=3\n{ANSWERS[asked]}"
    assert judge(right, asked) == LanguageVerdict(True, True, (asked,))
    assert judge(right, other).passed is False
    mixed = f"\n{SENTENCES[asked][3]}\n8+2=10\n{ANSWERS[other]}"
    # (ja, zh) too: 是 is a Chinese function word, so 答案是 is not excused as a Japanese heading.
    assert judge(mixed, asked) == LanguageVerdict(True, False, (asked, other))


@pytest.mark.parametrize(
    "heading", ["面積計算", "等差数列", "【計算】", "答 390", "長方形面積 = 390", "和、差、積", "最終結果"]
)
def test_a_kanji_heading_is_neither_right_nor_wrong_in_japanese(heading):
    text = f"{heading}\n縦と横を掛けます。\n{ANSWERS['ja']}"
    assert judge(text, "ja") == LanguageVerdict(True, True, ("ja",))
    assert judge(heading, "ja") == LanguageVerdict(False, None, ())


@pytest.mark.parametrize("line", ["因此面积等于 390", "答案是 390", "長方形的面積等於長乘以寬", "我們把十位相加"])
def test_chinese_lines_are_found_in_a_japanese_response(line):
    assert judge(f"まず十の位を足します。\n{line}", "ja") == LanguageVerdict(True, False, ("ja", "zh"))
    assert judge(line, "zh").passed is True


def test_a_block_of_latex_or_code_over_several_lines_is_not_judged():
    code = "```python\nreturn the answer of this\n```"
    text = f"我们先求和。\n\\[\n\\text{{the sum of all terms}} = 3\n\\]\n{code}\n答案是 3。"
    assert judge(text, "zh") == LanguageVerdict(True, True, ("zh",))
    block = "\\begin{align*}\n\\text{the area is} &= 3\n\\end{align*}\n"
    assert judge(block, "zh") == LanguageVerdict(False, None, ())


def test_numbers_alone_are_no_language():
    assert judge("\n8+2=10\n390", "en") == LanguageVerdict(False, None, ())


def test_an_unknown_language_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"cannot judge a text in 'fr': known languages are zh, en, es, ar, ja, ko, sw\."
    ):
        judge("La somme est 3.", "fr")


def test_fidelity_always_comes_with_coverage():
    passed, failed, silent = (
        LanguageVerdict(True, True, ("en",)), LanguageVerdict(True, False, ("zh",)), LanguageVerdict(False, None, ()),
    )  # fmt: skip
    assert fidelity([passed, passed, failed, silent]) == {"language_fidelity": 2 / 3, "coverage": 3 / 4}
    assert fidelity([silent]) == {"language_fidelity": None, "coverage": 0.0}
    assert fidelity([]) == {"language_fidelity": None, "coverage": None}


@given(st.text(max_size=200), st.sampled_from(LANGUAGES))
def test_any_text_gets_a_consistent_verdict(text, language):
    verdict = judge(text, language)
    assert verdict.judged == bool(verdict.found) == (verdict.passed is not None)
    assert set(verdict.found) <= {*LANGUAGES, "other"} and len(set(verdict.found)) == len(verdict.found)
    if verdict.judged:
        assert verdict.passed == (verdict.found == (language,))


@given(st.lists(st.sampled_from([(lang, s) for lang in LANGUAGES for s in SENTENCES[lang]]), max_size=6))
def test_found_is_the_languages_in_order_of_appearance(lines):
    """Lines are judged one by one: what stands around a line does not change what it is."""
    text = "\n8+2=10\n".join(sentence for _, sentence in lines)
    assert judge(text, "en").found == tuple(dict.fromkeys(language for language, _ in lines))


def test_the_identifier_is_loaded_late_and_the_librarys_own_is_left_alone():
    code = (
        "import sys, kernel_surgery.scoring.language as l\n"
        "assert 'py3langid' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert l.judge_line('答案是 390。') == 'zh' and 'py3langid' not in sys.modules\n"
        "assert l.judge_line('The answer is 390.') == 'en' and 'py3langid' in sys.modules\n"
        "import py3langid\n"
        "assert py3langid.classify('Cette phrase est écrite en français.')[0] == 'fr'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
