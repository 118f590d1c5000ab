"""A model that accelerate spreads over devices: read through its hooks, and refused if weights are not in memory."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

from kernel_surgery.common.errors import ModelError, UserError
from kernel_surgery.common.names import MODES
from kernel_surgery.edit.modes import applied
from kernel_surgery.edit.plan import plan_edit
from kernel_surgery.models.load import check_device_map, load_model
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.subspace.collecting import collect_activations, collect_moments, prompt_states
from tests.subspace.test_collecting import PROMPTS, Characters
from tests.support.models import basis, pico


def spread(model):
    """With a hook on every module that a map of several devices would name. All of them are the CPU here."""
    parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    parts += [f"model.layers.{i}" for i in range(len(model.model.layers))]
    return dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True, main_device="cpu")


@pytest.mark.parametrize("site", ["mlp_out", "resid_post"])
def test_a_spread_model_gives_the_same_bits_and_keeps_its_hooks(site):
    want = prompt_states(pico("llama"), Characters("left"), PROMPTS, [1, 2], site=site)
    model = spread(pico("llama"))
    assert all(hasattr(layer, "_hf_hook") for layer in model.model.layers)
    got = prompt_states(model, Characters("left"), PROMPTS, [1, 2], site=site)
    assert all(torch.equal(got[layer], want[layer]) for layer in want)
    assert len(model.model.layers) == 4 and all(hasattr(layer, "_hf_hook") for layer in model.model.layers)


@pytest.mark.parametrize("mode", MODES[1:])
def test_every_mode_edits_a_spread_model_to_the_same_bits(mode):
    ids, edits = torch.randint(1, 64, (2, 9)), {i: basis(48, 4, seed=i) for i in (1, 2)}
    found = []
    for model in (pico("llama"), spread(pico("llama"))):
        with applied(mode, model, edits, 1.0) as (edit,), torch.no_grad():
            found.append(model(input_ids=ids).logits)
    assert torch.equal(*found) and all(hasattr(layer, "_hf_hook") for layer in model.model.layers)
    with torch.no_grad():
        assert not torch.equal(found[0], model(input_ids=ids).logits)
    if mode == "fused":  # a forward that accelerate has replaced is left to accelerate
        assert set(edit.reach.values()) == {"output"} and "already replaced" in edit.fallbacks[1]


class Elsewhere(torch.nn.Parameter):
    """A weight that says that it is on a GPU. This test needs none."""

    @property
    def device(self):
        return torch.device("cuda", self.number)


def test_every_basis_is_placed_where_its_own_layer_lies(monkeypatch):
    model, edits, placed = pico("llama"), {i: Projection(basis(48, 4, seed=i)) for i in (1, 2, 3)}, {}
    for layer, number in {1: 0, 2: 1, 3: 1}.items():
        weight = Elsewhere(model.model.layers[layer].mlp.down_proj.weight.detach())
        weight.number = number
        model.model.layers[layer].mlp.down_proj.weight = weight

    def to(self, where):
        placed[next(i for i, edit in edits.items() if torch.equal(edit.basis, self.basis))] = str(where)
        return self

    monkeypatch.setattr(Projection, "to", to)
    plan_edit(model, edits, 1.0, None, False)
    assert placed == {1: "cuda:0", 2: "cuda:1", 3: "cuda:1"}


def test_weights_that_are_not_in_memory_are_refused():
    model = cpu_offload(pico("llama"), torch.device("cpu"))
    message = r"model\.embed_tokens\.weight is not in memory \(\d+ of \d+ weights are offloaded"
    for collect in (collect_activations, collect_moments):
        with pytest.raises(ModelError, match=message):
            collect(model, Characters("left"), None, ("en", "sw"))


def test_auto_goes_to_the_loader_and_needs_accelerate(monkeypatch):
    import transformers

    given = {}

    def load(source, **options):
        given.update(options)
        raise OSError("far enough")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    for device_map in ("auto", None):
        given.clear()
        with pytest.raises(UserError, match="far enough"):
            load_model("polyglot", torch.float32, device_map=device_map)
        assert given.get("device_map") == device_map and ("device_map" in given) == (device_map is not None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_device_map(None)
    with pytest.raises(UserError, match="--device-map auto needs accelerate, which is not installed: pip install acc"):
        check_device_map("auto")
