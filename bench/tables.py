"""The measured tables of README.md and docs/benchmarks.md, in Markdown (`bench.pages` writes them)."""

import json
from collections.abc import Callable
from pathlib import Path

from bench import store
from bench.growth import EXPECTED, as_expected
from bench.model import GOAL
from bench.opcount import KINDS, figure, ratio_text
from bench.timing import NOISE, ends

RESULTS = Path(__file__).resolve().parent / "results"


def rows(name: str) -> list[dict]:
    """The rows of the newest run in a file of bench/results/. Empty if there is no such file."""
    return store.newest(RESULTS / name)


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def grid(stored: list[dict], columns: Callable[[dict], str], cell: Callable[[dict], str]) -> str:
    """A table with one line for each method, one column for each value of `columns`, and the largest error/bound."""
    heads, methods = (list(dict.fromkeys(map(key, stored))) for key in (columns, lambda r: r["provider"]))
    body = []
    for name in methods:
        mine = {columns(r): r for r in stored if r["provider"] == name}
        errors = [r["error_over_bound"] for r in mine.values() if r["error_over_bound"] is not None]
        worst = f"{max(errors):.2f}{'' if max(errors) <= 1 else ' (exceeds its bound)'}" if errors else ""
        body.append([name, *(cell(mine[head]) if head in mine else "" for head in heads), worst])
    return table(["", *heads, "error/bound"], body)


def where(row: dict) -> str:
    """Where, when and with which versions a row was measured."""
    commit = (row["commit"] or "unknown")[:10] + (" with uncommitted changes" if row["dirty"] else "")
    names = ("torch", "transformers", "triton", "numpy", "scipy", "peft", "nnsight")
    if not row.get("graph"):
        names = tuple(name for name in names if name != "triton")  # it does not run on a CPU
    versions = [f"{name} {row[name]}" for name in names if row.get(name)]
    about = [row[key] for key in ("device", "machine") if row.get(key)]
    command = f"`{row['command']}`: " if row.get("command") else ""
    return f"{command}{', '.join([*about, *versions])}, commit {commit}, {row['date']}.\n"


def interval(row: dict, name: str = "ratio") -> str:
    """A ratio with its interval, or with its range if there is no interval."""
    low, high = ends(row, name)
    return f"{row[name]:.2f} ({low:.2f} to {high:.2f})"


def opcount_rows(model: str) -> list[dict]:
    """The rows of bench.opcount for a model, without the repeated original, which is 0 everywhere."""
    return [r for r in rows("opcount.json") if r["case"] == model and r["provider"] != NOISE]


def tokens(row: dict) -> str:
    """The number of tokens in a pass, as text."""
    return f"{row['M']} token{'s' if row['M'] > 1 else ''}"


def opcount(model: str) -> str:
    """The work of every method per edited layer, less the original's."""
    stored, out = opcount_rows(model), ""
    for dtype, m in dict.fromkeys((r["dtype"], r["M"]) for r in stored):
        chosen = [r for r in stored if (r["dtype"], r["M"]) == (dtype, m)]
        first = chosen[0]
        body = [[r["provider"], *(f"{figure(r, kind):.4g}" for kind in KINDS), ratio_text(r)] for r in chosen]
        out += (
            f"{dtype}, {tokens(first)}, d_model {first['d']}, k = {first['k']}; bytes in units of the MLP's output\n\n"
        )
        out += table(["", *(kind.replace("_", " ") for kind in KINDS), "error/bound"], body) + "\n"
    return out + where(stored[0]) if stored else ""


def speed(whole: str) -> str:
    """The counted work in short, then one line for each other ratio, each with where it was measured.

    whole: where the page of all tables is, from the page that this stands on.
    """
    stored, body = opcount_rows("stack"), []
    dtypes, sizes = (list(dict.fromkeys(r[key] for r in stored)) for key in ("dtype", "M"))
    for name in dict.fromkeys(r["provider"] for r in stored):
        line = [name]
        for dtype in dtypes:
            mine = [r for r in stored if (r["provider"], r["dtype"]) == (name, dtype)]
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
    lines += collected_in_short()
    of_loop = {r["provider"]: interval(r, "speedup") for r in asked}
    if asked:
        lines.append(
            f"- `eval` of the embedded model on a CPU: {of_loop['kernel_surgery.eval']} times the speed of a loop over "
            f"single prompts. The gain comes from batching: a batched loop that only looks for the answer reaches "
            f"{of_loop['the loop, batched']}. {where(asked[0])}"
        )
    for r in baked:
        if r["provider"] == "bake":
            lines.append(
                f"- `bake` of a synthetic checkpoint of {r['gigabytes']:.1f} GB, with hashes: {interval(r)} times the "
                f"time of `cp -r` and SHA-256 of the copy, {1 / r['fraction_of_copy']:.2f} times that of `cp -r` "
                f"alone. "
                f"{where(r)}"
            )
    out = table(["", *head], body) + "\n" + where(stored[0]) + "\n" if stored else ""
    return out + "".join(lines) + f"\nIn full: [docs/benchmarks.md]({whole}).\n"


def op_tables(stored: list[dict]) -> str:
    """The operators beside other implementations. On CUDA only replayed and cold, without the cost of host launches."""
    out = ""
    cuda = any(r["graph"] for r in stored)
    timed = [r for r in stored if not r["left_out"] and not (cuda and r["cache"] == "warm" and not r["graph"])]

    def kind(r: dict) -> tuple:
        return r["case"], r["dtype"], r["cache"], (r["d"], r["k"]) == (2048, 10)

    def cell(r: dict) -> str:
        low, high = ends(r)
        digits = 0 if r["us_p50"] >= 100 else 1
        return f"{r['us_p50']:.{digits}f} us, {r['of_floor']:.3g} ({1 / high:.3g} to {1 / low:.3g})"

    for key in dict.fromkeys(map(kind, timed)):
        chosen = [r for r in timed if kind(r) == key]
        noise = max(r["noise"] for r in chosen)
        how = f"{key[2]} cache{', replayed' if chosen[0]['graph'] else ''}"
        out += f"{key[0]}, {key[1]}, {how}; noise at most {noise:.3f}\n\n"
        out += grid(chosen, lambda r: f"{r['M']} x {r['d']}, k = {r['k']}", cell) + "\n"
    absent = dict.fromkeys(
        f"{r['provider']} at {r['M']} x {r['d']}, k = {r['k']}: {r['left_out']}" for r in stored if r["left_out"]
    )
    return out + "".join(f"- not run: {line}\n" for line in absent)


def op() -> str:
    """The operators on this CPU."""
    stored = rows("op.json")
    return op_tables(stored) + "\n" + where(stored[0]) if stored else ""


def fit() -> str:
    """The ways to fit a subspace."""
    stored = rows("fit.json")
    body = [
        [
            r["provider"],
            "yes" if r["exact"] else "no",
            f"{r['us_p50'] / 1e6:.3f}",
            interval(r, "speedup"),
            f"{r['sine']:.1e}",
            f"{r['residual']:.1e}",
        ]
        for r in stored
    ]
    if not stored:
        return ""
    head = ["", "exact", "s per layer", "speed over the script's", "sine to a float64 SVD", "residual"]
    first = stored[0]
    about = f"{first['layers']} layers of {first['M']} x {first['d']} deviations, k = {first['k']}.\n\n"
    return about + table(head, body) + "\n" + where(first)


def collect() -> str:
    """Reading activations beside the whole model, and what it adds to a model's memory."""
    stored = rows("collect.json")
    if not stored:
        return ""
    timed, weighed = ([r for r in stored if r["case"] == case] for case in ("vectors", "memory"))
    body = [
        [
            r["provider"],
            f"{r['us_p50'] / 1e6:.1f}",
            interval(r, "speedup"),
            f"{r['cpu_us_p50'] / 1e6:.1f}",
            interval(r, "cpu_speedup"),
        ]
        for r in timed
    ]
    first = timed[0]
    out = f"{first['model']}, {first['M']} prompts of {first['tokens']} tokens, all layers, float32.\n\n"
    out += table(["", "s", "speed over the speed before", "s of processor time", "the same of it"], body)
    sizes = list(dict.fromkeys(r["size"] for r in weighed))
    found = {(r["provider"], r["size"]): f"{r['added_bytes'] / 1e6:.1f}" for r in weighed}
    body = [[name, *(found[name, size] for size in sizes)] for name in dict.fromkeys(r["provider"] for r in weighed)]
    out += "\nMB that it adds to a loaded model, at the peak, by the size of the vocabulary:\n\n"
    return out + table(["", *map(str, sizes)], body) + "\n" + where(first)


def collected_in_short() -> list[str]:
    """README.md: the line about `collect`."""
    return [
        f"- `collect` of {r['model']}, at all layers, by processor time: {interval(r, 'cpu_speedup')} times the speed "
        f"of forward passes of the whole model in batches of 32. {where(r)}"
        for r in rows("collect.json")
        if (r["case"], r["provider"]) == ("vectors", "kernel_surgery.collect")
    ]


def busy() -> str:
    """The evaluation beside busy processes."""
    stored = rows("busy.json")
    by = {(r["provider"], r["case"]): r for r in stored}
    body = []
    for how in dict.fromkeys(r["provider"] for r in stored):
        alone, beside = by[how, "alone"], by[how, "busy"]
        times = [f"{r['us_p50'] / 1e6:.0f}" for r in (alone, beside)]
        low, high = ends(beside)
        body.append([how, *times, f"{beside['ratio']:.1f} ({low:.1f} to {high:.1f})"])
    if not stored:
        return ""
    head = ["", "alone, s", f"beside {stored[1]['processes']} busy processes, s", "times as long (range)"]
    return table(head, body) + "\n" + where(stored[0])


def evaluation() -> str:
    """The evaluation beside the loop over single prompts."""
    stored = rows("evaluation.json")
    if not stored:
        return ""
    body = [
        [
            r["provider"],
            str(r["batch"]),
            f"{r['us_p50'] / 1e6:.1f}",
            f"{r['tokens'] / r['us_p50'] * 1e6:.0f}",
            interval(r, "speedup"),
        ]
        for r in stored
    ]
    different = max(r["parted_by_rounding"] for r in stored)
    about = f"{stored[0]['M']} texts. All methods give the same, token for token"
    about += f", but for at most {different} that differ by rounding.\n\n" if different else ".\n\n"
    return about + table(["", "batch", "s", "tokens/s", "speed over the loop's"], body) + "\n" + where(stored[0])


def checkpoint() -> str:
    """Baking beside its yardstick and its peers."""
    out = ""
    for name in ("checkpoint-bake.json", "checkpoint-peers.json"):
        stored = rows(name)
        if not stored:
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
            for r in stored
        ]
        head = [
            "",
            "s",
            "over cp -r, then SHA-256",
            "over cp -r",
            "resident GB",
            "anonymous GB",
            "leak/floor",
            "error/bound",
            "not correctly rounded",
        ]
        about = f"{stored[0]['gigabytes']:.2f} GB, {stored[0]['layers']} layers of Qwen2.5-3B's shapes.\n\n"
        out += about + table(head, body) + "\n" + where(stored[0]) + "\n"
    return out


def model_cell(r: dict) -> str:
    """A method's time over the original's in one phase, with the verdict."""
    if r["left_out"]:
        return r["left_out"]
    if r["provider"] == "original":
        return f"{r['us_p50'] / 1e3:.2f} ms, {r['tokens_per_s']:.0f} tokens/s"
    low, high = ends(r)
    verdict = {"slower": " slower", "faster": " faster", "undecided": " undecided"}.get(r["verdict"], "")
    goal = {None: "", True: f"; {GOAL} met", False: f"; {GOAL} not met"}[r["goal_met"]]
    return f"{r['ratio']:.3f} ({low:.3f} to {high:.3f}){verdict}{goal}"


def model_tables(stored: list[dict]) -> str:
    """Every method in a model: one table for each dtype and way of running."""

    def phase(r: dict) -> str:
        return f"{r['case']} {r['sequences']} x {r['tokens']}"

    out = ""
    for dtype, how in dict.fromkeys((r["dtype"], r["how"]) for r in stored):
        chosen = [r for r in stored if (r["dtype"], r["how"]) == (dtype, how)]
        first = chosen[0]
        out += f"{first['model']}, layers {first['layers']}, edited {first['edited']}, {dtype}, {how}; "
        out += "time over the original's\n\n"
        out += grid(chosen, phase, model_cell)
        seen = {phase(r): r for r in chosen if not r["left_out"]}
        limits = ", ".join(f"{r['noise']:.3f} and {r['detectable']:.3f} in {name}" for name, r in seen.items())
        out += f"\nNoise and smallest detectable slowdown: {limits}.\n\n"
        if any(r["launches"] for r in chosen):
            out += "Kernels, copies and fills that one call starts:\n\n"
            out += grid(chosen, phase, lambda r: str(r["launches"] or "")) + "\n"
    return out + where(stored[0]) + "\n" if stored else ""


def models() -> str:
    """Every stored model on a CPU."""
    return "".join(model_tables(rows(f"model-{case}.json")) for case in ("layer", "stack", "polyglot"))


def on_gpu() -> str:
    """The newest run of `make gpu`: its parts, the operators, the whole model."""
    runs = sorted(file.parent for file in RESULTS.glob("*/summary.json"))
    if not runs:
        return "Nothing has been measured on a GPU yet. `make gpu` measures it.\n"
    folder = runs[-1]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    about = summary["environment"] | {"date": f"{summary['date'][:4]}-{summary['date'][4:6]}-{summary['date'][6:]}"}
    parts = [
        [name, str(part["status"]), "" if part["seconds"] is None else f"{part['seconds']:.0f}", part.get("says", "")]
        for name, part in summary["parts"].items()
    ]
    out = where(about | {"graph": True}) + "\n" + table(["part", "status", "s", ""], parts) + "\n"
    if "note" in summary:
        out += summary["note"] + "\n\n"
    op_rows, model_rows = rows(f"{folder.name}/op.json"), rows(f"{folder.name}/model.json")
    if op_rows:
        out += f"A large copy moved {op_rows[0]['copy_gbps']:.0f} GB/s.\n\n{op_tables(op_rows)}\n"
    out += model_tables(model_rows) + model_tables(rows(f"{folder.name}/compiled.json"))
    return out + steps(rows(f"{folder.name}/steps.json"))


def steps(stored: list[dict]) -> str:
    """How a kernel came to its speed: each step beside a copy of x timed in the same run."""
    out = ""
    for case, m, d, k in dict.fromkeys((r["case"], r["M"], r["d"], r["k"]) for r in stored):
        lines = [
            [r["provider"], f"{r['us_p50']:.1f}", f"{r['copy_us'] / r['us_p50']:.2f}"]
            for r in stored
            if (r["case"], r["M"], r["d"], r["k"]) == (case, m, d, k)
        ]
        head = f"{case} at {m} x {d}, k = {k}, {stored[0]['dtype']}, replayed as a graph, on the way to today's kernel"
        out += f"{head}\n\n" + table(["", "us", "of a copy of x in the same run"], lines) + "\n"
    return out


def growth() -> str:
    """The fitted slopes."""
    stored = rows("growth.json")
    body = []
    for what in dict.fromkeys(r["case"] for r in stored):
        chosen = [r for r in stored if r["case"] == what]
        sizes = ", ".join(f"{r['size']}: {r['us_p50'] / 1e3:.3g}" for r in chosen)
        first = chosen[0]
        (low, high), (least, most) = first["slope_ci95"], first["expected"]
        expected = f"{least:g}" if least == most else f"{least:g} to {most:g}"
        held = f"{max(r['peak_bytes'] for r in chosen) / 1e6:.0f} MB"
        memory = "-" if first["memory_slope"] is None else f"{first['memory_slope']:.2f}"
        met = "" if as_expected(what, first["slope"], high - first["slope"]) else " (not met)"
        line = [what, sizes, f"{first['slope']:.2f} ({low:.2f} to {high:.2f})", f"{expected}{met}: {EXPECTED[what][1]}"]
        body.append([*line, memory, held])
    head = ["", "ms", "slope of time (95%)", "expected", "slope of peak memory", "at most"]
    return table(head, body) + "\n" + where(stored[0]) if stored else ""


def fields() -> str:
    """The fields of a stored row."""
    return table(["field", "meaning"], [[f"`{name}`", what] for name, what in store.FIELDS.items()])
