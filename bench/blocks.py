"""How many blocks of each kernel share a multiprocessor, for docs/benchmarks.md, from bench/results/aot.json.

Everything here was computed by compiling. Nothing was run on a GPU.
"""

import json

from bench.tables import RESULTS, table

OPERATIONS = ("project", "project_add", "project_add_rmsnorm")
ON = (90, "bfloat16", False)  # an H100 or H200, an orthogonal edit


def kib(row: dict) -> str:
    """The bytes in flight of a row, as text."""
    return f"{row['in_flight'] / 1024:.3g} KiB"


def found() -> str:
    """The kernels that are launched, what the memory needs, and the candidates."""
    stored = json.loads((RESULTS / "aot.json").read_text(encoding="utf-8"))
    shipped = [r for r in stored["rows"] if (r["sm"], r["dtype"], r["oblique"]) == ON]
    body = []
    for form, m, d, k in dict.fromkeys((r["form"], r["rows"], r["d"], r["k"]) for r in shipped):
        mine = {r["operation"]: r for r in shipped if (r["form"], r["rows"], r["d"], r["k"]) == (form, m, d, k)}
        cells = [f"{mine[o]['blocks']} ({mine[o]['limit']}), {kib(mine[o])}" for o in OPERATIONS]
        body.append([form, f"{m} x {d}, k = {k}", *cells])
    out = "What is launched: blocks on a multiprocessor (what limits them), bytes in flight\n\n"
    out += table(["form", "shape", *OPERATIONS], body)
    need = stored["estimate"]
    out += (
        f"\nAn {need['device']} needs about {need['bytes'] / 1024:.3g} KiB in flight on each multiprocessor. This is "
        f"an estimate: {need['bandwidth'] / 1e12:.2g} TB/s over {need['multiprocessors']} multiprocessors, times a "
        f"latency of {need['latency'] * 1e9:.0f} ns.\n\nCandidates, beside what is launched:\n\n"
    )
    body = []
    for r in stored["candidates"]:
        one = next(s for s in shipped if all(s[n] == r[n] for n in ("operation", "rows", "d", "k")))
        options = " ".join(f"{name}={value}" for name, value in r["options"].items())
        body.append(
            [
                *(r["form"], r["operation"], f"{r['rows']} x {r['d']}, k = {r['k']}", f"`{options}`"),
                *(f"{one[name]} -> {r[name]}" for name in ("registers", "blocks")),
                f"{kib(one)} -> {kib(r)}",
            ]
        )
    head = ["form", "operation", "shape", "options", "registers", "blocks", "in flight"]
    return out + table(head, body) + f"\nCompiled for sm_90 in bfloat16 with triton {stored['triton']}.\n"
