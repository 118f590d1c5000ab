"""The palette of every page and picture, and figures as SVG.

A colour has a value for light pages and one for dark ones. A figure is drawn in the light values. In the SVG they
become CSS variables, `var(--fused, #0b6e99)`, so a page that defines the variables decides. A figure in a file of its
own brings the variables along (`standalone`).
"""

import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# {name: (on light pages, on dark pages)}. Text in any of them is readable on its ground (contrast of at least 4.5).
PALETTE = {
    "ground": ("#ffffff", "#14181d"),
    "card": ("#f6f8fa", "#1c2229"),
    "ink": ("#1c232b", "#e4e8ec"),
    "quiet": ("#566270", "#a4afba"),
    "line": ("#d4dae0", "#3a444e"),
    "band": ("#e9edf1", "#29313a"),
    "other": ("#77828e", "#929da8"),
    "original": ("#6b7280", "#9ca5b1"),
    "hook": ("#7a4fa3", "#bd9be6"),
    "fused": ("#0b6e99", "#55b8e0"),
    "baked": ("#b34d14", "#f2995f"),
    "lora": ("#46732a", "#93c76a"),
    "limit": ("#a3261b", "#ff8f80"),
    "good": ("#19692c", "#6fcf87"),
    "caution": ("#8a5a00", "#e6b450"),
    "mark": ("#ffe6a1", "#5c4a12"),
}
MODES = ("original", "hook", "fused", "baked", "lora")
COLOURS = {mode: PALETTE[mode][0] for mode in MODES}
# The colour of a limit, or of what is compared with the original.
LIMIT = PALETTE["limit"][0]
# Of what is shown beside the modes: random edits, yardsticks, other software.
OTHER = PALETTE["other"][0]
BAND, LINE, INK, QUIET = (PALETTE[name][0] for name in ("band", "line", "ink", "quiet"))

_NAMES = {light: name for name, (light, _) in PALETTE.items()}


def variables(dark: bool) -> str:
    """Return the palette as CSS declarations."""
    return ";".join(f"--{name}:{values[dark]}" for name, values in PALETTE.items())


def figure(width: float, height: float, columns: int = 1, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    """Return a figure with `rows` times `columns` panels, and the panels. They have no top and right border.

    width, height: of the figure, in inches.
    """
    from matplotlib.figure import Figure

    new = Figure(figsize=(width, height), layout="constrained")
    new.patch.set_visible(False)
    axes = list(new.subplots(rows, columns, squeeze=False).flat)
    for panel in axes:
        panel.patch.set_visible(False)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["bottom", "left"]].set_color(LINE)
        panel.tick_params(which="both", color=LINE, labelcolor=QUIET)
    return new, axes


def svg(made: "Figure") -> str:
    """Return the figure as an SVG element for a page that has the palette's variables.

    Text stays text: it is searchable, and it takes the page's colour and the reader's font.
    """
    import matplotlib

    buffer = io.StringIO()
    # A fixed salt makes equal figures equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kernel-surgery"}):
        made.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: _variable(found[0]), text)


def _variable(colour: str) -> str:
    return f"var(--{_NAMES[colour]}, {colour})" if colour in _NAMES else colour


def standalone(picture: str) -> str:
    """Return an SVG from `svg` as the text of a file, with its own ground and colours for light and dark screens."""
    end = picture.index(">") + 1
    style = (
        f"<style>svg{{{variables(False)}}}@media(prefers-color-scheme:dark){{svg{{{variables(True)}}}}}"
        'text{fill:var(--ink)}</style><rect width="100%" height="100%" style="fill:var(--ground)"/>'
    )
    return picture[:end] + style + picture[end:]
