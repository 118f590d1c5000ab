"""The Triton kernel interpreted, emulated in bfloat16 and compiled ahead of time; on a GPU, the real thing."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_surgery.reference import leak, leak_bound, project_oracle, rule_a_bound, worst_ratio
from tests.models import basis

ROOT = Path(__file__).resolve().parent.parent


def interpret(group, root=ROOT):
    """The results of one group of cases of tests/interpreter.py, run on the tree in `root`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.interpreter", group],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults(results):
    """The cases that break a rule."""
    found = []
    for r in results:
        if "same_bits" in r:
            good = r["same_bits"]
        else:
            good = r["finite"] and r["error_over_bound"] <= 1 and r["over_eager"] <= 1
            print(f"{r['case']}: error/bound {r['error_over_bound']:.3f}, over eager {r['over_eager']:.3f}")
        if not good:
            found.append(r["case"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("group, cases", [("shapes", 61), ("memory", 36), ("rows", 21)])
def test_the_interpreted_kernel_meets_rule_a_everywhere(group, cases):
    results = interpret(group)
    assert len(results) == cases
    assert faults(results) == []


BASIS_AT = "column[:, None].to(tl.int64) * stride_d + column_k[None, :] * stride_k"
STORE = "tl.store(y_row + column[None, :], y.to(y_ptr.dtype.element_ty), mask="
ROW_STORE = "tl.store(y_ptr + row * stride_y + column, y.to(y_ptr.dtype.element_ty), mask="
WALK = "for start in range({}, d, BLOCK_D):\n        column = start + "
MUTATIONS = {
    "last rows unmasked": (STORE + "inside)", STORE + "(column < d)[None, :])"),
    "last columns unmasked": (STORE + "inside)", STORE + "row_in)"),
    "row: last columns unmasked": (ROW_STORE + "column < d)", ROW_STORE + "column < d + BLOCK_D)"),
    "basis taken for row-major": (BASIS_AT, "column[:, None].to(tl.int64) * k + column_k[None, :]"),
    "row stride assumed": ("x_row = x_ptr + row[:, None] * stride_x", "x_row = x_ptr + row[:, None] * d"),
    "row: row stride assumed": ("x_ptr + row * stride_x", "x_ptr + row * d"),
    "strength ignored": ("x_wide - a * removed", "x_wide - removed"),
    "sign": ("x_wide - a * removed", "x_wide + a * removed"),
    "z rounded": ("z_lo = (z - z_hi.to(tl.float32)).to(PIECES)", "z_lo = z_hi * 0.0"),
    "row: z rounded": ("z = tl.sum(partial, 0)", "z = tl.sum(partial, 0).to(tl.float16).to(tl.float32)"),
    "low basis lost": ("removed = tl.dot(z_hi, tl.trans(u_lo))", "removed = tl.dot(z_hi, tl.trans(u_lo)) * 0.0"),
    "strength 0 computed": ("tl.where(a == 0.0, x_wide, x_wide - a * removed)", "x_wide - a * removed"),
    "first chunk skipped": (WALK.format("0") + "tl.arange", WALK.format("BLOCK_D") + "tl.arange"),
    "row: first chunk skipped": (WALK.format("0") + "lane", WALK.format("BLOCK_D") + "lane"),
    "row: strength of another row": ("tl.load(row_strength_ptr + row)", "tl.load(row_strength_ptr)"),
    "strength of another row": ("tl.load(row_strength_ptr + row, mask", "tl.load(row_strength_ptr + row * 0, mask"),
}


@pytest.fixture
def tree(tmp_path):
    """A copy of what the interpreter needs."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    for name in ("__init__.py", "interpreter.py", "models.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    (tmp_path / "kernel_surgery").mkdir()
    for name in ("__init__.py", "reference.py"):
        shutil.copy(ROOT / "kernel_surgery" / name, tmp_path / "kernel_surgery")
    (tmp_path / "kernel_surgery" / "kernels").symlink_to(Path("..") / "kernels")
    # The shapes that tell faults apart, and no others: twelve seconds would become two minutes.
    worker = tmp_path / "tests" / "interpreter.py"
    text = worker.read_text(encoding="utf-8")
    worker.write_text(re.sub(r"SHAPES = \[.*\]", "SHAPES = [(17, 129, 10)]", text), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_every_mutation_of_the_kernel_is_caught(tree):
    kernel = tree / "kernels" / "project.py"
    right = kernel.read_text(encoding="utf-8")
    groups = ("shapes", "memory", "rows")
    assert [faults(interpret(group, tree)) for group in groups] == [[], [], []]
    survivors = []
    for name, (old, new) in MUTATIONS.items():
        assert old in right, f"{name}: the source has changed, mend the mutation"
        kernel.write_text(right.replace(old, new), encoding="utf-8")
        caught = next((f"{group}: {found[0]}" for group in groups if (found := faults(interpret(group, tree)))), None)
        print(f"{name}: caught by {caught}")
        if not caught:
            survivors.append(name)
    assert survivors == []


def emulated(x, u, z_pieces=2, u_pieces=2, block=64):
    """The kernel's bfloat16 path in torch: same chunks, pieces and float32 sums, one rounding. x [rows, d] bfloat16."""
    high = u.bfloat16()
    low = (u - high.float()).bfloat16() if u_pieces == 2 else torch.zeros_like(high)
    z = torch.zeros(x.shape[0], u.shape[1])
    for start in range(0, x.shape[1], block):
        chunk = slice(start, start + block)
        z = z + x[:, chunk].float() @ high[chunk].float()
        z = z + x[:, chunk].float() @ low[chunk].float()
    z_high = z.bfloat16()
    z_low = (z - z_high.float()).bfloat16() if z_pieces == 2 else torch.zeros_like(z_high)
    removed = z_high.float() @ low.float().T
    removed = removed + z_low.float() @ high.float().T
    removed = removed + z_high.float() @ high.float().T
    return (x.float() - removed).bfloat16()


@pytest.mark.parametrize("d, k", [(2048, 10), (2048, 64), (8192, 10), (8192, 64)])
def test_the_bfloat16_arithmetic_meets_rule_a_and_the_leak_rule(d, k):
    u = basis(d, k)
    x = torch.randn(64, d).bfloat16()
    inside = (torch.randn(64, k) @ u.T).bfloat16()

    def ratios(**pieces):
        y, kept = emulated(x, u, **pieces), emulated(inside, u, **pieces)
        return (
            worst_ratio((y.double() - project_oracle(x, u)).abs(), rule_a_bound(x, u)),
            worst_ratio((kept.double() - project_oracle(inside, u)).abs(), rule_a_bound(inside, u)),
            worst_ratio(leak(kept, u), leak_bound(kept, inside, u)),
        )

    right = ratios()
    print(f"d={d} k={k}: error/bound {right[0]:.2f} random, {right[1]:.2f} inside; leak/bound {right[2]:.2f}")
    assert max(right) <= 1
    # Teeth: the usual mistakes. Random x alone would not show the first by much; x inside the span does.
    for name, pieces in {"z in bfloat16": {"z_pieces": 1}, "basis in bfloat16": {"u_pieces": 1}}.items():
        wrong = ratios(**pieces)
        print(f"  {name}: error/bound {wrong[0]:.1f} random, {wrong[1]:.1f} inside; leak/bound {wrong[2]:.1f}")
        assert max(wrong[1:]) > 1


@pytest.mark.slow
def test_it_compiles_for_sm_80_and_sm_90_without_spills_and_within_shared_memory():
    from kernel_surgery.aot import CASES, DTYPES, compile_project

    for sm in (80, 90):
        for dtype in DTYPES:
            for rows, d, k in CASES:
                c = compile_project(sm, dtype, rows, d, k)
                print(f"sm_{sm} {c.form} {dtype} {rows} x {d}, k={k}: {c.registers} registers, {c.spilled} spilled")
                assert c.faults() == []
                check_offsets(c.ttir)


def check_offsets(ttir):
    # M * d may pass 2^31: whatever is multiplied (rows and columns by strides, program by block) is 64 bits wide.
    products = re.findall(r"arith\.muli .* : (.*?)(?: loc|$)", ttir, re.MULTILINE)
    assert products and all("i64" in kind for kind in products), products


@pytest.mark.slow
def test_the_ahead_of_time_check_can_fail():
    from kernel_surgery.aot import compile_project

    found = compile_project(90, "bfloat16", 16384, 2048, 64, BLOCK_M=128, BLOCK_D=256).faults()
    print(found)
    assert any("spills" in fault for fault in found)
    found = compile_project(80, "float32", 16384, 2048, 64, BLOCK_M=64, BLOCK_D=1024, num_warps=32).faults()
    print(found)
    assert any("shared memory" in fault for fault in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the compiled kernel is run")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "m, d, k",
    [(0, 64, 1), (1, 2048, 10), (17, 2049, 33), (64, 2048, 10), (65, 2048, 10), (4097, 2048, 10), (199, 8192, 64)],
)
def test_on_a_gpu_rule_a_and_the_leak_rule_hold(dtype, m, d, k):
    from kernel_surgery.ops import project, provider

    u = basis(d, k).cuda()
    x = torch.randn(m, d).to(dtype).cuda()
    inside = (torch.randn(m, k) @ u.cpu().T).to(dtype).cuda()
    assert provider(x) == "triton/cuda"
    y, kept = project(x, u, 0.7), project(inside, u)
    error = worst_ratio((y.double() - project_oracle(x, u, 0.7)).abs(), rule_a_bound(x, u, 0.7))
    kept_ratio = worst_ratio(leak(kept, u), leak_bound(kept, inside, u))
    print(f"{dtype} {m}x{d} k={k}: error/bound {error:.2f}, leak/bound {kept_ratio:.2f}")
    assert error <= 1 and kept_ratio <= 1
