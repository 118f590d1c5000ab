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


def judged(text: str, prompt: str, language: str, answer: scoring.Answer) -> dict:
    """What the text alone tells: its answer, whether that is right, and what language it is in."""
    found, verdict = scoring.extract_answer(text, prompt, language=language), language_module.judge(text, language)
    return {
        **{"extracted": None if found.value is None else str(found.value), "correct": found.value == answer},
        **{"language_judged": verdict.judged, "language_passed": verdict.passed, "language_found": list(verdict.found)},
    }


def score(problem: Problem, language: str, mode: str, generation: Generation, decode) -> Sample:
    """One text, scored by the strict protocol. `decode` turns token ids into text (for FAT)."""
    prompt = problem.prompts[language]
    verdicts = judged(generation.text, prompt, language, problem.answer)
    first = characters = None
    if verdicts["correct"]:
        first = scoring.first_answer_token(generation.ids, decode, problem.answer, prompt, language=language)
        characters = scoring.first_answer_character(generation.text, problem.answer, prompt, language=language)
    return {
        "id": problem.id,
        "mode": mode,
        "language": language,
        "category": problem.category,
        "prompt": prompt,
        "answer": problem.answer,
        "text": generation.text,
        "extracted": verdicts["extracted"],
        "correct": verdicts["correct"],
        "fat_tokens": first,
        "fat_characters": characters,
        "finish": generation.finish,
        "tokens": list(generation.ids),
        "language_judged": verdicts["language_judged"],
        "language_passed": verdicts["language_passed"],
        "language_found": verdicts["language_found"],
        "correct_at": correct_at(problem.answer, prompt, language, generation, decode),
    }


def text_of(tokenizer):
    """Token ids to text, as samples hold it."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def score_again(tokenizer):
    """A kept sample judged by the code that runs now."""

    def again(problem: Problem, sample: dict) -> dict:
        generation = Generation(tuple(sample["tokens"]), sample["text"], sample["finish"])
        return score(problem, sample["language"], sample["mode"], generation, text_of(tokenizer))

    return again


def score_kept(problem: Problem, sample: Sample) -> Sample:
    """A kept sample judged again from its text alone: what needs the tokenizer stays as it was."""
    return sample | judged(sample["text"], sample["prompt"], sample["language"], problem.answer)


BUDGETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def correct_at(answer: int, prompt: str, language: str, generation: Generation, decode) -> dict[str, bool]:
    """{budget: whether the text, cut off there, gives the right answer}, for budgets shorter than the text.

    At any longer budget the verdict is that of the whole text.
    """
    found = {}
    for budget in BUDGETS:
        if budget < len(generation.ids):
            cut = scoring.extract_answer(decode(generation.ids[:budget]), prompt, language=language)
            found[str(budget)] = cut.value == answer
    return found


def budget_curve(cell: Sequence[Sample], budget: int) -> list[list[float]]:
    """[[budget, accuracy]]: what shorter budgets would have given, from the one generation that there is."""
    points = [b for b in BUDGETS if b < budget]
    right = [sum(s["correct_at"].get(str(b), s["correct"]) for s in cell) / len(cell) for b in points]
    return [*map(list, zip(points, right, strict=True)), [budget, sum(s["correct"] for s in cell) / len(cell)]]


def repetition(text: str, n: int = 4) -> float:
    """Share of the n-grams of a text's words (of its characters, where it is written without spaces) that repeat an
    earlier one; 0 for a text shorter than n."""
    words = text.split()
    if len("".join(words)) > 9 * len(words):
        words = list("".join(words))
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


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
        "repetition": sum(repetition(s["text"]) for s in cell) / n,
        "budget_curve": budget_curve(cell, budget),
        "by_category": categories,
    }


def pair(cells: Cells, margin: float = 0.05) -> list[dict]:
    """Every edited cell against the original's in that language: same problems, exact McNemar, Holm over all pairs.

    Where a mode answered in several languages, a row with the language "all" pools them, each problem with its
    translations one cluster. "equivalent": the difference is within `margin`, both ways, corrected for the number of
    comparisons too.
    """
    rows, pooled = [], {}
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
            | {"fat_both_solved": statistics.mean_difference(both)}
            | {"both": sum(a["correct"] and b["correct"] for a, b in zip(original, cell, strict=True))}
        )
        moves = [b["correct"] - a["correct"] for a, b in zip(original, cell, strict=True)]
        pooled.setdefault(mode, []).append((rows[-1], moves))
    for mode, languages in pooled.items():
        if len(languages) > 1:
            rows.append(_pooled_row(mode, [row for row, _ in languages], [moves for _, moves in languages]))
    rows.sort(key=lambda row: list(pooled).index(row["mode"]))
    tests = [row["p"] if row["language"] == POOLED else row["mcnemar_p"] for row in rows]
    for row, p in zip(rows, statistics.holm(tests), strict=True):
        row["holm_p"] = p
        row["verdict"] = statistics.verdict(row["delta"], row["ci95"], p, row["n"])
        row["margin"] = margin
        if row["language"] != POOLED:
            counts = (row["both"], row["gained"], row["lost"], row["n"] - row["both"] - row["gained"] - row["lost"])
            row["equivalent"] = statistics.equivalent(*counts, margin, comparisons=len(rows))
        else:
            row["equivalent"] = None
    return rows


POOLED = "all"


def _pooled_row(mode: str, rows: list[dict], moves: list[list[int]]) -> dict:
    """The row of a mode over all its languages; n counts problems."""
    found = statistics.clustered_difference(list(zip(*moves, strict=True)))
    return {"mode": mode, "language": POOLED, **asdict(found), "languages": [row["language"] for row in rows]} | {
        key: sum(row[key] for row in rows) for key in ("gained", "lost", "both", "same_text")
    }


def power(paired: list[dict]) -> list[dict]:
    """What the comparisons could have shown at best: {"language", "n", "comparisons", "smallest_shown"} a language."""
    found = {row["language"]: row["n"] for row in paired if row["language"] != POOLED}
    return [
        {"language": language, "n": n, "comparisons": len(paired)}
        | {"smallest_shown": statistics.smallest_shown(n, comparisons=len(paired))}
        for language, n in found.items()
    ]


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
    width = max(9, *map(len, modes))
    lines = [
        f"{'mode':<{width}} {'lang':<4} {'correct':>9}  {'accuracy (95% CI)':<22} "
        f"{'FAT':>6} {'fidelity':>8} {'coverage':>8}" + _COMPARED
    ]
    beside = {(row["mode"], row["language"]): row for row in paired}
    for mode, by_language in modes.items():
        for language, r in by_language.items():
            low, high = r["ci95"]
            fidelity = "-" if r["language_fidelity"] is None else f"{r['language_fidelity']:.3f}"
            line = (
                f"{mode:<{width}} {language:<4} {r['correct']:>4}/{r['n']:<4}  "
                f"{r['accuracy']:.3f} ({low:.3f} to {high:.3f})  "
                f"{r['fat_tokens']:>6.1f} {fidelity:>8} {r['coverage']:>8.3f}"
            )
            if row := beside.get((mode, language)):
                line += compared(row)
            lines.append(line.rstrip())
        if row := beside.get((mode, POOLED)):
            lines.append(f"{mode:<{width}} {POOLED:<4}".ljust(len(lines[0]) - len(_COMPARED)) + compared(row))
    if sooner := [words for row in paired if (words := answered_sooner(row))]:
        lines.append("tokens until the answer, problems that both solved: " + "; ".join(sooner))
    shown = {(r["n"], r["comparisons"]): r["smallest_shown"] for r in power(paired)}
    for (n, comparisons), least in shown.items():
        could = "no difference at all" if least is None else f"a difference of {least:.3f} or more"
        lines.append(f"{n} problems a language and {comparisons} comparisons could have shown {could}.")
    return "\n".join(lines)


def answered_sooner(row: dict) -> str:
    """How many tokens later (+) or sooner the answer came, on the problems that both solved; empty for a pooled row."""
    found = row.get("fat_both_solved")
    if not found or found["mean_difference"] is None:
        return ""
    interval = "all alike" if found["ci95"] is None else "{:+.2f} to {:+.2f}".format(*found["ci95"])
    return f"{row['mode']} {row['language']} {found['mean_difference']:+.2f} ({interval}, n={found['n']})"


_COMPARED = "   difference (95% CI)          Holm p  verdict"


def compared(row: dict) -> str:
    """The end of a table's line: difference, interval, corrected p, and the words they allow."""
    low, high = row["ci95"]
    words = row["verdict"]
    if row["equivalent"] and words.startswith("no difference"):
        words += f", within {row['margin']:g}"
    return f"   {row['delta']:+.3f} ({low:+.3f} to {high:+.3f})  {row['holm_p']:>6.3f}  {words}"


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
