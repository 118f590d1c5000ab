"""Weights that do not fit into their dtype any more, offloaded weights, and the permissions of what is written."""

import os

import pytest
import torch

from kernel_surgery import Subspace, adapted, bake_checkpoint, baked, fused, hooked, write_adapter
from kernel_surgery.common.errors import CheckpointError, KernelSurgeryError, ModelError
from kernel_surgery.models.load import POLYGLOT, load_model
from kernel_surgery.models.load import POLYGLOT_SUBSPACE as SHIPPED
from tests.support.models import basis, pico


@pytest.fixture
def half(tmp_path):
    """polyglot stored in float16."""
    load_model("polyglot", torch.float16).save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "half" / name).write_bytes((POLYGLOT / name).read_bytes())
    return tmp_path / "half"


def test_an_edit_beyond_the_dtype_is_refused_and_nothing_is_written(half, tmp_path):
    with pytest.raises(CheckpointError, match=r"strength 1e\+06.*float16"):
        bake_checkpoint(half, Subspace.load(SHIPPED), tmp_path / "out", strength=1e6)
    assert [p.name for p in tmp_path.iterdir()] == ["half"]


def test_a_strength_beyond_float32_is_refused_by_every_mode():
    model = pico("llama")
    for mode in (hooked, baked, fused, adapted):
        with pytest.raises(KernelSurgeryError, match=r"got 1e\+39"), mode(model, {1: basis(48, 4)}, 1e39):
            pytest.fail("the block was entered")


def test_weights_that_leave_the_dtype_in_memory_are_refused_and_put_back():
    model = pico("llama", dtype=torch.float16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KernelSurgeryError, match="model is unchanged"), baked(model, {1: basis(48, 4)}, 1e7):
        pytest.fail("the block was entered")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_whose_layers_are_not_in_memory_is_refused_by_every_mode():
    """What accelerate's offloading leaves in a model: weights on the meta device."""
    model = pico("llama")
    layer = model.model.layers[2].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.to("meta"))
    for mode in (hooked, baked, fused, adapted):
        with pytest.raises(ModelError, match="offloaded"), mode(model, {1: basis(48, 4), 2: basis(48, 4)}):
            pytest.fail("the block was entered")


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_what_is_written_has_the_permissions_of_any_new_file(half, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        subspace = Subspace.load(SHIPPED)
        subspace.save(tmp_path / "subspace.safetensors")
        write_adapter(half, subspace, tmp_path / "adapter")
        bake_checkpoint(half, subspace, tmp_path / "baked")
    finally:
        os.umask(before)
    ours = [tmp_path / "subspace.safetensors", *(p for d in ("adapter", "baked") for p in (tmp_path / d).rglob("*"))]
    # Files that are copied as they are keep their permissions.
    copied = {p.name for p in half.iterdir()} - {"model.safetensors"}
    modes = {p.name: p.stat().st_mode & 0o777 for p in ours if p.is_file() and p.name not in copied}
    print(modes)
    assert set(modes.values()) == {mode}
