"""The vLLM plugin's own parts, without vLLM: settings, the layer that it builds, strengths of requests, refusals."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from kernel_surgery.common.errors import KernelSurgeryError, MismatchError, ModelError, UserError
from kernel_surgery.engines import plugin
from kernel_surgery.engines.layers import Edits, edited_class, prepare_worker
from kernel_surgery.engines.offline import merged
from kernel_surgery.engines.per_request import ASKED, Strengths, check_request, salted, state_class, strength_in
from kernel_surgery.engines.refusing import refuse_lora, refuse_shared_cache
from kernel_surgery.engines.settings import KEY, PluginSettings, read_settings
from kernel_surgery.engines.texts import parse_arguments
from kernel_surgery.models.load import POLYGLOT_SUBSPACE, load_model
from kernel_surgery.models.table import LLAMA
from kernel_surgery.numerics.bounds import rule_a_bound, worst_ratio
from kernel_surgery.numerics.oracle import project_oracle
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.subspace.artifact import Subspace

D, F, LAYERS = 48, 64, (1, 2)


@pytest.fixture
def subspace():
    generator = torch.Generator().manual_seed(0)
    bases = {layer: torch.linalg.qr(torch.randn(D, 4, generator=generator))[0] for layer in LAYERS}
    return Subspace(bases, n_layers=4, strengths={2: 0.5})


@pytest.fixture
def edits(subspace):
    settings = PluginSettings(POLYGLOT_SUBSPACE, 1.0, None, force=True)
    return Edits(settings, subspace, LLAMA, LAYERS, torch.ones(16))


class Row(nn.Module):
    """What the plugin uses of vLLM's row-parallel layer."""

    def __init__(self, prefix="", reduce_results=True, skip_bias_add=False, bias=None, tp_size=1, pair=True):
        super().__init__()
        self.prefix, self.reduce_results, self.skip_bias_add, self.bias = prefix, reduce_results, skip_bias_add, bias
        self.tp_size, self.pair = tp_size, pair
        self.weight = nn.Parameter(torch.randn(D, F, generator=torch.Generator().manual_seed(1)), requires_grad=False)

    def weight_loader(self, param, loaded_weight):
        param.data.copy_(loaded_weight)

    def forward(self, input_):
        output = input_ @ self.weight.T
        return (output, None) if self.pair else output


# --- settings ---


@pytest.mark.parametrize(
    ("given", "layers"),
    [({}, None), ({"layers": "2-4,7"}, (2, 3, 4, 7)), ({"layers": [3, 1]}, (1, 3)), ({"strength": 0.5}, None)],
)
def test_settings_are_read_and_recorded(given, layers):
    asked = {"subspace": "s.safetensors"} | given
    found = read_settings({KEY: asked, "another plugin": 1})
    assert found.layers == layers and found.strength == asked.get("strength", 1.0) and not found.force
    assert read_settings({KEY: found.record()}) == found


@pytest.mark.parametrize("given", [None, {}, {"kernel": 1}, object()])
def test_an_engine_that_is_not_configured_has_no_settings(given):
    assert read_settings(given) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("s.safetensors", "not an object"),
        ({}, '"subspace" is None'),
        ({"subspace": 3}, '"subspace" is 3'),
        ({"subspace": "s", "strenght": 1}, "no field 'strenght', only subspace, strength, layers, force"),
        ({"subspace": "s", "strength": "1"}, "\"strength\" is '1'"),
        ({"subspace": "s", "strength": True}, '"strength" is True'),
        ({"subspace": "s", "strength": float("nan")}, "finite"),
        ({"subspace": "s", "layers": "4-2"}, "cannot read layers '4-2'"),
        ({"subspace": "s", "layers": []}, '"layers" is []'),
        ({"subspace": "s", "layers": [1, 1]}, "given twice"),
        ({"subspace": "s", "force": 1}, '"force" is 1'),
    ],
)
def test_settings_that_cannot_be_used_are_refused_by_name(given, words):
    with pytest.raises(KernelSurgeryError) as refused:
        read_settings({KEY: given})
    assert words in str(refused.value) and "The engine was not started." in str(refused.value)


# --- the layer ---


def built(edits, layer, **given):
    return edited_class(Row, edits)(prefix=LLAMA.site_name(layer), **given)


@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_an_asked_layer_returns_the_edited_output_and_any_other_its_own(edits, subspace, layer, pair):
    h = torch.randn(5, F, generator=torch.Generator().manual_seed(2))
    edits.strengths[:5] = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0])
    module, plain = built(edits, layer, pair=pair), Row(pair=pair)
    y, x = (out[0] if pair else out for out in (module(h), plain(h)))
    factor = subspace.strengths.get(layer, 1.0)
    for row, a in enumerate((edits.strengths[:5] * factor).tolist()):
        projection = Projection(subspace.bases[layer])
        exact, bound = project_oracle(x[row : row + 1], projection, a), rule_a_bound(x[row : row + 1], projection, a)
        assert worst_ratio((y[row : row + 1].double() - exact).abs(), bound) <= 1
    assert torch.equal(y[1], x[1])  # at strength 0 bit-identical
    assert not torch.allclose(y[0], x[0])
    other = edited_class(Row, edits)(prefix=LLAMA.site_name(3), pair=pair)(h)
    assert torch.equal(other[0] if pair else other, x)


def test_an_oblique_edit_with_an_offset_is_made_whole(edits, subspace):
    generator = torch.Generator().manual_seed(5)
    basis, dual = (torch.randn(D, 4, generator=generator) for _ in range(2))
    dual = dual @ torch.linalg.inv(basis.T @ dual)
    edit = Projection(basis, dual, torch.randn(4, generator=generator))
    edits.subspace = Subspace.of(dict.fromkeys(LAYERS, edit))
    h = torch.randn(5, F, generator=generator)
    x, y = Row()(h)[0], built(edits, 1)(h)[0]
    assert worst_ratio((y.double() - project_oracle(x, edit, 1.0)).abs(), rule_a_bound(x, edit, 1.0)) <= 1


def test_more_tokens_than_the_strengths_have_are_refused(edits):
    with pytest.raises(KernelSurgeryError, match="strength has shape"):
        built(edits, 1)(torch.randn(17, F))


def test_what_a_layer_adds_later_is_refused(edits):
    for given, words in (
        ({"skip_bias_add": True, "bias": torch.zeros(D)}, "its bias is added elsewhere"),
        ({"reduce_results": False, "tp_size": 2}, "its output is summed over the ranks elsewhere"),
    ):
        with pytest.raises(ModelError, match=words):
            built(edits, 1, **given)
    built(edits, 1, skip_bias_add=True)


def test_a_layer_that_is_built_twice_is_refused(edits):
    built(edits, 1)
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.down_proj was built twice"):
        built(edits, 1)


def test_fewer_layers_than_asked_stop_the_engine(edits):
    model = nn.ModuleList([built(edits, 1)])
    with pytest.raises(ModelError, match=r"1 of 2 layers are edited on rank 0: .*model.layers.2.mlp.down_proj"):
        edits.check(model, "rank 0")
    model.append(built(edits, 2))
    assert edits.check(model, "rank 0") == "fingerprint not compared (force)"
    assert edits.report()["layers"] == [1, 2]


def test_a_layer_that_the_model_does_not_hold_is_not_counted(edits):
    built(edits, 1), built(edits, 2)
    with pytest.raises(ModelError, match="0 of 2 layers"):
        edits.check(nn.ModuleList(), "rank 0")


def test_a_layer_inside_a_lora_layer_is_refused(edits):
    wrapping = nn.Module()
    wrapping.base_layer = built(edits, 1)
    with pytest.raises(ModelError, match="is wrapped by another layer on rank 1"):
        edits.check(nn.ModuleList([wrapping, built(edits, 2)]), "rank 1")


def test_the_fingerprint_is_that_of_the_weights_as_they_are_loaded():
    subspace, model = Subspace.load(POLYGLOT_SUBSPACE), load_model("polyglot", torch.bfloat16)
    edits = Edits(PluginSettings(POLYGLOT_SUBSPACE), subspace, LLAMA, subspace.layers, torch.ones(4))
    down = [model.model.layers[layer].mlp.down_proj for layer in subspace.layers]
    modules = []
    for layer, linear in zip(subspace.layers, down, strict=True):
        module = edited_class(Row, edits)(prefix=LLAMA.site_name(layer))
        module.weight = nn.Parameter(torch.empty_like(linear.weight), requires_grad=False)
        module.weight_loader(module.weight, linear.weight.data)
        modules.append(module)
    assert edits.check(nn.ModuleList(modules), "rank 0") == f"fingerprint agrees ({len(subspace.layers)} tensors)"
    other = down[1].weight.data.clone()
    other[:, ::3] *= 1.01
    modules[1].weight_loader(modules[1].weight, other)
    with pytest.raises(MismatchError, match=r"measured on other weights: model.layers.3.mlp.down_proj.weight differs"):
        edits.compare(nn.Module())
    edits.sampled.clear()
    edits.sample("model.layers.2.mlp.down_proj.weight", torch.zeros(4, 4, dtype=torch.int8))
    assert edits.sampled == {}


def embedding_of(weight, first=0, end=None):
    """What the plugin uses of vLLM's embedding: the rows that a rank holds, padded."""
    end = len(weight) if end is None else end
    held = nn.Module()
    held.weight = nn.Parameter(torch.nn.functional.pad(weight[first:end], (0, 0, 0, 3)), requires_grad=False)
    held.org_vocab_size = len(weight)
    held.shard_indices = SimpleNamespace(org_vocab_start_index=first, org_vocab_end_index=end)
    model = nn.Module()
    model.model = nn.Module()
    model.model.embed_tokens = held
    return model


def test_quantised_weights_are_known_by_the_embedding_beside_them():
    """Their down_proj has no floating-point numbers to sample. Each rank compares the rows that it holds."""
    subspace = Subspace.load(POLYGLOT_SUBSPACE)
    weight = load_model("polyglot", torch.bfloat16).get_input_embeddings().weight.detach()
    edits = Edits(PluginSettings(POLYGLOT_SUBSPACE), subspace, LLAMA, subspace.layers, torch.ones(4))
    half = len(weight) // 2
    for model in (embedding_of(weight), embedding_of(weight, 0, half), embedding_of(weight, half)):
        assert edits.compare(model) == "fingerprint agrees (the embedding alone: no other weight could be compared)"
    with pytest.raises(MismatchError, match=r"other weights: model.embed_tokens.weight differs"):
        edits.compare(embedding_of(weight * 1.02))
    with pytest.raises(MismatchError, match="cannot be compared"):
        edits.compare(embedding_of(weight.to(torch.int8)))
    assert edits.compare(nn.Module()).startswith("fingerprint not compared: this part of the model")


# --- the worker ---


def test_a_strength_that_cannot_be_used_leaves_the_engines_own(edits):
    for wrong in (float("nan"), float("inf"), "1", None, True):
        with pytest.raises(KernelSurgeryError, match="It is unchanged"):
            edits.set_strength(wrong)
    assert edits.report()["strength"] == 1.0
    edits.set_strength(0.25)
    assert edits.report()["strength"] == 0.25 and bool((edits.strengths == 0.25).all())


def test_a_worker_is_prepared_before_and_checked_after_it_loads(edits, monkeypatch):
    from kernel_surgery.engines import layers

    order = []

    class During:
        def __init__(self, given):
            assert given is edits

        def __enter__(self):
            order.append("in")

        def __exit__(self, *error):
            order.append("out")

    model = nn.ModuleList([built(edits, 1), built(edits, 2)])
    worker = SimpleNamespace(rank=0, vllm_config=None, model_runner=SimpleNamespace(get_model=lambda: model))
    worker.load_model = lambda **given: order.append(given)
    monkeypatch.setattr(layers, "edits_of", lambda config: edits)
    monkeypatch.setattr(layers, "replaced", During)
    monkeypatch.setattr(layers, "stated", During)
    monkeypatch.setattr(layers, "_say", lambda *given: order.append("said"))
    prepare_worker(worker)
    assert order == []
    worker.load_model(load_dummy_weights=False)
    assert order == ["in", "in", {"load_dummy_weights": False}, "out", "out", "said"]
    assert worker.kernel_surgery_report()["layers"] == [1, 2]
    model.pop(1)
    prepare_worker(worker)
    with pytest.raises(ModelError, match="1 of 2 layers"):
        worker.load_model()


def test_lora_is_refused_by_name():
    refuse_lora(None)
    with pytest.raises(KernelSurgeryError, match=r"LoRA cannot be combined.*Leave out --enable-lora"):
        refuse_lora(object())


@pytest.fixture
def fake_vllm(monkeypatch):
    """The three classes of vLLM that the plugin wraps."""

    class VllmConfig:
        def __init__(self, additional_config=None):
            self.additional_config, self.model_config, self.checked = additional_config, object(), 0
            self.__post_init__()

        def __post_init__(self):
            self.checked += 1

    class WorkerBase:
        def __init__(self, vllm_config):
            self.vllm_config, self.load_model = vllm_config, "its own"

    class InputProcessor:
        def __init__(self, vllm_config):
            self.vllm_config = vllm_config

        def process_inputs(self, request_id, prompt, params, lora_request=None):
            return SimpleNamespace(id=request_id, cache_salt=None, lora=lora_request)

    held = {"vllm.config": VllmConfig, "vllm.v1.engine.input_processor": InputProcessor}
    held["vllm.v1.worker.worker_base"] = WorkerBase
    for name in ("vllm", "vllm.v1", "vllm.v1.engine", "vllm.v1.worker", *held):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, owner in held.items():
        setattr(sys.modules[name], owner.__name__, owner)
    return SimpleNamespace(config=VllmConfig, worker=WorkerBase, processor=InputProcessor)


def test_the_plugin_changes_nothing_until_it_is_configured(fake_vllm, monkeypatch):
    seen = []
    monkeypatch.setattr("kernel_surgery.engines.refusing.refuse_config", lambda config: seen.append("config"))
    monkeypatch.setattr("kernel_surgery.engines.layers.prepare_worker", lambda worker: seen.append("worker"))
    plugin.register()
    plugin.register()  # vLLM may call it more than once
    plain = fake_vllm.config({"other": 1})
    assert plain.checked == 1 and fake_vllm.worker(plain).load_model == "its own" and seen == []
    request = fake_vllm.processor(plain).process_inputs("r", "p", SimpleNamespace(extra_args=None), lora_request="l")
    assert (request.id, request.cache_salt, request.lora) == ("r", None, "l")
    held = {name: module for name, module in sys.modules.items() if name.startswith("kernel_surgery.")}
    for name in held:  # of ours, only what the plugin's own file imports
        if name not in ("kernel_surgery.common", "kernel_surgery.common.names"):
            monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    fake_vllm.worker(fake_vllm.config({"other": 1}))
    fake_vllm.processor(plain).process_inputs("r", "p", SimpleNamespace(extra_args={"other": 1}))
    for name, module in held.items():
        monkeypatch.setitem(sys.modules, name, module)
    asked = fake_vllm.config({KEY: {"subspace": "s"}})
    assert asked.checked == 1 and seen == ["config"]
    fake_vllm.worker(asked)
    assert seen == ["config", "worker"]


def test_in_an_unknown_vllm_only_an_engine_that_asks_for_the_plugin_is_refused(fake_vllm, monkeypatch):
    monkeypatch.setattr(plugin, "_unknown", None)
    monkeypatch.setattr("kernel_surgery.engines.refusing.refuse_config", lambda config: None)
    del sys.modules["vllm.v1.worker.worker_base"].WorkerBase
    plugin.register()
    assert fake_vllm.config({"other": 1}).checked == 1
    with pytest.raises(KernelSurgeryError, match=r"does not know this vLLM \(.*WorkerBase"):
        fake_vllm.config({KEY: {"subspace": "s"}})


def test_a_draft_models_configuration_is_not_checked(fake_vllm, monkeypatch):
    seen = []
    monkeypatch.setattr(plugin, "_unknown", None)
    monkeypatch.setattr("kernel_surgery.engines.refusing.refuse_config", seen.append)
    plugin.register()
    engine = fake_vllm.config({KEY: {"subspace": "s"}})
    assert seen == [engine]
    draft = object.__new__(fake_vllm.config)
    draft.additional_config, draft.model_config, draft.checked = engine.additional_config, object(), 0
    draft.speculative_config = SimpleNamespace(draft_model_config=draft.model_config)
    draft.__post_init__()
    assert seen == [engine] and draft.checked == 1


# --- one request's strength ---


def asking(strength):
    return SimpleNamespace(extra_args={ASKED: strength, "other": 1})


def config(configured=True, v2=True):
    given = {KEY: {"subspace": "s"}} if configured else {}
    return SimpleNamespace(additional_config=given, use_v2_model_runner=v2)


def test_a_requests_strength_is_taken_or_refused_never_passed_over():
    assert check_request(config(), SimpleNamespace(extra_args=None)) is None
    assert check_request(config(), asking(0)) == 0.0
    with pytest.raises(KernelSurgeryError, match="this engine is not edited"):
        check_request(config(configured=False), asking(1.0))
    with pytest.raises(KernelSurgeryError, match="V2 model runner"):
        check_request(config(v2=False), asking(1.0))
    for wrong in ("1", None, True, float("nan")):
        with pytest.raises(KernelSurgeryError, match="must be a finite number"):
            strength_in(asking(wrong))


def test_a_requests_strength_is_refused_where_its_tokens_or_keys_are_not_known():
    drafts = config()
    drafts.speculative_config = SimpleNamespace(enable_adaptive_verification=True)
    with pytest.raises(KernelSurgeryError, match="adaptive verification of drafts"):
        check_request(drafts, asking(0.5))
    with pytest.raises(KernelSurgeryError, match="a session that is continued"):
        check_request(config(), asking(0.5), resumable=True)
    assert check_request(drafts, SimpleNamespace(extra_args=None), resumable=True) is None


def test_a_kv_connector_is_refused():
    refuse_shared_cache(None)
    with pytest.raises(KernelSurgeryError, match="a KV connector cannot be combined"):
        refuse_shared_cache(object())


def test_the_ranks_reports_are_merged_or_refused():
    one, two = ({"layers": part, "rank": 4, "strength": 1.0} for part in ([2, 3], [4, 5]))
    assert merged([one, one]) == one and merged([two, one])["layers"] == [2, 3, 4, 5]
    for other in ({"layers": [3, 4]}, {"strength": 0.0}, {"rank": 3}):
        with pytest.raises(KernelSurgeryError, match="do not edit the same"):
            merged([one, one | other])


def test_what_a_mode_is_made_of_cannot_be_set_beside_it():
    assert parse_arguments('{"enforce_eager": true}') == {"enforce_eager": True}
    for name in ("additional_config", "dtype", "tensor_parallel_size", "enable_lora", "quantization"):
        with pytest.raises(UserError, match=f"--engine-args cannot set '{name}'"):
            parse_arguments(f'{{"enforce_eager": true, "{name}": 1}}')
    for wrong in ("[1]", "{", "3"):
        with pytest.raises(UserError, match="--engine-args"):
            parse_arguments(wrong)


def test_the_prefix_cache_tells_strengths_apart():
    keys = {salted(SimpleNamespace(cache_salt=salt), a).cache_salt for salt in (None, "user") for a in (0.0, 0.5, 1.0)}
    assert len(keys) == 6 and None not in keys


def test_every_token_of_a_step_has_its_requests_strength():
    tokens = torch.full((8,), 1.0)
    held = Strengths(tokens, requests=4)
    held.add(0, asking(0.5))
    held.add(2, SimpleNamespace(extra_args=None))
    held.add(3, asking(0.0))
    held.fill([3, 2, 0], [1, 3, 2])
    assert tokens[:6].tolist() == [0.0, 1.0, 1.0, 1.0, 0.5, 0.5]
    # A slot is used again, by a request without a strength of its own.
    held.add(3, None)
    held.fill([3, 2], [2, 1])
    assert tokens.tolist() == [1.0] * 8
    held.engine = 0.25
    held.fill([0, 2], [1, 1])
    assert tokens[:2].tolist() == [0.5, 0.25]


def test_the_state_of_the_v2_runner_writes_strengths_before_a_step(edits):
    import numpy as np

    class State:
        def __init__(self, requests):
            self.max_num_reqs = requests

        def add_request(self, req_index, new_req_data):
            self.added = req_index

        def prepare_inputs(self, input_batch, req_states):
            return {"strengths": edits.strengths.clone()}

    state = state_class(State, edits)(4)
    state.add_request(1, SimpleNamespace(sampling_params=asking(0.5)))
    assert state.added == 1
    # num_scheduled_tokens may be an upper bound, and the arrays may be padded.
    batch = SimpleNamespace(idx_mapping_np=np.array([2, 1, 0]), num_reqs=2, query_start_loc_np=np.array([0, 3, 5, 5]))
    found = state.prepare_inputs(batch, None)["strengths"]
    assert found[:5].tolist() == [1.0, 1.0, 1.0, 0.5, 0.5]
    edits.set_strength(0.0)
    state.prepare_inputs(batch, None)
    assert edits.strengths[:5].tolist() == [0.0, 0.0, 0.0, 0.5, 0.5]
