"""Figures as inline SVG."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colour of a limit, or of what is compared with the original.
LIMIT = "#a3261b"
COLOURS = {"original": "#6b7280", "hook": "#7a4fa3", "fused": "#0b6e99", "baked": "#c2571a", "lora": "#4b7a2b"}


def figure(width: float, height: float, columns: int = 1, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    """Return a figure with `rows` times `columns` panels, and the panels. They have no top and right border.

    width, height: of the figure, in inches.
    """
    import matplotlib

    matplotlib.use("svg")
    # Keep text as text. The file is smaller and searchable, and uses the reader's font.
    matplotlib.rcParams["svg.fonttype"] = "none"
    # A fixed salt makes equal figures equal files.
    matplotlib.rcParams["svg.hashsalt"] = "kernel-surgery"
    from matplotlib.figure import Figure

    new = Figure(figsize=(width, height), layout="constrained")
    axes = list(new.subplots(rows, columns, squeeze=False).flat)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return new, axes


def svg(made: "Figure") -> str:
    """Return the figure as an SVG element. It works inside a page and as a separate file."""
    buffer = io.StringIO()
    made.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
