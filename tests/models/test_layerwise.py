"""A model run one layer at a time from its files is the model, to the bit; and little of it is in memory."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernel_surgery.common.errors import ModelError, UserError
from kernel_surgery.models import filling
from kernel_surgery.models.layerwise import Layerwise
from kernel_surgery.models.load import load_model
from kernel_surgery.models.table import ARCHITECTURES
from kernel_surgery.numerics.bounds import accumulated, worst_ratio
from kernel_surgery.numerics.oracle import rmsnorm_oracle
from tests.support.marks import everyday
from tests.support.models import pico
from tests.support.picos import pico_of

KINDS = ["qwen2", "qwen3", "llama", "mistral"]
FEW = everyday(ARCHITECTURES, "qwen3", "gpt2", "bloom", "gemma2", "gpt_oss", "llama4", "qwen3_next", "lfm2")


def run(model: Layerwise, ids):
    with torch.no_grad():
        hidden, calls = model.begin(ids)
        for i in range(model.layers):
            with model.layer(i) as block:
                hidden = calls.run(i, block, hidden)
        with model.final_norm() as norm:
            hidden = norm(hidden)
        return torch.cat([logits(hidden) for _, logits in model.head_blocks()], -1)


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


@pytest.mark.parametrize("dtype", everyday([torch.float32, torch.bfloat16], torch.float32))
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_runs_layer_by_layer_to_the_bit(tmp_path, kind, dtype):
    """Whatever it does around its layers: embedding norms and scales, positions, masks, tuples, caps of the logits."""
    pico_of(kind, dtype=dtype).save_pretrained(tmp_path, max_shard_size="200KB")
    reader, whole = Layerwise(tmp_path, dtype), load_model(str(tmp_path), dtype)
    with torch.no_grad():
        assert torch.equal(run(reader, ids()), whole(input_ids=ids(), use_cache=False).logits)
    inside = (f"{reader.layout.body}.", f"{reader.layout.head}.")
    assert all(p.is_meta for name, p in reader.model.named_parameters() if name.startswith(inside))


@pytest.mark.parametrize("kind", FEW)
def test_every_architecture_decodes_layer_by_layer_as_the_whole_model_does(tmp_path, kind):
    """A token at a time, with the cache that the model itself starts.

    The kernels may add in another order, as memory is aligned: by no more than the cache itself changes the sums.
    """
    pico_of(kind).save_pretrained(tmp_path)
    reader, whole = Layerwise(tmp_path, torch.float32), load_model(str(tmp_path), torch.float32)
    cache, start, text = None, 0, ids()
    with torch.no_grad():
        uncached = whole(input_ids=text, use_cache=False).logits
        want = whole(input_ids=text[:, :10], use_cache=True)
        for stop in (10, 11, 12):
            if start:
                want = whole(input_ids=text[:, start:stop], past_key_values=want.past_key_values, use_cache=True)
            hidden, calls = reader.begin(text[:, start:stop], cache, keep=True)
            for i in range(reader.layers):
                with reader.layer(i) as block:
                    hidden = calls.run(i, block, hidden)
            with reader.final_norm() as norm:
                hidden = norm(hidden)
            got = torch.cat([logits(hidden) for _, logits in reader.head_blocks()], -1)
            allowed = max(float((uncached[:, start:stop] - want.logits).norm()), 2**-23 * float(want.logits.norm()))
            assert float((got - want.logits).norm()) <= 2 * allowed, f"tokens {start} to {stop - 1}"
            cache, start = calls.cache, stop


@pytest.mark.parametrize("kind", FEW)
def test_every_architecture_has_an_oracle_with_float64_norms(tmp_path, kind):
    """Only a norm with a gate is left in float32. A norm in float64 is its own in float32, but for the rounding."""
    pico_of(kind).save_pretrained(tmp_path)
    oracle = Layerwise(tmp_path, torch.float64, exact=True)
    norms = [m for m in oracle.body.modules() if "Norm" in type(m).__name__ and not isinstance(m, torch.nn.LayerNorm)]
    assert all(type(m).__name__.endswith("RMSNormGated") for m in norms if "forward" not in vars(m))
    for i in range(oracle.layers):
        with oracle.layer(i) as block:
            for norm in (m for m in block.modules() if m in norms and "forward" in vars(m)):
                shape = tuple(norm.weight.shape) if hasattr(norm, "weight") else (48,)
                x = torch.randn(3, *shape, dtype=torch.float64)
                exact, own = norm(x), type(norm).forward(norm, x)
                assert exact.dtype == torch.float64 and not torch.equal(exact, own)
                # A sum of d squares and four more roundings in float32 (`bounds.rmsnorm_bound`).
                assert float(((exact - own).abs() / exact.abs().amax()).max()) < (math.sqrt(shape[-1]) / 2 + 8) * 2**-23


def test_experts_that_are_too_few_in_the_files_are_refused(tmp_path):
    pico_of("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if ".layers.2.mlp.experts.3." not in name}
    assert len(kept) == len(tensors) - 3
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reader = Layerwise(tmp_path, torch.float32)
    message = r"layers\.2\.mlp\.experts\.\w+ in .* has shape \(3, .* gives it \(4, "
    with pytest.raises(UserError, match=message), reader.layer(2):
        pass
    with reader.layer(3):
        pass
    save_file(
        {name: t for name, t in tensors.items() if ".layers.2.mlp.experts." not in name},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match=r"incomplete: model\.layers\.2\.mlp\.experts\.\w+ is missing"):
        Layerwise(tmp_path, torch.float32)


def test_a_body_that_changes_the_states_between_its_layers_is_refused(tmp_path, monkeypatch):
    pico("llama").save_pretrained(tmp_path)
    reader = Layerwise(tmp_path, torch.float32)
    block = reader.body.layers[1]
    block.register_forward_pre_hook(lambda module, args: (args[0] * 1, *args[1:]))
    with pytest.raises(ModelError, match="it changes the hidden states between its layers"):
        reader.begin(ids())


def test_blocks_of_the_vocabulary_make_the_whole(tmp_path, monkeypatch):
    model = pico("llama")
    model.save_pretrained(tmp_path)
    layerwise, hidden = Layerwise(tmp_path, torch.float32), torch.randn(5, 48)
    monkeypatch.setattr("kernel_surgery.models.layerwise.BLOCK", 7)
    blocks, starts = [], []
    for start, logits in layerwise.head_blocks():
        starts.append(start)
        blocks.append(logits(hidden))
        assert blocks[-1].shape == (5, min(7, 64 - start)) == (5, len(layerwise.model.lm_head.weight))
    assert starts == list(range(0, 64, 7))
    weight = model.lm_head.weight.detach().double()
    exact, scale = hidden.double() @ weight.T, (hidden.double().square() @ weight.square().T).sqrt()
    assert worst_ratio((torch.cat(blocks, -1) - exact).abs(), accumulated(scale, exact, 48)) <= 1
    assert torch.equal(layerwise.next_tokens(hidden), (hidden @ model.lm_head.weight.T).argmax(-1))
    assert layerwise.model.lm_head.weight.is_meta


def test_only_the_rows_that_are_asked_for_are_read(tmp_path, monkeypatch):
    model = pico("qwen2")
    model.save_pretrained(tmp_path)

    read, real = [], filling.read_tensor
    monkeypatch.setattr(filling, "read_tensor", lambda f, e: read.append(e.end - e.begin) or real(f, e))
    wanted = torch.tensor([[3, 60, 3], [5, 5, 3]])
    assert torch.equal(Layerwise(tmp_path, torch.float32).embed(wanted), model.model.embed_tokens(wanted))
    assert read == [48 * 4] * 3


def test_a_padding_token_beyond_the_rows_that_are_read_does_not_matter(tmp_path):
    model = pico("qwen2", pad_token_id=63)
    model.save_pretrained(tmp_path)
    assert model.model.embed_tokens.padding_idx == 63
    wanted = torch.tensor([[3, 60, 3]])
    assert torch.equal(Layerwise(tmp_path, torch.float32).embed(wanted), model.model.embed_tokens(wanted))


@pytest.mark.parametrize("kind", everyday(ARCHITECTURES, "mixtral", "granitemoe", "gemma3", "llama4", "gpt2"))
def test_a_checkpoint_with_the_names_that_the_model_has_in_memory_is_read_too(tmp_path, kind):
    """As other programs write it: experts stacked, no name changed."""
    model = pico_of(kind)
    model.save_pretrained(tmp_path)
    tied = model.all_tied_weights_keys
    own = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(own, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        assert torch.equal(run(Layerwise(tmp_path, torch.float32), ids()), model(input_ids=ids()).logits)


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


def test_a_window_is_kept_and_positions_are_respected(tmp_path):
    whole = pico("mistral", sliding_window=8)
    whole.save_pretrained(tmp_path)
    model = Layerwise(tmp_path, torch.float32)
    with torch.no_grad():
        want = whole(input_ids=ids(), use_cache=False).logits
        assert torch.equal(run(model, ids()), want)
        whole.config.sliding_window = None
        assert not torch.equal(whole(input_ids=ids(), use_cache=False).logits, want)  # the window counts
    with pytest.raises(UserError, match="longer than the model's 256 positions"):
        model.check_length(257)
    pico_of("mpt").save_pretrained(tmp_path / "other")
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
