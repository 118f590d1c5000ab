"""Count what the edit costs instead of timing it: python -m bench.opcount [--case stack|polyglot|small] [--out FILE]

On a CPU, times separate the methods in small models only. Work can be counted exactly in any model:

    operations         ATen calls that are not views
    matrix products    those of them that multiply matrices
    allocations        new tensors, and their bytes
    bytes moved        every operand and every result once; a tensor that is changed in place twice

These are operand sizes. A cache can save some of the memory traffic. The counts are of one forward pass of each method
(`bench.methods`), for one token (a decoding step) and for many. They are taken below autograd; our own operators count
as the ATen calls they make. The original's count is subtracted, and the rest is divided by the number of edited layers.

error/bound is the largest error in the output of an edited `down_proj`, over the bound for the way the method computes
(`certify.checks.check_outputs`). Above 1 the method rounds more coarsely than it has to.

The tests compare the case `small` with bench/results/opcount-small.json. A change of these numbers must be deliberate.
"""

import json
from collections import Counter
from functools import partial
from pathlib import Path

from bench.methods import PEERS
from bench.parsing import bench_parser
from bench.store import keep, record
from bench.timing import NOISE, stamp
from kernel_surgery.common.command import Parser, main
from kernel_surgery.models.load import parse_dtype
from kernel_surgery.ops.library import _DIRECT

SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 2, "num_key_value_heads": 1}
# {case: ((sequences, tokens) of each counted pass, ...)}
TOKENS = {"stack": ((1, 1), (1, 64)), "polyglot": ((1, 1), (1, 64)), "small": ((2, 16),)}
KINDS = ("operations", "matrix_products", "allocations", "bytes_allocated", "bytes_moved")
# {method: the way it computes, which selects its bound}. The others edit the output, like a hook.
WAYS = {"lora": "lora", "peft": "lora", "peft, 16-bit adapter": "lora", "baked": "baked"}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")


def counter():
    """A dispatch mode that adds up the work of everything inside it in its `.counts`."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten

    own = {op._opoverload: direct["cpu"] for op, direct in _DIRECT.items()}

    def tensors(tree) -> list[torch.Tensor]:
        return [t for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor)]

    def size(t: torch.Tensor) -> int:
        # A broadcast dimension counts once.
        return t.element_size() * int(torch.Size(n for n, s in zip(t.shape, t.stride(), strict=True) if s).numel())

    class Counting(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.counts = Counter(dict.fromkeys(KINDS, 0))

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            # Open up our operators, and ATen operations that are composed of others.
            with self:
                if function in own:
                    return own[function](*args, **kwargs)
                composed = function.decompose(*args, **kwargs)
            if composed is not NotImplemented:
                return composed
            given = tensors((args, kwargs))
            changed = tensors([a for a, of in zip(args, function._schema.arguments, strict=False) if of.is_write])
            result = function(*args, **kwargs)
            out = tensors(result)
            held = {t.untyped_storage().data_ptr() for t in given}
            fresh = [t for t in out if t.untyped_storage().data_ptr() not in held]
            if fresh or changed:
                self.counts["operations"] += 1
                self.counts["matrix_products"] += function.overloadpacket.__name__ in PRODUCTS
                self.counts["allocations"] += len(fresh)
                self.counts["bytes_allocated"] += sum(map(size, fresh))
                self.counts["bytes_moved"] += sum(map(size, (*given, *changed, *fresh)))
            return result

    return Counting()


def count(calls: dict, ids) -> dict[str, Counter]:
    """{method: counts} of one forward pass each, after a first pass that is not counted."""
    import torch

    counts = {}
    for name, call in calls.items():
        with torch.no_grad():
            call(input_ids=ids, use_cache=False)
            with counter() as mode:
                call(input_ids=ids, use_cache=False)
        counts[name] = mode.counts
    return counts


def errors(calls: dict, ids, bases: dict) -> dict[str, float]:
    """{method: error/bound}: the worst output of an edited `down_proj`, for the input that it received.

    For methods that edit the output, the bound on the edit alone (Rule A of the certificate) counts too.
    """
    import torch

    from kernel_surgery.certify.checks import check_outputs

    ratios = {}
    for name, call in calls.items():
        if name in ("original", NOISE):
            continue
        seen: dict = {}

        def look(module, inputs, output, layer, seen=seen):
            seen[layer] = inputs[0], output

        hooks = [
            module.register_forward_hook(partial(look, layer=layer))
            for path, module in call.model.named_modules()
            for layer in bases
            if path.endswith(f"layers.{layer}.mlp.down_proj")
        ]
        with torch.no_grad():
            call(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        assert seen.keys() == bases.keys(), name
        way, ratios[name] = WAYS.get(name, "hook"), 0.0
        for layer, (h, output) in seen.items():
            weight = calls["original"].model.model.layers[layer].mlp.down_proj.weight
            rounded = torch.nn.functional.linear(h, weight)[0]
            row = check_outputs({way: output[0]}, rounded, weight, None, h[0], bases[layer], 1.0)[0][way]
            ratios[name] = max(ratios[name], row["error_over_bound"], row.get("rule_a", 0.0))
    return ratios


def per_layer(counts: dict[str, Counter], layers: int) -> dict[str, dict[str, float]]:
    """{method: {kind: its work per edited layer, less the original's}}."""
    base = counts["original"]
    return {name: {kind: (c[kind] - base[kind]) / layers for kind in KINDS} for name, c in counts.items()}


def load(case: str, dtype):
    """(model, bases) of a case: those of `bench.model`, or a small Qwen2 model."""
    from bench import model, shapes

    if case != "small":
        return model.load(case, dtype, "cpu")
    small = shapes.random_model(dtype, "cpu", **SMALL, num_hidden_layers=4, vocab_size=64)
    return small, shapes.random_bases(small)


def rows_of(case: str, dtype_name: str, names) -> list[dict]:
    """One row for each method and pass."""
    from bench import methods
    from bench.logits import prompts

    dtype = parse_dtype(dtype_name, "cpu")
    (model, bases), absent = load(case, dtype), methods.missing(dtype)
    names, rows = [name for name in names if name not in absent], []
    about = {"d": model.config.hidden_size, "k": next(iter(bases.values())).shape[1], "dtype": dtype_name}
    with methods.opened(model, bases, names) as calls:
        for sequences, tokens in TOKENS[case]:
            ids = prompts(model, sequences, tokens)[:, :tokens]
            counts, ratios = per_layer(count(calls, ids), len(bases)), errors(calls, ids, bases)
            for name in counts:
                if name != "original":
                    known = about | counts[name] | {"M": sequences * tokens, "error_over_bound": ratios.get(name)}
                    rows.append(record("opcount", case, name, **known))
    return rows


def figure(row: dict, kind: str) -> float:
    """A count of a row. Bytes are in units of the MLP's output: [rows, d_model] in the row's dtype."""
    unit = row["M"] * row["d"] * (4 if row["dtype"] == "float32" else 2)
    return row[kind] / (unit if kind.startswith("bytes") else 1)


def row_text(row: dict) -> str:
    """One line of the table."""
    return (
        f"{row['case']:<9}{row['dtype']:<9} {row['M']:>4} {row['provider']:<21} {row['operations']:>6.1f} "
        f"{row['matrix_products']:>8.1f} {row['allocations']:>11.1f} "
        f"{figure(row, 'bytes_allocated'):>15.2f} {figure(row, 'bytes_moved'):>11.2f} {ratio_text(row):>12}"
    )


def ratio_text(row: dict) -> str:
    """error/bound of a row as text."""
    return "" if row["error_over_bound"] is None else f"{row['error_over_bound']:.2f}"


# Printed first: the least work that is possible.
CEILING = (
    "Work per edited layer, less the original's. Bytes are in units of the MLP's output, [rows, d_model].\n"
    "The least possible is 0 if the weights hold the edit. A method that edits the output has to read and write it:\n"
    "2, and 2 k / rows more for U in float32."
)
HEAD = (
    f"{'model':<9}{'dtype':<9} {'rows':>4} {'method':<21} {'ops':>6} {'products':>8} {'allocations':>11} "
    f"{'bytes allocated':>15} {'bytes moved':>11} {'error/bound':>12}"
)


def parser() -> Parser:
    """The command line."""
    p = bench_parser("opcount", "Count the work of every way of making the edit.")
    p.add_argument("--case", choices=tuple(TOKENS), help="default: stack and polyglot")
    p.add_argument("--dtype", default="float32,bfloat16", help="comma-separated")
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the table. Returns 1 if `fused` does more than a peer, or as much as the eager hook (`faults`)."""
    args = parser().parse_args(argv)
    from bench import methods

    for name, why in methods.missing().items():
        print(f"{name}: {why}")
    about = stamp(None, *dict.fromkeys(methods.PEERS.values()))
    rows = []
    print(CEILING)
    print(HEAD)
    for case in [args.case] if args.case else ["stack", "polyglot"]:
        for dtype in args.dtype.split(","):
            for row in rows_of(case, dtype, methods.NAMES):
                rows.append(row | about)
                print(row_text(row), flush=True)
    keep(args.out, rows)
    broken = faults(rows)
    for fault in broken:
        print(fault)
    print(json.dumps({"case": "opcount", "rows": len(rows), **about}))
    return 1 if broken else 0


def faults(rows: list[dict]) -> list[str]:
    """One line for each count in which `fused` exceeds a peer, or does not stay below the eager hook.

    A peer that breaks its bound is skipped: it multiplies in the storage dtype, which is a different computation.
    """
    lines = []
    for row in rows:
        same = [r for r in rows if all(r[key] == row[key] for key in ("case", "dtype", "M"))]
        if row["provider"] != "fused":
            continue
        for other in same:
            peer = other["provider"] in PEERS and other["error_over_bound"] <= 1
            for kind in KINDS:
                what = f"{row['case']} {row['dtype']} {row['M']}: fused {kind} {row[kind]:g}, "
                what += f"{other['provider']} {other[kind]:g}"
                if peer and row[kind] > other[kind]:
                    lines.append(what)
                if other["provider"] == "hook" and kind != "matrix_products" and row[kind] >= other[kind]:
                    lines.append(what)
    return lines


if __name__ == "__main__":
    main(run)
