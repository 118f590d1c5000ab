"""The Triton kernel in Triton's interpreter, in a process of its own: @triton.jit reads TRITON_INTERPRET when it runs.

    python -m tests.interpreter GROUP        one JSON line a case, with error_over_bound or same_bits

The interpreter cannot do bfloat16 (it works on raw bits), so the two-piece path runs in float16 pieces here; its
bfloat16 arithmetic is emulated in tests/test_project_kernel.py, and the compiled kernel is checked on hardware.
"""

import json
import os
import sys
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton.language as tl

from kernel_surgery.kernels.project import project
from kernel_surgery.reference import leak, leak_bound, project_eager, project_oracle, rule_a_bound, worst_ratio
from tests.models import basis

DTYPES = ("bfloat16", "float16", "float32")
PATHS = {
    "float32": (torch.float32, {"form": "two-pass"}),
    "float16": (torch.float16, {"form": "two-pass"}),
    "float16 pieces": (torch.float16, {"form": "two-pass", "PIECES": tl.float16}),
    "float32 row": (torch.float32, {"form": "row"}),
    "float16 row": (torch.float16, {"form": "row"}),
}
SHAPES = [(0, 64, 1), (1, 64, 1), (3, 129, 10), (17, 2048, 16), (2, 2049, 33), (3, 8192, 64)]


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


def check(case, x, u, strength, row_strength=None, **options):
    y = project(x, u, strength, row_strength, **options)
    a = strength if row_strength is None else strength * row_strength
    exact = project_oracle(x, u, a)
    error = (y.double() - exact).abs()
    eager = (project_eager(x, u, a if row_strength is None else a.unsqueeze(1)).double() - exact).abs()
    rounding = torch.finfo(x.dtype).eps / 2 * exact.abs().max() if x.numel() else 0.0
    return {
        "case": case,
        "finite": bool(torch.isfinite(y).all()),
        "error_over_bound": worst_ratio(error, rule_a_bound(x, u, a)),
        "over_eager": float(error.max() / (2 * eager.max() + rounding)) if x.numel() else 0.0,
    }


def shapes(path):
    dtype, options = PATHS[path]
    for m, d, k in SHAPES:
        x = torch.randn(m, d).to(dtype)
        u = basis(d, k)
        yield check(f"{path} {m}x{d} k={k}", x, u, 0.7, **options)
        inside = (torch.randn(m, k) @ u.T).to(dtype)
        y = project(inside, u, 1.0, **options)
        ratio = worst_ratio(leak(y, u), leak_bound(y, inside, u))
        yield {"case": f"{path} {m}x{d} k={k} leak", "finite": True, "error_over_bound": ratio, "over_eager": 0.0}


def memory(path):
    dtype, options = PATHS[path]
    x = torch.randn(5, 130).to(dtype)
    for name, laid in layouts(x).items():
        yield check(f"{path} x {name}", laid, basis(130, 10), 1.0, **options)
    for name, u in bases(130, 10).items():
        yield check(f"{path} basis {name}", x, u, 1.0, **options)


def rows(path):
    """Per-row strength, rows of strength 0 bit for bit, and NaN or Inf that stays in its row."""
    dtype, options = PATHS[path]
    x, u = torch.randn(18, 130).to(dtype), basis(130, 10)
    a = torch.rand(18)
    a[[3, 17]] = 0.0
    yield check(f"{path} per row", x, u, 2.0, a, **options)
    y = project(x, u, 1.0, a, **options)
    yield {"case": f"{path} strength 0", "same_bits": bool(torch.equal(y[[3, 17]], x[[3, 17]]))}
    poisoned = x.clone()
    poisoned[4, 7], poisoned[9, 0], poisoned[17, 129] = float("nan"), float("inf"), float("-inf")
    clean = [i for i in range(18) if i not in (4, 9, 17)]
    y = project(poisoned, u, 1.0, **options)
    same = torch.equal(y[clean], project(x, u, 1.0, **options)[clean])
    yield {"case": f"{path} isolation", "same_bits": same and not bool(torch.isfinite(y[[4, 9, 17]]).all())}
    y = project(poisoned, u, 1.0, a, **options)
    yield {"case": f"{path} strength 0 beside Inf", "same_bits": bool(torch.equal(y[17], poisoned[17]))}


if __name__ == "__main__":
    torch.manual_seed(0)
    group = {"shapes": shapes, "memory": memory, "rows": rows}[sys.argv[1]]
    # Every output starts as NaN, so that an element nobody stores is seen; the rows behind it are nobody's.
    real, guards = torch.empty, []

    def guarded_empty(shape, **kwargs):
        made = real((shape[0] + 32, *shape[1:]), **kwargs).fill_(float("nan"))
        guards.append(made[shape[0] :])
        return made[: shape[0]]

    project.__globals__["torch"] = SimpleNamespace(empty=guarded_empty, **{n: getattr(torch, n) for n in DTYPES})
    for path in PATHS:
        for result in group(path):
            print(json.dumps(result), flush=True)
    print(json.dumps({"case": "rows behind the output", "same_bits": all(bool(g.isnan().all()) for g in guards)}))
