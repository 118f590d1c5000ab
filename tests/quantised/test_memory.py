"""What baking a quantised checkpoint needs in memory does not depend on the number of layers or experts."""

import json

import pytest
import torch
from safetensors.torch import save_file

from kernel_surgery.models.table import ARCHITECTURES
from kernel_surgery.subspace.artifact import Subspace
from tests.checkpoint.test_memory import BAKING, measured
from tests.support.models import basis
from tests.support.quantised import CONFIGS, quantised

D, FF = 256, 1024
MATRIX = 4 * D * FF
# The same measuring, with the two ways in the places of baking and undoing.
WORK = (
    BAKING.replace('f"warm-{work}", force=True', 'f"warm-{work}", force=True, quantised=work')
    .replace('folder / "baked", force=True', "folder / work, force=True, quantised=work")
    .replace('if work == "bake":', "if True:")
    .replace('("bake", "undo")', '("requantize", "dequantize")')
)


def written(folder, name, layers, experts):
    """A checkpoint with the embedding and quantised experts alone. All experts of a layer are one."""
    layout = ARCHITECTURES["mixtral"]
    (form,) = layout.files
    tensors = {layout.embedding_name(): torch.randn(64, D)}
    for layer in range(layers):
        path = f"{layout.layer(layer)}.{form.path}"
        made = quantised(name, torch.randn(D, FF), path, torch.bfloat16)
        for expert in range(experts):
            tensors |= {key.replace("*", str(expert)): tensor.clone() for key, tensor in made.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "mixtral", "hidden_size": D, "num_hidden_layers": layers, "num_local_experts": experts}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[name]}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4-zero"])  # numbers, scales and zero points: more than the others have
def test_the_peak_memory_is_a_few_matrices_at_any_number_of_layers_and_experts(name, tmp_path):
    folders = {}
    for layers, experts in ((2, 8), (2, 32), (6, 8)):
        folder = folders[layers, experts] = tmp_path / f"{layers}-{experts}"
        folder.mkdir()
        for what, size in (("source", experts), ("warm", 1)):
            written(folder / what, name, layers, size)
        Subspace({i: basis(D, 6, i) for i in range(layers)}, site="mlp_out").save(folder / "subspace.safetensors")
    found = measured(WORK, folders)
    print({key: f"{peak / 1e6:.2f} MB" for key, peak in found.items()}, f"one matrix {MATRIX / 1e6:.2f} MB")
    # The matrix and the edited one in float32; of ROWS rows, which are all here, the numbers and values by both scales
    # in float32, the errors of both and their squares in float64, and what is in between.
    assert max(found.values()) <= 16 * MATRIX
    for work in ("requantize", "dequantize"):
        peaks = [peak for (did, *_), peak in found.items() if did == work]
        headers = 8192 * 2 * 32  # names and places of up to 64 matrices, as Python holds them
        assert max(peaks) - min(peaks) < MATRIX + headers
