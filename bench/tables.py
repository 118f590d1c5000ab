"""The tables of the kept rows, in Markdown: what README.md and docs/benchmarks.md show (`bench.pages` writes them)."""

import json
from collections.abc import Callable
from pathlib import Path

from bench import store
from bench.growth import as_expected
from bench.model import GOAL
from bench.opcount import KINDS, figure, off
from bench.timing import NOISE, ends

RESULTS = Path(__file__).resolve().parent / "results"


def rows(name: str) -> list[dict]:
    """The rows of a benchmark's newest run; none where it has not been run."""
    return store.newest(RESULTS / name)


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def grid(found: list[dict], columns: Callable[[dict], str], cell: Callable[[dict], str]) -> str:
    """A table with a line a provider, a column for every value of `columns`, and the largest error/bound at the end."""
    heads, methods = (list(dict.fromkeys(map(key, found))) for key in (columns, lambda r: r["provider"]))
    body = []
    for name in methods:
        mine = {columns(r): r for r in found if r["provider"] == name}
        errors = [r["error_over_bound"] for r in mine.values() if r["error_over_bound"] is not None]
        worst = f"{max(errors):.2f}{'' if max(errors) <= 1 else ' (beyond its bound)'}" if errors else ""
        body.append([name, *(cell(mine[head]) if head in mine else "" for head in heads), worst])
    return table(["", *heads, "error/bound"], body)


def where(row: dict) -> str:
    """Where and when a row was measured."""
    commit = (row["commit"] or "unknown")[:10] + (", with changes that were not committed" if row["dirty"] else "")
    names = ("torch", "transformers", "triton", "numpy", "scipy", "peft", "nnsight")
    if not row.get("graph"):
        names = tuple(name for name in names if name != "triton")  # nothing of it runs on a CPU
    versions = [f"{name} {row[name]}" for name in names if row.get(name)]
    about = [row[key] for key in ("device", "machine") if row.get(key)]
    command = f"`{row['command']}`: " if row.get("command") else ""
    return f"{command}{', '.join([*about, *versions])}, commit {commit}, {row['date']}.\n"


def interval(row: dict, name: str = "ratio") -> str:
    """A ratio with its interval, or its range where there is none."""
    low, high = ends(row, name)
    return f"{row[name]:.2f} ({low:.2f} to {high:.2f})"


def opcount_rows(model: str) -> list[dict]:
    """The rows of bench.opcount for a model, but for the original's repetition, which is 0 throughout."""
    return [r for r in rows("opcount.json") if r["case"] == model and r["provider"] != NOISE]


def tokens(row: dict) -> str:
    """How many rows of activations a pass had."""
    return f"{row['M']} token{'s' if row['M'] > 1 else ''}"


def opcount(model: str) -> str:
    """What every provider does beyond the original, an edited layer."""
    found, out = opcount_rows(model), ""
    for dtype, m in dict.fromkeys((r["dtype"], r["M"]) for r in found):
        chosen = [r for r in found if (r["dtype"], r["M"]) == (dtype, m)]
        first = chosen[0]
        body = [[r["provider"], *(f"{figure(r, kind):.4g}" for kind in KINDS), off(r)] for r in chosen]
        out += (
            f"{dtype}, {tokens(first)}, d_model {first['d']}, k = {first['k']}; bytes in units of the MLP's output\n\n"
        )
        out += table(["", *(kind.replace("_", " ") for kind in KINDS), "error/bound"], body) + "\n"
    return out + where(found[0]) if found else ""


def speed() -> str:
    """README.md: the counted work in short, and the other ratios in a line each, each with where it was measured."""
    found, body = opcount_rows("stack"), []
    dtypes, sizes = (list(dict.fromkeys(r[key] for r in found)) for key in ("dtype", "M"))
    for name in dict.fromkeys(r["provider"] for r in found):
        line = [name]
        for dtype in dtypes:
            mine = [r for r in found if (r["provider"], r["dtype"]) == (name, dtype)]
            line += [f"{figure(r, 'bytes_moved'):.1f}" for r in mine] or [""] * len(sizes)
            line.append(f"{max(r['error_over_bound'] for r in mine):.2f}" if mine else "")
        body.append(line)
    named = [tokens({"M": m}) for m in sizes]
    head = [f"{word}, {dtype}" for dtype in dtypes for word in (*named, "error/bound")]
    lines, fitted, asked, baked = [], rows("fit.json"), rows("evaluation.json"), rows("checkpoint-bake.json")
    for r in fitted:
        if r["provider"] == "kernel_surgery.fit":
            lines.append(
                f"- `fit`, exact, on {r['layers']} synthetic layers of {r['M']} x {r['d']}: {interval(r, 'speedup')} "
                f"times the speed of numpy's full SVD. {where(r)}"
            )
    of_loop = {r["provider"]: interval(r, "speedup") for r in asked}
    if asked:
        lines.append(
            f"- `eval` of the embedded model on a CPU: {of_loop['kernel_surgery.eval']} times the speed of a loop over "
            f"single prompts, by batching; a batched loop that only looks for the answer, as the first script does: "
            f"{of_loop['the loop, batched']}. {where(asked[0])}"
        )
    for r in baked:
        if r["provider"] == "bake":
            lines.append(
                f"- `bake` of a synthetic checkpoint of {r['gigabytes']:.1f} GB, hashes included: {interval(r)} of the "
                f"time of `cp -r` and SHA-256 of the copy, {1 / r['fraction_of_copy']:.2f} of that of `cp -r` alone. "
                f"{where(r)}"
            )
    out = table(["", *head], body) + "\n" + where(found[0]) + "\n" if found else ""
    return out + "".join(lines) + "\nIn full: [docs/benchmarks.md](docs/benchmarks.md).\n"


def op_tables(found: list[dict]) -> str:
    """The operators beside their alternatives; on CUDA replayed and cold, without what the host's launches cost."""
    out = ""
    cuda = any(r["graph"] for r in found)
    shown = [r for r in found if not r["left_out"] and not (cuda and r["cache"] == "warm" and not r["graph"])]

    def kind(r: dict) -> tuple:
        return r["case"], r["dtype"], r["cache"], (r["d"], r["k"]) == (2048, 10)

    def cell(r: dict) -> str:
        low, high = ends(r)
        digits = 0 if r["us_p50"] >= 100 else 1
        return f"{r['us_p50']:.{digits}f} us, {r['of_floor']:.3g} ({1 / high:.3g} to {1 / low:.3g})"

    for key in dict.fromkeys(map(kind, shown)):
        chosen = [r for r in shown if kind(r) == key]
        noise = max(r["noise"] for r in chosen)
        how = f"{key[2]} cache{', replayed' if chosen[0]['graph'] else ''}"
        out += f"{key[0]}, {key[1]}, {how}; noise at most {noise:.3f}\n\n"
        out += grid(chosen, lambda r: f"{r['M']} x {r['d']}, k = {r['k']}", cell) + "\n"
    absent = dict.fromkeys(
        f"{r['provider']} at {r['M']} x {r['d']}, k = {r['k']}: {r['left_out']}" for r in found if r["left_out"]
    )
    return out + "".join(f"- not run: {line}\n" for line in absent)


def op() -> str:
    """The operators on this CPU."""
    found = rows("op.json")
    return op_tables(found) + "\n" + where(found[0]) if found else ""


def fit() -> str:
    """Providers of the fit."""
    found = rows("fit.json")
    body = [
        [
            r["provider"],
            "yes" if r["exact"] else "no",
            f"{r['us_p50'] / 1e6:.3f}",
            interval(r, "speedup"),
            f"{r['sine']:.1e}",
            f"{r['residual']:.1e}",
        ]
        for r in found
    ]
    if not found:
        return ""
    head = ["", "exact", "s a layer", "times the script's speed", "sine to a float64 SVD", "residual"]
    first = found[0]
    about = f"{first['layers']} layers of {first['M']} x {first['d']} deviations, k = {first['k']}.\n\n"
    return about + table(head, body) + "\n" + where(first)


def evaluation() -> str:
    """The evaluation against the loop."""
    found = rows("evaluation.json")
    if not found:
        return ""
    body = [
        [
            r["provider"],
            str(r["batch"]),
            f"{r['us_p50'] / 1e6:.1f}",
            f"{r['tokens'] / r['us_p50'] * 1e6:.0f}",
            interval(r, "speedup"),
        ]
        for r in found
    ]
    parted = max(r["parted_by_rounding"] for r in found)
    about = f"{found[0]['M']} texts, the same from all"
    about += " token for token.\n\n" if not parted else f", but for {parted} at most that rounding parts.\n\n"
    return about + table(["", "batch", "s", "tokens/s", "times the loop's speed"], body) + "\n" + where(found[0])


def checkpoint() -> str:
    """Baking against its floor and its peers."""
    out = ""
    for name in ("checkpoint-bake.json", "checkpoint-peers.json"):
        found = rows(name)
        if not found:
            continue
        body = [
            [
                r["provider"],
                f"{r['us_p50'] / 1e6:.1f}",
                interval(r),
                f"{1 / r['fraction_of_copy']:.2f}",
                *(
                    f"{r[key]:{form}}" if r.get(key) is not None else ""
                    for key, form in (
                        ("peak_resident_gb", ".2f"),
                        ("peak_anonymous_gb", ".2f"),
                        ("leak_over_floor", ".3f"),
                        ("error_over_bound", ".3f"),
                        ("not_correctly_rounded", ".5f"),
                    )
                ),
            ]
            for r in found
        ]
        head = [
            "",
            "s",
            "of cp -r, then SHA-256",
            "of cp -r",
            "resident GB",
            "anonymous GB",
            "leak/floor",
            "error/bound",
            "wrongly rounded",
        ]
        about = f"{found[0]['gigabytes']:.2f} GB, {found[0]['layers']} layers of Qwen2.5-3B's shapes.\n\n"
        out += about + table(head, body) + "\n" + where(found[0]) + "\n"
    return out


def model_cell(r: dict) -> str:
    """What a provider costs in one phase: its time over the original's, and what may be said of that."""
    if r["left_out"]:
        return r["left_out"]
    if r["provider"] == "original":
        return f"{r['us_p50'] / 1e3:.2f} ms, {r['tokens_per_s']:.0f} tokens/s"
    low, high = ends(r)
    said = {"slower": " slower", "faster": " faster", "undecided": " undecided"}.get(r["verdict"], "")
    goal = {None: "", True: f"; {GOAL} met", False: f"; {GOAL} not met"}[r["goal_met"]]
    return f"{r['ratio']:.3f} ({low:.3f} to {high:.3f}){said}{goal}"


def model_tables(found: list[dict]) -> str:
    """Every provider in a model, one table for each dtype and way of running it."""

    def phase(r: dict) -> str:
        return f"{r['case']} {r['sequences']} x {r['tokens']}"

    out = ""
    for dtype, how in dict.fromkeys((r["dtype"], r["how"]) for r in found):
        chosen = [r for r in found if (r["dtype"], r["how"]) == (dtype, how)]
        first = chosen[0]
        out += f"{first['model']}, layers {first['layers']}, edited {first['edited']}, {dtype}, {how}; "
        out += "time over the original's\n\n"
        out += grid(chosen, phase, model_cell)
        seen = {phase(r): r for r in chosen if not r["left_out"]}
        said = ", ".join(f"{r['noise']:.3f} and {r['detectable']:.3f} in {name}" for name, r in seen.items())
        out += f"\nNoise, and the overhead from which on a provider would have been called slower: {said}.\n\n"
        if any(r["launches"] for r in chosen):
            out += "Kernels, copies and fills that a call starts:\n\n"
            out += grid(chosen, phase, lambda r: str(r["launches"] or "")) + "\n"
    return out + where(found[0]) + "\n" if found else ""


def models() -> str:
    """Every kept model."""
    return "".join(model_tables(rows(f"model-{case}.json")) for case in ("layer", "stack", "polyglot"))


def on_gpu() -> str:
    """The newest run of `make gpu`: what was checked, the operators, the whole model."""
    runs = sorted(file.parent for file in RESULTS.glob("*/summary.json"))
    if not runs:
        return "Nothing has been measured on a GPU yet; `make gpu` is what will.\n"
    folder = runs[-1]
    found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    about = found["environment"] | {"date": f"{found['date'][:4]}-{found['date'][4:6]}-{found['date'][6:]}"}
    parts = [[name, str(part["status"]), f"{part['seconds']:.0f}"] for name, part in found["parts"].items()]
    made = where(about | {"graph": True}) + "\n" + table(["part", "status", "s"], parts) + "\n"
    op_rows, model_rows = rows(f"{folder.name}/op.json"), rows(f"{folder.name}/model.json")
    if op_rows:
        made += f"A large copy moved {op_rows[0]['copy_gbps']:.0f} GB/s.\n\n{op_tables(op_rows)}\n"
    return made + model_tables(model_rows) + model_tables(rows(f"{folder.name}/compiled.json"))


def growth() -> str:
    """Fitted slopes."""
    found = rows("growth.json")
    body = []
    for what in dict.fromkeys(r["case"] for r in found):
        chosen = [r for r in found if r["case"] == what]
        sizes = ", ".join(f"{r['size']}: {r['us_p50'] / 1e3:.3g}" for r in chosen)
        first = chosen[0]
        (low, high), (least, most) = first["slope_ci95"], first["expected"]
        expected = f"{least:g}" if least == most else f"{least:g} to {most:g}"
        held = f"{max(r['peak_bytes'] for r in chosen) / 1e6:.0f} MB"
        memory = "-" if first["memory_slope"] is None else f"{first['memory_slope']:.2f}"
        met = "" if as_expected(what, first["slope"], high - first["slope"]) else " (not met)"
        line = [what, sizes, f"{first['slope']:.2f} ({low:.2f} to {high:.2f})", f"{expected}{met}: {first['why']}"]
        body.append([*line, memory, held])
    head = ["", "ms", "slope of time (95%)", "expected", "slope of peak memory", "at most"]
    return table(head, body) + "\n" + where(found[0]) if found else ""


def fields() -> str:
    """What a kept row holds."""
    return table(["field", "what it is"], [[f"`{name}`", what] for name, what in store.FIELDS.items()])
