"""The table of tensors: a layer's experts share a row with the worst figures, and a fault still names its tensor."""

import math
import re

import pytest
import torch

from kernel_surgery import Subspace
from kernel_surgery.certify.files import verify_checkpoint
from kernel_surgery.certify.render import grouped, shown, tensor_table
from kernel_surgery.checkpoint.baking import bake_checkpoint
from kernel_surgery.models.table import without_number
from kernel_surgery.subspace.fingerprint import fingerprint
from tests.support.models import basis
from tests.support.picos import pico_of


def row(layer, name, error, leak=None, over=None, **more):
    figures = {"error_over_bound": error, "leak": leak, "leak_floor": 1e-3, "leak_over_floor": over}
    return {"layer": layer, "tensor": name, "dtype": "BF16", **figures, **more}


def test_experts_of_a_layer_share_a_row_with_the_worst_of_each_figure():
    stacked, alone = "model.layers.{}.mlp.experts.down_proj[{}]", "model.layers.{}.mlp.experts.{}.down_proj.weight"
    rows = [row(1, "model.layers.1.mlp.shared_expert.down_proj.weight", 0.5, 1e-3, 1.0)]
    for name, layer in ((stacked, 1), (alone, 2)):
        rows += [row(layer, name.format(layer, i), 0.9 - i / 100, i * 1e-3, i / 8) for i in range(8)]
    rows.append(row(3, "model.layers.3.mlp.down_proj.weight", 0.25, 2e-3, 1.01))
    found = grouped(rows)
    assert [(r["tensor"], r["error_over_bound"], r["leak"], r["leak_over_floor"]) for r in found] == [
        ("model.layers.1.mlp.shared_expert.down_proj.weight", 0.5, 1e-3, 1.0),
        ("model.layers.1.mlp.experts.down_proj[*] (8 experts)", 0.9, 7e-3, 7 / 8),
        ("model.layers.2.mlp.experts.*.down_proj.weight (8 experts)", 0.9, 7e-3, 7 / 8),
        ("model.layers.3.mlp.down_proj.weight", 0.25, 2e-3, 1.01),
    ]
    head, lines = tensor_table(rows)
    assert len(lines) == 4 and head[:4] == ["layer", "tensor", "dtype", "error/bound"]


@pytest.mark.parametrize("worst", [math.nan, math.inf, 5.0])
def test_one_bad_expert_is_the_one_that_is_shown(worst):
    rows = [row(1, f"experts.down_proj[{i}]", worst if i == 2 else 0.1, 1e-3, 0.5) for i in range(4)]
    (only,) = grouped(rows)
    assert only["error_over_bound"] == worst or (math.isnan(worst) and math.isnan(only["error_over_bound"]))


def test_dtypes_and_layers_are_not_mixed():
    rows = [row(i % 2, f"experts.down_proj[{i}]", 0.1) | {"dtype": "F16" if i > 3 else "BF16"} for i in range(8)]
    assert [r["tensor"] for r in grouped(rows)] == ["experts.down_proj[*] (2 experts)"] * 4
    assert without_number("model.layers.7.mlp.down_proj.weight") == "model.layers.7.mlp.down_proj.weight"


def test_a_mixture_prints_a_row_per_layer_and_kind_and_names_the_tensor_at_fault(tmp_path):
    model = pico_of("qwen2_moe", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    d = model.config.hidden_size
    edits = {layer: basis(d, 3, seed=layer) for layer in range(model.config.num_hidden_layers)}
    subspace = Subspace(edits, site="mlp_out", fingerprint=fingerprint(model))
    bake_checkpoint(tmp_path / "model", subspace, tmp_path / "baked", force=True)
    good = verify_checkpoint(tmp_path / "baked", tmp_path / "model")
    assert good["faults"] == []
    kinds = {(r["layer"], without_number(r["tensor"])) for r in good["tensors"]}
    lines = shown(good).split("\n\n")[0].split("\n")[1:]
    assert len(lines) == len(kinds) < len(good["tensors"]) and any("experts)" in line for line in lines)
    # One element of one expert is changed.
    from safetensors.torch import load_file, save_file

    (file,) = (tmp_path / "baked").glob("model*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if re.search(r"\.0\.mlp\.experts\.2\.down_proj", name))
    tensors[name].view(-1)[5] += 9
    save_file(tensors, file, metadata={"format": "pt"})
    bad = verify_checkpoint(tmp_path / "baked", tmp_path / "model")
    assert len(bad["tensors"]) == len(good["tensors"])
    assert "\nfault: layer 0: model.layers.0.mlp.experts.down_proj[2]: " in shown(bad)
