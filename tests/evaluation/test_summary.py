"""From texts to figures, tables and the report page, on samples whose figures can be counted by hand."""

import re

import pytest

from kernel_surgery.evaluation.generate import Generation
from kernel_surgery.evaluation.judging import score
from kernel_surgery.evaluation.notes import floor_notes
from kernel_surgery.evaluation.summary import expag_metrics, pair, power, repetition, summarize
from kernel_surgery.evaluation.tables import answered_sooner, expag_table, strict_table
from kernel_surgery.problems.generator import problems
from kernel_surgery.scoring import answers, prompts
from kernel_surgery.scoring.answers import _read, _Reading


def sample(i, mode="original", language="en", correct=True, fat=10, text="The answer is 4.", judged=True, passed=True):
    return {
        **{"id": f"p{i}", "mode": mode, "language": language, "category": "ab"[i % 2], "prompt": "<b>2 + 2?</b>"},
        **{"answer": 4, "text": text, "extracted": "4", "correct": correct, "fat_tokens": fat if correct else None},
        **{"finish": "stop", "tokens": [1, 2, 3], "language_judged": judged, "language_passed": passed},
        **{"language_found": [], "correct_at": {}},
    }


def test_a_text_is_scored_for_answer_time_and_language():
    problem = next(p for p in problems("test", 1) if p.kind == "geometry")
    words = [
        "The ",
        "area ",
        "is ",
        "the ",
        "length ",
        "times ",
        "the ",
        "width.\n",
        f"The answer is {problem.answer}.",
    ]

    def decode(ids):
        return "".join(words[i] for i in ids)

    made = score(problem, "en", "hook", Generation(tuple(range(9)), decode(range(9)), "stop"), decode)
    assert made["correct"] and made["extracted"] == str(problem.answer) and made["fat_tokens"] == 9
    # In characters too: up to the end of the answer, without the full stop.
    assert decode(range(9))[: made["fat_characters"]].endswith(f"The answer is {problem.answer}")
    assert made["language_judged"] and made["language_passed"] and made["mode"] == "hook"
    wrong = score(problem, "zh", "hook", Generation((0, 1), decode([0, 1]), "length"), decode)
    assert (
        not wrong["correct"] and wrong["fat_tokens"] is wrong["fat_characters"] is None and wrong["extracted"] is None
    )


def test_a_text_is_read_once_whatever_is_asked_of_it_and_its_prompt_once_for_all(monkeypatch):
    """Reading is what scoring costs: the answer, its character, its token and the texts cut off ask of the same."""
    problem, words = problems("test", 1)[0], [f"word {i}" for i in range(40)]
    words[30] = f"The answer is {problems('test', 1)[0].answer}."
    decode = lambda ids: " ".join(words[i] for i in ids)  # noqa: E731
    read, made = [], []
    real, plain = _Reading, prompts.Plain
    monkeypatch.setattr(answers, "_Reading", lambda *given: read.append(given[0]) or real(*given))
    monkeypatch.setattr(prompts, "Plain", lambda text: made.append(text) or plain(text))
    for kept in (_read, prompts.asked, prompts.numbers_of):
        kept.cache_clear()
    ids = tuple(range(40))
    found = score(problem, "en", "hook", Generation(ids, decode(ids), "stop"), decode)
    assert found["correct"] and found["fat_tokens"] == 31 and found["correct_at"] == {"16": False, "32": True}
    assert sorted(map(len, read)) == sorted(len(decode(ids[:n])) for n in (16, 32, 40))
    assert made.count(problem.prompts["en"]) == 1


def test_a_cell_is_summed_up_as_counted_by_hand():
    cell = [sample(0), sample(1, correct=False), sample(2, fat=30, judged=False, passed=None), sample(3, passed=False)]
    made = summarize(cell, budget=100)
    assert (made["n"], made["correct"], made["accuracy"]) == (4, 3, 0.75)
    assert made["fat_tokens"] == (10 + 100 + 30 + 10) / 4  # the miss counts with the whole budget
    assert made["language_fidelity"] == pytest.approx(2 / 3) and made["coverage"] == 0.75
    assert made["by_category"] == {"a": {"n": 2, "correct": 2}, "b": {"n": 2, "correct": 1}}
    assert made["ci95"][0] < 0.75 < made["ci95"][1]
    assert summarize([sample(0, judged=False)], 10)["language_fidelity"] is None


def cells(original, edited, mode="fused", language="en"):
    return {
        ("original", language): [sample(i, correct=c, language=language) for i, c in enumerate(original)],
        (mode, language): [sample(i, mode, language, c) for i, c in enumerate(edited)],
    }


def test_differences_are_paired_and_words_follow_the_corrected_interval():
    n = 40
    (row,) = pair(cells([False] * n, [True] * 12 + [False] * 28))
    assert (row["delta"], row["gained"], row["lost"], row["same_text"]) == (0.3, 12, 0, n)
    assert row["holm_p"] == row["mcnemar_p"] == pytest.approx(2 / 2**12) and row["verdict"].startswith("improved")
    (row,) = pair(cells([True] * n, [True] * n))
    assert row["delta"] == 0 and row["verdict"].startswith("no difference shown") and f"n={n}" in row["verdict"]
    # The same pair in a run of many comparisons is corrected for them.
    many = cells([False] * n, [True] * 6 + [False] * 34)
    assert pair(many)[0]["verdict"].startswith("improved")
    for language in ("zh", "es", "sw"):
        many |= cells([True] * n, [True] * n, language=language)
    corrected = pair(many)
    # Four languages, and the four pooled.
    assert [row["language"] for row in corrected] == ["en", "zh", "es", "sw", "all"]
    assert corrected[0]["holm_p"] == pytest.approx(5 * corrected[0]["mcnemar_p"])
    assert corrected[0]["verdict"].startswith("no difference shown")


def test_the_time_until_the_answer_is_compared_where_both_solved():
    made = cells([True] * 4, [True, True, True, False])
    for i, one in enumerate(made["fused", "en"]):
        one["fat_tokens"] = None if i == 3 else 10 + i
    row = pair(made)[0]
    assert row["fat_both_solved"]["n"] == 3 and row["fat_both_solved"]["mean_difference"] == 1.0
    low, high = row["fat_both_solved"]["ci95"]
    assert 0 <= low < 1 < high <= 2
    said = f"fused en +1.00 ({low:+.2f} to {high:+.2f}, n=3)"
    assert answered_sooner(row) == said
    table = strict_table({"fused": {"en": summarize(made["fused", "en"], 100)}}, [row])
    assert f"change in FAT on the problems that both models solved: {said}" in table
    # Where nothing was solved by both there is nothing to say, and of equal ones no interval.
    assert answered_sooner(pair(cells([True], [False]))[0]) == ""
    assert answered_sooner(pair(cells([True] * 2, [True] * 2))[0]) == "fused en +0.00 (all equal, n=2)"


def test_languages_are_pooled_by_problem_and_equivalence_needs_numbers():
    n = 40
    right, wrong = [True] * n, [True] * 28 + [False] * 12
    both = cells(right, wrong, language="en") | cells(right, wrong, language="zh")
    rows = pair(both)
    pooled = rows[-1]
    assert [row["language"] for row in rows] == ["en", "zh", "all"] and pooled["languages"] == ["en", "zh"]
    # Twelve problems moved, in both languages alike: the second language adds no evidence.
    assert (pooled["n"], pooled["moved"], pooled["delta"]) == (n, 12, -0.3) and (pooled["gained"], pooled["lost"]) == (
        0,
        24,
    )
    assert pooled["p"] == pytest.approx(2 / 2**12) and pooled["verdict"] == "worse" and pooled["equivalent"] is None
    low, high = pooled["ci95"]
    assert -0.5 < low < -0.3 < high < 0
    (row,) = pair(cells([True] * 400, [True] * 400))
    assert row["equivalent"] and row["margin"] == 0.05 and row["verdict"].startswith("no difference shown")
    assert not pair(cells([True] * 400, [True] * 400), margin=0.001)[0]["equivalent"]
    # Forty problems cannot show that nothing happened, though nothing did.
    assert not pair(cells(right, right))[0]["equivalent"]


def test_the_budget_curve_is_what_shorter_budgets_would_have_given():
    problem = next(p for p in problems("test", 1) if p.kind == "geometry")
    words = ["The ", "area ", "is "] + ["so "] * 30 + [f"{problem.answer}. "] + ["Then "] * 40 + ["the answer is 1."]

    def decode(ids):
        return "".join(words[i] for i in ids)

    ids = tuple(range(len(words)))
    made = score(problem, "en", "hook", Generation(ids, decode(ids), "stop"), decode)
    assert made["correct_at"] == {"16": False, "32": False, "48": True, "64": True} and not made["correct"]
    assert summarize([made], 256)["budget_curve"] == [
        *([16, 0.0], [32, 0.0], [48, 1.0], [64, 1.0], [96, 0.0], [128, 0.0], [192, 0.0], [256, 0.0])
    ]
    # Each point is the verdict on the text that the budget would have left.
    for budget, accuracy in summarize([made], 256)["budget_curve"]:
        cut = ids[:budget]
        assert score(problem, "en", "hook", Generation(cut, decode(cut), "length"), decode)["correct"] == accuracy


@pytest.mark.parametrize(
    "text, share",
    [
        ("", 0.0),
        ("one two three", 0.0),
        ("one two three four five", 0.0),
        ("again and again and again and again and", 3 / 5),
        ("答案是五答案是五答案是五", 5 / 9),
    ],
)
def test_repetition_counts_what_was_said_before(text, share):
    assert repetition(text) == pytest.approx(share)


def test_cells_of_other_problems_are_never_compared():
    made = cells([True] * 3, [True] * 3)
    made["fused", "en"].reverse()
    with pytest.raises(RuntimeError, match="not asked the same problems"):
        pair(made)


def test_the_tables_show_what_was_summed_up():
    made = cells([True, False, True, True], [True, True, True, False])
    modes = {"original": {}, "fused": {}}
    for (mode, language), cell in made.items():
        modes[mode][language] = summarize(cell, 100)
    shown = strict_table(modes, pair(made))
    print(shown)
    assert re.search(r"original +en +3/4 +0\.750 \(0\.\d+ to 0\.\d+\)", shown)
    assert re.search(r"fused +en +3/4 .*\+0\.000 \(.*no difference shown", shown)
    assert "smallest detectable difference: none (4 problems per language, 1 comparisons)" in shown
    assert power(pair(made)) == [{"language": "en", "n": 4, "comparisons": 1, "smallest_shown": None}]
    metrics = expag_metrics(made)
    assert metrics["fused"]["en"]["total"] == 4 and metrics["fused"]["en"]["languages"] == {
        "zh": 0,
        "en": 4,
        "unknown": 0,
    }
    script = expag_table(metrics, "fused")
    assert "baseline | EN 0/4 FAT= -1.0" in script and "surgery | EN 0/4" in script  # "4." is not "4" to the script


def test_where_the_original_solves_too_few_no_drop_could_be_shown_and_a_note_says_so():
    modes = {"original": {lang: {"correct": k, "n": 20, "accuracy": k / 20} for lang, k in (("en", 5), ("zh", 6))}}
    power = [{"language": "en", "smallest_shown": 0.3}, {"language": "zh", "smallest_shown": 0.3}]
    (said,) = floor_notes(modes, power)
    assert said.startswith("en: the original solves 5 of 20, so no drop in accuracy could be shown there")
    assert floor_notes(modes, [{"language": "en", "smallest_shown": None}]) == []
