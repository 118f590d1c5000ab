"""Modes on quantised linears: any module that gives a float output is edited by hook and fused, and adapted by lora."""

import pytest
import torch
from torch import nn

from kernel_surgery import fused, hooked
from kernel_surgery.common.errors import KernelSurgeryError, ModelError
from kernel_surgery.edit.baked import baked
from kernel_surgery.edit.lora import adapted
from kernel_surgery.models.architectures import mlp_outputs
from kernel_surgery.numerics.bounds import rule_a_bound, worst_ratio
from kernel_surgery.numerics.oracle import project_oracle
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import fingerprint
from tests.support.models import basis
from tests.support.picos import LAYERS, WORDS, D, pico_of

IDS = torch.arange(3 * 8).reshape(3, 8) % WORDS


class Int8Linear(nn.Module):
    """8-bit integers with a scale per row, multiplied in the dtype of the input."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scale = linear.weight.detach().abs().amax(1, keepdim=True).float() / 127
        self.register_buffer("weight", (linear.weight.detach().float() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, (self.weight.float() * self.scale).to(x.dtype), self.bias)


class Fp8Linear(Int8Linear):
    """Its weight is of floats by torch's word, but they mean nothing without the scale."""

    def __init__(self, linear):
        super().__init__(linear)
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True).float() / 448
        self.weight = (linear.weight.detach().float() / self.scale).to(torch.float8_e4m3fn)


class Packed(Int8Linear):
    """No tensor called weight at all."""

    def __init__(self, linear):
        super().__init__(linear)
        self.register_buffer("qweight", self.weight)
        del self.weight

    def forward(self, x):
        return nn.functional.linear(x, (self.qweight.float() * self.scale).to(x.dtype), self.bias)


def dynamic(linear):
    """torch's own: its weight is a method, and it quantises its input as well."""
    return torch.ao.nn.quantized.dynamic.Linear.from_float(_observed(linear))


def _observed(linear):
    linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return linear


EVERY = {"int8": Int8Linear, "fp8": Fp8Linear, "packed": Packed, "torch": dynamic}


def quantised(kind="qwen2", how="int8", dtype=torch.float32, **config):
    model = pico_of(kind, dtype=dtype, **config)
    for layer in model.model.layers:
        layer.mlp.down_proj = EVERY[how](layer.mlp.down_proj)
    return model


def space(layers=(1, 2)):
    return {i: basis(D, 4, i) for i in layers}


def outputs(model, layers):
    """What the MLP blocks give, by layer, with the edits in force."""
    caught, handles = {}, []
    for i in layers:
        hook = lambda module, inputs, output, i=i: caught.__setitem__(i, (inputs[0], output))  # noqa: E731
        handles.append(model.model.layers[i].mlp.down_proj.register_forward_hook(hook))
    with torch.no_grad():
        logits = model(IDS).logits
    for handle in handles:
        handle.remove()
    return caught, logits


# torch's dynamic linear takes float32 alone.
@pytest.mark.parametrize("how, dtype", [*((how, torch.float32) for how in EVERY), ("int8", torch.bfloat16)])
@pytest.mark.parametrize("mode", [hooked, fused], ids=["hook", "fused"])
def test_hook_and_fused_edit_the_output_of_any_linear(mode, how, dtype):
    model, subspace = quantised(how=how, dtype=dtype), space()
    plain, logits = outputs(model, [1])
    with mode(model, subspace) as edit:
        edited, _ = outputs(model, [1])
        assert edit.calls == {1: 1, 2: 1}
    x, y = plain[1][1].reshape(-1, D), edited[1][1].reshape(-1, D)
    assert worst_ratio((y.double() - project_oracle(x, subspace[1], 1.0)).abs(), rule_a_bound(x, subspace[1])) <= 1
    assert torch.equal(outputs(model, [1])[1], logits)


def test_fused_says_why_it_reaches_no_further():
    with fused(quantised(), space()) as edit:
        assert edit.reach == {1: "output", 2: "output"}
        assert edit.fallbacks[1].startswith("model.layers.1.mlp.down_proj.weight is quantised")


@pytest.mark.parametrize("how", ["int8", "fp8", "packed"])
def test_lora_adapts_the_weight_as_the_module_uses_it(how):
    model, subspace = quantised(how=how), space()
    module = model.model.layers[1].mlp.down_proj
    held = module.qweight if how == "packed" else module.weight
    w = held.float() * module.scale
    (opaque,) = mlp_outputs(model, [1])[1].opaque
    assert torch.equal(opaque.matrix(torch.empty(0)), w)
    with hooked(model, subspace):
        hook, logits = outputs(model, [1])
    with adapted(model, subspace) as edit:
        lora, others = outputs(model, [1])
        assert edit.calls == {1: 1, 2: 1}
    assert float((hook[1][1] - lora[1][1]).norm() / hook[1][1].norm()) < 1e-5
    assert float((logits - others).norm() / logits.norm()) < 1e-5
    assert float((lora[1][1] @ subspace[1]).norm()) < 1e-4 * float(lora[1][1].norm())


def test_a_weight_of_more_columns_than_are_read_at_a_time_is_whole():
    model = quantised(intermediate_size=600)
    module = model.model.layers[0].mlp.down_proj
    (opaque,) = mlp_outputs(model, [0])[0].opaque
    assert torch.equal(opaque.matrix(torch.empty(0)), module.weight.float() * module.scale)


def test_what_cannot_be_edited_is_refused_by_name_and_nothing_changes():
    model = quantised()
    before = outputs(model, [1])[1]
    message = r"cannot bake .*down_proj\.weight: it is quantised in memory"
    with pytest.raises(KernelSurgeryError, match=message), baked(model, space()):
        pass
    model.model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.ones(D))
    with pytest.raises(KernelSurgeryError, match="has a bias"), adapted(model, space()):
        pass
    model.model.layers[1].mlp.down_proj.bias = None
    assert torch.equal(outputs(model, [1])[1], before)
    module, real = model.model.layers[1].mlp.down_proj, model.model.layers[1].mlp.down_proj.forward
    module.forward = lambda x: real(x) + 1  # a bias that is no parameter
    with pytest.raises(ModelError, match="has a bias, which an adapter cannot edit"), adapted(model, space()):
        pass
    module.forward = real
    del model.model.layers[1].mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.scale
    model.model.layers[1].mlp.down_proj.forward = lambda x: nn.functional.linear(x, torch.zeros(D, 5))
    with pytest.raises(ModelError, match="cannot be read: it does not take unit vectors"), adapted(model, space()):
        pass
    with pytest.raises(KernelSurgeryError, match="basis has d_model=50"), hooked(model, {1: basis(50, 4)}):
        pass


def test_a_fingerprint_without_quantised_weights_compares_what_both_have():
    model, plain = quantised(), pico_of("qwen2")
    taken = fingerprint(model)
    assert taken["quantised"] and list(taken["samples"]) == ["model.embed_tokens.weight"]
    assert "quantised" not in fingerprint(plain) and len(fingerprint(plain)["samples"]) == 1 + LAYERS
    fitted = Subspace(bases=space(), site="mlp_out", fingerprint=fingerprint(plain))
    with hooked(model, fitted):
        pass
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 1
    with pytest.raises(KernelSurgeryError, match="measured on other weights"), hooked(model, fitted):
        pass


def test_quantised_experts_in_memory_are_edited_by_hook_and_refused_by_the_rest():
    model = pico_of("qwen3_moe")
    experts = model.model.layers[2].mlp.experts
    kept, real = experts.down_proj.detach().clone(), experts.forward
    del experts.down_proj
    experts.register_buffer("down_proj", (kept * 100).to(torch.int8))

    def forward(*args, **kwargs):
        held = experts.down_proj
        experts.down_proj = held.float() / 100
        try:
            return real(*args, **kwargs)
        finally:
            experts.down_proj = held

    experts.forward = forward
    site = mlp_outputs(model, [2])[2]
    assert site.quantised == "model.layers.2.mlp.experts.down_proj" and site.d_model == D
    plain = model(IDS).logits
    with hooked(model, space([2])) as edit:
        assert not torch.equal(model(IDS).logits, plain) and edit.calls == {2: 1}
    for mode in (baked, adapted):
        with pytest.raises(KernelSurgeryError, match=r"experts\.down_proj"), mode(model, space([2])):
            pass
