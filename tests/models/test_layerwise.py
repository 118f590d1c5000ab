"""A model run one layer at a time from its files is the model, to the bit; and little of it is in memory."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernel_surgery.common.errors import UserError
from kernel_surgery.models import layerwise
from kernel_surgery.models.layerwise import Layerwise
from kernel_surgery.numerics.oracle import rmsnorm_oracle
from tests.support.models import pico

KINDS = ["qwen2", "qwen3", "llama", "mistral"]


def run(model: Layerwise, ids):
    with torch.no_grad():
        hidden, where = model.embed(ids), model.positions(0, ids.shape[1])
        for i in range(model.layers):
            with model.layer(i) as block:
                hidden = block(hidden, **where)
        with model.final_norm() as norm:
            hidden = norm(hidden)
        return torch.cat([hidden @ rows.T for _, rows in model.head_blocks()], -1)


def ids():
    return torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tied", [True, False])
def test_layer_by_layer_is_the_model_to_the_bit(tmp_path, kind, dtype, tied, monkeypatch):
    model = pico(kind, dtype=dtype, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    layerwise = Layerwise(tmp_path, dtype)
    monkeypatch.setattr("kernel_surgery.models.layerwise.BLOCK", 64)
    with torch.no_grad():
        assert torch.equal(run(layerwise, ids()), model(input_ids=ids(), use_cache=False).logits)
    # Nothing stays behind.
    assert all(p.is_meta for p in layerwise.model.parameters())


def test_blocks_of_the_vocabulary_make_the_whole(tmp_path, monkeypatch):
    model = pico("llama")
    model.save_pretrained(tmp_path)
    layerwise, hidden = Layerwise(tmp_path, torch.float32), torch.randn(5, 48)
    monkeypatch.setattr("kernel_surgery.models.layerwise.BLOCK", 7)
    blocks = list(layerwise.head_blocks())
    assert [start for start, _ in blocks] == list(range(0, 64, 7))
    assert torch.equal(torch.cat([rows for _, rows in blocks]), model.lm_head.weight)
    assert torch.equal(layerwise.next_tokens(hidden), (hidden @ model.lm_head.weight.T).argmax(-1))


def test_only_the_rows_that_are_asked_for_are_read(tmp_path, monkeypatch):
    model = pico("qwen2")
    model.save_pretrained(tmp_path)

    read, real = [], layerwise.read_tensor
    monkeypatch.setattr(layerwise, "read_tensor", lambda f, e: read.append(e.end - e.begin) or real(f, e))
    wanted = torch.tensor([[3, 60, 3], [5, 5, 3]])
    assert torch.equal(Layerwise(tmp_path, torch.float32).embed(wanted), model.model.embed_tokens(wanted))
    assert read == [48 * 4] * 3


def test_one_layer_and_a_norm_are_filled_at_a_time_also_when_it_fails(tmp_path):
    pico("qwen3").save_pretrained(tmp_path)
    model = Layerwise(tmp_path, torch.float32)
    with pytest.raises(KeyError), model.layer(1):
        here = {name for name, p in model.model.named_parameters() if not p.is_meta}
        assert here == {n for n, _ in model.model.named_parameters() if n.startswith("model.layers.1.")} | {
            "model.layers.2.input_layernorm.weight"
        }
        raise KeyError
    assert all(p.is_meta for p in model.model.parameters())


def test_the_oracle_has_norms_in_float64(tmp_path):
    pico("qwen3").save_pretrained(tmp_path)
    oracle = Layerwise(tmp_path, torch.float64, exact=True)
    x = torch.randn(4, 48, dtype=torch.float64)
    with oracle.final_norm() as norm:
        assert torch.equal(norm(x), rmsnorm_oracle(x, norm.weight, norm.variance_epsilon))
        assert not torch.equal(norm(x), type(norm).forward(norm, x))  # transformers' own goes through float32


def test_a_window_and_the_positions_are_respected(tmp_path):
    pico("mistral", sliding_window=16).save_pretrained(tmp_path)
    model = Layerwise(tmp_path, torch.float32)
    model.check_length(16)
    with pytest.raises(UserError, match="sequences of 17 tokens are longer than the model's 16 tokens of attention"):
        model.check_length(17)
    pico("llama").save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="longer than the model's 256 positions"):
        Layerwise(tmp_path / "other", torch.float32).check_length(257)


def test_files_that_do_not_fit_their_configuration_are_refused(tmp_path):
    pico("qwen2").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    wrong = {k: v for k, v in tensors.items() if k != name}
    save_file(wrong, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"incomplete: {name} is missing"):
        Layerwise(tmp_path, torch.float32)
    save_file(wrong | {name: tensors[name][:-1].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"{name} in .* has shape \(95, 48\), but config.json gives it \(96, 48\)"):
        Layerwise(tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "opt", "architectures": ["OPT"]}))
    with pytest.raises(ValueError, match="cannot find the MLP outputs of a 'opt' model"):
        Layerwise(tmp_path, torch.float32)
