"""The plots of the report as inline SVG, made from results.json alone."""

from collections.abc import Sequence

from kernel_surgery.common.plotting import COLOURS, figure, svg


def accuracy(results: dict) -> str:
    """Plot accuracy with 95% Wilson intervals, by language and mode."""
    modes, languages = list(results["modes"]), results["config"]["languages"]
    fig, (axes,) = figure(1.6 + 1.3 * len(languages), 3.2)
    width = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        cells = [results["modes"][mode][language] for language in languages]
        positions = [j - 0.4 + width * (i + 0.5) for j in range(len(languages))]
        heights = [c["accuracy"] for c in cells]
        error = [
            [c["accuracy"] - c["ci95"][0] for c in cells],
            [c["ci95"][1] - c["accuracy"] for c in cells],
        ]
        axes.bar(positions, heights, width * 0.92, yerr=error, capsize=3, label=mode, color=COLOURS[mode])
    axes.set_xticks(range(len(languages)), languages)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("accuracy (95% Wilson interval)")
    fig.legend(loc="outside upper center", ncols=len(modes), frameon=False)
    return svg(fig)


def budget_curves(results: dict) -> str:
    """Plot the accuracy at shorter budgets, with one panel per language."""
    languages = results["config"]["languages"]
    columns = min(len(languages), 4)
    fig, axes = figure(2.6 * columns, 2.8, columns)
    for panel, language in zip(axes, languages, strict=False):
        for mode, by in results["modes"].items():
            points = by[language]["budget_curve"]
            panel.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.2, color=COLOURS[mode], label=mode)
        panel.set_title(language, fontsize=10)
        panel.set_ylim(-0.02, 1.02)
        panel.set_xlabel("limit on new tokens")
    axes[0].set_ylabel("accuracy")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return svg(fig)


def spectrum(captured: dict[str, float], values: dict[str, Sequence[float]], rank: int) -> str:
    """Plot the share of language variance that the subspace holds, by layer, and the singular values."""
    fig, (left, right) = figure(8, 2.8, 2)
    layers = [int(layer) for layer in captured]
    left.bar(layers, list(captured.values()), color=COLOURS["fused"])
    left.set_ylim(0, 1)
    left.set_xticks(layers if len(layers) <= 12 else layers[:: len(layers) // 9])
    left.set_xlabel("layer")
    left.set_ylabel(f"share of variance in rank {rank}")
    for layer, column in values.items():
        shares = [v / column[0] for v in column]
        right.plot(range(1, len(shares) + 1), shares, lw=1, label=f"layer {layer}")
    right.axvline(rank + 0.5, color="#a3261b", lw=1)
    right.set_yscale("log")
    right.set_xlabel("singular value")
    right.set_ylabel("relative to the first")
    if len(values) <= 8:
        right.legend(frameon=False, fontsize=7)
    return svg(fig)


def probes(found: dict) -> str:
    """Plot the probes' held-out accuracy by layer and mode, at the site and in the residual stream."""
    fig, axes = figure(8, 2.8, 2)
    for panel, site in zip(axes, ("mlp_out", "resid_post"), strict=True):
        for mode, sites in found["probes"].items():
            layers = sorted(sites[site], key=int)
            panel.plot(
                [int(i) for i in layers], [sites[site][i] for i in layers], "o-", ms=3, color=COLOURS[mode], label=mode
            )
        panel.axhline(found["chance"], color="#a3261b", lw=1)
        panel.set_ylim(0, 1.03)
        panel.set_title({"mlp_out": "MLP output (edited here)", "resid_post": "residual stream"}[site], fontsize=10)
        panel.set_xlabel("layer")
    axes[0].set_ylabel("probe accuracy (red: chance)")
    axes[0].legend(frameon=False)
    return svg(fig)


def controls(found: dict) -> str:
    """Plot the controls as a strip, with the real subspace and the original marked.

    One panel per measure, one row per language.
    """
    names = {"accuracy": "accuracy", "fat_tokens": "FAT (tokens to answer)", "language_fidelity": "language fidelity"}
    languages = list(found["real"])
    fig, axes = figure(9, 1.2 + 0.5 * len(languages), 3)
    for panel, (measure, words) in zip(axes, names.items(), strict=True):
        for y, language in enumerate(languages):
            values = [row[measure] for row in found["rows"] if row["language"] == language]
            values = [v for v in values if v is not None]
            # Shift the points a little, in a fixed order, so that equal values do not hide each other.
            spread = [y + 0.25 * ((i * 7 % 11) / 5 - 1) for i in range(len(values))]
            panel.plot(values, spread, "o", color="#9ca3af", ms=4, alpha=0.7, label="random" if y == 0 else None)
            for which, mark in (("original", "|"), ("real", "D")):
                value = found[which][language][measure]
                if value is not None:
                    colour = "#111827" if which == "original" else "#a3261b"
                    panel.plot([value], [y], mark, ms=12 if mark == "|" else 6, mew=2, color=colour)
        panel.set_yticks(range(len(languages)), languages)
        panel.set_ylim(-0.6, len(languages) - 0.4)
        panel.set_xlabel(words)
    return svg(fig)
