"""Headers: what the format's own library refuses is refused, each kind with a clear error and no traceback."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from kernel_surgery.checkpoint.baking import UNDO, _read_undo
from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.files.tensorfile import mapped, read_layout
from tests.support.models import basis

GOOD = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def written(path, header, body=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


HEADERS = {
    "a text as shape": GOOD | {"a": GOOD["a"] | {"shape": "48"}},
    "a shape below zero": GOOD | {"a": GOOD["a"] | {"shape": [-2, -2]}},
    "a shape of fractions": GOOD | {"a": GOOD["a"] | {"shape": [2.0, 2.0]}},
    "a shape that is too large": GOOD | {"a": GOOD["a"] | {"shape": [1 << 62, 1 << 62]}},
    "a dtype that is none": GOOD | {"a": GOOD["a"] | {"dtype": {}}},
    "an unknown dtype": GOOD | {"a": GOOD["a"] | {"dtype": "F33"}},
    "offsets that overlap": GOOD | {"b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}},
    "an end before the begin": GOOD | {"b": {"dtype": "F4", "shape": [1], "data_offsets": [16, 8]}},
    "three offsets": GOOD | {"a": GOOD["a"] | {"data_offsets": [0, 8, 16]}},
    "a hole": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
    "metadata of numbers": GOOD | {"__metadata__": {"format": 1}},
    "nested too deep": b"[" * 100_000,
    "a list": [],
    "not UTF-8": b'{"\xff": 3}',
    "not a number": b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_header_is_refused(name, tmp_path):
    with pytest.raises(CheckpointError, match=r"m\.safetensors' cannot be read as safetensors \("):
        read_layout(written(tmp_path / "m.safetensors", HEADERS[name]))


def test_a_good_header_is_read(tmp_path):
    layout = read_layout(written(tmp_path / "m.safetensors", GOOD, torch.arange(4.0).numpy().tobytes()))
    assert layout.entries["a"].shape == (2, 2)
    assert torch.equal(mapped(layout.path, layout.entries["a"]), torch.arange(4.0).reshape(2, 2))


@pytest.mark.parametrize(
    "change",
    [
        {"inside.model.layers.5.mlp.down_proj.weight": torch.zeros(2, 6)},  # a layer without a basis
        {"inside.model.layers.1.mlp.down_proj.weight": torch.zeros(2, 7)},
        {"inside.model.layers.1.mlp.down_proj.weight": torch.zeros(3, 6)},
        {"inside.model.layers.1.mlp.up_proj.weight": torch.zeros(2, 6)},
        {"basis.1": basis(10, 2)},
    ],
)
def test_an_undo_file_that_does_not_fit_its_checkpoint_is_refused(change, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({name: torch.zeros(8, 6)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 4}')
    layouts, undo = [read_layout(tmp_path / "model.safetensors")], tmp_path / UNDO
    undo.parent.mkdir()
    kept = {"basis.1": basis(8, 2), f"inside.{name}": torch.zeros(2, 6)}
    save_file(kept, undo)
    bases, edited, insides = _read_undo(tmp_path, layouts)
    assert set(bases) == {1} and [part.name for part in edited] == [name] and set(insides) == {f"inside.{name}"}
    save_file(kept | change, undo)
    with pytest.raises(CheckpointError, match=r"undo\.safetensors' does not fit its checkpoint: .* cannot be undone"):
        _read_undo(tmp_path, layouts)
