"""The benchmarks' pictures, from the kept rows alone; `python -m bench.pages` writes them to bench/plots/."""

from bench.opcount import figure as figure_of
from bench.tables import opcount_rows, rows
from bench.timing import ends
from kernel_surgery.common.plotting import COLOURS, figure, svg

OTHER = "#9ca3af"
SHOWN = {"hook": "hook", "fused": "fused", "fused output": "fused", "baked": "baked", "lora": "lora"}


def colour(provider: str) -> str:
    """A provider's colour: the mode's, or grey for what is not ours."""
    return COLOURS.get(SHOWN.get(provider, ""), OTHER)


def opcount() -> str:
    """Bytes that every provider reads and writes beyond the original, an edited layer, in a pass of many tokens."""
    found = opcount_rows("stack")
    made, axes = figure(9, 3.2, 2)
    for panel, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        chosen = [r for r in found if r["dtype"] == dtype and r["M"] > 1][::-1]
        values = [figure_of(r, "bytes_moved") for r in chosen]
        names = [r["provider"] for r in chosen]
        panel.barh(names, values, color=[colour(n) for n in names])
        for y, value in enumerate(values):
            panel.text(value, y, f" {value:.1f}", va="center", fontsize=8)
        panel.set_title(dtype, fontsize=10)
        panel.set_xlabel("bytes read and written, in MLP outputs")
    return svg(made)


def models() -> str:
    """Time over the original's, with its interval; the band is the original against itself."""
    stack = [r for r in rows("model-stack.json") if r["dtype"] == "float32" and r["how"] == "eager"]
    found = [r for r in stack if not r["left_out"] and r["provider"] != "original"]
    keys = list(dict.fromkeys((r["case"], r["sequences"], r["tokens"], r["how"]) for r in found))
    made, axes = figure(3.4 * len(keys), 3.2, len(keys))
    for panel, key in zip(axes, keys, strict=True):
        chosen = [r for r in found if (r["case"], r["sequences"], r["tokens"], r["how"]) == key][::-1]
        panel.axvspan(1 / (1 + chosen[0]["noise"]), 1 + chosen[0]["noise"], color="#f3f4f6")
        panel.axvline(1, color="#9ca3af", lw=1)
        for y, r in enumerate(chosen):
            low, high = ends(r)
            panel.plot([low, high], [y, y], lw=2, color=colour(r["provider"]))
            panel.plot([r["ratio"]], [y], "o", ms=4, color=colour(r["provider"]))
        panel.set_yticks(range(len(chosen)), [r["provider"] for r in chosen] if panel is axes[0] else [])
        panel.set_title(f"{key[0]} {key[1]} x {key[2]}, {key[3]}", fontsize=10)
        panel.set_xlabel("time / original (band: noise)")
    return svg(made)


def growth() -> str:
    """Time against the size of the work, with the fitted slope in the title."""
    found = rows("growth.json")
    kinds = list(dict.fromkeys(r["case"] for r in found))
    made, axes = figure(2.2 * len(kinds), 2.6, len(kinds))
    for panel, kind in zip(axes, kinds, strict=True):
        chosen = [r for r in found if r["case"] == kind]
        times = [r["us_p50"] / 1e3 for r in chosen]
        panel.loglog([r["size"] for r in chosen], times, "o-", ms=4, color=COLOURS["fused"])
        panel.set_title(f"{kind}: {chosen[0]['slope']:.2f}", fontsize=10)
        panel.set_xticks([r["size"] for r in chosen], [str(r["size"]) for r in chosen], fontsize=7)
        # Measured values, not powers of ten: a curve may lie between two of those.
        ticks = sorted({times[0], times[len(times) // 2], times[-1]})
        panel.set_yticks(ticks, [f"{t:.3g}" if t < 1000 else f"{t:.0f}" for t in ticks], fontsize=7)
        panel.minorticks_off()
    axes[0].set_ylabel("ms")
    return svg(made)


def draw() -> dict[str, str]:
    """{file name: SVG} of every picture whose rows are there."""
    wanted = {"counted": ("opcount.json", opcount), "models": ("model-stack.json", models)}
    wanted["growth"] = "growth.json", growth
    return {f"{name}.svg": made() for name, (file, made) in wanted.items() if rows(file)}
