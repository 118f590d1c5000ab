"""From scored texts to results: rates with intervals, and paired differences with corrected tests.

A *sample* is one line of samples.jsonl (a dict). A *cell* is the samples of one mode in one language, in problem order.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kernel_surgery.evaluation.judging import BUDGETS, Cells, Sample
from kernel_surgery.evaluation.stats import (
    clustered_difference,
    equivalent,
    holm,
    mean_difference,
    paired_difference,
    restricted_mean,
    smallest_shown,
    verdict,
    wilson,
)
from kernel_surgery.scoring.expag import expag_check, expag_fat, expag_language


def budget_curve(cell: Sequence[Sample], budget: int) -> list[list[float]]:
    """Return [[budget, accuracy], ...]: the accuracy if the texts were cut off at shorter budgets.

    All points come from the same generated texts.
    """
    points = [b for b in BUDGETS if b < budget]
    right = [sum(s["correct_at"].get(str(b), s["correct"]) for s in cell) / len(cell) for b in points]
    return [*map(list, zip(points, right, strict=True)), [budget, sum(s["correct"] for s in cell) / len(cell)]]


def repetition(text: str, n: int = 4) -> float:
    """Return the share of a text's n-grams that repeat an earlier one; 0 for a text shorter than n.

    The n-grams are of words, or of characters if the text is written without spaces.
    """
    words = text.split()
    if len("".join(words)) > 9 * len(words):
        words = list("".join(words))
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summarize(cell: Sequence[Sample], budget: int) -> dict[str, Any]:
    """Summarise one cell.

    "accuracy" has a Wilson interval, "ci95". "fat_tokens" is the mean number of tokens until the right answer is
    complete, where a problem that was not solved counts as `budget`. "language_fidelity" is the share of judged texts
    with no line in another language. "coverage" is the share of texts whose language could be judged.
    """
    n, correct = len(cell), sum(s["correct"] for s in cell)
    categories: dict[str, dict[str, int]] = {}
    for sample in cell:
        entry = categories.setdefault(sample["category"], {"n": 0, "correct": 0})
        entry["n"] += 1
        entry["correct"] += sample["correct"]
    judged = [s for s in cell if s["language_judged"]]
    passes = sum(bool(s["language_passed"]) for s in judged)
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "ci95": list(wilson(correct, n)),
        # A problem that was not solved counts as the whole budget. A mean over the solved problems alone would
        # reward a model for failing at the problems that take long.
        "fat_tokens": restricted_mean([s["fat_tokens"] for s in cell], budget),
        "fat_budget": budget,
        "language_fidelity": passes / len(judged) if judged else None,
        "coverage": len(judged) / n,
        "stopped": sum(s["finish"] == "stop" for s in cell) / n,
        "mean_tokens": sum(len(s["tokens"]) for s in cell) / n,
        "repetition": sum(repetition(s["text"]) for s in cell) / n,
        "budget_curve": budget_curve(cell, budget),
        "by_category": categories,
    }


def pair(cells: Cells, margin: float = 0.05) -> list[dict[str, Any]]:
    """Compare every edited cell with the original's in the same language. Return one row per comparison.

    Both models answered the same problems, so the test is McNemar's exact test, with Holm's correction over all rows
    (`evaluation.stats`). If a mode answered in several languages, a row with the language "all" pools them, with each
    problem and its translations as one cluster.

    "equivalent" says whether the difference lies within `margin` in both directions, also corrected for the number of
    comparisons. It is None for a pooled row.

    Raises RuntimeError if the cells hold different problems.
    """
    rows: list[dict[str, Any]] = []
    pooled: dict[str, list[tuple[dict[str, Any], list[int]]]] = {}
    for (mode, language), cell in cells.items():
        if mode == "original":
            continue
        original = cells["original", language]
        if [s["id"] for s in original] != [s["id"] for s in cell]:
            raise RuntimeError(f"{mode} and original were not asked the same problems in {language}")
        difference = paired_difference([s["correct"] for s in original], [s["correct"] for s in cell])
        same = sum(a["text"] == b["text"] for a, b in zip(original, cell, strict=True))
        fat_differences = [
            b["fat_tokens"] - a["fat_tokens"]
            for a, b in zip(original, cell, strict=True)
            if a["fat_tokens"] is not None and b["fat_tokens"] is not None
        ]
        rows.append(
            {"mode": mode, "language": language, "n": len(cell), **asdict(difference), "same_text": same}
            | {"fat_both_solved": mean_difference(fat_differences)}
            | {"both": sum(a["correct"] and b["correct"] for a, b in zip(original, cell, strict=True))}
        )
        moves = [b["correct"] - a["correct"] for a, b in zip(original, cell, strict=True)]
        pooled.setdefault(mode, []).append((rows[-1], moves))
    for mode, languages in pooled.items():
        if len(languages) > 1:
            rows.append(_pooled_row(mode, [row for row, _ in languages], [moves for _, moves in languages]))
    rows.sort(key=lambda row: list(pooled).index(row["mode"]))
    tests = [row["p"] if row["language"] == POOLED else row["mcnemar_p"] for row in rows]
    for row, p in zip(rows, holm(tests), strict=True):
        row["holm_p"] = p
        row["verdict"] = verdict(row["delta"], row["ci95"], p, row["n"])
        row["margin"] = margin
        if row["language"] != POOLED:
            counts = (row["both"], row["gained"], row["lost"], row["n"] - row["both"] - row["gained"] - row["lost"])
            row["equivalent"] = equivalent(*counts, margin, comparisons=len(rows))
        else:
            row["equivalent"] = None
    return rows


POOLED = "all"


def _pooled_row(mode: str, rows: list[dict[str, Any]], moves: list[list[int]]) -> dict[str, Any]:
    """Return the row of a mode over all its languages. n counts problems."""
    difference = clustered_difference(list(zip(*moves, strict=True)))
    return {"mode": mode, "language": POOLED, **asdict(difference), "languages": [row["language"] for row in rows]} | {
        key: sum(row[key] for row in rows) for key in ("gained", "lost", "both", "same_text")
    }


def power(paired: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, per language, the smallest difference that the comparisons could have detected.

    Rows: {"language", "n", "comparisons", "smallest_shown"}; see `evaluation.stats.smallest_shown`.
    """
    problems_by_language = {row["language"]: row["n"] for row in paired if row["language"] != POOLED}
    return [
        {"language": language, "n": n, "comparisons": len(paired)}
        | {"smallest_shown": smallest_shown(n, comparisons=len(paired))}
        for language, n in problems_by_language.items()
    ]


def expag_metrics(cells: Cells) -> dict:
    """Score the texts by the reference script's own rules (`scoring.expag`), only to continue its figures.

    Returns {mode: {language: figures}}. "mean_fat" is the mean index of the first word that holds the answer, over the
    solved texts; -1 if there is none.
    """
    metrics: dict[str, dict[str, dict]] = {}
    for (mode, language), cell in cells.items():
        solved = [s for s in cell if expag_check(s["text"], s["answer"])]
        positions = [expag_fat(s["text"], s["answer"]) for s in solved]
        answer_positions = [p for p in positions if p >= 0]
        counts = {"zh": 0, "en": 0, "unknown": 0}
        for sample in cell:
            counts[expag_language(sample["text"])] += 1
        metrics.setdefault(mode, {})[language] = {
            "correct": len(solved),
            "total": len(cell),
            "accuracy": len(solved) / len(cell),
            "mean_fat": sum(answer_positions) / len(answer_positions) if answer_positions else -1.0,
            "languages": counts,
        }
    return metrics
