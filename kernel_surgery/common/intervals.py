"""Intervals beside each other on one axis, as HTML: a row per interval, with its name and its figures in words.

The drawing is as wide as its column, on a phone as on a screen, because its coordinates are percentages. Everything
that is drawn is also said in the row's words.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One interval. low, value, high: in the axis' unit, finite. words: the figures as text.

    colour: a name of the palette. strong: of what the page is about; the other rows are there to compare with.
    group: rows of a group stand together, under its name.
    """

    label: str
    low: float
    value: float
    high: float
    words: str
    colour: str = "other"
    strong: bool = False
    group: str = ""


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`. unit: its title. log: logarithmic, `low` above 0.

    zero: where a line is drawn across all rows. band: a range that is shaded.
    """

    low: float
    high: float
    unit: str
    log: bool = False
    zero: float | None = None
    band: tuple[float, float] | None = None

    def at(self, value: float) -> float:
        """Return where a value lies, in percent of the width. What lies beyond an end lies at the end."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        if self.log:
            value = math.log10(value) if value > 0 else low
        return 100 * min(max((value - low) / (high - low), 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Return at most six round values on the axis."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        locator = LogLocator(numticks=6) if self.log else MaxNLocator(5)
        return [float(v) for v in locator.tick_values(self.low, self.high) if self.low <= v <= self.high]


def around_zero(rows: Sequence[Row], unit: str, band: float | None) -> Axis:
    """Return the axis for differences: zero in the middle, wide enough for every interval and the band."""
    reach = 1.1 * max([abs(v) for row in rows for v in (row.low, row.high)] + [band or 0.0, 1e-3])
    return Axis(-reach, reach, unit, zero=0.0, band=None if band is None else (-band, band))


def of_sizes(rows: Sequence[Row], unit: str) -> Axis:
    """Return a logarithmic axis for sizes above 0, over whole decades. A row that is 0 lies at its left end."""
    above = [v for row in rows for v in (row.low, row.value, row.high) if v > 0] or [1.0]
    low, high = math.floor(math.log10(min(above))), math.ceil(math.log10(max(above)))
    return Axis(10.0**low, 10.0 ** max(high, low + 1), unit, log=True)


def forest(rows: Sequence[Row], axis: Axis) -> str:
    """Return the rows as HTML, with the axis below them."""
    out, group = "", ""
    for row in rows:
        if row.group != group:
            out, group = out + f"<span class=group>{html.escape(row.group)}</span>", row.group
        strong = " edit" * row.strong
        out += (
            f'<span class="label{strong}">{html.escape(row.label)}</span>{_drawing(row, axis)}'
            f'<span class="value{strong}">{html.escape(row.words)}</span>'
        )
    return f"<div class=forest>{out}<span></span>{_scale(axis)}<span></span><span></span>{_unit(axis)}</div>"


def _drawing(row: Row, axis: Axis) -> str:
    low, value, high = (f"{axis.at(v):.2f}%" for v in (row.low, row.value, row.high))
    behind = ""
    if axis.band:
        left, right = axis.at(axis.band[0]), axis.at(axis.band[1])
        behind += f'<rect x="{left:.2f}%" y="0" width="{right - left:.2f}%" height="100%" fill="var(--band)"/>'
    if axis.zero is not None:
        zero = f"{axis.at(axis.zero):.2f}%"
        behind += f'<line x1="{zero}" x2="{zero}" y1="0" y2="100%" stroke="var(--quiet)"/>'
    colour, width, radius = f"var(--{row.colour})", 3 if row.strong else 1.5, 5 if row.strong else 3.5
    return (
        f'<svg aria-hidden=true>{behind}<line x1="0" x2="100%" y1="50%" y2="50%" stroke="var(--line)" '
        f'stroke-dasharray="1 4"/><line x1="{low}" x2="{high}" y1="50%" y2="50%" stroke="{colour}" '
        f'stroke-width="{width}"/><circle cx="{value}" cy="50%" r="{radius}" fill="{colour}"/></svg>'
    )


def _scale(axis: Axis) -> str:
    marks = ""
    for tick in axis.ticks():
        at = axis.at(tick)
        anchor = "start" if at < 4 else "end" if at > 96 else "middle"
        marks += f'<text x="{at:.2f}%" y="75%" text-anchor="{anchor}">{tick:g}</text>'
    return f"<svg class=axis aria-hidden=true>{marks}</svg>"


def _unit(axis: Axis) -> str:
    return f"<span class=unit>{html.escape(axis.unit)}</span>"
