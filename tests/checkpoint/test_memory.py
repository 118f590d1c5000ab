"""What baking and undoing need in memory does not depend on the number of layers or experts."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from kernel_surgery.files.hashing import CHUNK
from kernel_surgery.models.table import ARCHITECTURES
from kernel_surgery.subspace.artifact import Subspace
from tests.support.models import basis

D, FF = 256, 1024
MATRIX = 4 * D * FF
BAKING = """
import json, os, sys, torch
from pathlib import Path
from kernel_surgery.checkpoint.baking import bake_checkpoint, undo_checkpoint
from kernel_surgery.subspace.artifact import Subspace

def now(name):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def measured(folder, work):
    subspace = Subspace.load(folder / "subspace.safetensors", force=True)
    bake_checkpoint(folder / "warm", subspace, folder / f"warm-{work}", force=True)  # what is allocated once for good
    before = now("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    shared = now("VmRSS") - before
    if work == "bake":
        bake_checkpoint(folder / "source", subspace, folder / "baked", force=True)
    else:
        undo_checkpoint(folder / "baked", folder / "restored")
    return now("VmHWM") - shared - before

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    for work in ("bake", "undo"):
        if os.fork() == 0:
            print(json.dumps([[work, folder], measured(Path(folder), work)]), flush=True)
            os._exit(0)
        if os.wait()[1]:
            sys.exit(f"{work}: failed")
"""


def measured(code, folders):
    """{(what was done, key): the bytes that it took at most} of a program that prints both, a line each.

    folders: {key: the folder that it works on}.
    """
    # Every large block is mapped and unmapped for itself: what was freed, in pieces, is not counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    keys = {str(folder): key for key, folder in folders.items()}
    words = [sys.executable, "-c", code, *keys]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    lines = map(json.loads, done.stdout.splitlines())
    return {(work, *keys[folder]): peak for (work, folder), peak in lines}


def written(folder, kind, layers, experts):
    """A checkpoint with the embedding and the experts alone, in the form of its files."""
    layout = ARCHITECTURES[kind]
    (form,) = [form for form in layout.files or layout.writes if form.role == "expert" and not form.bias]
    shape = (FF, D) if form.transposed else (D, FF)
    tensors = {layout.embedding_name(): torch.randn(64, D)}
    for layer in range(layers):
        path = f"{layout.layer(layer)}.{form.path}"
        if form.stacked:
            tensors[path] = torch.randn(experts, *shape)
        else:
            tensors |= {path.replace("*", str(i)): torch.randn(*shape) for i in range(experts)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": kind, "hidden_size": D, "num_hidden_layers": layers, "num_local_experts": experts}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])  # experts one by one in the files, and stacked in one tensor
def test_the_peak_memory_is_a_few_matrices_at_any_number_of_layers_and_experts(kind, tmp_path):
    folders = {}
    for layers, experts in ((2, 8), (2, 32), (6, 8)):
        folder = folders[layers, experts] = tmp_path / f"{layers}-{experts}"
        folder.mkdir()
        for name, size in (("source", experts), ("warm", 1)):
            written(folder / name, kind, layers, size)
        Subspace({i: basis(D, 6, i) for i in range(layers)}, site="mlp_out").save(folder / "subspace.safetensors")
    found = measured(BAKING, folders)
    print({key: f"{peak / 1e6:.2f} MB" for key, peak in found.items()}, f"one matrix {MATRIX / 1e6:.2f} MB")
    # A block of a file that is hashed; the matrix as it is read, the edited one, and copies in float32 of both.
    assert max(found.values()) <= CHUNK + 5 * MATRIX
    for work in ("bake", "undo"):
        peaks = [peak for (did, *_), peak in found.items() if did == work]
        assert max(peaks) - min(peaks) < MATRIX
