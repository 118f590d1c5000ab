"""The parts that tables and plots of certificates share, and those of a certificate across engines."""

from typing import TYPE_CHECKING, Any

from kernel_surgery.common.plotting import COLOURS, LIMIT, QUIET, figure, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Table = tuple[list[str], list[list[str]]]


def number(value: float | None, form: str = ".3f") -> str:
    """Format a figure for a table. None is a dash."""
    return "-" if value is None else format(value, form)


def aligned(head: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    """Return a table as lines with aligned columns: the first `left` columns to the left, the rest to the right."""
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}" + "s" * (n != 1)


def draw_limit(axes: "Axes", limit: float, label: str) -> None:
    """Draw a red line at the limit. The axis is linear while everything is below it, else logarithmic."""
    axes.axhline(limit, color=LIMIT, lw=1)
    axes.annotate(f"{limit:g}", (1, limit), xycoords=("axes fraction", "data"), color=LIMIT, va="center")
    axes.set_ylabel(label)
    if axes.get_ylim()[1] > 1.5 * limit:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.1 * limit)


def across_table(across: dict[str, Any]) -> Table:
    """Return the names of the columns, and one row per mode of an engine: its log probabilities beside the oracle's."""
    head = ["mode", "rms", "/yardstick", "largest", "/yardstick"]
    rows = [
        [mode, f"{r['rms']:.2e}", f"{r['rms_of_original']:.3f}", f"{r['max']:.2e}", f"{r['max_of_original']:.3f}"]
        for mode, r in across["modes"].items()
    ]
    return head, rows


def across_sampled(across: dict[str, Any]) -> list[str]:
    """Return the lines that say what was run, before the table."""
    tokens = counted(across["new_tokens"], "greedy token")
    return [
        f"{across['engine']}, {across['dtype']}, tensor parallel {across['tensor_parallel']}, compared with the exact "
        f"edit in {across['oracle']} (the oracle).",
        f"Prompts: {across['prompts']}, {across['text']}. Each is followed by {tokens} of the oracle.",
        *(f"{mode} left out: {why}" for mode, why in across["left_out"].items()),
        f"Log probabilities of {across['positions']} tokens, in nats, against the oracle's (a check fails above "
        f"{across['limit']:g} yardsticks):",
    ]


def across_legend(across: dict[str, Any]) -> list[str]:
    """Return the lines that say what the table's words mean, after it."""
    yardstick = across["yardstick"]
    pairs = ", ".join(f"{'-'.join(pair['pair'])} {pair['error_over_bound']:.3f}" for pair in across["pairs"])
    return [
        f"yardstick: what the original shows in this engine, or the exact edit rounded once ({yardstick['rms']:.2e}, "
        f"largest {yardstick['max']:.2e}). The edit itself moves them by {across['effect_rms']:.2e}, that is "
        f"{across['effect_rms'] / yardstick['rms']:.3g} yardsticks.",
        *([f"Modes beside each other, over their bound: {pairs}"] if pairs else []),
    ]


def across_plot(across: dict[str, Any]) -> str:
    """Plot a certificate across engines as SVG: every mode's error, and how far the edit itself moves the text."""
    modes, yardstick = across["modes"], across["yardstick"]["rms"]
    fig, (axes,) = figure(8, 3.4)
    for at, (mode, row) in enumerate(modes.items()):
        for name, mark in (("rms_of_original", "o"), ("max_of_original", "^")):
            axes.plot([at], [row[name]], mark, color=COLOURS.get(mode, QUIET), ms=6)
    axes.set_xticks(range(len(modes)), [mode.replace(", ", ",\n") for mode in modes])
    draw_limit(axes, across["limit"], "error of log probabilities / yardstick")
    axes.set_title(
        f"{across['engine']}, {across['dtype']}: circles root mean square, triangles largest. The edit itself: "
        f"{across['effect_rms'] / yardstick:.3g} yardsticks",
        fontsize=8,
    )
    return svg(fig)
