"""Signs, denials and corrections: what is read for certain, and where there is no answer instead of a wrong one."""

from fractions import Fraction

import pytest

from kernel_surgery.scoring.answers import extract_answer, is_correct

SIGNS = [
    (r"The answer is $-\frac{1}{2}$.", "-1/2", "en"),
    (r"\boxed{\frac{-7}{3}}", "-7/3", "en"),
    (r"\boxed{-\dfrac{7}{3}}", "-7/3", "en"),
    (r"\boxed{\frac{7}{-3}}", "-7/3", "en"),
    (r"x = -\left(\frac{3}{4}\right)", "-3/4", "en"),
    (r"The answer is -1\frac{1}{2}.", "-3/2", "en"),
    ("The answer is -3/4.", "-3/4", "en"),
    ("The answer is –58.", -58, "en"),
    ("The answer is ‑58.", -58, "en"),
    ("The answer is ﹣58.", -58, "en"),
    ("答案是－５８。", -58, "zh"),
    ("The answer is - 58.", -58, "en"),
    ("x = − 58", -58, "en"),
    ("The answer is **-58**.", -58, "en"),
    ("The answer is -€58.", -58, "en"),
    (r"The answer is -\$58.", -58, "en"),
    ("The answer is $-58$.", -58, "en"),
    ("The answer is -(58).", -58, "en"),
    ("The answer is minus 58.", -58, "en"),
    ("The temperature is 58 degrees below zero.", -58, "en"),
    ("答案是負58。", -58, "zh"),
    ("气温是零下5度。", -5, "zh"),
    ("答えは負の58です。", -58, "ja"),
    ("정답은 음수 58입니다.", -58, "ko"),
    ("الجواب هو ناقص ٥٨", -58, "ar"),
    ("الناتج هو ٥٨-", -58, "ar"),
    ("El resultado es negativo 58.", -58, "es"),
    ("98 menos 40 es 58.", 58, "es"),
    ("Son al menos 58 cajas: la respuesta es 58.", 58, "es"),
    ("40 minus 98 is minus 58.", -58, "en"),
    ("The answer is non-negative 58.", 58, "en"),
    ("The range is 10-58, so the answer is 58.", 58, "en"),
    ("- We add 3 and 4.\n- The sum is 7.", 7, "en"),
    ("答案——58。", 58, "zh"),
]
UNCERTAIN = [
    "The answer is ±58.",
    r"The answer is \pm 58.",
    "The answer is —58.",
    "The answer is --58.",
    "The answer - 58",
    "The answer is 12,5.",
    "The answer is 3:4.",
    "The answer is 58 (negative).",
    "The answer is > 58.",
    r"The answer is \neq 58.",
    r"The answer is $12\times7$.",
    r"\boxed{3, 5}",
    "The answer is 36k.",
]
DENIALS = [
    ("The answer is not 12 but 13.", 13, "en"),
    ("The answer is 12? No, 12 is wrong. It is 13.", 13, "en"),
    ("It isn't 12, it is 13.", 13, "en"),
    ("One could say the answer is 12, but the answer is 13.", 13, "en"),
    ("答案不是12，而是13。", 13, "zh"),
    ("有人认为答案是12，但正确答案是13。", 13, "zh"),
    ("答えは12ではない。13です。", 13, "ja"),
    ("答えは12じゃなくて13です。", 13, "ja"),
    ("정답은 12가 아닙니다. 13입니다.", 13, "ko"),
    ("La respuesta no es 12 sino 13.", 13, "es"),
    ("الجواب ليس 12 بل 13.", 13, "ar"),
    ("Jibu si 12 bali ni 13.", 13, "sw"),
    ("The answer is not 12.", None, "en"),
    ("答えは12ではありません。", None, "ja"),
]
CORRECTIONS = [
    ("The answer is 92. I made a mistake: 17 × 6 = 102.", 102, "en"),
    ("The answer is 92. That is wrong. The answer is 102.", 102, "en"),
    ("The answer is 92. Wait, the answer is 102.", 102, "en"),
    ("The answer is 102. Wait, let me check: 17 × 6 = 102. Yes.", 102, "en"),
    (r"\boxed{92} I made an error. It should be 102.", 102, "en"),
    ("答案是92。我算错了，应该是102。", 102, "zh"),
    ("答えは92です。間違えました。102です。", 102, "ja"),
    ("정답은 92입니다. 계산 실수입니다. 정답은 102입니다.", 102, "ko"),
    ("الجواب هو 92. أخطأت، الجواب هو 102.", 102, "ar"),
    ("Jibu ni 92. Nimekosea, jibu ni 102.", 102, "sw"),
    ("The answer is 92. I made a mistake.", None, "en"),
    ("The answer is 92. Wait, 17 × 6 = 102.", None, "en"),
]
FORMS = [
    (r"\boxed{2\cdot10^{4}}", 20000, "en"),
    (r"Answer: $\approx42$", 42, "en"),
    ("The answer is 12 3/4 cups.", "51/4", "en"),
    ("1.234,50", "1234.5", "en"),
    ("The answer is 1'234'567.", 1234567, "en"),
    ("The answer is 1_234_567.", 1234567, "en"),
    ("The answer is 12,34,567.", 1234567, "en"),
    ("答案是3万6000。", 36000, "zh"),
    ("答案是1.2亿。", 120000000, "zh"),
    ("距离是12千米。", 12, "zh"),
    ("정답은 3만 원입니다.", 30000, "ko"),
    ("La respuesta es 36 mil.", 36000, "es"),
    ("The answer is 1.5 million.", 1500000, "en"),
    ("Jibu ni elfu 36.", 36000, "sw"),
    ("<answer>-42</answer> Confidence: 9", -42, "en"),
    ("It took 3 steps.\n#### 42", 42, "en"),
    ("【答案】12\n一共用了3步", 12, "zh"),
    ("Answer => 42, after 3 steps", 42, "en"),
    (r"\boxed{15~\text{km/h}} for 3 hours", 15, "en"),
    (r"\boxed{9.8\,\mathrm{m/s^2}}", "9.8", "en"),
    ("The speed is 15 km/h.", 15, "en"),
    ("The answer is US$ 12.50, for 3 people.", "12.5", "en"),
]


@pytest.mark.parametrize("text, answer, language", SIGNS + DENIALS + CORRECTIONS + FORMS)
def test_it_is_read_as_a_careful_reader_does(text, answer, language):
    assert extract_answer(text, language=language).value == (None if answer is None else Fraction(answer))


@pytest.mark.parametrize("text, answer, language", SIGNS)
def test_a_sign_is_never_lost(text, answer, language):
    assert not is_correct(text, -Fraction(answer), language=language)


@pytest.mark.parametrize("text", UNCERTAIN)
def test_what_can_be_read_in_two_ways_is_no_answer(text):
    assert extract_answer(text, language="en").value is None


FEW_SHOT = [
    ("Question: 3 + 5?\nAnswer: 8\n\nQuestion: 2 x 4?\nAnswer:", " 8", 8),
    ("问题：3 + 5？\n答案：8\n\n问题：2 × 4？\n答案：", "8", 8),
    ("What is 3 + 5?\nAnswer: 8\n\nWhat is 2 x 4?", "8", 8),
    ("Q: Which? A. 1 B. 2\nA: B\n\nQ: Which? A. 7 B. 8\nA:", "B", 8),
]


@pytest.mark.parametrize("prompt, text, answer", FEW_SHOT)
def test_only_the_last_question_of_a_prompt_counts(prompt, text, answer):
    assert extract_answer(text, prompt, language="en").value == answer


def test_a_number_of_the_prompt_is_an_answer_only_where_nothing_else_is_offered():
    prompt = "Ann has 5 apples, buys 3 and eats 3. How many has she?"
    assert extract_answer("She has 5 apples left.", prompt).value == 5
    assert extract_answer("Ann has 5 apples and buys 3.", prompt).value is None
    assert extract_answer("Ann has 5 apples. She buys some. Then she eats.", prompt).value is None
