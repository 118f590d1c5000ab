"""What counts as the answer: labelled texts in seven languages, where it is complete, and the script's own rules."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.evaluation.external import agreement, read_lines
from kernel_surgery.evaluation.stats import restricted_mean
from kernel_surgery.score import run
from kernel_surgery.scoring.answers import (
    Extracted,
    extract_answer,
    first_answer_character,
    first_answer_token,
    is_correct,
)
from kernel_surgery.scoring.expag import expag_check, expag_fat, expag_language

# (text, what it answers or None, language). Labelled by hand before they were run.
ANSWERS = [
    # stated, one language after the other
    ("So the answer is 390.", 390, "en"),
    ("The answer is 12 + 7 = 19.", 19, "en"),
    ("390 is the answer.", 390, "en"),
    ("所以答案是 390。", 390, "zh"),
    ("答案：390", 390, "zh"),
    ("因此结果为390。", 390, "zh"),
    ("Por lo tanto la respuesta es 390.", 390, "es"),
    ("La respuesta es 1.234.", 1234, "es"),
    ("إذن الجواب هو 390.", 390, "ar"),
    ("الجواب هو ٣٩٠.", 390, "ar"),
    ("したがって答えは 390 です。", 390, "ja"),
    ("答えは３９０です。", 390, "ja"),
    ("따라서 답은 390입니다.", 390, "ko"),
    ("정답: 390", 390, "ko"),
    ("Kwa hiyo jibu lake ni 390.", 390, "sw"),
    # broken off where the answer would have stood
    ("We have 5 x 3 = 15, so the answer is", None, "en"),
    ("We have 5 x 3 = 15. The final answer is: **", None, "en"),
    ("5 x 3 = 15。所以答案是", None, "zh"),
    ("5 x 3 = 15. La respuesta es ", None, "es"),
    ("5 x 3 = 15. إذن الجواب هو", None, "ar"),
    ("5 x 3 = 15。したがって答えは", None, "ja"),
    ("5 x 3 = 15. 따라서 답은", None, "ko"),
    ("5 x 3 = 15. Kwa hiyo jibu ni", None, "sw"),
    ("We have 5 x 3 = 15. That is the answer.", 15, "en"),
    ("We have 5 x 3 = 15. The answer is correct.", 15, "en"),
    ("The answer is 15. So the answer is", 15, "en"),
    # what stands last does not outrank what is stated
    ("The answer is 12. Checked in 3 ways.", 12, "en"),
    ("First 5 x 3 = 15, then 15 + 2 = 17.", 17, "en"),
    ("So the result is 14. The answer is 28.", 28, "en"),
    (r"We get 3, then \boxed{42}. That took 5 steps.", 42, "en"),
    (r"\boxed{12} or rather \boxed{13}", 13, "en"),
    (r"\boxed{\frac{3}{4}}", Fraction(3, 4), "en"),
    (r"The answer is $\dfrac{6}{5}$.", Fraction(6, 5), "en"),
    # the forms one number can take
    ("The answer is 12.0.", 12, "en"),
    ("The value of C(12, 3) is 220.", 220, "en"),
    ("The answer is 1,234,567.", 1234567, "en"),
    (r"The answer is 1{,}234.", 1234, "en"),
    ("The answer is 1 234.", 1234, "en"),
    ("The answer is -7.", -7, "en"),
    ("The answer is −7.", -7, "en"),
    ("The answer is 0.5.", Fraction(1, 2), "en"),
    (r"The answer is 1.2 \times 10^{3}.", 1200, "en"),
    ("The answer is **48**.", 48, "en"),
    ("الجواب هو ١٬٢٣٤.", 1234, "ar"),
    # no answer
    ("", None, "en"),
    ("I do not know.", None, "en"),
    ("12 + 7", None, "en"),
    ("Is it 12?", None, "en"),
    ("The answer is", None, "en"),
    # the text turns to something else
    ("The answer is 15.\n\nQuestion: What is 3 + 4? The answer is 7.", 15, "en"),
    ("答案是 15。\n问题：3 + 4 等于多少？答案是 7。", 15, "zh"),
    ("The answer is 15.\nQ: 8 + 8?\nA: 16", 15, "en"),
    ("91\n¿Cuánto es 91 + 18?\n109", 91, "es"),
    ("First, what is 5 x 3?\n15\nThen what is 15 + 2?\n17", 17, "en"),
    # lists and steps
    ("Step 1: add.\nStep 2: done, 19.", 19, "en"),
    ("1. Add the tens: 30\n2. Add the ones: 33", 33, "en"),
]


@pytest.mark.parametrize("text, answer, language", ANSWERS)
def test_the_answer_is_what_a_reader_would_take(text, answer, language):
    assert extract_answer(text, language=language).value == answer


@pytest.mark.parametrize(
    "options, text, answer",
    [
        ("¿C(7, 3)? a) 21  b) 35  c) 42", "b", 35),
        ("C(9, 4) はどれか。ア 84\u3000イ 126\u3000ウ 210", "イ", 126),
        ("どれですか。\nア 422\nイ 432", "よって、答えはアです。", 422),
        ("C(8, 3)의 값은? ① 24 ② 48 ③ 56", "정답은 ③입니다.", 56),
        ("나머지는? (가) 1 (나) 5 (다) 6", "답은 (나)입니다.", 5),
        ("", "a) 403\nb) 413\nc) 423\nChaguo sahihi ni (a).", 403),
        # No list, no letters: what is said otherwise counts.
        ("What is 3 + 4?", "The answer is a 7.", 7),
        ("3 + 4?", "① 3 + 4 = 7", 7),
    ],
)
def test_options_may_be_named_in_any_of_the_scripts(options, text, answer):
    assert extract_answer(text, options).value == answer


OPTIONS = "What is 3 + 4?\nA. 5\nB. 7\nC. 12\nD. 34\n"
CONTEXT = [
    # (text, prompt, answer or None)
    ("A. 5\nB. 7\nC. 12\nAnswer: B", OPTIONS, 7),
    ("The answer is C.", OPTIONS, 12),
    ("B", OPTIONS, 7),
    ("A. 219 B. 220 C. 221 D. 222\nAnswer: A", "What is C(12, 3)?", 219),
    ("What is 12 + 7?", "What is 12 + 7?", None),
    ("12 and 7.", "What is 12 + 7?", None),
    ("You asked for 12 plus 7.", "What is 12 plus 7?", None),
    ("It leaves 7.", "What is 19 mod 12?", 7),
    ("12", "What is 19 mod 12?", 12),  # wrong, but offered
    ("We divide 19 by 12.", "What is 19 mod 12?", None),
    ("The remainder is 12.", "What is 12 mod 19?", 12),
    ("19.\nWhat is 8 plus 9?\n17", "What is 12 plus 7?", 19),
]


@pytest.mark.parametrize("text, prompt, answer", CONTEXT)
def test_the_prompt_tells_echoes_options_and_new_questions(text, prompt, answer):
    assert extract_answer(text, prompt).value == answer


@pytest.mark.parametrize("language", ["zh", "en", "es", "ar", "ja", "ko", "sw"])
def test_every_worked_solution_is_read_right(language):
    """polyglot's own target texts: sums, arrows and remainders on the way, the answer at the end."""
    from kernel_surgery.polyglot.solutions import solution
    from kernel_surgery.problems.generator import problems

    for problem in problems("test", 40):
        text = solution(problem, language)
        found = extract_answer(text, problem.prompts[language], language=language)
        assert found.value == problem.answer, (problem.prompts[language], text)
        wrong = text.replace(f"{problem.answer}", f"{problem.answer + 1}")
        assert not is_correct(wrong, problem.answer, problem.prompts[language], language=language)


@given(st.integers(-(10**12), 10**12))
def test_separators_and_scripts_do_not_change_a_number(n):
    forms = [str(n), f"{n:,}", f"{n}.0", str(n).translate(str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩"))]
    for form in forms:
        assert extract_answer(f"The answer is {form}.", language="en").value == n, form


@given(st.text(max_size=200), st.text(max_size=60))
def test_no_text_makes_it_fail(text, prompt):
    found = extract_answer(text, prompt)
    assert (found.value is None) == (found == Extracted(None))
    if found.span:
        assert 0 <= found.span[0] < found.span[1] <= len(text)


@pytest.mark.parametrize("text", ["9" * 100_000, "1e" + "9" * 500, "10^999999", "1/" * 40_000, "(" * 50_000 + "1"])
def test_hostile_texts_are_read_in_bounded_time(text):
    import time

    started = time.perf_counter()
    extract_answer(text)
    assert time.perf_counter() - started < 10


def test_comparison_is_exact_and_takes_one_number():
    assert is_correct("The answer is 0.1.", "0.1") and is_correct("The answer is 1,234.", "1234")
    assert not is_correct("The answer is 0.10000000000000000001.", "0.1")
    for answer in ("", "12 apples", "1 2 3 4"):
        with pytest.raises(ValueError, match="one number"):
            is_correct("12", answer)


def pieces(*parts):
    """(ids, decode) of a text whose tokens are `parts`."""
    return list(range(len(parts))), lambda ids: "".join(parts[i] for i in ids)


def test_the_first_answer_token_is_where_the_number_is_complete():
    ids, decode = pieces("So ", "the ", "answer ", "is ", "1", "2", "3", ".")
    assert first_answer_token(ids, decode, 123) == 7
    assert first_answer_token(ids, decode, 12) is None  # 12 in 123 is not the answer: the whole text says so
    assert first_answer_token([], decode, 12) is None
    ids, decode = pieces("12", " + ", "7", " = ", "19", ".")
    assert first_answer_token(ids, decode, 19, "What is 12 + 7?") == 5
    assert first_answer_token(ids, decode, 12, "What is 12 + 7?") is None  # an echo
    # A token that completes a character only with the next: decode of a prefix ends in the replacement sign.
    ids, decode = [0, 1, 2], lambda ids: ("", "答", "答\ufffd", "答5")[len(ids)]
    assert first_answer_token(ids, decode, 5) == 3


def test_characters_count_to_the_end_of_the_number():
    assert first_answer_character("答案是 390。", 390) == 7
    assert first_answer_character("答案是 39。", 390) is None


def test_a_miss_counts_as_the_whole_budget():
    assert restricted_mean([10, None, 30], 100) == pytest.approx((10 + 100 + 30) / 3)
    assert restricted_mean([None, None], 64) == 64 and restricted_mean([500], 64) == 64
    assert restricted_mean([], 64) is None


def test_the_scripts_rules_are_kept_with_their_quirks():
    assert expag_check("It is 220 .", 220)
    assert not expag_check("The value of C(12, 3) is 220.", 220)  # the trailing period makes it another string
    assert expag_check("A. 219 B. 220 C. 221\nAnswer: A", 220)  # any number anywhere
    assert not expag_check("1220", 220)
    assert expag_fat("so it is 220 exactly", 220) == 3 and expag_fat("it is 219", 220) == -1
    assert expag_language("答案 is 220") == "en" and expag_language("答案是 OK") == "zh"
    assert expag_language("220") == "unknown"


LABELLED = Path(__file__).parents[1] / "labelled.jsonl"


def test_the_scorer_agrees_with_a_reader_on_texts_it_was_not_written_for(capsys):
    """491 outputs labelled by hand before the scorer saw them, about 70 per language, of 25 kinds.

    docs/scoring.md has the figures at first sight, and what was then added. The reference script's rule stands beside.
    """
    lines = read_lines(LABELLED)
    assert len(lines) >= 200 and {line["language"] for line in lines} == set(LANGUAGES)
    assert len({line["id"] for line in lines}) == len(lines) and len({line["kind"] for line in lines}) == 25
    assert run([str(LABELLED), "--labels"]) == 0
    said = capsys.readouterr().out
    print(said)
    ours, script = agreement(lines), agreement(lines, "expag")
    assert ours.precision >= 0.995 and ours.recall >= 0.985
    assert f"{ours.precision:.3f}  {ours.recall:.3f}" in said.splitlines()[-1]
    # Teeth: the script's rule on the same texts.
    assert script.precision < 0.75 and script.recall < 0.75
