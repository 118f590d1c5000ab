"""The plots of the report as inline SVG, made from results.json alone.

Each function returns panels, which the page sets side by side or below each other. A panel is at most `page.PANEL`
inches wide. The colours of the modes are explained once, in the page's legend.
"""

from collections.abc import Sequence

from kernel_surgery.common.plotting import COLOURS, LIMIT, figure, svg
from kernel_surgery.damage.measure import named
from kernel_surgery.evaluation.page import PANEL


def accuracy(results: dict) -> list[str]:
    """Plot accuracy with 95% Wilson intervals, by language and mode. Two languages per panel."""
    modes, languages = list(results["modes"]), results["config"]["languages"]
    width = 0.8 / len(modes)
    pictures = []
    for first in range(0, len(languages), 2):
        subset = languages[first : first + 2]
        fig, (axes,) = figure(PANEL, 2.8)
        for i, mode in enumerate(modes):
            cells = [results["modes"][mode][language] for language in subset]
            positions = [j - 0.4 + width * (i + 0.5) for j in range(len(subset))]
            error = [
                [c["accuracy"] - c["ci95"][0] for c in cells],
                [c["ci95"][1] - c["accuracy"] for c in cells],
            ]
            heights = [c["accuracy"] for c in cells]
            axes.bar(positions, heights, width * 0.92, yerr=error, capsize=3, color=COLOURS[mode])
        axes.set_xticks(range(len(subset)), subset)
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("accuracy (95% interval)")
        pictures.append(svg(fig))
    return pictures


def budget_curves(results: dict) -> list[str]:
    """Plot the accuracy at shorter budgets, with one panel per language."""
    pictures = []
    for language in results["config"]["languages"]:
        fig, (axes,) = figure(2.9, 2.6)
        for mode, by in results["modes"].items():
            points = by[language]["budget_curve"]
            axes.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.2, color=COLOURS[mode])
        axes.set_title(language, fontsize=10)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("limit on new tokens")
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
    axes.set_ylabel(f"share of variance in rank {rank}")
    right, (axes,) = figure(PANEL, 2.8)
    for layer, column in values.items():
        shares = [v / column[0] for v in column]
        axes.plot(range(1, len(shares) + 1), shares, lw=1, label=f"layer {layer}")
    axes.axvline(rank + 0.5, color=LIMIT, lw=1)
    axes.set_yscale("log")
    axes.set_xlabel("singular value")
    axes.set_ylabel("relative to the first")
    if len(values) <= 8:
        axes.legend(frameon=False, fontsize=8)
    return [svg(left), svg(right)]


def damage(found: dict) -> list[str]:
    """Plot the mean KL of every edit and yardstick with its interval, from mild to severe. One panel per language."""
    pictures = []
    changes = found["neutral"] | found["yardsticks"]
    for language in next(iter(found["neutral"].values())):
        # A KL of 0 has no place on a logarithmic axis.
        shown = {name: by[language] for name, by in changes.items() if by[language]["kl_mean"] > 0}
        order = sorted(shown, key=lambda name: -shown[name]["kl_mean"])
        fig, (axes,) = figure(PANEL, 0.9 + 0.3 * len(order))
        for y, name in enumerate(order):
            mean, (low, high) = shown[name]["kl_mean"], shown[name]["kl_ci95"]
            edit = name in found["neutral"]
            colour = COLOURS[name] if edit else "#6b7280"
            axes.plot([low, high], [y, y], color=colour, lw=1.5)
            axes.plot([mean], [y], "D" if edit else "o", ms=6 if edit else 4, color=colour)
        axes.set_yticks(range(len(order)), [f"{named(name, found)}" for name in order], fontsize=8)
        axes.set_ylim(-0.6, len(order) - 0.4)
        axes.set_xscale("log")
        axes.set_title(language, fontsize=10)
        axes.set_xlabel("KL, nats per token")
        pictures.append(svg(fig))
    return pictures


def probes(found: dict) -> list[str]:
    """Plot the probes' held-out accuracy by layer and mode, at the site and in the residual stream."""
    pictures = []
    for site, title in (("mlp_out", "MLP output (edited here)"), ("resid_post", "residual stream")):
        fig, (axes,) = figure(PANEL, 2.8)
        for mode, sites in found["probes"].items():
            layers = sorted(sites[site], key=int)
            axes.plot([int(i) for i in layers], [sites[site][i] for i in layers], "o-", ms=3, color=COLOURS[mode])
        axes.axhline(found["chance"], color=LIMIT, lw=1)
        axes.annotate("chance", (0.02, found["chance"] + 0.02), xycoords=("axes fraction", "data"), color=LIMIT)
        axes.set_ylim(0, 1.03)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("layer")
        axes.set_ylabel("probe accuracy")
        pictures.append(svg(fig))
    return pictures


def controls(found: dict) -> list[str]:
    """Plot the controls as a strip, with the real subspace and the original marked.

    One panel per measure, one row per language.
    """
    names = {"accuracy": "accuracy", "fat_tokens": "FAT (tokens to answer)", "language_fidelity": "language fidelity"}
    languages = list(found["real"])
    pictures = []
    for measure, words in names.items():
        fig, (axes,) = figure(3.3, 1.2 + 0.5 * len(languages))
        for y, language in enumerate(languages):
            values = [row[measure] for row in found["rows"] if row["language"] == language]
            values = [v for v in values if v is not None]
            # Shift the points a little, in a fixed order, so that equal values do not hide each other.
            spread = [y + 0.25 * ((i * 7 % 11) / 5 - 1) for i in range(len(values))]
            axes.plot(values, spread, "o", color="#9ca3af", ms=4, alpha=0.7)
            for which, mark in (("original", "|"), ("real", "D")):
                value = found[which][language][measure]
                if value is not None:
                    colour = "#111827" if which == "original" else LIMIT
                    axes.plot([value], [y], mark, ms=12 if mark == "|" else 6, mew=2, color=colour)
        axes.set_yticks(range(len(languages)), languages)
        axes.set_ylim(-0.6, len(languages) - 0.4)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(words)
        pictures.append(svg(fig))
    return pictures
