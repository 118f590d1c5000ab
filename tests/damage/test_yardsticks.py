"""The known changes: what each does to a weight, and that the model is whole again after it."""

import re

import pytest
import torch
from torch import nn

from kernel_surgery import Subspace, hooked
from kernel_surgery.damage.neutral import NeutralText
from kernel_surgery.damage.yardsticks import (
    haar_edits,
    in_other_precision,
    matched_edits,
    other_precision,
    rounded_to_bits,
    rounded_weights,
)
from kernel_surgery.models.architectures import decoder_layers, layout_of
from kernel_surgery.models.load import POLYGLOT_SUBSPACE, load_model, load_tokenizer
from kernel_surgery.models.table import ARCHITECTURES
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.subspace.erasing import SHRINKAGE, shrunk
from kernel_surgery.subspace.moments import Moments
from tests.support.models import pico
from tests.support.picos import pico_of


@pytest.fixture(scope="module")
def polyglot():
    return load_model("polyglot", torch.float32), load_tokenizer("polyglot")


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_whole(model, before):
    for name, parameter in model.named_parameters():
        assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name]), name
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [64, 70])
def test_weights_are_rounded_to_the_nearest_of_the_group_s_values(bits, columns):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, columns, generator=generator)
    weight[2, :32] = 0
    rounded = rounded_to_bits(weight, bits)
    most = 2 ** (bits - 1) - 1
    for row in range(5):
        for start in range(0, columns, 32):
            group, new = weight[row, start : start + 32].double(), rounded[row, start : start + 32].double()
            step = float(group.abs().max()) / most
            # Half a step, and the rounding of float32 arithmetic on numbers as large as the group's largest.
            assert float((group - new).abs().max()) <= step / 2 + 4 * 2.0**-24 * float(group.abs().max())
            assert len(new.unique()) <= 2 * most + 1
            assert float(new.abs().max()) == pytest.approx(float(group.abs().max()), rel=1e-6)
    assert rounded.shape == weight.shape and rounded_to_bits(weight.bfloat16(), bits).dtype == torch.bfloat16


def test_rounded_weights_are_those_of_the_decoder_alone_and_come_back(polyglot):
    model, _ = polyglot
    before, seen, ids = weights_of(model), {}, torch.tensor([[1, 2, 3]])

    def watch(name):
        def hook(module, inputs):
            seen[name] = module.weight.detach().clone()

        return hook

    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    with torch.no_grad():
        plain = model(ids).logits
        with rounded_weights(model, 4):
            # These hooks run after those that change the weights.
            handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
            changed = model(ids).logits
    for handle in handles:
        handle.remove()
    for name, weight in seen.items():
        inside, own = ".layers." in name, before.get(f"{name}.weight", before["model.embed_tokens.weight"])
        assert torch.equal(weight, rounded_to_bits(own, 4) if inside else own), name
        assert not inside or not torch.equal(weight, own)
    assert seen.keys() == modules.keys() and not torch.equal(plain, changed)
    assert_whole(model, before)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)


# Of all architectures: the tensors of at least two dimensions in a decoder layer that stay.
STAY = re.compile(
    r"mlp\.(gate|router|router\.gate|gate\.wg|shared_expert_gate)\.weight|(block_sparse_moe|feed_forward)\.router\.weight|"
    r"linear_attn\.conv1d\.weight|.*bias"
)
INPUTS_FIRST = {"gpt2": 2, "gpt_oss": 3, "llama4_text": 3, "llama4": 3}  # {model type: the dimensions of such tensors}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_all_linear_layers_and_experts_of_an_architecture_are_rounded_along_their_inputs(kind):
    model, seen = pico_of(kind), {}
    before, body = weights_of(model), layout_of(model).layers + "."

    def watch(module, inputs):
        for parameter in module.parameters(recurse=False):
            seen[parameter] = parameter.data

    with torch.no_grad(), rounded_weights(model, 4):
        handles = [module.register_forward_pre_hook(watch) for module in model.modules()]
        model(torch.arange(1, 41)[None])
    for handle in handles:
        handle.remove()
    rounded = 0
    for name, parameter in model.named_parameters():
        weight, inside = before[name], re.sub(r"^\d+\.", "", name.removeprefix(body))
        if not name.startswith(body) or weight.ndim < 2 or STAY.fullmatch(inside):
            assert torch.equal(seen.get(parameter, weight), weight), name
            continue
        turned = weight.mT if INPUTS_FIRST.get(kind) == weight.ndim else weight
        expected = rounded_to_bits(turned.reshape(-1, turned.shape[-1]), 4).view(turned.shape)
        expected = expected.mT if INPUTS_FIRST.get(kind) == weight.ndim else expected
        assert torch.equal(seen[parameter], expected) and not torch.equal(expected, weight), name
        rounded += 1
    assert rounded >= 4 * len(decoder_layers(model))
    assert_whole(model, before)


@pytest.mark.parametrize("block", [lambda m: rounded_weights(m, 8), in_other_precision])
def test_the_model_is_whole_after_a_forward_pass_that_failed(polyglot, block):
    model, _ = polyglot
    before = weights_of(model)
    site = model.model.layers[1].mlp.down_proj

    def fail(module, inputs):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"), block(model):
        handle = site.register_forward_pre_hook(fail)
        try:
            model(torch.tensor([[1, 2]]))
        finally:
            handle.remove()
    assert_whole(model, before)


def test_the_other_precision_is_close_to_a_model_that_runs_in_it(polyglot):
    """Beside the real thing: the same model in bfloat16, which a float32 model imitates."""
    model, tokenizer = polyglot
    text = NeutralText(model, tokenizer, ("en",))
    before = weights_of(model)
    with in_other_precision(model):
        imitated = text.read()["en"]
    assert other_precision(model) == "bfloat16"
    assert_whole(model, before)
    low = load_model("polyglot", torch.bfloat16)
    text.model = low
    real = text.read()["en"]
    text.model = model
    print(f"KL imitated {imitated.kl_mean:.2e}, real {real.kl_mean:.2e}")
    # Of one size: what is not imitated is the rounding of sums in the residual stream before each second norm.
    assert 0.2 < imitated.kl_mean / real.kl_mean < 5
    # The other way round it is float32 arithmetic on the same weights, to the bit of the dtype that it ends in.
    before = weights_of(low)
    ids = torch.tensor([text.encoded["en"][0]])
    with in_other_precision(low), torch.no_grad():
        wide = low(ids).logits
    assert other_precision(low) == "float32" and wide.dtype == torch.float32
    assert_whole(low, before)
    with torch.no_grad():
        error = (wide - load_model("polyglot", torch.bfloat16).float()(ids).logits).abs().max()
        moved = (wide - low(ids).logits.float()).abs().max()
    assert float(error) <= 1e-3 * float(moved)


def edits(kind, layers=(1, 3), d=24, k=3):
    generator, made = torch.Generator().manual_seed(5), {}
    for layer in layers:
        a = torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]
        b = a + 0.3 * (torch.eye(d) - a @ a.T).double() @ torch.randn(d, k, generator=generator, dtype=torch.float64)
        b = b @ torch.linalg.inv(a.T @ b)
        offset = torch.randn(k, generator=generator) if kind in ("affine", "orthogonal with an offset") else None
        made[layer] = Projection(a.float(), None if kind.startswith("orthogonal") else b.float(), offset)
    return made


@pytest.mark.parametrize("kind", ["orthogonal", "orthogonal with an offset", "oblique", "affine"])
def test_random_edits_have_the_rank_and_form_of_the_edit(kind):
    own, generator = edits(kind), torch.Generator().manual_seed(1)
    scales = torch.logspace(0, -2, 24)
    found = {}
    for layer in own:
        found[layer] = Moments.empty(1, 24)
        found[layer].add(torch.randn(500, 24, generator=generator) * scales + (2.0 if kind == "affine" else 0), 0)
    for layer, edit in haar_edits(own, moments=found).items():
        assert edit.dual is None and (edit.offset is None) == (own[layer].offset is None)
        if edit.offset is not None:  # it keeps the mean, as the edit that it stands beside does
            assert torch.allclose(edit.offset.double(), edit.basis.double().T @ found[layer].mean, atol=1e-4)
        assert edit.basis.shape == own[layer].basis.shape
        assert torch.allclose(edit.basis.T @ edit.basis, torch.eye(3), atol=1e-6)
    matched = matched_edits(own, found)
    assert matched.keys() == own.keys() and not torch.equal(matched[1].basis, matched[3].basis)
    for layer, edit in matched.items():
        assert (edit.dual is None, edit.offset is None) == (own[layer].dual is None, own[layer].offset is None)
        assert torch.allclose(edit.reads.T @ edit.basis, torch.eye(3), atol=1e-5)
        if kind == "orthogonal with an offset":
            assert torch.allclose(edit.offset.double(), edit.basis.double().T @ found[layer].mean, atol=1e-4)
        elif kind == "orthogonal":
            # It holds far more of the activations' variance than a uniform one does: .12 of 24 dimensions.
            inside = found[layer].energy(edit) / float(found[layer].mean_square.trace())
            uniform = found[layer].energy(haar_edits(own)[layer]) / float(found[layer].mean_square.trace())
            assert inside > 2 * uniform
        else:
            # Q in whitened coordinates is orthonormal: S^(-1/2) A = S^(1/2) B.
            second = found[layer].covariance if kind == "affine" else found[layer].mean_square
            values, vectors = torch.linalg.eigh(shrunk(second, SHRINKAGE))
            q = (vectors * values.rsqrt()) @ vectors.T @ edit.basis.double()
            assert torch.allclose(q.T @ q, torch.eye(3, dtype=torch.float64), atol=1e-5)
        if kind == "affine":
            assert torch.allclose(edit.offset.double(), edit.dual.double().T @ found[layer].mean, atol=1e-4)
    again = matched_edits(own, found)
    assert all(torch.equal(again[i].basis, matched[i].basis) for i in own)


def test_bits_order_the_damage(polyglot):
    model, tokenizer = polyglot
    subspace = Subspace.load(POLYGLOT_SUBSPACE)
    text, kl = NeutralText(model, tokenizer, ("zh",)), {}
    for bits in (8, 4, 2):
        with rounded_weights(model, bits):
            kl[bits] = text.read()["zh"].kl_mean
    with hooked(model, subspace):
        edit = text.read()["zh"].kl_mean
    print({bits: f"{value:.2e}" for bits, value in kl.items()}, f"edit {edit:.2e}")
    assert kl[8] < kl[4] < kl[2] and kl[8] > 0


def test_the_other_precision_rounds_every_weight_and_all_that_a_module_takes_and_gives():
    """On random weights: those of the embedded model are stored in bfloat16, so rounding them again shows nothing."""
    model, seen = pico("llama"), {}

    def watch(name):
        def hook(module, inputs, output):
            seen[name] = module.weight.detach().clone(), inputs[0], output

        return hook

    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    before = weights_of(model)
    with in_other_precision(model), torch.no_grad():
        # Before the hook that restores the weight: it was registered first, so these are prepended.
        handles = [m.register_forward_hook(watch(n), prepend=True) for n, m in modules.items()]
        model(torch.tensor([[1, 2, 3]]))
    for handle in handles:
        handle.remove()
    assert seen.keys() == modules.keys()
    for name, (weight, given, gave) in seen.items():
        assert torch.equal(weight, before[f"{name}.weight"].bfloat16().float()), name
        assert not torch.equal(weight, before[f"{name}.weight"])
        assert torch.equal(given, given.bfloat16().float()), name
        assert not torch.equal(gave, gave.bfloat16().float()), "it is rounded after this hook"
    assert_whole(model, before)
