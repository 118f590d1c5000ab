"""The plots of a certificate: error over bound by layer, what is left in the weights, and the hidden states' errors."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kernel_surgery.certify.tables import across_plot, draw_limit
from kernel_surgery.common.plotting import COLOURS, QUIET, figure, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The figures that the plot of error/bound shows: words, the marker of the plot, and the same as a character.
CHECKS = {
    "error_over_bound": ("against the exact edit", "o", "●"),
    "rule_a": ("edit of the rounded output", "s", "■"),
    "span_rule_a": ("rows inside the subspace", "v", "▼"),
    "span_leak": ("what is left of such rows", "^", "▲"),
    "add": ("with the residual addition", "D", "◆"),
    "norm": ("with the next norm", "x", "✕"),
    "tensor": ("tensors, element by element", "*", "★"),
}


def _draw_bounds(axes: "Axes", model: dict[str, Any] | None, tensors: list[dict[str, Any]]) -> None:
    """Draw every error over its bound. The colour is the mode, the marker the check."""
    for i, mode in enumerate(model["modes"] if model else []):
        rows = [r for r in (model or {})["layers"] if r["mode"] == mode]
        for key, (_, marker, _) in CHECKS.items():
            # Shift the modes sideways: hook and fused are often identical and would hide each other.
            if points := [(r["layer"] + 0.08 * (i - 1.5), r[key]) for r in rows if r.get(key) is not None]:
                axes.plot(*zip(*points, strict=True), marker, color=COLOURS[mode], ms=4, alpha=0.8)
    if errors := [(t["layer"], t["error_over_bound"]) for t in tensors if t["error_over_bound"] is not None]:
        axes.plot(*zip(*errors, strict=True), "*", color=COLOURS["baked"], ms=6)
    draw_limit(axes, 1.0, "error / bound")
    axes.set_title("every check, by edited layer", fontsize=10, loc="left")


def _draw_leaks(axes: "Axes", leaks: list[dict[str, Any]]) -> None:
    axes.plot([t["layer"] for t in leaks], [t["leak_over_floor"] for t in leaks], "*", color=COLOURS["baked"])
    draw_limit(axes, min(t["leak_gate"] for t in leaks), "leak / what rounding leaves")
    axes.set_title("the subspace left in the baked weights", fontsize=10, loc="left")


def _draw_hidden(axes: "Axes", model: dict[str, Any]) -> None:
    for mode in ("original", *model["modes"]):
        errors = [row[mode] for row in model["hidden"]]
        axes.plot([r["layer"] for r in model["hidden"]], errors, color=COLOURS[mode], lw=1.2)
    axes.set_yscale("log")
    axes.set_ylabel("relative error")
    axes.set_title("hidden states, against the exact edit", fontsize=10, loc="left")


def panels(certificate: dict[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Plot a certificate as separate SVG panels.

    Returns them, the modes whose colours need a legend, and the marks that do. The panels are: error / bound by layer;
    leak / floor of the weights; relative error of the hidden states by mode. The second and third are left out if there
    is no data for them.
    """
    pictures = []
    for draw in _drawings(certificate):
        fig, (axes,) = figure(3.6, 3.0)
        _finished(axes, draw)
        pictures.append(svg(fig))
    return pictures, _modes(certificate), [f"{mark} {words}" for words, _, mark in _checks(certificate)]


def plot(certificate: dict[str, Any]) -> str:
    """Plot a certificate as one figure with its legend, and return it as SVG. The panels are those of `panels`."""
    if across := certificate.get("across_engines"):
        return across_plot(across)
    drawings = _drawings(certificate)
    fig, all_axes = figure(8, 1.4 + 2.6 * len(drawings), rows=len(drawings))
    for axes, draw in zip(all_axes, drawings, strict=True):
        _finished(axes, draw)
    top = all_axes[0]
    entries = [top.plot([], [], "s", color=COLOURS[mode], label=mode)[0] for mode in _modes(certificate)]
    entries += [top.plot([], [], mark, color=QUIET, label=words)[0] for words, mark, _ in _checks(certificate)]
    fig.legend(handles=entries, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return svg(fig)


def _modes(certificate: dict[str, Any]) -> list[str]:
    model = certificate.get("model")
    return ["original", *model["modes"]] if model else ["baked"]


def _checks(certificate: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the checks that the plot shows."""
    model = certificate.get("model") or {"layers": []}
    drawn = {key for row in model["layers"] for key in CHECKS if row.get(key) is not None}
    drawn |= {"tensor"} if certificate["tensors"] or model.get("tensors") else set()
    return [words for key, words in CHECKS.items() if key in drawn]


def _drawings(certificate: dict[str, Any]) -> list[Callable[["Axes"], None]]:
    model = certificate.get("model")
    tensors = certificate["tensors"] or (model or {}).get("tensors", [])
    leaks = [t for t in tensors if t.get("leak_over_floor") is not None]
    drawings: list[Callable[[Axes], None]] = [lambda axes: _draw_bounds(axes, model, tensors)]
    if leaks:
        drawings.append(lambda axes: _draw_leaks(axes, leaks))
    if model:
        drawings.append(lambda axes: _draw_hidden(axes, model))
    return drawings


def _finished(axes: "Axes", draw: "Callable[[Axes], None]") -> None:
    from matplotlib.ticker import MaxNLocator

    draw(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
