"""What the edit costs, counted instead of timed: python -m bench.opcount [--case stack|polyglot|small] [--out FILE]

On a CPU time tells the ways of making the edit apart in small models only; what each does can be counted exactly:
operations, matrix products, tensors allocated and their bytes, bytes read and written (every operand and every result
of every operation that is not a view, once; what is changed in place, twice). These are the sizes of operands, not what
a memory bus carries: a cache may spare some of it. Counted for one token, a decoding step, and for many; below
autograd, operation by operation, in one forward pass of each provider (`bench.methods`), our own operators opened up
into the ATen calls they make; the original's count is taken away, and what is left divided by the edited layers.
Beside it error/bound: the largest error of what an edited `down_proj` gives, over the bound of its way of computing
(`reference.applied_bound`, Rule A); beyond 1 it is rounded more coarsely than that way has to.

`small` is what the tests hold against bench/results/opcount-small.json: a change of these numbers is a decision.
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
# (sequences, tokens) of the passes that are counted.
TOKENS = {"stack": ((1, 1), (1, 64)), "polyglot": ((1, 1), (1, 64)), "small": ((2, 16),)}
KINDS = ("operations", "matrix_products", "allocations", "bytes_allocated", "bytes_moved")
# The way a provider computes, which its bound goes by; the others edit the output.
WAYS = {"lora": "lora", "peft": "lora", "peft, 16-bit adapter": "lora", "baked": "baked"}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")


def counter():
    """A dispatch mode that counts into its `.counts`."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten

    own = {op._opoverload: direct["cpu"] for op, direct in _DIRECT.items()}

    def tensors(tree) -> list[torch.Tensor]:
        return [t for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor)]

    def size(t: torch.Tensor) -> int:
        # A broadcast dimension is read once.
        return t.element_size() * int(torch.Size(n for n, s in zip(t.shape, t.stride(), strict=True) if s).numel())

    class Counting(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.counts = Counter(dict.fromkeys(KINDS, 0))

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            # Our operators opened up, and inside them what ATen itself makes of several operations.
            with self:
                if function in own:
                    return own[function](*args, **kwargs)
                composed = function.decompose(*args, **kwargs)
            if composed is not NotImplemented:
                return composed
            given = tensors((args, kwargs))
            changed = tensors([a for a, of in zip(args, function._schema.arguments, strict=False) if of.is_write])
            made = function(*args, **kwargs)
            out = tensors(made)
            held = {t.untyped_storage().data_ptr() for t in given}
            fresh = [t for t in out if t.untyped_storage().data_ptr() not in held]
            if fresh or changed:
                self.counts["operations"] += 1
                self.counts["matrix_products"] += function.overloadpacket.__name__ in PRODUCTS
                self.counts["allocations"] += len(fresh)
                self.counts["bytes_allocated"] += sum(map(size, fresh))
                self.counts["bytes_moved"] += sum(map(size, (*given, *changed, *fresh)))
            return made

    return Counting()


def count(calls: dict, ids) -> dict[str, Counter]:
    """{provider: counts} of one forward pass each; a first pass, uncounted, has done what is done once."""
    import torch

    found = {}
    for name, call in calls.items():
        with torch.no_grad():
            call(input_ids=ids, use_cache=False)
            with counter() as mode:
                call(input_ids=ids, use_cache=False)
        found[name] = mode.counts
    return found


def errors(calls: dict, ids, bases: dict) -> dict[str, float]:
    """{provider: error/bound} of what every edited `down_proj` gives for the input that it got; for those that edit
    the output, Rule A on that output too."""
    import torch

    from kernel_surgery.certify.checks import check_outputs

    found = {}
    for name, call in calls.items():
        if name in ("original", NOISE):
            continue
        seen: dict = {}

        def look(module, given, made, layer, seen=seen):
            seen[layer] = given[0], made

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
        way, found[name] = WAYS.get(name, "hook"), 0.0
        for layer, (given, made) in seen.items():
            weight = calls["original"].model.model.layers[layer].mlp.down_proj.weight
            rounded = torch.nn.functional.linear(given, weight)[0]
            row = check_outputs({way: made[0]}, rounded, weight, None, given[0], bases[layer], 1.0)[0][way]
            found[name] = max(found[name], row["error_over_bound"], row.get("rule_a", 0.0))
    return found


def per_layer(counts: dict[str, Counter], layers: int) -> dict[str, dict[str, float]]:
    """{provider: {kind: what it does beyond the original, an edited layer}}."""
    base = counts["original"]
    return {name: {kind: (c[kind] - base[kind]) / layers for kind in KINDS} for name, c in counts.items()}


def load(case: str, dtype):
    """(model, bases): as `bench.model`, or a small one of the same make."""
    from bench import model, shapes

    if case != "small":
        return model.load(case, dtype, "cpu")
    small = shapes.random_model(dtype, "cpu", **SMALL, num_hidden_layers=4, vocab_size=64)
    return small, shapes.random_bases(small)


def rows_of(case: str, dtype_name: str, names) -> list[dict]:
    """One row a provider and pass."""
    from bench import methods
    from bench.model import prompts

    dtype = parse_dtype(dtype_name, "cpu")
    (model, bases), absent = load(case, dtype), methods.missing(dtype)
    names, rows = [name for name in names if name not in absent], []
    about = {"d": model.config.hidden_size, "k": next(iter(bases.values())).shape[1], "dtype": dtype_name}
    with methods.opened(model, bases, names) as calls:
        for sequences, tokens in TOKENS[case]:
            ids = prompts(model, sequences, tokens)[:, :tokens]
            found, off = per_layer(count(calls, ids), len(bases)), errors(calls, ids, bases)
            for name in found:
                if name != "original":
                    known = about | found[name] | {"M": sequences * tokens, "error_over_bound": off.get(name)}
                    rows.append(record("opcount", case, name, **known))
    return rows


def figure(row: dict, kind: str) -> float:
    """A count of a row; bytes in units of the MLP's output, [rows, d_model] in the row's dtype."""
    unit = row["M"] * row["d"] * (4 if row["dtype"] == "float32" else 2)
    return row[kind] / (unit if kind.startswith("bytes") else 1)


def shown(row: dict) -> str:
    """One line of the table."""
    return (
        f"{row['case']:<9}{row['dtype']:<9} {row['M']:>4} {row['provider']:<21} {row['operations']:>6.1f} "
        f"{row['matrix_products']:>8.1f} {row['allocations']:>11.1f} "
        f"{figure(row, 'bytes_allocated'):>15.2f} {figure(row, 'bytes_moved'):>11.2f} {off(row):>12}"
    )


def off(row: dict) -> str:
    """error/bound of a row, as it is printed."""
    return "" if row["error_over_bound"] is None else f"{row['error_over_bound']:.2f}"


# The ceiling first: nothing can do less than the weights do, and what works on the output moves it twice.
CEILING = (
    "Beyond the original, an edited layer; bytes in units of the MLP's output, [rows, d_model]. At best nothing,\n"
    "where the weights hold the edit; what works on the output reads and writes it: 2, and 2 k / rows for U in float32."
)
HEAD = (
    f"{'model':<9}{'dtype':<9} {'rows':>4} {'provider':<21} {'ops':>6} {'products':>8} {'allocations':>11} "
    f"{'bytes allocated':>15} {'bytes moved':>11} {'error/bound':>12}"
)


def parser() -> Parser:
    """The command line."""
    p = bench_parser("opcount", "Count what every way of making the edit does.")
    p.add_argument("--case", choices=tuple(TOKENS), help="default: stack and polyglot")
    p.add_argument("--dtype", default="float32,bfloat16", help="comma-separated")
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the table; 1 if the fused mode does more than a peer, or not less than the eager hook."""
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
            for found in rows_of(case, dtype, methods.NAMES):
                rows.append(found | about)
                print(shown(found), flush=True)
    keep(args.out, rows)
    broken = faults(rows)
    for fault in broken:
        print(fault)
    print(json.dumps({"case": "opcount", "rows": len(rows), **about}))
    return 1 if broken else 0


def faults(rows: list[dict]) -> list[str]:
    """Where the fused mode does more of anything than a peer that computes the same, or not less than the eager hook.

    A peer that breaks its bound computes something else (products in the storage dtype) and is not compared.
    """
    found = []
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
                    found.append(what)
                if other["provider"] == "hook" and kind != "matrix_products" and row[kind] >= other[kind]:
                    found.append(what)
    return found


if __name__ == "__main__":
    main(run)
