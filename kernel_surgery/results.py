"""From scored texts to results: rates with intervals, paired differences with corrected tests, tables.

A *sample* is one line of samples.jsonl (a dict); a *cell* is the samples of one mode in one language, in problem
order.
"""

from collections.abc import Sequence
from dataclasses import asdict

import kernel_surgery.language as language_module
from kernel_surgery import scoring, statistics
from kernel_surgery.generate import Generation
from kernel_surgery.problems import Problem

Sample = dict
Cells = dict[tuple[str, str], list[Sample]]


def score(problem: Problem, language: str, mode: str, generation: Generation, decode) -> Sample:
    """One text, scored by the strict protocol. `decode` turns token ids into text (for FAT)."""
    prompt = problem.prompts[language]
    found = scoring.extract_answer(generation.text, prompt, language=language)
    correct = found.value == problem.answer
    verdict = language_module.judge(generation.text, language)
    first = None
    if correct:
        first = scoring.first_answer_token(generation.ids, decode, problem.answer, prompt, language=language)
    return {
        "id": problem.id,
        "mode": mode,
        "language": language,
        "category": problem.category,
        "prompt": prompt,
        "answer": problem.answer,
        "text": generation.text,
        "extracted": None if found.value is None else str(found.value),
        "correct": correct,
        "fat_tokens": first,
        "finish": generation.finish,
        "tokens": list(generation.ids),
        "language_judged": verdict.judged,
        "language_passed": verdict.passed,
        "language_found": list(verdict.found),
    }


def summarize(cell: Sequence[Sample], budget: int) -> dict:
    """Accuracy with its Wilson interval, FAT censored at `budget` tokens, language fidelity with coverage."""
    n, correct = len(cell), sum(s["correct"] for s in cell)
    categories = {}
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
        "ci95": list(statistics.wilson(correct, n)),
        # A problem that was not solved counts with the whole budget: a mean over survivors alone would
        # reward a model for failing at whatever takes long.
        "fat_tokens": scoring.restricted_mean([s["fat_tokens"] for s in cell], budget),
        "fat_budget": budget,
        "language_fidelity": passes / len(judged) if judged else None,
        "coverage": len(judged) / n,
        "stopped": sum(s["finish"] == "stop" for s in cell) / n,
        "mean_tokens": sum(len(s["tokens"]) for s in cell) / n,
        "by_category": categories,
    }


def pair(cells: Cells) -> list[dict]:
    """Every edited cell against the original's in that language: same problems, exact McNemar, Holm over all pairs."""
    rows = []
    for (mode, language), cell in cells.items():
        if mode == "original":
            continue
        original = cells["original", language]
        if [s["id"] for s in original] != [s["id"] for s in cell]:
            raise RuntimeError(f"{mode} and original were not asked the same problems in {language}")
        difference = statistics.paired_difference([s["correct"] for s in original], [s["correct"] for s in cell])
        same = sum(a["text"] == b["text"] for a, b in zip(original, cell, strict=True))
        both = [
            b["fat_tokens"] - a["fat_tokens"]
            for a, b in zip(original, cell, strict=True)
            if a["fat_tokens"] is not None and b["fat_tokens"] is not None
        ]
        rows.append(
            {"mode": mode, "language": language, "n": len(cell), **asdict(difference), "same_text": same}
            | {"fat_both_solved": {"n": len(both), "mean_difference": sum(both) / len(both) if both else None}}
        )
    for row, p in zip(rows, statistics.holm([row["mcnemar_p"] for row in rows]), strict=True):
        row["holm_p"] = p
        row["verdict"] = statistics.verdict(row["delta"], row["ci95"], p, row["n"])
    return rows


def expag_metrics(cells: Cells) -> dict:
    """The reference script's figures, by its own rules, of whatever was generated. For continuity only."""
    out: dict[str, dict[str, dict]] = {}
    for (mode, language), cell in cells.items():
        solved = [s for s in cell if scoring.expag_check(s["text"], s["answer"])]
        positions = [scoring.expag_fat(s["text"], s["answer"]) for s in solved]
        kept = [p for p in positions if p >= 0]
        counts = {"zh": 0, "en": 0, "unknown": 0}
        for sample in cell:
            counts[scoring.expag_language(sample["text"])] += 1
        out.setdefault(mode, {})[language] = {
            "correct": len(solved),
            "total": len(cell),
            "accuracy": len(solved) / len(cell),
            "mean_fat": sum(kept) / len(kept) if kept else -1.0,
            "languages": counts,
        }
    return out


def strict_table(modes: dict, paired: list[dict]) -> str:
    """The table that a run prints: one line a mode and language."""
    lines = [
        f"{'mode':<9} {'lang':<4} {'correct':>9}  {'accuracy (95% CI)':<22} {'FAT':>6} {'fidelity':>8} {'coverage':>8}"
        f"   {'difference (95% CI)':<26} {'Holm p':>6}  verdict"
    ]
    beside = {(row["mode"], row["language"]): row for row in paired}
    for mode, by_language in modes.items():
        for language, r in by_language.items():
            low, high = r["ci95"]
            fidelity = "-" if r["language_fidelity"] is None else f"{r['language_fidelity']:.3f}"
            line = (
                f"{mode:<9} {language:<4} {r['correct']:>4}/{r['n']:<4}  "
                f"{r['accuracy']:.3f} ({low:.3f} to {high:.3f})  "
                f"{r['fat_tokens']:>6.1f} {fidelity:>8} {r['coverage']:>8.3f}"
            )
            if row := beside.get((mode, language)):
                low, high = row["ci95"]
                line += f"   {row['delta']:+.3f} ({low:+.3f} to {high:+.3f})  {row['holm_p']:>6.3f}  {row['verdict']}"
            lines.append(line.rstrip())
    return "\n".join(lines)


def expag_table(metrics: dict, mode: str) -> str:
    """The reference script's own summary, in its own words ("baseline" is the original, "surgery" the edit)."""
    lines = [
        "=" * 70,
        "RESULTS SUMMARY",
        "=" * 70,
        f"{'Condition':>12} | {'EN acc':>7} {'EN FAT':>7} | {'ZH acc':>7} {'ZH FAT':>7}",
        "-" * 55,
    ]
    named = [("baseline", "original")] + ([("surgery", mode)] if mode != "original" else [])
    for language in metrics["original"]:
        for word, key in named:
            r = metrics[key][language]
            lines.append(f"{word:>10} | {language.upper()} {r['correct']}/{r['total']} FAT={r['mean_fat']:5.1f}")
    return "\n".join(lines)
