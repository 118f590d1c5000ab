"""The regression guard: what every way of making the edit does, counted, not timed. A change of it is a decision."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import methods, opcount, store
from bench.timing import NOISE
from kernel_surgery.ops.aten import project_add_rmsnorm_aten
from kernel_surgery.ops.library import _DIRECT, _project_add_rmsnorm

ROOT = Path(__file__).resolve().parents[2]
KEPT = store.newest(ROOT / "bench" / "results" / "opcount-small.json")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def rows(request):
    return opcount.rows_of("small", request.param, methods.NAMES)


def decided(rows):
    dtype = rows[0]["dtype"]
    return {r["provider"]: {k: r[k] for k in opcount.KINDS} for r in KEPT if r["dtype"] == dtype}


def test_every_count_is_the_one_that_was_decided_on(rows):
    found = {row["provider"]: {kind: row[kind] for kind in opcount.KINDS} for row in rows}
    assert found == decided(rows), "python -m bench.opcount --case small --out bench/results/opcount-small.json"


def test_fused_does_no_more_than_a_peer_and_less_than_the_eager_hook(rows):
    assert opcount.faults(rows) == []
    own = {row["provider"]: row for row in rows}
    assert own["fused"]["matrix_products"] == 2 and own["baked"]["operations"] == 0
    # The check can fail, in every kind that it looks at.
    for kind in opcount.KINDS:
        worse = [row | ({kind: own["peft"][kind] + 1} if row["provider"] == "fused" else {}) for row in rows]
        assert any(f"fused {kind}" in fault for fault in opcount.faults(worse)), kind


def test_what_is_counted_is_held_to_its_bound_and_who_breaks_it_is_no_peer(rows):
    """Products in 16 bits are cheap and something else: the addmm hook's, and PEFT's with an adapter of 16 bits."""
    off = {row["provider"]: row["error_over_bound"] for row in rows}
    print({name: None if ratio is None else round(ratio, 2) for name, ratio in off.items()})
    coarse = {"addmm hook", methods.NARROW} if rows[0]["dtype"] == "bfloat16" else set()
    assert {name for name, ratio in off.items() if ratio is not None and ratio > 1} == coarse
    assert [name for name, ratio in off.items() if ratio is None] == [NOISE]
    for name in coarse:
        better = [row | (dict.fromkeys(opcount.KINDS, 0) if row["provider"] == name else {}) for row in rows]
        assert opcount.faults(better) == []


def test_a_pass_over_the_rows_too_many_is_seen(monkeypatch):
    real = project_add_rmsnorm_aten

    def careless(x, *more):
        return real(x.clone(), *more)

    direct = _DIRECT[_project_add_rmsnorm] | {"cpu": careless}
    monkeypatch.setitem(_DIRECT, _project_add_rmsnorm, direct)
    names = ["original", "hook", "fused"]
    found = {row["provider"]: row for row in opcount.rows_of("small", "float32", names)}
    before = {r["provider"]: r for r in KEPT if r["dtype"] == "float32"}
    for kind, more in (
        ("operations", 1),
        ("allocations", 1),
        ("bytes_moved", 2 * 32 * 256 * 4),
        ("matrix_products", 0),
    ):
        assert found["fused"][kind] == before["fused"][kind] + more, kind
    assert found["hook"]["operations"] == before["hook"]["operations"]


def test_the_counter_counts_what_an_operation_reads_and_writes():
    x, w = torch.randn(4, 8), torch.randn(8, 16)
    with torch.no_grad(), opcount.counter() as mode:
        _ = x.T.view(8, 4)[:2].T  # views
        y = x @ w
        y += 1
        y.expand(2, 4, 16).sum()
    products = 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert mode.counts["matrix_products"] == 1 and mode.counts["operations"] == 3
    assert mode.counts["allocations"] == 2 and mode.counts["bytes_allocated"] == 4 * (4 * 16 + 1)
    # In place: read and written; the broadcast dimension of the sum is read once; its result is one number.
    assert mode.counts["bytes_moved"] == products + 4 * 2 * 64 + 4 * (64 + 1)


def test_bake_reads_and_writes_every_byte_once_and_hashes_what_it_wrote(tmp_path, monkeypatch):
    """Counted by the kernel's account of this process: reads of the source, reads for the hash, writes."""
    from bench.checkpoint import make_source
    from kernel_surgery.checkpoint import baking
    from kernel_surgery.subspace.artifact import Subspace

    # Where a filesystem can share blocks fewer bytes move, and that is not what is counted here.
    monkeypatch.setattr(baking, "share_blocks", lambda source, target: False)
    small = {"hidden_size": 128, "intermediate_size": 4096, "num_attention_heads": 1, "num_key_value_heads": 1}
    make_source(tmp_path / "source", 8, **small, vocab_size=64)
    space = Subspace.load(tmp_path / "subspace.safetensors")
    size = (tmp_path / "source" / "model.safetensors").stat().st_size
    baking.bake_checkpoint(tmp_path / "source", space, tmp_path / "first")  # what is imported is read by now

    def account():
        lines = Path("/proc/self/io").read_text().splitlines()
        return {name: int(value) for name, value in (line.split(": ") for line in lines)}

    before = account()
    baking.bake_checkpoint(tmp_path / "source", space, tmp_path / "baked")
    after = account()
    read, written = (after[key] - before[key] for key in ("rchar", "wchar"))
    folder = sum(f.stat().st_size for f in (tmp_path / "baked").rglob("*") if f.is_file())
    assert (tmp_path / "baked" / "model.safetensors").stat().st_size == size
    # Written: every file of the folder, once. Read: the source, and what was written, for its hash.
    more_written, more_read = written - folder, read - size - folder
    print(f"{size / 1e6:.1f} MB: {more_written} bytes more are written than there are, {more_read} more read than that")
    assert more_written == 0
    # Headers, configuration, the samples that tell whether the weights are the fitted ones, and /proc itself.
    assert 0 <= more_read <= 2**18 < size / 50


LAUNCHES = """
import os
import subprocess
import sys
os.environ["TRITON_INTERPRET"] = "1"
import torch
from kernel_surgery.kernels import project as kernels
from tests.support.models import basis

class Counted:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        def launched(*args, **kwargs):
            seen.append(grid)
            return self.kernel[grid](*args, **kwargs)
        return launched
    def __getattr__(self, name):
        return getattr(self.kernel, name)

seen = []
for form, kernel in kernels.KERNELS.items():
    kernels.KERNELS[form] = Counted(kernel)
x, u, weight = torch.randn(5, 128), basis(128, 16), torch.ones(128)
for form in ("row", "tile", "two-pass"):
    for more in ({}, {"residual": x}, {"residual": x, "weight": weight, "eps": 1e-6}):
        seen.clear()
        kernels.project(x, u, 1.0, form=form, **more)
        print(form, len(more), len(seen))
"""


@pytest.mark.slow
def test_every_operator_is_one_launch_in_every_form():
    """Counted in the interpreter, through the launcher that CUDA takes: with the addition and the norm too."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LAUNCHES],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line.split() for line in done.stdout.splitlines()]
    assert len(found) == 9 and {launches for *_, launches in found} == {"1"}, found
