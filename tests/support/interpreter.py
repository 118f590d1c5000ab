"""The Triton kernels in Triton's interpreter, in a process of its own: @triton.jit reads TRITON_INTERPRET when it runs.

    python -m tests.support.interpreter GROUP[,GROUP] [PATH...]
        one JSON line per case: ratios to bounds, or same_bits
    python -m tests.support.interpreter --first FILE...
        for each kernel source, the first case that breaks a rule; a file named F.G.*.py starts with path or form F, and
        there with group G

The interpreter cannot do bfloat16 (it works on raw bits), so the two-piece paths run in float16 pieces here; their
bfloat16 arithmetic is emulated in tests/ops/test_kernels.py, and the compiled kernels are checked on hardware.
"""

import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton.language as tl
from triton.runtime import interpreter

from kernel_surgery.kernels import project as kernels
from kernel_surgery.numerics.bounds import add_bound, leak_bound, rmsnorm_bound, rule_a_bound, worst_ratio
from kernel_surgery.numerics.oracle import leak, project_oracle, rmsnorm_oracle
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.ops.eager import project_eager
from tests.support.models import basis, oblique

project = None  # of the module under test: `results` sets it
DTYPES = ("bfloat16", "float16", "float32")
PATHS = {
    "float32": (torch.float32, {"form": "two-pass"}),
    "float16": (torch.float16, {"form": "two-pass"}),
    "float16 pieces": (torch.float16, {"form": "two-pass", "PIECES": tl.float16}),
    "float32 row": (torch.float32, {"form": "row"}),
    "float16 row": (torch.float16, {"form": "row"}),
    "float32 row chunks": (torch.float32, {"form": "row", "BLOCK_D": 64}),
    "float32 tile": (torch.float32, {"form": "tile"}),
    "float16 tile pieces": (torch.float16, {"form": "tile", "PIECES": tl.float16}),
    "float16 tile pieces, two": (torch.float16, {"form": "tile", "PIECES": tl.float16, "TILES": 2, "KEEP": True}),
    "float16 tile prepared": (torch.float16, {"form": "tile", "PIECES": tl.float16, "PREPARED": True}),
}
# Every size of rows {0, 1, 3, 17, 199}, d {64, 129, 2048, 2049, 3584, 8192} and k {1, 10, 16, 33, 64} is here, many
# rows beside a small d: the interpreter takes a minute where the compiled kernel takes a microsecond. The row form
# takes a row whole where U fits into registers, else chunk by chunk; "row chunks" takes them all so. `takes` says which
# path takes which shape.
SHAPES = [
    *((0, 64, 1), (199, 64, 16), (3, 129, 10), (199, 129, 64), (17, 2048, 16), (3, 2048, 64)),
    *((2, 2049, 33), (1, 2049, 1), (3, 3584, 10), (1, 3584, 16), (2, 8192, 64)),
]
# More of the shapes that the tile form can take: d a multiple of 128, k = 16.
TILE_SHAPES = [(0, 128, 16), (17, 896, 16), (199, 128, 16), (50, 1024, 16), (3, 2560, 16), (2, 4096, 16)]
# Wide shapes that are left for a two-pass path: float32 takes them all. The other two differ from it in the products of
# a chunk alone, so each takes 2048 (its chunks are all full), 2049 (the last is not) and every k, but not every pair.
WIDE = {
    "float16": [(17, 2048, 16), (2, 2049, 33), (1, 2049, 1)],
    "float16 pieces": [(3, 2048, 64), (2, 2049, 33), (1, 2049, 1), (3, 3584, 10)],
}
# What tells faults apart without a minute of waiting: a last block and a last chunk that are not full, and two chunks.
FEW = [(17, 129, 10), (17, 384, 16)]
EPS = 0.3  # of the size of the mean square, so that where it stands in the formula shows


def patch_once():
    """Let the interpreter prepare `triton.language` once a launch. It does so again in every call of a device function,
    with the same result, and that takes nearly half of the time of a launch."""
    patch, done = interpreter._patch_lang, set()

    def once(fn):
        if id(fn.__globals__) in done:  # within a launch: a launch looks at what it is given, a device call does not
            return None
        done.add(id(fn.__globals__))
        scope = patch(fn)
        restore = scope.restore

        def ended():
            restore()
            done.clear()

        scope.restore = ended
        return scope

    interpreter._patch_lang = once


def takes(path, m, d, k):
    if "tile" in path:
        return d % 128 == 0 and k == 16
    if "row" in path:  # a program takes one row: more rows show nothing new, and in chunks they take a minute
        return m <= 64 and not ("chunks" in path and ((m > 3 and d > 400) or d in (2560, 4096, 8192)))
    return (m, d, k) not in TILE_SHAPES and (d < 2000 or (m, d, k) in WIDE.get(path, SHAPES))


def layouts(x):
    """The same rows in memory in every way a caller may have them."""
    rows, d = x.shape
    wide = torch.full((rows, d + 24), float("nan"), dtype=x.dtype)
    wide[:, 8 : 8 + d] = x
    return {
        "contiguous": x,
        "row stride > d": wide[:, 8 : 8 + d],
        "offset view": torch.cat([torch.full((5, d), float("nan"), dtype=x.dtype), x])[5:],
        "stride 0": x[:1].expand(rows, d) if rows else x,
    }


def bases(d, k):
    """The same basis in both memory orders; a kernel that assumes one is silently wrong on the other."""
    u = basis(d, k)
    padded = torch.full((d, k + 3), float("nan"))
    padded[:, :k] = u
    return {"row-major": u, "column-major": u.T.contiguous().T, "padded": padded[:, :k]}


def check(case, x, u, strength, row_strength=None, residual=None, both=True, **options):
    """The projection, the sum and the norm of one input, each against its oracle; the sum against separate operations
    bit for bit. u: a basis or a projection. both: also the sum alone, and with one rounding."""
    edit = Projection.of(u)
    a = strength if row_strength is None else strength * row_strength
    exact = project_oracle(x, edit, a)
    u, options = edit.basis, options | {"dual": edit.dual, "offset": edit.offset}
    y, _ = project(x, u, strength, row_strength, **options)
    eager = (project_eager(x, edit, a if row_strength is None else a.unsqueeze(1)).double() - exact).abs()
    error = (y.double() - exact).abs()
    rounding = torch.finfo(x.dtype).eps / 2 * exact.abs().max() if x.numel() else 0.0
    weight = torch.rand(x.shape[1]).to(x.dtype) - 0.5
    residual = torch.randn(x.shape).to(x.dtype) if residual is None else residual
    results = {"y": worst_ratio(error, rule_a_bound(x, edit, a))}
    for separate in (True, False) if both else (True,):
        more = options | {"residual": residual, "separate": separate}
        h, n = project(x, u, strength, row_strength, weight=weight, eps=EPS, **more)
        if separate:
            same = torch.equal(h, residual + y)
        if both:
            alone, nothing = project(x, u, strength, row_strength, **more)
            same &= torch.equal(h, alone) and nothing is None
        if separate and x.dtype == torch.float16:
            # The same roundings as separate operations give the same elements, but for a few where the float32 root
            # differs in its last bit (2^-23) and n stands just there between two float16 numbers (2^-11 apart).
            wide = h.float()
            apart = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).half() * weight
            results["n other than apart"] = float((n != apart).float().mean()) / 0.01 if n.numel() else 0.0
        name = "separate" if separate else "once"
        off = (h.double() - (residual.double() + exact)).abs()
        results[f"h {name}"] = worst_ratio(off, add_bound(x, residual, edit, a, separate))
        off = (n.double() - rmsnorm_oracle(h, weight, EPS)).abs()
        results[f"n {name}"] = worst_ratio(off, rmsnorm_bound(h, weight, EPS, separate))
    return {
        "case": case,
        "over_bound": results,
        "over_eager": float(error.max() / (2 * eager.max() + rounding)) if x.numel() else 0.0,
        "same_bits": same,
    }


def shapes(path, sizes=(*SHAPES, *TILE_SHAPES)):
    dtype, options = PATHS[path]
    for m, d, k in sizes:
        if not takes(path, m, d, k):
            continue
        if sizes is FEW and "row" in path:
            m = 3
        u = basis(d, k)
        yield check(f"{path} {m}x{d} k={k}", torch.randn(m, d).to(dtype), u, 0.7, both=False, **options)
        if "pieces" in path:
            inside = (torch.randn(m, k) @ u.T).to(dtype)
            y, _ = project(inside, u, 1.0, **options)
            ratio = worst_ratio(leak(y, u), leak_bound(y, inside, u))
            yield {"case": f"{path} {m}x{d} k={k} leak", "over_bound": {"leak": ratio}}
        if "prepared" in path:
            x, r = torch.randn(m, d).to(dtype), torch.randn(m, d).to(dtype)
            more = options | {"residual": r, "weight": torch.rand(d).to(dtype), "eps": EPS}
            both = zip(project(x, u, 0.7, **more), project(x, u, 0.7, **more | {"PREPARED": False}), strict=True)
            yield {"case": f"{path} {m}x{d} as not prepared", "same_bits": all(torch.equal(*pair) for pair in both)}


def memory(path):
    dtype, options = PATHS[path]
    d, k = (128, 16) if "tile" in path else (70, 10)
    m = 3 if "row" in path else 11
    x, r = torch.randn(m, d).to(dtype), torch.randn(m, d).to(dtype)
    for (name, laid), other in zip(layouts(x).items(), reversed(layouts(r).values()), strict=True):
        yield check(f"{path} x {name}", laid, basis(d, k), 1.0, residual=other, **options)
    for name, u in bases(d, k).items():
        if "tile" not in path:
            yield check(f"{path} basis {name}", x, u, 1.0, **options)
        elif name != "row-major":
            yield refused(f"{path} basis {name}", x, u, **options)


def refused(case, x, u, **options):
    """The tile form reads a packed basis alone; asked for on another it must say so rather than read what is there."""
    try:
        project(x, u, 1.0, **options)
    except ValueError as error:
        return {"case": case, "same_bits": "packed" in str(error)}
    return {"case": case, "same_bits": False}


def rows(path):
    """Per-row strength, rows of strength 0 bit for bit, and NaN or Inf that stays in its row."""
    dtype, options = PATHS[path]
    d, k = (128, 16) if "tile" in path else (70, 10)
    m = 6 if "row" in path else 18  # two programs or more
    still, bad = [1, m - 1], [2, 4, m - 1]
    x, u = torch.randn(m, d).to(dtype), basis(d, k)
    a = torch.rand(m)
    a[still] = 0.0
    yield check(f"{path} per row", x, u, 2.0, a, **options)
    y, _ = project(x, u, 1.0, a, **options)
    yield {"case": f"{path} strength 0", "same_bits": bool(torch.equal(y[still], x[still]))}
    zeros, down = torch.full((2, d), -0.0).to(dtype), -basis(d, 16).abs()
    y, _ = project(zeros, down, 1.0, torch.zeros(2), **options)
    yield {"case": f"{path} strength 0 of -0.0", "same_bits": bool(torch.signbit(y).all())}
    poisoned = x.clone()
    for row, column, value in zip(bad, (7, 0, d - 1), (float("nan"), float("inf"), float("-inf")), strict=True):
        poisoned[row, column] = value
    clean = [i for i in range(m) if i not in bad]
    y, _ = project(poisoned, u, 1.0, **options)
    same = torch.equal(y[clean], project(x, u, 1.0, **options)[0][clean])
    yield {"case": f"{path} isolation", "same_bits": same and not bool(torch.isfinite(y[bad]).all())}
    y, _ = project(poisoned, u, 1.0, a, **options)
    yield {"case": f"{path} strength 0 beside Inf", "same_bits": bool(torch.equal(y[m - 1], poisoned[m - 1]))}
    r, w = torch.randn(m, d).to(dtype), torch.rand(d).to(dtype)
    h, n = project(poisoned, u, 1.0, residual=r, weight=w, eps=EPS, **options)
    right = project(x, u, 1.0, residual=r, weight=w, eps=EPS, **options)
    same = torch.equal(h[clean], right[0][clean]) and torch.equal(n[clean], right[1][clean])
    yield {"case": f"{path} isolation of the norm", "same_bits": same and bool(n[bad].isnan().any(1).all())}


def obliques(path):
    """A dual and an offset, alone and together, with a strength a row; bases in every order of memory."""
    dtype, options = PATHS[path]
    d, k = (256, 16) if "tile" in path else (70, 10)
    m = 3 if "row" in path else 18
    edit, a = oblique(d, k, offset=True), torch.rand(m)
    x = (torch.randn(m, d) + edit.basis @ torch.randn(k)).to(dtype)
    cases = {"dual": edit.linear, "offset": Projection(basis(d, k), None, edit.offset), "both": edit}
    for name, form in cases.items():
        yield check(f"{path} {name}", x, form, 0.7, both=False, **options)
    yield check(f"{path} both, per row", x, edit, 2.0, a, **options)
    inside = (torch.randn(m, k) @ edit.basis.T).to(dtype)
    y, _ = project(inside, edit.basis, 1.0, dual=edit.dual, **options)
    ratio = worst_ratio(leak(y, edit.linear), leak_bound(y, inside, edit.linear))
    yield {"case": f"{path} oblique leak", "over_bound": {"leak": ratio}}
    if "tile" not in path:
        turned = edit.linear.map(lambda t: t.T.contiguous().T)
        yield check(f"{path} column-major", x, turned, 1.0, both=False, **options)
    try:
        project(x, edit.basis, 1.0, dual=edit.dual.T.contiguous().T, **options)
        said = ""
    except ValueError as error:
        said = str(error)
    yield {"case": f"{path} dual in another order", "same_bits": "must lie in memory as the basis" in said}


def batches(path):
    """A row's bits in batches of every size: the same with `invariant`, whatever the form that is then chosen."""
    if path not in ("float32", "float16"):  # the form is chosen here, by the sizes
        return
    dtype, options = PATHS[path]
    d, k = 256, 10  # not padded, so that the row form is left after 64 rows
    options = {name: value for name, value in options.items() if name != "form"}
    x, r, w, u = torch.randn(70, d).to(dtype), torch.randn(70, d).to(dtype), torch.rand(d).to(dtype), basis(d, k)

    def row(first, last, invariant):
        part = slice(first, last)
        more = options | {"residual": r[part], "weight": w, "eps": EPS, "invariant": invariant}
        h, n = project(x[part], u, 1.0, **more)
        return h[3 - first], n[3 - first]

    for invariant in (True, False):
        alone = row(3, 4, invariant)
        same = [all(map(torch.equal, alone, row(*part, invariant))) for part in ((0, 5), (3, 67), (2, 67), (0, 70))]
        # Without it the check can fail: 65 rows and more take another form (16 bits may round the difference away).
        if invariant or dtype == torch.float32:
            yield {"case": f"{path} invariant={invariant}", "same_bits": all(same) == invariant}


def preparing(module):
    """`module.project`, with the pieces of its basis and dual made before a launch with PREPARED."""

    def launch(x, u, *given, PREPARED=False, **options):
        if PREPARED:
            of_b = u if options.get("dual") is None else options["dual"]
            options["split"] = module.prepared(of_b, x.dtype)[0], module.prepared(u, x.dtype)[1]
        return module.project(x, u, *given, **options)

    return launch


def broken(result):
    """What a case breaks, as text; empty if nothing."""
    found = [
        f"{what} {ratio:.2g} of its bound" for what, ratio in result.get("over_bound", {}).items() if not ratio <= 1
    ]
    if not result.get("same_bits", True):
        found.append("other bits")
    if result.get("over_eager", 0.0) > 1:
        found.append(f"{result['over_eager']:.2g} of twice eager's error")
    return f"{result['case']}: {', '.join(found)}" if found else ""


def guarded():
    """(a stand-in for torch that gives every output as NaN, so that an element nobody stores is seen; the rows behind
    those outputs, which are nobody's)."""
    guards = []

    def empty(shape, **kwargs):
        made = torch.empty((shape[0] + 32, *shape[1:]), **kwargs).fill_(float("nan"))
        guards.append(made[shape[0] :])
        return made[: shape[0]]

    return SimpleNamespace(empty=empty, **{n: getattr(torch, n) for n in (*DTYPES, "int32", "stack")}), guards


def results(module, groups, paths):
    """Every case of some groups and paths, of the kernels in `module`."""
    global project
    project = preparing(module)
    module.torch, guards = guarded()
    for path, group in itertools.product(paths, groups):
        torch.manual_seed(0)  # the same cases whatever runs before them
        yield from {
            "shapes": shapes,
            "few": lambda p: shapes(p, FEW),
            "memory": memory,
            "rows": rows,
            "batches": batches,
            "oblique": obliques,
        }[group](path)
        same = all(bool(g.isnan().all()) for g in guards)
        guards.clear()
        if not same:
            break
    yield {"case": "rows behind the output", "same_bits": same}


if __name__ == "__main__":
    patch_once()
    if sys.argv[1] == "--first":
        for number, file in enumerate(sys.argv[2:]):
            spec = importlib.util.spec_from_file_location(f"kernels_{number}", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            first, first_group = Path(file).name.split(".")[:2]
            paths = sorted(PATHS, key=lambda path: first not in (path, PATHS[path][1]["form"]))
            groups = sorted(("few", "oblique", "memory", "rows"), key=lambda group: group != first_group)
            cases = results(module, groups, paths)
            print(json.dumps(next(filter(None, map(broken, cases)), "")), flush=True)
    else:
        for result in results(kernels, sys.argv[1].split(","), sys.argv[2:] or PATHS):
            print(json.dumps(result | {"broken": broken(result)}), flush=True)
