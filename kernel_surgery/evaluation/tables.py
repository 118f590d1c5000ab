"""The tables that a run prints."""

from kernel_surgery.evaluation.controls import table as control_table
from kernel_surgery.evaluation.effects import table as effects_table
from kernel_surgery.evaluation.pairs import changed, in_words
from kernel_surgery.evaluation.summary import POOLED, power


def strict_table(modes: dict, paired: list[dict]) -> str:
    """Return the table of the strict protocol, with one line per mode and language."""
    width = max(9, *map(len, modes))
    lines = [
        f"{'mode':<{width}} {'lang':<4} {'correct':>9}  {'accuracy (95% CI)':<22} "
        f"{'FAT':>6} {'fidelity':>8} {'judged':>8}" + _COMPARED
    ]
    comparisons_of = {(row["mode"], row["language"]): row for row in paired}
    for mode, by_language in modes.items():
        for language, r in by_language.items():
            low, high = r["ci95"]
            fidelity = "-" if r["language_fidelity"] is None else f"{r['language_fidelity']:.3f}"
            line = (
                f"{mode:<{width}} {language:<4} {r['correct']:>4}/{r['n']:<4}  "
                f"{r['accuracy']:.3f} ({low:.3f} to {high:.3f})  "
                f"{r['fat_tokens']:>6.1f} {fidelity:>8} {r['coverage']:>8.3f}"
            )
            if row := comparisons_of.get((mode, language)):
                line += compared(row)
            lines.append(line.rstrip())
        if row := comparisons_of.get((mode, POOLED)):
            lines.append(f"{mode:<{width}} {POOLED:<4}".ljust(len(lines[0]) - len(_COMPARED)) + compared(row))
    if delays := [words for row in paired if (words := answered_sooner(row))]:
        lines.append("change in FAT on the problems that both models solved: " + "; ".join(delays))
    smallest = {(r["n"], r["comparisons"]): r["smallest_shown"] for r in power(paired)}
    for (n, comparisons), least in smallest.items():
        could = "none" if least is None else f"{least:.3f}"
        lines.append(f"smallest detectable difference: {could} ({n} problems per language, {comparisons} comparisons)")
    return "\n".join([*lines, *LEGEND[: 2 if paired else 1]])


LEGEND = (
    "FAT: mean tokens until the right answer is complete, the whole budget if it never is. fidelity: share of judged "
    "texts with no line in another language. judged: share of texts whose language could be judged.",
    "Holm p: p-value corrected for all comparisons. The verdict goes by it; the intervals are not corrected.",
)


def answered_sooner(row: dict) -> str:
    """Return how many tokens later (+) or earlier (-) the answer came, in words.

    Only problems that both models solved count. The result is empty for a pooled row.
    """
    change = row.get("fat_both_solved")
    if not change or change["mean_difference"] is None:
        return ""
    interval = "all equal" if change["ci95"] is None else "{:+.2f} to {:+.2f}".format(*change["ci95"])
    return f"{row['mode']} {row['language']} {change['mean_difference']:+.2f} ({interval}, n={change['n']})"


_COMPARED = "   difference (95% CI)          Holm p  verdict"


def compared(row: dict) -> str:
    """Return the end of a table line: difference, interval, corrected p, and the verdict in words."""
    low, high = row["ci95"]
    words = row["verdict"]
    if row["equivalent"] and words.startswith("no difference"):
        words += f", within {row['margin']:g}"
    return f"   {row['delta']:+.3f} ({low:+.3f} to {high:+.3f})  {row['holm_p']:>6.3f}  {words}"


def expag_table(metrics: dict, mode: str) -> str:
    """Return the summary in the reference script's own form and words.

    "baseline" is the original, "surgery" the edit.
    """
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


def expag_lines(results: dict, mode: str) -> list[str]:
    """Return the lines that the reference script prints, in its order."""
    norms = results["edits"].get(mode, {}).get("norms", {})
    lines = [
        f"  L{layer}: W_down modified. Norm change: {before:.1f} -> {after:.1f}"
        for layer, (before, after) in norms.items()
    ]
    metrics = results["expag_metrics"]
    for word, key in (("baseline", "original"), ("surgery", mode)):
        if key not in metrics or (word == "surgery" and mode == "original"):
            continue
        for language, r in metrics[key].items():
            name = language.upper()
            lines.append(f"  [{word}] {name}: {r['correct']}/{r['total']} correct, mean FAT={r['mean_fat']:.1f}")
            lines.append(f"  {name} prompts -> output languages: {r['languages']}")
    return [*lines, expag_table(metrics, mode)]


def shown(results: dict) -> str:
    """Return the text that `eval` prints: the damage in words, the settings, the notes, and the tables."""
    config, strict = results["config"], results["config"]["protocol"] == "strict"
    lines = [
        results["damage_in_words"],
        f"{results['model']['id']}: {config['problems']} {'test ' * strict}problems per language, greedy decoding, "
        f"at most {config['max_new_tokens']} new tokens, {config['dtype']}, {results['provider']}",
        *results["notes"],
    ]
    if not strict:
        modes = list(results["modes"])
        return "\n".join([*lines, *(line for mode in modes[1:] or modes for line in expag_lines(results, mode))])
    lines.append(strict_table(results["modes"], results["paired"]))
    if results["paired"]:
        lines.append(f"of what the models write, {in_words(changed(results['paired']))} from the original's")
    if results["damage"]:
        lines.append(effects_table(results["damage"]))
    if results["controls"]:
        lines.append(control_table(results["controls"]))
    return "\n".join(lines)
