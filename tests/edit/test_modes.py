"""hooked, baked, fused, adapted as context managers: what they change, what they leave alone, what they refuse."""

from copy import deepcopy

import pytest
import torch

from kernel_surgery import Subspace, adapted, baked, fused, hooked
from kernel_surgery.edit import baked as edit_baked
from kernel_surgery.edit.baked import bake_weight
from kernel_surgery.edit.marks import marked, put_back
from kernel_surgery.models.architectures import mlp_outputs
from kernel_surgery.numerics.bounds import rule_b_bounds, worst_ratio
from kernel_surgery.numerics.oracle import project_oracle
from tests.support.marks import everyday
from tests.support.models import basis, pico

MODES = {"hook": hooked, "baked": baked, "fused": fused, "lora": adapted}
LAYERS = (1, 2, 3)


@pytest.fixture
def bases():
    return {layer: basis(48, 5, seed=layer) for layer in LAYERS}


def ids():
    return torch.arange(1, 13).reshape(2, 6)


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids()).logits


def anatomy(model):
    """Everything an applier might leave behind: parameters by identity and value, buffers, hooks, attributes."""
    return {
        "parameters": [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()],
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "buffers": [name for name, _ in model.named_buffers()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "transient": [sorted(m._non_persistent_buffers_set) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
    }


def same_anatomy(before, after):
    states = before.pop("state"), after.pop("state")
    assert before == after
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_itself_again(mode, dtype, bases):
    model = pico("qwen2", dtype=dtype, bias=mode != "lora")
    before, out = anatomy(model), logits(model)
    with MODES[mode](model, bases) as edit:
        assert not torch.equal(logits(model), out)
        assert edit.mode == mode and edit.layers == LAYERS
        # The state dict has the same keys inside the block: a checkpoint saved there loads.
        assert model.state_dict().keys() == before["state"].keys()
    same_anatomy(before, anatomy(model))
    assert torch.equal(logits(model), out)


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_itself_again_after_an_exception(mode, bases):
    model = pico("llama")
    before = anatomy(model)
    with pytest.raises(KeyError, match="inside"), MODES[mode](model, bases):
        raise KeyError("inside")
    same_anatomy(before, anatomy(model))


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_itself_again_when_applying_fails_half_way(mode, bases, monkeypatch):
    model = pico("llama")
    before, calls = anatomy(model), []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("no room for the third layer")
        return real(*args)

    if mode == "baked":
        real = bake_weight
        monkeypatch.setattr(edit_baked, "bake_weight", failing)
    else:
        real = torch.nn.Module.register_forward_hook
        monkeypatch.setattr(torch.nn.Module, "register_forward_hook", failing)
    with pytest.raises(MemoryError), MODES[mode](model, bases):
        pytest.fail("the block was entered")
    assert len(calls) == 3
    same_anatomy(before, anatomy(model))


@pytest.mark.parametrize("mode", ["hook", "fused", "lora"])
def test_every_layer_is_counted_and_hooks_leave_weights_alone(mode, bases):
    model = pico("qwen3")
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with MODES[mode](model, bases) as edit:
        logits(model)
        logits(model)
        assert edit.calls == dict.fromkeys(LAYERS, 2)
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    logits(model)
    assert edit.calls == dict.fromkeys(LAYERS, 2)


def test_baked_reports_the_norms_it_changed_and_keeps_the_parameters(bases):
    model = pico("mistral")
    sites = mlp_outputs(model, LAYERS)
    before = {
        layer: (id(site.module.weight), float(site.module.weight.detach().norm())) for layer, site in sites.items()
    }
    with baked(model, bases) as edit:
        assert list(edit.norms) == list(LAYERS) and edit.calls == {}
        for layer, site in sites.items():
            assert id(site.module.weight) == before[layer][0]
            assert edit.norms[layer] == pytest.approx((before[layer][1], float(site.module.weight.detach().norm())))
            assert edit.norms[layer][1] < edit.norms[layer][0]


@pytest.mark.parametrize("mode", MODES)
def test_fewer_layers_and_another_strength_are_what_is_applied(mode, bases):
    model, seen = pico("llama"), {}
    sites = mlp_outputs(model)
    for layer, site in sites.items():
        site.module.register_forward_hook(lambda m, args, out, layer=layer: seen.update({layer: out, "h": args[0]}))
    logits(model)
    plain = dict(seen)
    with MODES[mode](model, bases, 0.5, layers=[2]) as edit:
        # A hook added after ours sees the edited output; ours was added after the recorder for the hook modes.
        handle = sites[2].module.register_forward_hook(lambda m, args, out: seen.update(edited=out, h=args[0]))
        recorded = sites[3].module.register_forward_pre_hook(lambda m, args: seen.update(kept=seen["h"]))
        logits(model)
        handle.remove()
        recorded.remove()
    assert edit.layers == (2,) and edit.strength == 0.5
    assert torch.equal(seen[0], plain[0]) and torch.equal(seen[1], plain[1])
    # Whatever the mode, within Rule B of the output before, projected: it is wider than each mode's own bound.
    h, weight = seen["kept"].flatten(0, 1), sites[2].module.weight.detach()
    each, _ = rule_b_bounds(weight, h, bases[2], 0.5)
    error = seen["edited"].flatten(0, 1).double() - project_oracle(plain[2].flatten(0, 1), bases[2], 0.5)
    print(f"{mode}: error/bound {worst_ratio(error.abs(), each):.3f}")
    assert worst_ratio(error.abs(), each) <= 1
    assert worst_ratio((seen["edited"] - plain[2]).flatten(0, 1).abs(), each) > 1


NESTED = [(outer, inner) for outer in MODES for inner in MODES if inner in ("hook", "fused") or outer == "baked"]


@pytest.mark.parametrize(("outer", "inner"), NESTED)
def test_nested_edits_are_made_one_after_the_other(outer, inner, bases):
    """Against hooks of the plainest kind that do the same, in float64, where a million roundings stay below 1e-9.

    lora keeps its pair in float32: a rounding of 2^-24, which 16 products of it in a row stay within.
    """
    model, other = pico("llama").double(), {2: basis(48, 3, seed=9)}
    before, out = anatomy(model), logits(model)
    with MODES[outer](model, bases):
        once = logits(model)
        with MODES[inner](model, other):
            twice = logits(model)
        assert torch.equal(logits(model), once)
    assert not torch.equal(once, twice) and not torch.equal(once, out)
    same_anatomy(before, anatomy(model))
    handles = []
    for edit in (bases, other):
        for layer, u in edit.items():
            down, u = model.model.layers[layer].mlp.down_proj, u.double()
            handles.append(down.register_forward_hook(lambda module, inputs, y, u=u: y - (y @ u) @ u.T))
    room = 16 * 2.0**-24 if "lora" in (outer, inner) else 1e-9
    torch.testing.assert_close(twice, logits(model), rtol=room, atol=room)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("outer", "inner"), [(o, i) for o in MODES for i in MODES if (o, i) not in NESTED])
def test_a_pair_that_would_not_be_one_after_the_other_is_refused(outer, inner, bases):
    model = pico("llama")
    other = {2: basis(48, 3, seed=9)}
    with MODES[outer](model, bases):
        once, before = logits(model), anatomy(model)
        with pytest.raises(ValueError, match=rf"in mode {inner} inside a block of mode {outer}: "):
            MODES[inner](model, other).__enter__()
        same_anatomy(before, anatomy(model))
        assert torch.equal(logits(model), once)
        with MODES[inner](model, {0: other[2]}):  # another layer
            logits(model)


@pytest.mark.parametrize(("outer", "inner"), NESTED)
def test_blocks_that_end_in_the_wrong_order_leave_the_model_as_it_was(outer, inner, bases):
    model, other = pico("llama"), {2: basis(48, 3, seed=9)}
    before, out = anatomy(model), logits(model)
    first, second = MODES[outer](model, bases), MODES[inner](model, other)
    first.__enter__()
    second.__enter__()
    if outer == "baked":
        with pytest.raises(ValueError, match=rf"mode {inner} .* still open\. Blocks must end in reverse order"):
            first.__exit__(None, None, None)
    else:
        first.__exit__(None, None, None)
        alone = pico("llama")
        with MODES[inner](alone, other):
            assert torch.equal(logits(model), logits(alone)), "what is left is the inner block's edit"
    second.__exit__(None, None, None)
    assert torch.equal(logits(model), out)
    same_anatomy(before, anatomy(model))


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_made_inside_a_block_keeps_the_edit_and_takes_no_other(mode, bases):
    model = pico("llama")
    out = logits(model)
    with MODES[mode](model, bases):
        edited, copy = logits(model), deepcopy(model)
        assert torch.equal(logits(copy), edited)
    assert torch.equal(logits(model), out)
    assert torch.equal(logits(copy), edited)
    before = anatomy(copy)
    for again in MODES:
        with pytest.raises(ValueError, match=f"a copy that was made inside a block of mode {mode}"):
            MODES[again](copy, bases).__enter__()
    same_anatomy(before, anatomy(copy))
    with MODES[mode](model, bases):  # the original takes the next one
        assert torch.equal(logits(model), edited)


def test_a_model_saved_whole_inside_a_baked_block_is_a_copy(tmp_path, bases):
    """Its file has no second copy of the weights, and the loaded model takes no other edit."""
    model, file = pico("llama"), tmp_path / "model.pt"
    torch.save(model, file)
    size = file.stat().st_size
    with baked(model, bases):
        edited = logits(model)
        torch.save(model, file)
    weight = model.model.layers[2].mlp.down_proj.weight
    assert file.stat().st_size < size + weight.numel() * weight.element_size()
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(logits(loaded), edited)
    with pytest.raises(ValueError, match="a copy that was made inside a block of mode baked"):
        hooked(loaded, bases).__enter__()


def test_a_block_that_ended_holds_no_weights(bases):
    """A variable may still hold the block's own object."""
    model = pico("llama")
    with marked(mlp_outputs(model, LAYERS).values(), "baked") as marks:
        site = mlp_outputs(model)[2]
        marks[2].originals.append((site.module.weight, site.module.weight.detach().clone()))
        put_back(site, marks[2])
    assert not marks[2].originals


@pytest.mark.parametrize("mode", ["hook", "fused", "lora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_inside_the_block_does_not_touch_the_basis(mode, dtype, bases):
    """Every buffer keeps its bits. So do hook and fused, beside an edit of the model that was cast before.

    lora's pair comes from the weights before the cast.
    """
    model = pico("llama")

    def stored():
        return [b for name, b in model.named_buffers() if "kernel_surgery" in name]

    with MODES[mode](model, bases):
        first = [b.clone() for b in stored()]
        model.to(dtype)
        inside, held = logits(model), stored()
        # lora keeps a pair
        expected = len(LAYERS) * (2 if mode == "lora" else 1)
        assert len(held) == expected and all(b.dtype == torch.int32 for b in held)
        assert all(torch.equal(b, before) for b, before in zip(held, first, strict=True))
        if mode != "lora":
            for layer, b in zip(LAYERS, held, strict=True):
                assert torch.equal(b.view(torch.float32), bases[layer])
    if mode != "lora":
        with MODES[mode](model, bases):
            assert torch.equal(inside, logits(model))
    else:
        assert not torch.equal(inside, logits(model))


@pytest.mark.parametrize("mode", MODES)
def test_an_edited_model_trains_only_what_it_should(mode, bases):
    """Gradients flow through the edit to what lies below, and to no basis."""
    model = pico("llama")
    with MODES[mode](model, bases):
        model(input_ids=ids()).logits.sum().backward()
        assert not any(buffer.requires_grad for buffer in model.buffers())
    # What an edited layer computes reaches the loss through the edit alone.
    through = [model.model.layers[layer].mlp.gate_proj.weight.grad for layer in LAYERS]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in through)
    edited = [p.grad.clone() for p in model.model.layers[0].parameters()]
    assert all(torch.isfinite(gradient).all() for gradient in edited)
    model.zero_grad()
    model(input_ids=ids()).logits.sum().backward()
    assert not any(torch.equal(p.grad, g) for p, g in zip(model.model.layers[0].parameters(), edited, strict=True))


def test_a_tied_weight_is_refused_by_baking_before_anything_changes(bases):
    model = pico("llama")
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj: it shares.*layers\.1\.mlp"), baked(model, bases):
        pytest.fail("the block was entered")
    same_anatomy(before, anatomy(model))
    with fused(model, bases):  # its weights are not touched
        logits(model)


def test_the_basis_follows_the_model_and_stays_out_of_a_save(bases, tmp_path):
    model = pico("llama")
    with fused(model, bases):
        names = [name for name, _ in model.named_buffers() if "kernel_surgery" in name]
        assert len(names) == len(LAYERS)
        model.to("meta")  # buffers move with their module
        assert all(buffer.is_meta for name, buffer in model.named_buffers() if name in names)
    model = pico("llama")
    with fused(model, bases):
        model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "kernel_surgery" in key]  # noqa: SIM118


WRONG = {
    "unknown layer": (
        lambda b: {"subspace": b, "layers": [0, 1]},
        r"layers \[0\] are not in the subspace, which holds \[1, 2, 3\]",
    ),
    "no layers": (lambda b: {"subspace": b, "layers": []}, "no layers were given"),
    "layer out of range": (lambda b: {"subspace": b | {7: b[1]}}, "layer 7 is out of range: the model has 4 layers"),
    "d_model": (lambda b: {"subspace": {1: basis(50, 5)}}, r"d_model=50, weight is \(48, 96\)"),
    "not orthonormal": (lambda b: {"subspace": {1: b[1] * 1.01}}, "layer 1 is not orthonormal"),
    "NaN": (lambda b: {"subspace": {1: b[1] * torch.nan}}, "NaN"),
    "no basis": (lambda b: {"subspace": {}}, "at least one layer"),
    "strength": (lambda b: {"subspace": b, "strength": float("inf")}, "finite"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_before_anything_changes(mode, name, bases):
    build, message = WRONG[name]
    model = pico("qwen2")
    before = anatomy(model)
    with pytest.raises(ValueError, match=message), MODES[mode](model, **build(bases)):
        pytest.fail("the block was entered")
    same_anatomy(before, anatomy(model))


@pytest.mark.parametrize("mode", MODES)
def test_a_subspace_of_another_model_is_refused_before_anything_changes(mode, bases):
    from kernel_surgery.subspace.fingerprint import fingerprint

    model = pico("qwen2")
    own, foreign = (Subspace(bases, n_layers=4, fingerprint=fingerprint(m)) for m in (model, pico("qwen2", seed=1)))
    before = anatomy(model)
    with pytest.raises(ValueError, match="measured on other weights"), MODES[mode](model, foreign):
        pytest.fail("the block was entered")
    same_anatomy(before, anatomy(model))
    for subspace, force in ((own, False), (foreign, True)):
        with MODES[mode](model, subspace, force=force) as edit:
            assert edit.layers == LAYERS and edit.note is None
    with MODES[mode](model, Subspace(bases, site="resid_post"), force=True) as edit:
        assert edit.note == "resid_post basis applied at mlp_out"


@pytest.mark.parametrize("mode", MODES)
def test_an_unknown_architecture_is_refused_by_name(mode, bases):
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(OPTConfig(num_hidden_layers=4, num_attention_heads=1, hidden_size=48, vocab_size=16))
    with pytest.raises(ValueError, match="'opt'"), MODES[mode](model, bases):
        pytest.fail("the block was entered")


@pytest.mark.parametrize("mode", everyday(MODES, "fused"))
def test_code_compiled_before_sees_the_edit_come_and_go(mode, bases):
    """Dynamo does not look at hooks again by itself: without the reset the edit would silently not be there."""
    model = pico("llama")
    compiled = torch.compile(lambda x: model(input_ids=x, use_cache=False).logits, backend="eager", fullgraph=True)
    with torch.no_grad():
        plain = compiled(ids())
        with MODES[mode](model, bases):
            torch.testing.assert_close(compiled(ids()), logits(model), rtol=0, atol=0)
            assert not torch.equal(compiled(ids()), plain)
        assert torch.equal(compiled(ids()), plain)
    torch._dynamo.reset()
