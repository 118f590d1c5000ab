"""Figures as inline SVG."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"original": "#6b7280", "hook": "#7a4fa3", "fused": "#0b6e99", "baked": "#c2571a", "lora": "#4b7a2b"}


def figure(width: float, height: float, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure with a row of panels, without the frame's upper and right side."""
    import matplotlib

    matplotlib.use("svg")
    # Text stays text: smaller, searchable, and in the reader's own font.
    matplotlib.rcParams["svg.fonttype"] = "none"
    # The same figure is the same file.
    matplotlib.rcParams["svg.hashsalt"] = "kernel-surgery"
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    axes = list(made.subplots(1, columns, squeeze=False)[0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return made, axes


def svg(made: "Figure") -> str:
    """The figure as an SVG element, which stands in a page and as a file of its own."""
    buffer = io.StringIO()
    made.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
