"""The plots of the report as inline SVG, made from results.json alone.

Each function returns panels, which the page sets side by side or below each other. A panel is at most `page.PANEL`
inches wide. The colours of the modes are explained once, in the page's legend.
"""

from collections.abc import Sequence

from kernel_surgery.common.page import PANEL
from kernel_surgery.common.plotting import COLOURS, INK, LIMIT, OTHER, figure, svg


def budget_curves(results: dict) -> list[str]:
    """Plot the accuracy at shorter budgets, with one panel per language."""
    pictures = []
    for language in results["config"]["languages"]:
        fig, (axes,) = figure(2.9, 2.6)
        for mode, by in results["modes"].items():
            points = by[language]["budget_curve"]
            axes.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.2, color=COLOURS[mode])
        axes.set_title(language, fontsize=10, loc="left")
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("limit, tokens")
        axes.set_ylabel("accuracy")
        pictures.append(svg(fig))
    return pictures


def spectrum(captured: dict[str, float], values: dict[str, Sequence[float]], rank: int) -> list[str]:
    """Plot the share of language variance that the subspace holds, by layer, and the singular values."""
    left, (axes,) = figure(PANEL, 2.8)
    layers = [int(layer) for layer in captured]
    axes.bar(layers, list(captured.values()), color=COLOURS["fused"])
    axes.set_ylim(0, 1)
    axes.set_xticks(layers if len(layers) <= 10 else layers[:: -(-len(layers) // 9)])
    axes.set_xlabel("layer")
    axes.set_ylabel("share of the variance")
    axes.set_title(f"variance between languages in rank {rank}", fontsize=10, loc="left")
    right, (axes,) = figure(PANEL, 2.8)
    ends = []
    for layer, column in values.items():
        shares = [v / column[0] for v in column]
        axes.plot(range(1, len(shares) + 1), shares, lw=1, color=COLOURS["fused"], alpha=0.7)
        ends.append((shares[-1], len(shares), layer))
    axes.axvline(rank + 0.5, color=LIMIT, lw=1)
    axes.annotate(
        f" rank {rank}", (rank + 0.5, 1), xycoords=("data", "axes fraction"), color=LIMIT, va="top", fontsize=8
    )
    axes.set_yscale("log")
    for share, at, layer in (min(ends), max(ends)) if len(ends) > 1 else ends:
        axes.annotate(f" {layer}", (at, share), va="center", fontsize=8)
    axes.set_xlabel("number of the singular value")
    axes.set_ylabel("relative to the first")
    axes.set_title("singular values, a line per layer", fontsize=10, loc="left")
    return [svg(left), svg(right)]


def probes(found: dict) -> list[str]:
    """Plot the probes' held-out accuracy by layer and mode, at the site and in the residual stream."""
    pictures = []
    names = {"mlp_out": "MLP output (edited here)", "mlp_write": "after the MLP block's norm (edited here)"}
    for site in found["probes"]["original"]:
        title = names.get(site, "residual stream")
        fig, (axes,) = figure(PANEL, 2.8)
        for mode, sites in found["probes"].items():
            layers = sorted(sites[site], key=int)
            axes.plot([int(i) for i in layers], [sites[site][i] for i in layers], "o-", ms=3, color=COLOURS[mode])
        axes.axhline(found["chance"], color=LIMIT, lw=1)
        near = {"xycoords": ("axes fraction", "data"), "color": LIMIT, "fontsize": 8}
        axes.annotate("chance", (0.02, found["chance"] + 0.02), **near)
        axes.set_ylim(0, 1.03)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("layer")
        axes.set_ylabel("accuracy of the probe")
        pictures.append(svg(fig))
    return pictures


def controls(found: dict) -> list[str]:
    """Plot the controls as a strip, with the real subspace and the original marked.

    One panel per measure, one row per language.
    """
    names = {
        "accuracy": "accuracy",
        "fat_tokens": "FAT, tokens to the answer",
        "language_fidelity": "language fidelity",
    }
    languages = list(found["real"])
    pictures = []
    for measure, words in names.items():
        fig, (axes,) = figure(3.3, 1.2 + 0.5 * len(languages))
        for y, language in enumerate(languages):
            values = [row[measure] for row in found["rows"] if row["language"] == language]
            values = [v for v in values if v is not None]
            # Shift the points a little, in a fixed order, so that equal values do not hide each other.
            spread = [y + 0.25 * ((i * 7 % 11) / 5 - 1) for i in range(len(values))]
            axes.plot(values, spread, "o", color=OTHER, ms=4, alpha=0.7)
            for which, mark in (("original", "|"), ("real", "D")):
                value = found[which][language][measure]
                if value is not None:
                    colour = INK if which == "original" else LIMIT
                    axes.plot([value], [y], mark, ms=12 if mark == "|" else 6, mew=2, color=colour)
        axes.set_yticks(range(len(languages)), languages)
        axes.set_ylim(-0.6, len(languages) - 0.4)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(words)
        pictures.append(svg(fig))
    return pictures
