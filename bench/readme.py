"""The tables of README.md that are made for it: our modes beside other software, and what runs where."""

import json

from bench import tables
from bench.opcount import figure
from bench.tables import opcount_rows, rows, table, where
from kernel_surgery.models.table import ARCHITECTURES

# A method's case on the GPU: (case, sequences, tokens), as the column's head.
SHOWN = {"prefill, 8 x 2048": ("prefill", 8, 2048), "decode, batch 8": ("decode", 8, 1024)}
LEFT_OUT = ("fused output", "peft, 16-bit adapter", "nnsight")  # they stand in docs/benchmarks.md
COUNTED = 64  # tokens of the pass whose bytes are counted


def peers() -> str:
    """Time over the original's on the newest GPU run, the bytes a layer adds, and how exact each method is."""
    found = sorted(file.parent.name for file in tables.RESULTS.glob("*/model.json"))
    counted = [r for r in opcount_rows("stack") if r["dtype"] == "bfloat16"]
    if not found or not counted:
        return ""
    timed = [r for r in rows(f"{found[-1]}/model.json") if r["dtype"] == "bfloat16" and not r["left_out"]]
    body = []
    for name in dict.fromkeys(r["provider"] for r in counted if r["provider"] not in LEFT_OUT):
        cells = [name]
        for key in SHOWN.values():
            mine = [r for r in timed if r["provider"] == name and (r["case"], r["sequences"], r["tokens"]) == key]
            cells += ["{:.2f} ({:.2f} to {:.2f})".format(r["ratio"], *r["ratio_ci95"]) for r in mine] or [""]
        of = [r for r in counted if r["provider"] == name]
        moved = next((f"{figure(r, 'bytes_moved'):.1f}" for r in of if r["M"] == COUNTED), "")
        body.append([*cells, moved, f"{max(r['error_over_bound'] for r in of):.2f}"])
    head = ["bfloat16", *SHOWN, f"on a CPU: bytes added, {COUNTED} tokens", "on a CPU: error/bound"]
    one = next(r for r in timed if r["provider"] == "fused")
    shapes = f"{one['layers']} layers of Qwen2.5-3B's shapes, random weights, replayed as a CUDA graph"
    about = f"Time over the original's with its 95% interval: {shapes}. {where(one)}"
    bytes_said = f"Bytes in sizes of the MLP's output, and error/bound, on a CPU. {where(counted[0])}"
    return f"{table(head, body)}\n{about}{bytes_said}"


def _numbers(cells: dict[str, dict[str, str]], column: str) -> int:
    """How many model types have a figure in a column."""
    return sum(by.get(column, "").replace(".", "", 1).isdigit() for by in cells.values())


def places() -> str:
    """What runs where, with how many model types it was tested on, from docs/models.json and docs/engines*.json."""
    from tests.engines.architectures import FILE as IN_VLLM
    from tests.engines.table import FILE as MODES
    from tests.support.model_cells import FILE

    if not all(file.is_file() for file in (FILE, IN_VLLM, MODES)):
        return ""
    tested, vllm, modes = (json.loads(file.read_text(encoding="utf-8")) for file in (FILE, IN_VLLM, MODES))
    cells, of = tested["cells"], len(ARCHITECTURES)

    def right(mode: str) -> int:
        """How many types have no fault in this mode, nor in the original."""
        faulty = (f"{mode}: ", "original: ")
        return sum(
            "error" in by.get(mode, {}) and not any(fault.startswith(faulty) for fault in by["faults"])
            for by in vllm["architectures"].values()
        )

    baked = {r["model"] for r in modes["cells"] if (r["mode"], r["column"], r["found"]) == ("baked", "loads", "yes")}
    gpu = sorted(file.parent.name for file in tables.RESULTS.glob("*/model.json"))
    timed = {(r["model"], r["provider"]) for r in rows(f"{gpu[-1]}/model.json")} if gpu else set()
    names = {"hook": "hook", "fused": "fused", "baked": "baked in memory", "lora": "lora"}
    counts = {
        "transformers, CPU": {mode: _numbers(cells, column) for mode, column in names.items()},
        "transformers, one GPU (Qwen2.5-3B's shapes)": {mode: sum(of == mode for _, of in timed) for mode in names},
        "vLLM, CPU": {"fused": right("fused"), "baked": len(baked), "lora": right("lora")},
        "a checkpoint on disk": {"baked": _numbers(cells, "baked on disk")},
    }
    body = [[place, *(f"{by[mode]} of {of}" if mode in by else "-" for mode in names)] for place, by in counts.items()]
    return table(["model types", *names], body)
