"""Whole MLP blocks in vLLM, without vLLM: what is edited, where vLLM has it, and what is refused."""

from contextlib import nullcontext
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn

from kernel_surgery.common.errors import ModelError
from kernel_surgery.engines import layers
from kernel_surgery.engines.layers import Edits, prepare_worker
from kernel_surgery.engines.refusing import layout_for, refuse_block
from kernel_surgery.engines.settings import PluginSettings
from kernel_surgery.models.load import POLYGLOT_SUBSPACE
from kernel_surgery.models.table import ARCHITECTURES
from kernel_surgery.numerics.bounds import rule_a_bound, worst_ratio
from kernel_surgery.numerics.oracle import project_oracle
from kernel_surgery.subspace.artifact import Subspace
from tests.support.models import oblique

D, LAYERS = 48, (1, 2)


class Experts(nn.Module):
    """What the plugin looks at in vLLM's runner of experts."""

    def __init__(self, **config):
        super().__init__()
        self.moe_config = SimpleNamespace(**config)


class Block(nn.Module):
    """A block that adds a shared expert to its routed ones."""

    def __init__(self, pair=False, **config):
        super().__init__()
        self.experts, self.shared, self.pair = Experts(**config), nn.Linear(D, D, bias=False), pair

    def forward(self, hidden_states, *, scale=1.0):
        output = scale * hidden_states + self.shared(hidden_states)
        return (output, "scores") if self.pair else output


def model_of(blocks, name="mlp"):
    layers = nn.ModuleList(nn.Module() for _ in range(4))
    for layer, block in zip(layers, blocks, strict=True):
        layer.add_module(name, block)
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = layers
    return model


def edits_for(kind="qwen2_moe", **more):
    projections = {layer: oblique(D, 4, layer, spread=3.0, **more) for layer in LAYERS}
    subspace = Subspace.of(projections, n_layers=4, strengths={2: 0.5})
    settings = PluginSettings(POLYGLOT_SUBSPACE, 1.0, None, force=True)
    return Edits(settings, subspace, ARCHITECTURES[kind], LAYERS, torch.ones(16))


@pytest.mark.parametrize("pair", [False, True])
def test_the_sum_of_routed_and_shared_experts_is_edited_once(pair):
    model, edits = model_of([Block(pair) for _ in range(4)]), edits_for()
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = [layer.mlp(x, scale=3.0) for layer in model.model.layers]
        edits.edit_blocks(model)
        after = [layer.mlp(x, scale=3.0) for layer in model.model.layers]
    assert edits.check(model, "rank 0") == "fingerprint not compared (force)" and edits.report()["layers"] == [1, 2]
    for layer, (plain, edited) in enumerate(zip(before, after, strict=True)):
        if pair:
            assert edited[1] == "scores"
            plain, edited = plain[0], edited[0]
        if layer not in LAYERS:
            assert torch.equal(plain, edited)
            continue
        projection, strength = edits.subspace.projections[layer], edits.subspace.strength_at(layer, 1.0)
        exact = project_oracle(plain, projection, strength)
        ratio = worst_ratio((edited.double() - exact).abs(), rule_a_bound(plain, projection, strength))
        print(f"layer {layer}: error/bound {ratio:.3f}")
        assert ratio <= 1 and worst_ratio((plain.double() - exact).abs(), rule_a_bound(plain, projection)) > 1
    edits.set_strength(0.0)
    with torch.no_grad():
        output = model.model.layers[1].mlp(x, scale=3.0)
    assert torch.equal(output[0] if pair else output, before[1][0] if pair else before[1])


def test_a_block_with_a_forward_of_its_own_is_edited_too():
    """As vLLM's Transformers backend gives it one. It goes before that of the class."""
    x, edits = torch.ones(2, D), edits_for()
    model = model_of([Block() for _ in range(4)]).requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.forward = MethodType(lambda self, hidden_states: 7 * hidden_states, layer.mlp)
    edits.edit_blocks(model)
    edits.check(model, "rank 0")
    projection, after = edits.subspace.projections[1], model.model.layers[1].mlp(x)
    exact = project_oracle(7 * x, projection, 1.0)
    assert worst_ratio((after.double() - exact).abs(), rule_a_bound(7 * x, projection)) <= 1
    assert torch.equal(model.model.layers[0].mlp(x), 7 * x) and not torch.equal(after, 7 * x)
    # One that is given to it later would not edit.
    model.model.layers[2].mlp.forward = MethodType(lambda self, hidden_states: hidden_states, model.model.layers[2].mlp)
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp is wrapped by another layer on rank 0"):
        edits.check(model, "rank 0")


def test_blocks_that_are_not_there_are_counted():
    edits = edits_for()
    model = model_of([Block() for _ in range(4)], name="moe")
    edits.edit_blocks(model)
    words = r"0 of 2 layers are edited on rank 0: there is no block named model\.layers\.1\.mlp"
    with pytest.raises(ModelError, match=words):
        edits.check(model, "rank 0")


def test_a_block_is_found_where_vllm_has_it():
    edits = edits_for("mixtral")
    model = model_of([Block() for _ in range(4)], name="block_sparse_moe")
    edits.edit_blocks(model)
    assert edits.check(model, "rank 0") and edits.layer_of("model.layers.2.block_sparse_moe") == 2
    assert ARCHITECTURES["gpt_neox"].vllm_site(3) == "model.layers.3.mlp.dense_4h_to_h"
    assert ARCHITECTURES["gemma3"].vllm_site("*") == "language_model.model.layers.*.mlp.down_proj"
    assert ARCHITECTURES["gemma3"].vllm_body == "language_model.model"
    assert ARCHITECTURES["llama"].vllm_site(1) == ARCHITECTURES["llama"].site_name(1)


class ReplicatedLinear(nn.Linear):
    """What the plugin looks at in vLLM's linear layer that every rank holds whole."""

    def __init__(self, skip_bias_add=False):
        super().__init__(D, D)
        self.skip_bias_add = skip_bias_add

    def forward(self, input_):
        return super().forward(input_), None


def test_of_linear_sites_those_that_every_rank_holds_whole_are_edited():
    edits = edits_for("llama")
    model = model_of([nn.Module() for _ in range(4)])
    for layer, block in enumerate(layer.mlp for layer in model.model.layers):
        block.down_proj = nn.Linear(D, D) if layer == 1 else ReplicatedLinear()
    model.requires_grad_(False)
    before = model.model.layers[2].mlp.down_proj(torch.ones(2, D))[0]
    edits.edit_blocks(model)
    assert list(edits.edited) == [2]
    after = model.model.layers[2].mlp.down_proj(torch.ones(2, D))
    exact = project_oracle(before, edits.subspace.projections[2], 0.5)
    assert worst_ratio((after[0].double() - exact).abs(), rule_a_bound(before, edits.subspace.projections[2], 0.5)) <= 1
    assert after[1] is None and not torch.equal(after[0], before)
    with pytest.raises(ModelError, match="its bias is added elsewhere"):
        refuse_block("a", ReplicatedLinear(skip_bias_add=True), offset=False)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"skip_final_all_reduce": True}, "the sum of its experts is reduced over the ranks elsewhere"),
        ({"is_sequence_parallel": True}, r"each rank computes other tokens \(sequence parallel\)"),
        ({"in_dtype": torch.float16}, "an offset has another size"),
    ],
)
def test_a_block_whose_output_is_not_whole_is_refused_by_name(config, words):
    refuse_block("a.mlp", Block(in_dtype=torch.bfloat16), offset=True)
    with pytest.raises(ModelError, match=rf"cannot edit a\.mlp in vLLM: .*{words}"):
        refuse_block("a.mlp", Block(**config), offset=True)
    if "in_dtype" in config:
        refuse_block("a.mlp", Block(**config), offset=False)
    edits = edits_for(offset=True)
    with pytest.raises(ModelError, match=words):
        edits.edit_blocks(model_of([Block(**config) for _ in range(4)]))


def test_a_dense_block_is_refused_as_a_row_parallel_layer_is():
    class RowParallelLinear(nn.Module):
        def __init__(self, reduce_results):
            super().__init__()
            self.reduce_results, self.skip_bias_add, self.bias, self.tp_size = reduce_results, False, None, 2

    def dense(reduce_results):
        block = nn.Module()
        block.down_proj = RowParallelLinear(reduce_results)
        return block

    refuse_block("a.mlp", dense(True), offset=False)
    with pytest.raises(ModelError, match="its output is summed over the ranks elsewhere"):
        refuse_block("a.mlp", dense(False), offset=False)


def test_the_layout_is_that_of_the_whole_model_or_of_its_language_model():
    def config(whole, text):
        kinds = {"hf_config": whole, "hf_text_config": text}
        return SimpleNamespace(**{name: SimpleNamespace(model_type=kind) for name, kind in kinds.items()})

    assert layout_for(config("gemma3", "gemma3_text")) is ARCHITECTURES["gemma3"]
    assert layout_for(config("unknown_vl", "llama")) is ARCHITECTURES["llama"]
    with pytest.raises(ModelError, match="cannot find the MLP outputs of a 'other' model"):
        layout_for(config("unknown", "other"))


def test_an_edit_of_the_routed_experts_alone_is_far_off_the_bound():
    x, projection = torch.randn(5, D, generator=torch.Generator().manual_seed(0)), oblique(D, 4, 1, spread=3.0)
    shared = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    exact = project_oracle(x + shared, projection, 1.0)
    partly = project_oracle(x, projection, 1.0) + shared
    assert worst_ratio((partly - exact).abs(), rule_a_bound(x + shared, projection)) > 1000


def test_a_worker_edits_the_blocks_of_the_model_that_it_loads(monkeypatch):
    model, edits = model_of([Block() for _ in range(4)]), edits_for()
    worker = SimpleNamespace(rank=0, vllm_config=None, model_runner=SimpleNamespace(get_model=lambda: model))
    worker.load_model = lambda: None
    monkeypatch.setattr(layers, "edits_of", lambda config: edits)
    monkeypatch.setattr(layers, "replaced", lambda edits: nullcontext())
    monkeypatch.setattr(layers, "_say", lambda *given: None)
    prepare_worker(worker)
    worker.load_model()
    assert worker.kernel_surgery_report()["layers"] == [1, 2]
    names = [type(layer.mlp).__name__ for layer in model.model.layers]
    assert names == ["Block", "EditedBlock", "EditedBlock", "Block"]
