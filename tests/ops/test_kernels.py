"""The Triton kernel interpreted, emulated in bfloat16 and compiled ahead of time; on a GPU, the real thing."""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_surgery.common.names import DTYPES
from kernel_surgery.numerics.bounds import add_bound, leak_bound, rmsnorm_bound, rule_a_bound, worst_ratio
from kernel_surgery.numerics.oracle import leak, project_oracle, rmsnorm_oracle
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.ops.library import _launch, project_add_rmsnorm, set_batch_invariant
from tests.support.models import basis, oblique

ROOT = Path(__file__).resolve().parents[2]


def interpret(*words):
    """The lines of `python -m tests.support.interpreter`, from JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.interpreter", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


# Each test of the interpreter is one process on one core, which starts in four seconds.
@pytest.mark.slow
@pytest.mark.parametrize(
    "paths, cases",
    [
        (("float32", "float16 tile pieces", "float16 tile prepared", "float32 tile", "float16 row"), 66),
        (("float16 pieces", "float16", "float32 row", "float32 row chunks"), 46),
    ],
    ids=["wide", "many"],
)
def test_the_interpreted_kernels_meet_every_bound_on_awkward_shapes(paths, cases):
    results = interpret("shapes", *paths)
    worst = {}
    for r in results:
        for what, ratio in r.get("over_bound", {}).items():
            worst[what] = max(worst.get(what, (0.0, "")), (ratio, r["case"]))
    for what, (ratio, case) in worst.items():
        print(f"{what}: at most {ratio:.3f} of its bound ({case})")
    assert len(results) == cases
    assert [r["broken"] for r in results if r["broken"]] == []


@pytest.mark.slow
def test_the_interpreted_kernels_take_any_layout_keep_rows_apart_and_have_the_same_bits_in_any_batch():
    """In one process. "few": the cases that a mutation below meets first, here with the right kernels."""
    results = interpret("few,memory,rows,oblique,batches")
    assert len(results) == 217 and sum("invariant=True" in r["case"] for r in results) == 2
    assert [r["broken"] for r in results if r["broken"]] == []


def test_batch_invariance_is_off_by_default_and_reaches_the_launch(monkeypatch):
    from kernel_surgery.kernels import project as kernels

    seen = []
    monkeypatch.setattr(kernels, "project", lambda x, *more, invariant, **rest: (seen.append(invariant), x))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    x, u = torch.randn(2, 32), basis(32, 4)
    for enabled in (True, False):
        _launch(x, u, 1.0, None)
        assert set_batch_invariant(enabled) != enabled
    _launch(x, u, 1.0, None)
    assert seen == [False, True, False]


# name: (what stands in kernels/project.py, what a plausible mistake would make of it). A name that begins with a form
# is a fault of that form alone.
FORMS = ("row", "tile", "two-pass")
MUTATIONS = {
    "sign": ("x.to(tl.float32) - removed", "x.to(tl.float32) + removed"),
    "strength ignored": ("tl.where(a == 0.0, 0.0, a * z)", "tl.where(a == 0.0, 0.0, z)"),
    "strength 0 computed": ("tl.where(a == 0.0, 0.0, a * z)", "a * z"),
    "z in one piece": ("z_lo = (z - z_hi.to(tl.float32)).to(u_hi.dtype)", "z_lo = z_hi * 0.0"),
    "low piece of the basis lost": ("removed = tl.dot(z_hi, u_lo)", "removed = tl.dot(z_hi, u_lo) * 0.0"),
    "basis taken for row-major": (
        "column[:, None].to(tl.int64) * stride_d + column_k[None, :] * stride_k",
        "column[:, None].to(tl.int64) * k + column_k[None, :]",
    ),
    "columns beyond k unmasked": ("mask=(column < d)[:, None] & (column_k < k)[None, :]", "mask=(column < d)[:, None]"),
    "residual forgotten": ("wide += residual.to(tl.float32)", "wide += 0.0"),
    "residual added twice": ("wide += residual.to(tl.float32)", "wide += 2.0 * residual.to(tl.float32)"),
    "residual projected too": ("- removed\n    if ADD:", "- removed * (2.0 if ADD else 1.0)\n    if ADD:"),
    "y not rounded where separate": (
        "        if SEPARATE:\n            wide = wide.to(kind).to(tl.float32)\n        wide +=",
        "        wide +=",
    ),
    "h / rms not rounded where separate": (
        "    if SEPARATE:\n        wide = wide.to(kind).to(tl.float32)\n    return (wide *",
        "    return (wide *",
    ),
    "weight forgotten": ("(wide * weight.to(tl.float32)).to(kind)", "wide.to(kind)"),
    "row: z rounded": (
        "        z = tl.sum(x.to(tl.float32)[:, None] * b, 0)\n",
        "        z = tl.sum(x.to(tl.float32)[:, None] * b, 0).to(tl.float16).to(tl.float32)\n",
    ),
    "row: dual forgotten": ("b = load_basis(dual_ptr, lane,", "b = load_basis(basis_ptr, lane,"),
    "row: dual written": (
        "y = edited(x, tl.sum(u * z[None, :], 1) + 0.0, r, kind, ADD, SEPARATE)\n        tl.store(",
        "y = edited(x, tl.sum(b * z[None, :], 1) + 0.0, r, kind, ADD, SEPARATE)\n        tl.store(",
    ),
    "offset forgotten": ("z -= tl.load(offset_ptr + rank,", "z -= 0.0 * tl.load(offset_ptr + rank,"),
    "offset's sign": ("z -= tl.load(offset_ptr + rank,", "z += tl.load(offset_ptr + rank,"),
    "row: chunks: dual forgotten": (
        "b = load_basis(dual_ptr, column, d, k, stride_basis_d, stride_basis_k, BLOCK_K)\n            z +=",
        "b = load_basis(basis_ptr, column, d, k, stride_basis_d, stride_basis_k, BLOCK_K)\n            z +=",
    ),
    "two-pass: dual forgotten": (
        "b = load_basis(dual_ptr, column, d, k, stride_basis_d, stride_basis_k, BLOCK_K)\n        z = gather",
        "b = load_basis(basis_ptr, column, d, k, stride_basis_d, stride_basis_k, BLOCK_K)\n        z = gather",
    ),
    "two-pass: offset once a chunk": (
        "z = gather(x, b, z, PIECES, PRECISION)\n",
        "z = gather(x, b, less_offset(z, offset_ptr, tl.arange(0, BLOCK_K)[None, :], k, OFFSET), PIECES, PRECISION)\n",
    ),
    "tile: dual forgotten": ("inside_products(kept, dual_ptr,", "inside_products(kept, basis_ptr,"),
    "tile: offset in the order of memory": ("rank = 2 * (slot % 8) + slot // 8", "rank = slot"),
    "tile: offset once a warp": (
        "less_offset(over_warps(z, WARPS, BLOCK_M), offset_ptr, rank[:, None], BLOCK_K, OFFSET)",
        "over_warps(less_offset(z, offset_ptr, rank[None, :, None], BLOCK_K, OFFSET), WARPS, BLOCK_M)",
    ),
    "row: row stride assumed": ("x_ptr + row * stride_x", "x_ptr + row * d"),
    "row: residual stride assumed": ("residual_ptr + row * stride_residual", "residual_ptr + row * d"),
    "row: last columns unmasked": ("lane, y, mask=inside)", "lane, y, mask=lane < d + BLOCK_D)"),
    "row: strength of another row": ("tl.load(row_strength_ptr + row)", "tl.load(row_strength_ptr)"),
    "row: eps outside the root": (
        "tl.rsqrt(tl.sum(wide * wide, 0) / d + eps)",
        "1.0 / (tl.sqrt(tl.sum(wide * wide, 0) / d) + eps)",
    ),
    "row: mean over the block": ("tl.sum(wide * wide, 0) / d", "tl.sum(wide * wide, 0) / BLOCK_D"),
    "row: a row that is not whole taken for one": (
        "whole = block_d >= d and elements",
        "whole = True or elements",
    ),
    "row: chunks: z rounded": (
        "z += tl.sum(x.to(tl.float32)[:, None] * b, 0)",
        "z = (z + tl.sum(x.to(tl.float32)[:, None] * b, 0)).to(tl.float16).to(tl.float32)",
    ),
    "row: chunks: last columns unmasked": ("column, y, mask=column < d)", "column, y, mask=column < d + BLOCK_D)"),
    "row: chunks: those before the last lost": (
        "z += tl.sum(x.to(tl.float32)[:, None] * b, 0)",
        "z = tl.sum(x.to(tl.float32)[:, None] * b, 0)",
    ),
    "row: chunks: eps outside the root": (
        "tl.rsqrt(tl.sum(squares, 0) / d + eps)",
        "1.0 / (tl.sqrt(tl.sum(squares, 0) / d) + eps)",
    ),
    "row: chunks: mean over the block": ("tl.sum(squares, 0) / d", "tl.sum(squares, 0) / BLOCK_D"),
    "row: chunks: norm of the projection alone": (
        "h = tl.load(y_row + column, mask=column < d, other=0.0)\n                w",
        "h = tl.load(x_row + column, mask=column < d, other=0.0)\n                w",
    ),
    "two-pass: row stride assumed": ("x_row = x_ptr + row[:, None] * stride_x", "x_row = x_ptr + row[:, None] * d"),
    "two-pass: residual stride assumed": (
        "residual_ptr + row[:, None] * stride_residual",
        "residual_ptr + row[:, None] * d",
    ),
    "two-pass: last rows unmasked": (
        "tl.store(y_row + column[None, :], y, mask=inside)",
        "tl.store(y_row + column[None, :], y, mask=(column < d)[None, :])",
    ),
    "two-pass: last columns unmasked": (
        "tl.store(n_row + column[None, :], normalized(h, w, inverse_rms, kind, SEPARATE), mask=inside)",
        "tl.store(n_row + column[None, :], normalized(h, w, inverse_rms, kind, SEPARATE), mask=row_in)",
    ),
    "two-pass: chunks before the last lost": ("z = gather(x, b, z,", "z = gather(x, b, z * 0.0,"),
    "two-pass: eps outside the root": (
        "tl.rsqrt(tl.sum(squares, 1) / d + eps)",
        "1.0 / (tl.sqrt(tl.sum(squares, 1) / d) + eps)",
    ),
    "two-pass: mean over the block": ("tl.sum(squares, 1) / d", "tl.sum(squares, 1) / BLOCK_D"),
    "blocks: strength of another row": (
        "tl.load(row_strength_ptr + row, mask",
        "tl.load(row_strength_ptr + row * 0, mask",
    ),
    "tile: chunks before the last lost": ("z = tl.dot(u_hi, x_of[half], z)", "z = tl.dot(u_hi, x_of[half], z * 0.0)"),
    "tile: low piece of the basis lost in z": ("z = tl.dot(u_lo, x_of[half], z)", "z = z"),
    "tile: one half of the columns twice": ("x_of[half]", "x_of[0]"),
    "tile: columns of U out of order": (
        "at + 4 * BLOCK_K), tl.load(at + 6 * BLOCK_K)",
        "at + 6 * BLOCK_K), tl.load(at + 4 * BLOCK_K)",
    ),
    "tile: ranks of z out of order": ("(2, 8, 16 * TILES)), (2, 1, 0)", "(2, 8, 16 * TILES)), (2, 0, 1)"),
    "tile: basis of the first chunk": ("at + column * BLOCK_K, WARPS", "at, WARPS"),
    "tile: half of the warps left out": (
        "    return tl.reshape(a + b, (16, BLOCK_M))",
        "    return tl.reshape(a, (16, BLOCK_M))",
    ),
    "tile: z of the first tile for both": ("products(z_of[tile],", "products(z_of[0],"),
    "tile: prepared: halves of the columns swapped": ("tl.dot(hi_of[half],", "tl.dot(hi_of[1 - half],"),
    "tile: prepared: low piece lost in z": ("z = tl.dot(lo_of[half], x_of[half], z)", "z = z"),
    "tile: prepared: columns out of order": (
        "at + 4 * 32), tl.load(at + 6 * 32)",
        "at + 6 * 32), tl.load(at + 4 * 32)",
    ),
    "tile: prepared: pieces of the first chunk": ("at + column * 2 * BLOCK_K, WARPS", "at, WARPS"),
    "tile: prepared: nothing left for the low piece": (
        "(1 << (below - 1))) & -(1 << below)\n    high",
        "0) & -1\n    high",
    ),
    "tile: prepared: pieces of the basis for the dual": ("pointers = [x, of_a, of_b]", "pointers = [x, of_a, of_a]"),
    "tile: strength of another row": (
        "tl.load(row_strength_ptr + row, mask=row < rows, other=0.0)[None, :]",
        "tl.load(row_strength_ptr + row * 0, mask=row < rows, other=0.0)[None, :]",
    ),
    "tile: row stride assumed": ("x_ptr + first[:, None] * stride_x", "x_ptr + first[:, None] * d"),
    "tile: stride between a lane's rows assumed": ("x_first + 8 * i * stride_x.to(tl.int64)", "x_first + 8 * i * d"),
    "tile: residual stride assumed": (
        "residual_ptr + first[:, None] * stride_residual",
        "residual_ptr + first[:, None] * d",
    ),
    "tile: last rows unmasked": (
        "tl.store(y_first + below * d + chunk * wide, h, mask=inside)",
        "tl.store(y_first + below * d + chunk * wide, h)",
    ),
    "tile: kept rows of the first chunk": ("made[chunk * parts + i]", "made[i]"),
    "tile: weight of the first chunk": ("tl.load(weight_ptr + chunk * wide + across)", "tl.load(weight_ptr + across)"),
    "tile: eps outside the root": ("tl.rsqrt(whole / d + eps)", "1.0 / (tl.sqrt(whole / d) + eps)"),
    "tile: any basis taken for packed": (
        'if form == "tile" and (basis.stride() != (k, 1)',
        'if form == "tile" and (False',
    ),
}
# Faults that only very large inputs show, seen in the compiled kernel's IR instead.
NARROW = {
    "32-bit offsets in blocks": ("tl.program_id(0).to(tl.int64) * BLOCK_M", "tl.program_id(0) * BLOCK_M"),
    "32-bit offsets of a row": ("row = tl.program_id(0).to(tl.int64)\n", "row = tl.program_id(0)\n"),
}


def mutated(folder, name):
    """A file with the kernels, a mutation of MUTATIONS or NARROW made. "nothing": with none."""
    right = (ROOT / "kernels" / "project.py").read_text(encoding="utf-8")
    old, new = ({"nothing": (right, right)} | MUTATIONS | NARROW)[name]
    assert old in right, f"{name}: the source has changed, mend the mutation"
    file = folder / f"{first_path(name)}.{first_group(name)}.{len(list(folder.iterdir()))}.py"
    file.write_text(right.replace(old, new), encoding="utf-8")
    return file


@pytest.mark.slow
def test_a_row_number_multiplied_in_32_bits_is_seen_in_the_compiled_kernel(tmp_path, monkeypatch):
    """One specialisation of each form, compiled ahead of time."""
    from kernel_surgery.ops import compiled

    found = {}
    for number, name in enumerate(("nothing", *NARROW)):
        spec = importlib.util.spec_from_file_location(f"kernels_{number}", mutated(tmp_path, name))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for used in ("KERNELS", "form_of", "launch_options"):
            monkeypatch.setattr(compiled, used, getattr(module, used))
        shapes = ((1, 10), (9999, 16), (9999, 10))
        made = [compiled.compile_project(90, "bfloat16", m, 256, k, "project_add_rmsnorm") for m, k in shapes]
        assert {c.form for c in made} == set(FORMS)
        found[name] = [f"{c.form}: {fault}" for c in made for fault in c.faults()]
        print(f"{name}: {found[name]}")
    assert found.pop("nothing") == [] and all(found.values())


# The path whose cases show a mutation at once, where another path of its form does not show it.
FIRST_PATHS = {
    **dict.fromkeys(("z in one piece", "low piece of the basis lost"), "float16 pieces"),
    **dict.fromkeys(("y not rounded where separate", "h / rms not rounded where separate"), "float16"),
    "row: a row that is not whole taken for one": "float32 row chunks",
    "tile: chunks before the last lost": "float16 tile pieces",
    "tile: low piece of the basis lost in z": "float16 tile pieces",
    "tile: z of the first tile for both": "float16 tile pieces, two",
}
PREPARED = "float16 tile prepared"


def mutated_form(mutation):
    """The form that a mutation is of, from its name; "any" where it is of none alone."""
    return next((form for form in FORMS if mutation.startswith(f"{form}: ")), "any")


def first_path(mutation):
    """The path or form whose cases are tried first, so that the mutation is found soon."""
    if mutation.startswith("row: chunks"):
        return "float32 row chunks"
    return PREPARED if "prepared: " in mutation else FIRST_PATHS.get(mutation, mutated_form(mutation))


# Words of a mutation's name: the group of cases that shows it at once. Any other is shown by the first case of a form.
SHOWN_BY = {
    **{"stride": "memory", "row-major": "memory", "packed": "memory"},
    **{"dual": "oblique", "offset": "oblique", "strength 0": "rows", "strength of another": "rows"},
}


def first_group(mutation):
    """The group of cases that is tried first, for the same reason. A wrong guess costs time alone."""
    return next((group for words, group in SHOWN_BY.items() if words in mutation), "few")


@pytest.mark.slow
def test_every_mutation_of_the_kernels_is_caught(tmp_path):
    """Unmutated, the same cases pass in the test of layouts and rows above."""
    files = [str(mutated(tmp_path, name)) for name in MUTATIONS]
    caught = dict(zip(MUTATIONS, interpret("--first", *files), strict=True))
    for name, case in caught.items():
        print(f"{name}: {case or 'not caught'}")
    assert [name for name, case in caught.items() if not case] == []
    assert {mutated_form(name) for name in caught} == {"any", *FORMS}
    # A fault of one form shows in a case of that form.
    for name, case in caught.items():
        form = mutated_form(name)
        if form in FORMS and not case.startswith("rows behind"):
            found_in = next((f for f in ("row", "tile") if case.split()[1] == f), "two-pass")
            assert found_in == form, f"{name}: {case}"


def emulated(x, u, z_pieces=2, u_pieces=2, block=64, split=1):
    """The kernels' bfloat16 path in torch: same chunks, pieces and float32 sums, one rounding. x [rows, d] bfloat16.

    split: the tile form's slices of a chunk, each with a sum of its own, added up at the end.
    """
    high = ((u.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32).bfloat16()
    low = (u - high.float()).bfloat16() if u_pieces == 2 else torch.zeros_like(high)
    z = torch.zeros(split, x.shape[0], u.shape[1])
    for start in range(0, x.shape[1], block):
        for part in range(split):
            chunk = slice(start + part * block // split, start + (part + 1) * block // split)
            z[part] = z[part] + x[:, chunk].float() @ high[chunk].float()
            z[part] = z[part] + x[:, chunk].float() @ low[chunk].float()
    z = z.sum(0)
    z_high = z.bfloat16()
    z_low = (z - z_high.float()).bfloat16() if z_pieces == 2 else torch.zeros_like(z_high)
    removed = z_high.float() @ low.float().T
    removed = removed + z_low.float() @ high.float().T
    removed = removed + z_high.float() @ high.float().T
    return (x.float() - removed).bfloat16()


@pytest.mark.parametrize("form", ["two-pass", "tile"])
@pytest.mark.parametrize("d, k", [(2048, 16), (2048, 64), (8192, 10), (8192, 64)])
def test_the_bfloat16_arithmetic_meets_rule_a_and_the_leak_rule(d, k, form):
    from kernel_surgery.kernels.project import launch_options

    options = launch_options(torch.bfloat16, 16384, d, k, form)
    warps = options.get("WARPS")  # of the tile form: each sums 32 columns of a chunk
    order = {"block": 32 * warps, "split": warps} if warps else {"block": options["BLOCK_D"]}
    u = basis(d, k)
    x = torch.randn(64, d).bfloat16()
    inside = (torch.randn(64, k) @ u.T).bfloat16()

    def ratios(**pieces):
        y, kept = emulated(x, u, **order, **pieces), emulated(inside, u, **order, **pieces)
        return (
            worst_ratio((y.double() - project_oracle(x, u)).abs(), rule_a_bound(x, u)),
            worst_ratio((kept.double() - project_oracle(inside, u)).abs(), rule_a_bound(inside, u)),
            worst_ratio(leak(kept, u), leak_bound(kept, inside, u)),
        )

    right = ratios()
    print(f"{form} d={d} k={k}: error/bound {right[0]:.2f} random, {right[1]:.2f} inside; leak/bound {right[2]:.2f}")
    assert max(right) <= 1
    # Teeth: the usual mistakes. Random x alone would not show the first by much; x inside the span does.
    for name, pieces in {"z in bfloat16": {"z_pieces": 1}, "basis in bfloat16": {"u_pieces": 1}}.items():
        wrong = ratios(**pieces)
        print(f"  {name}: error/bound {wrong[0]:.1f} random, {wrong[1]:.1f} inside; leak/bound {wrong[2]:.1f}")
        assert max(wrong[1:]) > 1


def test_the_choice_of_a_form_is_by_shape_alone():
    from kernel_surgery.kernels.project import form_of, launch_options

    def form(rows, d=2048, k=16, dtype=torch.bfloat16, **more):
        return form_of(dtype, rows, d, k, **more)

    assert [form(rows) for rows in (1, 64, 256, 257, 16384)] == ["row", "row", "row", "tile", "tile"]
    assert form(65, k=10) == form(65, k=32) == form(65, d=2049) == form(65, d=4096) == "two-pass"
    assert form(65, packed=False) == form(257, dtype=torch.float16) == form(257, dtype=torch.float32) == "two-pass"
    for d in range(128, 4097, 128):
        if form(257, d) == "tile":
            options = {rows: launch_options(torch.bfloat16, rows, d, 16, "tile") for rows in (257, 16384)}
            assert d % (32 * options[257]["WARPS"]) == 0 and d // (32 * options[257]["WARPS"]) <= 8
            assert options[257]["WARPS"] == options[16384]["WARPS"]  # they decide the order of the sum


def test_the_prepared_pieces_are_those_that_the_kernels_make():
    from kernel_surgery.kernels.project import prepared
    from kernel_surgery.kernels.project import project as launch

    u = basis(256, 16)
    high = ((u.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32).bfloat16()  # as in `emulated`
    low = (u - high.float()).bfloat16()
    across, by_columns = prepared(u)
    assert torch.equal(across, torch.stack([high.T, low.T]))
    for number, piece in enumerate((high, low)):
        assert torch.equal(by_columns[:, :, number].reshape(256, 16), piece)
    x = torch.randn(3, 256).bfloat16()
    for form, dtype, split in (
        ("two-pass", torch.bfloat16, (across, by_columns)),
        ("tile", torch.float32, (across, by_columns)),
        ("tile", torch.bfloat16, (by_columns, across)),
    ):
        with pytest.raises(ValueError, match="only the tile form in 16 bits takes prepared pieces"):
            launch(x.to(dtype), u, 1.0, form=form, split=split)


def table_of_compiled_kernels():
    return json.loads((ROOT / "bench" / "results" / "aot.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90])
def test_it_compiles_without_spills_within_shared_memory_and_with_64_bit_offsets(sm):
    """Each shape is compiled once with the norm, for one device, and once without, for the other; dtypes take turns.
    Among these are all pairs of form and operation, and each figure is that of the stored table, with the compiler that
    made it. So the table is believed for the rest, above all for the tile form, which takes up to ten seconds."""
    import triton

    from kernel_surgery.ops.compiled import CANDIDATES, CASES, OBLIQUE_CASES, compile_project

    table, seen = table_of_compiled_kernels(), set()
    cases = [(False, *case) for case in CASES] + [(True, *case) for case in OBLIQUE_CASES]
    for number, (dual, rows, d, k) in enumerate(cases):
        if (number + (sm == 90)) % 2:  # the tile form is of bfloat16 alone
            operation, dtype = "project_add_rmsnorm", "bfloat16" if dual else DTYPES[(number // 2 + 1) % 3]
        else:
            operation = ("project", "project_add")[number // 2 % 2]
            dtype = ("float16", "float32")[number // 2 % 2] if dual else "bfloat16"
        c = compile_project(sm, dtype, rows, d, k, operation, oblique=dual)
        print(f"sm_{sm} {operation} {c.form} {dtype} {rows} x {d}, k={k}: {c.registers} registers, {c.shared} shared")
        assert c.faults() == []
        made = dataclasses.asdict(c) | {"faults": []}
        assert made in table["rows"] or table["triton"] != triton.__version__, made
        seen.add((c.form, operation != "project_add_rmsnorm"))
    assert seen == set(itertools.product(FORMS, (False, True)))
    # Of the candidates one of each form, the tile form at both widths. The others take up to a minute.
    for number, one in enumerate(CANDIDATES if sm == 90 else ()):
        if one.form == "tile" and not (one.options.get("PREPARED") and one.options["WARPS"] == 8):
            continue
        made = dataclasses.asdict(next(one.compiled())) | {"options": one.options, "faults": []}
        assert made in table["candidates"] or table["triton"] != triton.__version__, (number, made)


def test_the_table_of_compiled_kernels_is_of_this_source_and_has_no_fault():
    from kernel_surgery.ops.compiled import CANDIDATES, CASES, MAY_SPILL, OBLIQUE_CASES, OPERATIONS, kernel_sha256
    from kernel_surgery.ops.occupancy import SHARED_LIMIT

    table = table_of_compiled_kernels()
    remedy = "run: python -m kernel_surgery.aot --out bench/results/aot.json --overwrite"
    assert table["kernel_sha256"] == kernel_sha256(), remedy
    names = {(r["sm"], r["operation"], r["dtype"], r["oblique"], r["rows"], r["d"], r["k"]) for r in table["rows"]}
    assert names == {
        (sm, operation, dtype, oblique, *case)
        for sm in SHARED_LIMIT
        for operation in OPERATIONS
        for dtype in DTYPES
        for oblique in (False, True)
        for case in (CASES, OBLIQUE_CASES)[oblique]
    }, remedy
    assert [r for r in table["rows"] if r["faults"] or r["spilled"] > MAY_SPILL or r["narrow"]] == []
    assert [r for r in table["rows"] if r["blocks"] < 1 or r["in_flight"] < 1] == []
    # The candidates: no spill at all, and two blocks or more where what ships has one.
    ships = {(r["operation"], r["rows"], r["d"], r["k"]): r for r in table["rows"] if of_qwen(r)}
    listed = {(one.form, *one.shape, o, str(one.options)) for one in CANDIDATES for o in one.operations}
    found = {(*(r[n] for n in ("form", "rows", "d", "k", "operation")), str(r["options"])) for r in table["candidates"]}
    assert found == listed and len(found) == len(table["candidates"]), remedy
    for r in table["candidates"]:
        assert r["faults"] == [] and r["spilled"] == 0 and r["blocks"] >= 2
        assert ships[r["operation"], r["rows"], r["d"], r["k"]]["blocks"] == 1


def of_qwen(row):
    """Whether a row of the table is of an orthogonal edit in bfloat16 on sm_90, as the candidates are."""
    return (row["sm"], row["dtype"], row["oblique"]) == (90, "bfloat16", False)


@pytest.mark.parametrize("operation", ["project", "project_add_rmsnorm"])
def test_a_whole_row_is_asked_for_before_anything_is_waited_for(operation):
    """What a decoding step costs is how often a program waits for memory: once, where U is packed and fits."""
    from kernel_surgery.ops.compiled import compile_project

    whole = compile_project(90, "bfloat16", 1, 2048, 16, operation)
    chunks = compile_project(90, "bfloat16", 1, 2048, 16, operation, BLOCK_D=1024)
    print(f"{operation}: loads behind the first barrier: {whole.late_loads} whole, {chunks.late_loads} in chunks")
    assert whole.late_loads == 0 < chunks.late_loads


@pytest.mark.slow
def test_the_ahead_of_time_check_can_fail():
    from kernel_surgery.ops.compiled import compile_project
    from kernel_surgery.ops.occupancy import SHARED_LIMIT

    (spills,) = compile_project(90, "bfloat16", 16384, 2048, 64, BLOCK_M=128, BLOCK_D=128, num_warps=4).faults()
    large = compile_project(90, "bfloat16", 16384, 2048, 64, BLOCK_M=128, BLOCK_D=256)
    print(spills, large.faults())
    assert spills.startswith("spills ") and any("shared memory" in fault for fault in large.faults())
    # The limit is the device's own, to the byte.
    for sm, limit in SHARED_LIMIT.items():
        fits = dataclasses.replace(large, sm=sm, spilled=0, shared=limit)
        assert fits.faults() == [] and dataclasses.replace(fits, shared=limit + 1).faults() == [
            f"needs {limit + 1} bytes of shared memory, sm_{sm} has {limit}"
        ]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the compiled kernel is run")
GPU_SHAPES = [
    *((0, 64, 1), (1, 2048, 10), (17, 2049, 33), (64, 2048, 16), (257, 2048, 16), (8209, 2048, 16), (199, 8192, 64)),
    *((300, 896, 16), (300, 2048, 32), (300, 2560, 16), (300, 4096, 16), (4097, 2048, 10)),
]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("m, d, k", GPU_SHAPES)
@pytest.mark.parametrize("form", ["orthogonal", "affine"])
def test_on_a_gpu_every_bound_holds(dtype, m, d, k, form):
    from kernel_surgery.ops.library import project, project_add, project_add_rmsnorm, provider

    edit = (Projection(basis(d, k)) if form == "orthogonal" else oblique(d, k, offset=True)).to("cuda")
    u, more = edit.basis, {"dual": edit.dual, "offset": edit.offset}
    x, r = torch.randn(m, d).to(dtype).cuda(), torch.randn(m, d).to(dtype).cuda()
    w = torch.rand(d).to(dtype).cuda()
    inside = (torch.randn(m, k) @ u.cpu().T).to(dtype).cuda()
    assert provider(x) == "triton/cuda"
    exact = project_oracle(x, edit, 0.7)
    y, kept = project(x, u, 0.7, **more), project(inside, u, **more)
    ratios = {
        "y": worst_ratio((y.double() - exact).abs(), rule_a_bound(x, edit, 0.7)),
        "leak": worst_ratio(leak(kept, edit), leak_bound(kept, inside, edit)),
    }
    for separate in (True, False):
        h, n = project_add_rmsnorm(x, r, w, 0.3, u, 0.7, separate=separate, **more)
        assert torch.equal(h, project_add(x, r, u, 0.7, separate=separate, **more))
        assert not separate or torch.equal(h, r + y)
        off = (h.double() - (r.double() + exact)).abs()
        ratios[f"h {separate}"] = worst_ratio(off, add_bound(x, r, edit, 0.7, separate))
        off = (n.double() - rmsnorm_oracle(h, w, 0.3)).abs()
        ratios[f"n {separate}"] = worst_ratio(off, rmsnorm_bound(h, w, 0.3, separate))
    figures = ", ".join(f"{what} {ratio:.2f}" for what, ratio in ratios.items())
    print(f"{form} {dtype} {m}x{d} k={k}: {figures} of its bound")
    assert max(ratios.values()) <= 1


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 300])
def test_on_a_gpu_a_captured_graph_replays_the_same_bits(rows, dtype):
    from kernel_surgery.ops.library import project_add_rmsnorm

    x, r = (torch.randn(rows, 2048, device="cuda").to(dtype) for _ in range(2))
    w, u = torch.rand(2048, device="cuda").to(dtype), basis(2048, 16).cuda()
    right = project_add_rmsnorm(x, r, w, 1e-6, u)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h, n = project_add_rmsnorm(x, r, w, 1e-6, u)
    h.zero_(), n.zero_()
    graph.replay()
    assert torch.equal(h, right[0]) and torch.equal(n, right[1])


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_pieces_prepared_once_give_the_same_bits():
    """With eight warps, as in the candidates. What each candidate gives is checked again by `bench.tune`."""
    from kernel_surgery.kernels.project import prepared
    from kernel_surgery.kernels.project import project as launch

    edit = oblique(2048, 16, offset=True).to("cuda")
    x, r = (torch.randn(300, 2048, device="cuda").bfloat16() for _ in range(2))
    split = prepared(edit.dual)[0], prepared(edit.basis)[1]
    how = {"form": "tile", "WARPS": 8, "num_warps": 8, "TILES": 1, "maxnreg": 128}
    more = how | {"residual": r, "dual": edit.dual, "offset": edit.offset}
    h = launch(x, edit.basis, 0.7, split=split, **more)[0]
    assert torch.equal(h, launch(x, edit.basis, 0.7, **more)[0])
    off = (h.double() - (r.double() + project_oracle(x, edit, 0.7))).abs()
    assert worst_ratio(off, add_bound(x, r, edit, 0.7, True)) <= 1


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_rows_beyond_2_to_the_31_elements_are_right():
    """One form after the other: each takes 20 GB."""
    from kernel_surgery.kernels.project import project as launch

    rows, d, last = 2**31 // 2048 + 100, 2048, slice(-50, None)
    u, w = basis(d, 16).cuda(), torch.rand(d).bfloat16().cuda()
    x, r = (torch.zeros(rows, d, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for t in (x, r):
        t[last] = torch.randn(50, d).bfloat16().cuda()
    exact, found = project_oracle(x[last], u), {}
    for form in FORMS:
        y = launch(x, u, 1.0, form=form)[0]
        assert not y[:-50].any()
        found[form, "y"] = worst_ratio((y[last].double() - exact).abs(), rule_a_bound(x[last], u))
        del y
        h, n = launch(x, u, 1.0, residual=r, weight=w, eps=0.3, form=form)
        assert not h[:-50].any() and not n[:-50].any()
        off = (h[last].double() - (r[last].double() + exact)).abs()
        found[form, "h"] = worst_ratio(off, add_bound(x[last], r[last], u))
        off = (n[last].double() - rmsnorm_oracle(h[last], w, 0.3)).abs()
        found[form, "n"] = worst_ratio(off, rmsnorm_bound(h[last], w, 0.3))
        del h, n
    print(f"{rows} x {d}: " + ", ".join(f"{form} {what} {ratio:.2f}" for (form, what), ratio in found.items()))
    assert max(found.values()) <= 1


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [18, 300])
def test_on_a_gpu_a_bad_row_stays_in_its_row(rows, dtype):
    from kernel_surgery.ops.library import project_add_rmsnorm

    x, r = (torch.randn(rows, 2048, device="cuda").to(dtype) for _ in range(2))
    w, u = torch.rand(2048, device="cuda").to(dtype), basis(2048, 16).cuda()
    right = project_add_rmsnorm(x, r, w, 1e-6, u)
    x[4, 7], x[9, 0] = float("nan"), float("inf")
    clean = [i for i in range(rows) if i not in (4, 9)]
    for got, expected in zip(project_add_rmsnorm(x, r, w, 1e-6, u), right, strict=True):
        assert torch.equal(got[clean], expected[clean]) and got[[4, 9]].isnan().any(1).all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rows", [18, 300])
def test_on_a_gpu_a_row_of_strength_0_keeps_its_bits(rows):
    """-0.0 too, and beside sums of nothing but -0.0, which the interpreter does not make."""
    from kernel_surgery.ops.library import project

    x = torch.randn(rows, 2048, device="cuda").bfloat16()
    x[3], x[4, 7] = -0.0, float("inf")
    for u in (basis(2048, 16).cuda(), -basis(2048, 16).abs().cuda()):
        for strengths in (torch.zeros(rows, device="cuda"), torch.full((rows,), -0.0, device="cuda")):
            y = project(x, u, strengths)
            assert torch.equal(y.view(torch.int16), x.view(torch.int16))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu_a_row_has_the_same_bits_in_any_batch_where_that_is_asked_for(dtype):

    x, r = (torch.randn(5000, 2048, device="cuda").to(dtype) for _ in range(2))
    w, u = torch.rand(2048, device="cuda").to(dtype), basis(2048, 16).cuda()
    before = set_batch_invariant(True)
    try:
        whole = project_add_rmsnorm(x, r, w, 1e-6, u)
        for rows in (1, 7, 256, 257, 4097):
            part = project_add_rmsnorm(x[3 : 3 + rows], r[3 : 3 + rows], w, 1e-6, u)
            assert all(torch.equal(p, all_[3 : 3 + rows]) for p, all_ in zip(part, whole, strict=True)), rows
    finally:
        set_batch_invariant(before)
