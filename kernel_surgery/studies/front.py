"""The Pareto front of a search: as JSON, as the terminal shows it, and as a picture."""

from collections.abc import Mapping, Sequence
from typing import Any

from kernel_surgery.common.plotting import COLOURS, LIMIT, OTHER, QUIET, figure, svg
from kernel_surgery.studies.searching import Row, front, rule
from kernel_surgery.studies.space import Search

SHOWN = 12  # rows of the front in the terminal
WIDTH = 3.6  # of a panel, in inches: a phone's
UNITS = {
    "damage": "damage: KL, nats per token, worst language",
    "probe": "accuracy of a probe for the language",
    "means": "covariance with the language, share left",
    "accuracy": "accuracy",
    "fidelity": "language fidelity",
}


def record(rows: Sequence[Row], search: Search, best: Row) -> dict[str, Any]:
    """Return the "search" entry of study.json. rows: the baseline's first."""
    return {
        "rule": rule(search),
        "objectives": list(search.objectives),
        "baseline": rows[0].name,
        "chosen": best.number,
        "front": [row.number for row in front(rows, search.objectives)],
        "rows": [row.as_json() for row in rows],
    }


def table(search: Mapping[str, Any]) -> str:
    """Return the table of the front on dev, with the baseline and the choice."""
    rows = {row["number"]: row for row in search["rows"]}
    first, columns = search["objectives"][0], list(dict.fromkeys([*search["objectives"], "damage", "probe", "means"]))
    numbers = sorted(search["front"], key=lambda number: rows[number][first])
    left_out = len(numbers) - SHOWN
    if left_out > 0:  # the choice stays, and the others evenly
        step = len(numbers) / SHOWN
        numbers = sorted(
            {numbers[int(i * step)] for i in range(SHOWN)} | {search["chosen"]}, key=lambda number: rows[number][first]
        )
    shown = [-1, *(number for number in numbers if number != -1)]
    refused = sum("refused" in row for row in search["rows"])
    lines = [
        f"{len(rows) - 1} settings and the baseline on dev, {refused} of them refused. Choice: {search['rule']}. "
        "The front:",
        "  " + "  ".join(f"{name:>9}" for name in columns),
    ]
    for number in shown:
        row = rows[number]
        marks = ["baseline"] * (number == -1) + ["chosen"] * (number == search["chosen"])
        figures = "  ".join(f"{row[name]:>9.4f}" for name in columns)
        lines.append(f"  {figures}  {row['name']}{'  <- ' + ', '.join(marks) if marks else ''}")
    if left_out > 0:
        lines.append(f"  and {len(search['front']) - len(numbers)} more; all are in study.json")
    return "\n".join(lines)


def reported_table(study: Mapping[str, Any]) -> str:
    """Return the table of the choice, the baseline and the random edits on test, and how the first two differ."""
    measured = study["measured"]
    languages = list(next(iter(measured.values()))["kl"])
    head = "  ".join(f"{'KL ' + language:>9}" for language in languages)
    lines = [f"on test:  {head}      probe      means  in words"]
    for name, by in measured.items():
        kl = "  ".join(f"{by['kl'][language]:>9.4f}" for language in languages)
        word = "" if name == "original" else by["word"]
        lines.append(f"{name:<9} {kl}  {by['probe']:>9.4f}  {by['means']:>9.4f}  {word}".rstrip())
    lines.append(
        f"the choice beside the baseline (95% intervals, each its own): {difference_in_words(study['difference'])}"
    )
    return "\n".join(lines)


def difference_in_words(found: Mapping[str, Any]) -> str:
    """Return how the choice differs from the baseline on test, with intervals."""
    ratios = ", ".join(
        f"{language} " + ("not comparable" if by is None else "x{:.2f} ({:.2f} to {:.2f})".format(*by))
        for language, by in found["damage"].items()
    )
    return f"KL {ratios}; probe " + "{:+.4f} ({:+.4f} to {:+.4f})".format(*found["probe"])


def pictures(study: Mapping[str, Any]) -> list[str]:
    """Return two panels: all settings with the front on dev, and the choice with the controls on test.

    A search whose second objective needs answers has the first panel alone.
    """
    search = study["search"]
    x, y = "damage", next(name for name in search["objectives"] if name != "damage")
    rows = [row for row in search["rows"] if "refused" not in row]
    shown = [row[x] for row in rows] + [by[x] for by in study["measured"].values()]
    least = min((value for value in shown if value > 0), default=1e-6)  # where a logarithmic axis shows 0
    line = "o-" if len(search["objectives"]) == 2 else "o"  # a front of three is no line in two

    def at(figures: Mapping[str, Any]) -> tuple[float, float]:
        return max(figures[x], least), figures[y]

    on_front = sorted((row for row in rows if row["number"] in search["front"]), key=lambda row: row[x])
    made, (axes,) = figure(WIDTH, 3.8)
    axes.plot(*zip(*map(at, rows), strict=True), "o", ms=4, color=OTHER, alpha=0.8, label="a setting")
    axes.plot(*zip(*map(at, on_front), strict=True), line, ms=4, lw=1, color=COLOURS["fused"], label="the front")
    chosen = next(row for row in rows if row["number"] == search["chosen"])
    _stand_out(axes, at(rows[0]), at(chosen))
    _finish(made, axes, f"{study['declared']['model']}, dev: {len(rows)} settings", y)
    if y not in ("probe", "means"):
        return [svg(made)]
    measured = study["measured"]
    other, (axes,) = figure(WIDTH, 3.8)
    axes.axhline(measured["original"][y], color=COLOURS["original"], lw=1, label="original")
    for kind, mark, label in (("haar", "x", "uniform random edit"), ("matched", "+", "random edit by covariance")):
        if points := [at(by) for name, by in measured.items() if name.startswith(kind)]:
            axes.plot(*zip(*points, strict=True), mark, ms=7, color=QUIET, label=label)
    for name in ("baseline", "chosen") if y == "probe" else ():
        colour = COLOURS["baked"] if name == "baseline" else LIMIT
        axes.plot([at(measured[name])[0]] * 2, measured[name]["probe_ci95"], lw=1, color=colour)
    _stand_out(axes, at(measured["baseline"]), at(measured["chosen"]))
    _finish(other, axes, f"{study['declared']['model']}, test: beside random edits", y)
    return [svg(made), svg(other)]


def _stand_out(axes: Any, baseline: tuple[float, float], chosen: tuple[float, float]) -> None:
    """Mark the baseline and the choice. Where they are one, both marks are seen."""
    axes.plot(
        *([value] for value in baseline), "s", ms=9, mfc="none", mew=1.8, color=COLOURS["baked"], label="baseline"
    )
    axes.plot(*([value] for value in chosen), "D", ms=5, color=LIMIT, label="chosen")


def _finish(made: Any, axes: Any, title: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(UNITS["damage"], fontsize=9)
    axes.set_ylabel(UNITS[y], fontsize=9)
    axes.margins(0.12)
    made.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
