"""Hook, baked, fused, lora are one function: at the real shape 2048 x 11008, and on whole models of both families.

Every bound is Rule A, Rule B or the leak rule of kernel_surgery/numerics/bounds.py. Every test prints error/bound and
has wrong implementations beside it that must break the bound. For the embedded model: test_polyglot_equivalence.py.
"""

import pytest
import torch

from kernel_surgery import adapted, baked, fused, hooked
from kernel_surgery.edit.baked import bake_weight
from kernel_surgery.models.architectures import mlp_outputs
from kernel_surgery.numerics.bounds import (
    baked_element_bound,
    expected_rule_b,
    leak_bound,
    leak_floor,
    rule_a_bound,
    rule_b_bounds,
    worst_ratio,
)
from kernel_surgery.numerics.oracle import bake_oracle, leak, leak_of_weight, project_oracle
from kernel_surgery.numerics.rounding import unit_roundoff
from kernel_surgery.ops.eager import project_eager
from kernel_surgery.ops.library import project
from tests.support.marks import everyday
from tests.support.models import basis, pico

D, D_FF, K = 2048, 11008, 10  # Qwen2.5-3B's down_proj, and the default rank
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MODES = {"hook": hooked, "baked": baked, "fused": fused, "lora": adapted}


@pytest.fixture(scope="module", params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def layer(request):
    """(down_proj [2048, 11008], what enters it [16, 11008], U [2048, 10]) in one dtype; U float32."""
    torch.manual_seed(0)
    weight = (torch.randn(D, D_FF) * D_FF**-0.5).to(request.param)
    # The gated activations of an MLP: a product of two, so mostly small with a heavy tail.
    h = (torch.randn(16, D_FF) * torch.nn.functional.silu(torch.randn(16, D_FF))).to(request.param)
    return weight, h, basis(D, K)


def over(bounds, one, other):
    """Worst error/bound of Rule B between two outputs, by element and by row."""
    each, row = bounds
    difference = one.double() - other.double()
    return worst_ratio(difference.abs(), each), worst_ratio(difference.norm(dim=-1), row)


@pytest.mark.parametrize("strength", everyday([1.0, 0.5, 2.0], 1.0))
def test_a_real_layer_meets_rule_b(layer, strength):
    weight, h, u = layer
    x, bounds = h @ weight.T, rule_b_bounds(weight, h, u, strength)
    ours = h @ bake_weight(weight, u, strength).T
    for name, y in {"hook": project_eager(x, u, strength), "fused": project(x, u, strength)}.items():
        each, row = over(bounds, y, ours)
        print(f"{weight.dtype} a={strength} {name} against baked: error/bound {each:.3f} element, {row:.3f} row")
        assert max(each, row) <= 1
    if strength == 1.0 and weight.dtype == torch.bfloat16:
        typical = (project(x, u).double() - ours.double()).norm(dim=-1) / expected_rule_b(weight, h)
        print(f"norm(fused - baked) is {float(typical.median()):.3f} of 0.88 u norm(x), gate {2 / 0.88:.2f}")
        assert typical.median() > 0.5 and typical.max() < 2 / 0.88


def test_wrong_forms_break_rule_b(layer):
    weight, h, u = layer
    ours, bounds = bake_weight(weight, u), rule_b_bounds(weight, h, u)
    x, right = h @ weight.T, h @ ours.T
    wrong = {
        "identity": (x, right),
        "strength ignored": (project(x, u, 0.5), right),
        "another layer's basis": (project(x, basis(D, K, seed=1)), right),
        "basis read column-major": (project(x, u.T.reshape(D, K).contiguous()), right),
        "a column forgotten": (project(x, u[:, :-1].contiguous()), right),
        "the weight left as it was": (project(x, u), x),
    }
    if weight.dtype == torch.bfloat16:
        coarse = (ours.view(torch.int16) & -8).view(torch.bfloat16)
        wrong["weights stored with three bits fewer"] = (project(x, u), h @ coarse.T)
    for name, (one, other) in wrong.items():
        ratio = max(over(bounds, one, other))
        print(f"{weight.dtype} {name}: error/bound {ratio:.1f}")
        assert ratio > 1


def test_the_op_meets_rule_a_and_the_leak_rule_at_the_real_width(layer):
    weight, h, u = layer
    x = h @ weight.T
    inside = (torch.randn(16, K) @ u.T).to(weight.dtype)
    for name, rows in {"activations": x, "inside span(U)": inside}.items():
        for strength in (1.0, 2.0):
            y = project(rows, u, strength)
            error = (y.double() - project_oracle(rows, u, strength)).abs()
            eager = (project_eager(rows, u, strength).double() - project_oracle(rows, u, strength)).abs()
            ratio = worst_ratio(error, rule_a_bound(rows, u, strength))
            one_rounding = unit_roundoff(rows.dtype) * float(project_oracle(rows, u, strength).abs().max())
            print(f"{rows.dtype} {name} a={strength}: error/bound {ratio:.3f}, eager x {error.max() / eager.max():.2f}")
            assert ratio <= 1
            assert error.max() <= 2 * eager.max() + one_rounding
    kept = worst_ratio(leak(project(inside, u), u), leak_bound(project(inside, u), inside, u))
    print(f"{weight.dtype} leak/bound {kept:.3f}")
    assert kept <= 1


def test_a_rounded_z_breaks_rule_a_and_the_leak_rule(layer):
    """The usual mistake of LoRA-style kernels. On random rows it hides; on rows inside span(U) it cannot.

    z is rounded to the storage dtype; for float32 to TF32, which Rule A must not admit either.
    """
    weight, _, u = layer
    inside = (torch.randn(16, K) @ u.T).to(weight.dtype)
    z = (inside.float() @ u).to(weight.dtype)
    if weight.dtype == torch.float32:
        z = (z.view(torch.int32) & ~0x1FFF).view(torch.float32)
    y = (inside.float() - z.float() @ u.T).to(weight.dtype)
    error = worst_ratio((y.double() - project_oracle(inside, u)).abs(), rule_a_bound(inside, u))
    kept = worst_ratio(leak(y, u), leak_bound(y, inside, u))
    print(f"{weight.dtype} z rounded: error/bound {error:.1f}, leak/bound {kept:.1f}")
    assert min(error, kept) > 1


@pytest.mark.slow
def test_baked_weights_are_one_rounding_from_exact_and_leak_no_more_than_rounding_leaves(layer):
    weight, _, u = layer
    ours, bound, exact = bake_weight(weight, u), baked_element_bound(weight, u), bake_oracle(weight, u)
    error = worst_ratio((ours.double() - exact).abs(), bound)
    kept, floor = leak_of_weight(ours, weight, u), leak_floor(ours, weight, u)
    print(f"{weight.dtype}: error/bound {error:.3f}; leak {kept:.3e}, floor {floor:.3e}, ratio {kept / floor:.3f}")
    assert error <= 1
    if weight.dtype == torch.float32:
        # Storage no longer dominates: what U's own columns lack of orthonormality, and one float32 sum over d, do.
        skew = float(torch.linalg.matrix_norm(u.double().T @ u.double() - torch.eye(K, dtype=torch.float64), 2))
        spread = D**0.5 * 2**-22
        print(f"float32: leak/bound {kept / (floor + skew + spread):.3f}")
        assert kept <= floor + skew + spread
        return
    assert kept <= 1.1 * floor
    # Teeth: the reference script's way, P = I - U U^T rounded to the storage dtype.
    # In some columns, which do not depend on each other: a product with a dense P takes seconds.
    p, few = (torch.eye(D) - u @ u.T).to(weight.dtype), weight[:, :512]
    dense = (p.float() @ few.float()).to(weight.dtype)
    wrong, leaks = worst_ratio((dense.double() - exact[:, :512]).abs(), bound[:, :512]), leak_of_weight(dense, few, u)
    floor = leak_floor(dense, few, u)
    print(f"{weight.dtype}, P rounded too: error/bound {wrong:.1f}, leak/floor {leaks / floor:.2f}")
    assert wrong > 1 and leaks > 1.1 * floor


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.double()


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3", "mistral"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_whole_model_in_float32_is_within_1e_4_of_float64(kind, bias):
    model, ids = pico(kind, bias=bias), torch.randint(1, 64, (3, 12))
    bases = {i: basis(48, 5, seed=i) for i in (1, 2, 3)}
    exact = pico(kind, bias=bias).double()
    original = logits(exact, ids)
    with torch.no_grad():
        for i, site in mlp_outputs(exact, bases).items():
            site.module.weight.copy_(bake_oracle(site.module.weight, bases[i]))
            if bias:
                site.module.bias.copy_(project_oracle(site.module.bias, bases[i]))
    oracle = logits(exact, ids)
    assert float((oracle - original).abs().max()) > 0.1
    for mode, applier in MODES.items():
        if bias and mode == "lora":
            continue  # an adapter cannot edit a bias: tests/checkpoint/test_adapter.py
        with applier(model, bases):
            error = float((logits(model, ids) - oracle).abs().max())
        print(f"{kind} bias={bias} {mode}: logit error {error:.1e}, error/bound {error / 1e-4:.3f}")
        assert error <= 1e-4
    # Teeth: a layer skipped; with a bias, the bias forgotten.
    with baked(model, bases, layers=(1, 2)):
        assert float((logits(model, ids) - oracle).abs().max()) > 1e-3
    if bias:
        kept = {i: site.module.bias.detach().clone() for i, site in mlp_outputs(model, bases).items()}
        with baked(model, bases), torch.no_grad():
            for i, site in mlp_outputs(model, bases).items():
                site.module.bias.copy_(kept[i])
            assert float((logits(model, ids) - oracle).abs().max()) > 1e-3
            # Put back what the block left, so that its own restoration is what is undone.
            for i, site in mlp_outputs(model, bases).items():
                site.module.bias.copy_(bake_weight(kept[i], bases[i]))
