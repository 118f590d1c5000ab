"""The benchmarks' pictures, from the stored rows; `python -m bench.pages` writes them to bench/plots/."""

import re
from typing import Any

from bench import reals
from bench.opcount import figure as figure_of
from bench.tables import opcount_rows, rows
from bench.timing import ends
from kernel_surgery.common.plotting import BAND, COLOURS, OTHER, figure, standalone, svg
from kernel_surgery.studies.front import pictures as search_pictures

MODES = {"hook": "hook", "fused": "fused", "fused output": "fused", "baked": "baked", "lora": "lora"}


def colour(method: str) -> str:
    """The colour of a method: that of the mode, or grey if it is not ours."""
    return COLOURS.get(MODES.get(method, ""), OTHER)


def described(drawing: Any, what: str, row: dict) -> str:
    """The picture as a file, with what was measured, on what and of what written above its panels."""
    versions = f"torch {row['torch']}, commit {row['commit'][:10]}, {row['date']}"
    drawing.suptitle(f"{what}\n{row['device']}, {row['machine'].split(', Python')[0]}; {versions}", fontsize=9)
    return standalone(svg(drawing))


def opcount() -> str:
    """Bytes moved by every method per edited layer, less the original's, in a pass of many tokens."""
    stored = opcount_rows("stack")
    drawing, axes = figure(9, 3.2, 2)
    for panel, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        chosen = [r for r in stored if r["dtype"] == dtype and r["M"] > 1][::-1]
        values = [figure_of(r, "bytes_moved") for r in chosen]
        names = [r["provider"] for r in chosen]
        panel.barh(names, values, color=[colour(n) for n in names])
        for y, value in enumerate(values):
            panel.text(value, y, f" {value:.1f}", va="center", fontsize=8)
        panel.set_title(dtype, fontsize=10, loc="left")
        panel.set_xlabel("bytes read and written, in MLP outputs")
    tokens = max(r["M"] for r in stored)
    one = stored[0]
    what = f"Bytes that one edited layer adds to the original's, {tokens} tokens, d = {one['d']}, rank {one['k']}"
    return described(drawing, what, one)


def models() -> str:
    """Time over the original's, with its interval. The band is the noise."""
    stack = [r for r in rows("model-stack.json") if r["dtype"] == "float32" and r["how"] == "eager"]
    stored = [r for r in stack if not r["left_out"] and r["provider"] != "original"]
    keys = list(dict.fromkeys((r["case"], r["sequences"], r["tokens"], r["how"]) for r in stored))
    drawing, axes = figure(8, 2.7 * -(-len(keys) // 2), 2, -(-len(keys) // 2))
    for panel in axes[len(keys) :]:
        panel.set_visible(False)
    for panel, key in zip(axes, keys, strict=False):
        chosen = [r for r in stored if (r["case"], r["sequences"], r["tokens"], r["how"]) == key][::-1]
        panel.axvspan(1 / (1 + chosen[0]["noise"]), 1 + chosen[0]["noise"], color=BAND)
        panel.axvline(1, color=OTHER, lw=1)
        for y, r in enumerate(chosen):
            low, high = ends(r)
            panel.plot([low, high], [y, y], lw=2, color=colour(r["provider"]))
            panel.plot([r["ratio"]], [y], "o", ms=4, color=colour(r["provider"]))
        panel.set_yticks(range(len(chosen)), [r["provider"] for r in chosen] if panel in axes[::2] else [])
        panel.set_title(f"{key[0]} {key[1]} x {key[2]}, {key[3]}", fontsize=10, loc="left")
        panel.set_xlabel("time / original (band: noise)")
    one = stored[0]
    shape = f"{one['layers']} layers of a 3B model's shape, d = {one['d']}, {one['dtype']}"
    return described(drawing, f"{shape}, {one['edited']} of them edited at rank {one['k']}", one)


def growth() -> str:
    """Time against the size of the work, with the fitted slope in the title."""
    stored = rows("growth.json")
    kinds = list(dict.fromkeys(r["case"] for r in stored))
    drawing, axes = figure(8, 2.3 * -(-len(kinds) // 4), 4, -(-len(kinds) // 4))
    for panel in axes[len(kinds) :]:
        panel.set_visible(False)
    for panel, kind in zip(axes, kinds, strict=False):
        chosen = [r for r in stored if r["case"] == kind]
        times = [r["us_p50"] / 1e3 for r in chosen]
        panel.loglog([r["size"] for r in chosen], times, "o-", ms=4, color=COLOURS["fused"])
        panel.set_title(f"{kind}: slope {chosen[0]['slope']:.2f}", fontsize=10, loc="left")
        panel.set_xticks([r["size"] for r in chosen], [str(r["size"]) for r in chosen], fontsize=7)
        # Tick at measured values. A curve may lie between two powers of ten.
        ticks = sorted({times[0], times[len(times) // 2], times[-1]})
        panel.set_yticks(ticks, [f"{t:.3g}" if t < 1000 else f"{t:.0f}" for t in ticks], fontsize=7)
        panel.minorticks_off()
    for panel in axes[: len(kinds) : 4]:
        panel.set_ylabel("time, ms")
    return described(drawing, "Time of our steps against the size of the work, with the fitted slope", stored[0])


def curve(stored: dict) -> str:
    """The learning curve of docs/real.md: a probe on unseen problems against the tokens of the fit, at full rank."""
    whole = stored["rows"][reals.THEIRS] | {"sequential": False}
    fitted = [row for row in (*stored["curve"].values(), whole) if row["rank"] == whole["rank"]]
    drawing, (panel,) = figure(5.2, 3.4)
    before = stored["original"][reals.THEIRS]
    panel.axhline(before, color=COLOURS["original"], lw=1)
    panel.annotate("original", (0.99, before), xycoords=("axes fraction", "data"), va="bottom", ha="right", fontsize=9)
    for sequential, words, name in ((False, "one by one", "fused"), (True, "layer by layer", "baked")):
        chosen = sorted((row for row in fitted if row["sequential"] == sequential), key=lambda row: row["tokens"])
        if not chosen:
            continue
        x, read = [row["tokens"] for row in chosen], [row["read"][reals.THEIRS] for row in chosen]
        for tokens, by in zip(x, read, strict=True):
            panel.plot([tokens] * 2, by["probe_ci95"], lw=1.5, color=COLOURS[name])
        panel.plot(x, [by["probe"] for by in read], "o-", ms=4, color=COLOURS[name])
        panel.annotate(words, (x[-1], read[-1]["probe"]), xytext=(6, 0), textcoords="offset points", fontsize=9)
    panel.set_xscale("log")
    panel.margins(x=0.2)
    panel.set_xlabel("tokens of MGSM that the edit was fitted on")
    panel.set_ylabel("accuracy of a probe, unseen MGSM", fontsize=9)
    chance = reals.chance_of_tokens(stored["problems_file"])
    known = "" if chance is None else f"; chance {chance:.2f}"
    panel.set_title(f"SmolLM2-135M-Instruct, rank {whole['rank']}{known}", fontsize=10, loc="left")
    return standalone(svg(drawing))


def draw() -> dict[str, str]:
    """{file name: SVG} of every picture that has stored rows."""
    pictures = {"counted": ("opcount.json", opcount), "models": ("model-stack.json", models)}
    pictures["growth"] = "growth.json", growth
    drawn = {f"{name}.svg": draw_one() for name, (file, draw_one) in pictures.items() if rows(file)}
    if (study := reals.held(reals.SEARCH)) is not None:
        drawn |= dict(zip(("search-dev.svg", "search-test.svg"), map(standalone, search_pictures(study)), strict=True))
    if (stored := reals.held(reals.SOURCES)) is not None and stored.get("curve"):
        drawn["curve.svg"] = curve(stored)
    return drawn


def same_picture(one: str, other: str) -> bool:
    """Whether two SVGs agree but for random ids and the last printed digit of a coordinate.

    That digit depends on the machine's maths library.
    """
    (text, numbers), (other_text, other_numbers) = _split(one), _split(other)
    if text != other_text or len(numbers) != len(other_numbers):
        return False
    return all(abs(a - b) <= 1e-4 for a, b in zip(numbers, other_numbers, strict=True))


def _split(picture: str) -> tuple[str, list[float]]:
    # An SVG without its random ids: the text, and the numbers in it.
    number = r"-?\d+\.\d+"
    text = re.sub(r'(id|href|clip-path)="[^"]*"|url\(#[^)]*\)', "", picture)
    return re.sub(number, "0", text), [float(word) for word in re.findall(number, text)]
