"""y = x - a A (B^T x - c) in every mode: one function within its derived bounds, and wrong forms outside them."""

import pytest
import torch
from torch.nn import functional as F

from kernel_surgery import Subspace, adapted, baked, fused, hooked
from kernel_surgery.common.errors import KernelSurgeryError, SubspaceError
from kernel_surgery.edit.baked import bake_weight
from kernel_surgery.edit.lora import lora_pair
from kernel_surgery.models.architectures import mlp_outputs
from kernel_surgery.numerics.bounds import (
    adapter_bound,
    applied_bound,
    leak_bound,
    rule_a_bound,
    rule_b_bounds,
    worst_ratio,
)
from kernel_surgery.numerics.oracle import bake_oracle, exact_output, leak, project_oracle
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.ops.eager import project_eager
from kernel_surgery.ops.library import project
from kernel_surgery.subspace.fingerprint import fingerprint
from tests.support.marks import everyday
from tests.support.models import basis, oblique, pico

D, D_FF, K = 2048, 11008, 6  # Qwen2.5-3B's down_proj, and one dimension less than there are languages
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MODES = {"hook": hooked, "baked": baked, "fused": fused, "lora": adapted}


def ours(function, x, edit, strength=1.0):
    """The operator or its eager form, which takes a projection as one."""
    if function is project_eager:
        return project_eager(x, edit, strength)
    return function(x, edit.basis, strength, dual=edit.dual, offset=edit.offset)


@pytest.fixture(scope="module", params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def layer(request):
    """(down_proj, its bias, what enters it, an edit with an offset) at the real shape, in one dtype."""
    torch.manual_seed(0)
    weight, bias = (torch.randn(D, D_FF) * D_FF**-0.5).to(request.param), torch.randn(D).to(request.param)
    h = (torch.randn(8, D_FF) * F.silu(torch.randn(8, D_FF))).to(request.param)
    return weight, bias, h, oblique(D, K, offset=True)


WRONG = {
    "dual forgotten": lambda e: Projection(e.basis, e.basis, e.offset),
    "A and B swapped": lambda e: Projection(e.dual, e.basis, e.offset),
    "offset dropped": lambda e: e.linear,
    "offset's sign": lambda e: Projection(e.basis, e.dual, -e.offset),
    "offset of another dimension": lambda e: Projection(e.basis, e.dual, e.offset.roll(1)),
    "dual in another order": lambda e: Projection(e.basis, e.dual.roll(1, 1), e.offset),
    "dual's last column lost": lambda e: Projection(e.basis, F.pad(e.dual[:, :-1], (0, 1)), e.offset),
    "dual in bfloat16": lambda e: Projection(e.basis, e.dual.bfloat16().float(), e.offset),
    "basis made orthonormal": lambda e: Projection(torch.linalg.qr(e.basis)[0], e.dual, e.offset),
    "dual of norm one": lambda e: Projection(e.basis, e.dual / e.dual.norm(dim=0), e.offset),
}


@pytest.mark.parametrize("strength", everyday([1.0, 0.5, -1.0], 1.0))
def test_hook_and_fused_meet_rule_a_and_baked_rule_b_at_the_real_shape(layer, strength):
    weight, bias, h, edit = layer
    x = F.linear(h, weight, bias)
    exact = exact_output(weight, h, edit, strength, bias)
    bounds = rule_b_bounds(weight, h, edit, strength, exact)
    made = F.linear(h, bake_weight(weight, edit, strength), bake_weight(bias, edit, strength))
    for name, function in (("hook", project_eager), ("fused", project)):
        y = ours(function, x, edit, strength)
        a = worst_ratio((y.double() - project_oracle(x, edit, strength)).abs(), rule_a_bound(x, edit, strength))
        difference = y.double() - made.double()
        b = worst_ratio(difference.abs(), bounds[0]), worst_ratio(difference.norm(dim=-1), bounds[1])
        print(f"{weight.dtype} a={strength} {name}: error/bound {a:.3f} (A), {b[0]:.3f} {b[1]:.3f} (B)")
        assert max(a, *b) <= 1
        bound = applied_bound(name, exact, edit, D_FF, weight.dtype, strength)
        assert worst_ratio((y.double() - exact.y).abs(), bound) <= 1
    bound = applied_bound("baked", exact, edit, D_FF, weight.dtype, strength)
    assert worst_ratio((made.double() - exact.y).abs(), bound) <= 1


@pytest.mark.parametrize("name", WRONG)
def test_wrong_forms_break_rule_a(layer, name):
    weight, bias, h, edit = layer
    x = F.linear(h, weight, bias)
    # Rows inside span(A) too: there nothing but z is left, so a coarse B shows in every dtype.
    rows = torch.cat([x, (3 * torch.randn(8, K) @ edit.basis.T).to(x.dtype)])
    error = (ours(project, rows, WRONG[name](edit)).double() - project_oracle(rows, edit)).abs()
    ratio = worst_ratio(error, rule_a_bound(rows, edit))
    print(f"{weight.dtype} {name}: error/bound {ratio:.1f}")
    assert ratio > 1


def test_the_leak_rule_and_its_teeth(layer):
    weight, _, _, edit = layer
    for form in (edit, edit.linear):
        inside = (3 * torch.randn(16, K) @ edit.basis.T).to(weight.dtype)
        y = ours(project, inside, form)
        kept = worst_ratio(leak(y, form), leak_bound(y, inside, form))
        coarse = WRONG["dual in bfloat16"](edit)
        y = ours(project, inside, coarse if form is edit else coarse.linear)
        wrong = worst_ratio(leak(y, form), leak_bound(y, inside, form))
        print(f"{weight.dtype} {'affine' if form is edit else 'linear'}: leak/bound {kept:.3f}, B rounded {wrong:.1f}")
        assert kept <= 1 < wrong


def test_the_adapter_is_exact_and_takes_no_offset(layer):
    weight, _, _, edit = layer
    pair = lora_pair(weight, edit.linear, 0.5)
    exact = 0.5 * edit.dual.double().T @ weight.double()
    error = worst_ratio((pair.a.double() - exact).abs(), adapter_bound(weight, 0.5, edit.linear))
    swapped = lora_pair(weight, Projection(edit.dual, edit.basis), 0.5)
    wrong = worst_ratio((swapped.a.double() - exact).abs(), adapter_bound(weight, 0.5, edit.linear))
    print(f"{weight.dtype}: error/bound {error:.3f}, A and B swapped {wrong:.1f}")
    assert error <= 1 < wrong and torch.equal(pair.b, -edit.basis)


def spaces(model, offset):
    """An oblique subspace of layers 1 and 2 of a pico model, with a schedule."""
    edits = {i: oblique(48, 4, i, offset=offset) for i in (1, 2)}
    return Subspace(
        {i: e.basis for i, e in edits.items()},
        fingerprint=fingerprint(model),
        duals={i: e.dual for i, e in edits.items()},
        offsets={i: e.offset for i, e in edits.items()} if offset else {},
        strengths={1: 0.5, 2: 1.25},
    )


def outputs(model, ids):
    seen = {}
    handles = [
        site.module.register_forward_hook(lambda m, args, out, i=i: seen.update({i: (args[0], out)}))
        for i, site in mlp_outputs(model, (1, 2)).items()
    ]
    with torch.no_grad():
        logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return seen, logits


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("offset", [False, True], ids=["linear", "affine"])
def test_a_whole_model_computes_the_edit_in_every_mode(kind, mode, offset):
    """Against the float64 model whose weights and biases are edited in float64, strength by layer."""
    model, exact = (pico(kind, dtype=t, bias=offset) for t in (torch.float32, torch.float64))
    subspace, ids = spaces(model, offset), torch.randint(50, (2, 7))
    if mode == "lora" and offset:
        with pytest.raises(KernelSurgeryError, match="offset"), adapted(model, subspace):
            pytest.fail("the block was entered")
        return
    exact.load_state_dict(model.state_dict())
    before = model(ids).logits.detach().double()
    own = float(
        (before - exact(ids).logits.detach()).abs().max()
    )  # the original's error, which transformers' norms make
    for i, site in mlp_outputs(exact, (1, 2)).items():
        edit, a = subspace.projections[i].double(), {1: 0.5, 2: 1.25}[i] * 0.8
        for p in (site.module.weight, site.module.bias):
            if p is not None:
                p.data.copy_(bake_oracle(p.data, edit, a))
    right = exact(ids).logits.detach()
    with MODES[mode](model, subspace, strength=0.8) as record:
        _, logits = outputs(model, ids)
    assert record.schedule == {1: 0.5, 2: 1.25}
    error, moved = float((logits.double() - right).abs().max()), float((before - right).abs().max())
    print(f"{kind} {mode}: error {error:.1e}, the original's {own:.1e}; the edit moves the logits by {moved:.1e}")
    # What enters the edit has the original's error; A and B amplify it (`Projection.norm`) at either of two layers.
    amplified = max(edit.norm(0.8 * subspace.strengths[i]) for i, edit in subspace.projections.items()) ** 2
    assert error <= 2 * amplified * own < moved
    assert torch.equal(model(ids).logits.double(), before), "the model is itself again"


def test_a_schedule_multiplies_strengths_of_sequences():
    model = pico("llama")
    subspace, ids = spaces(model, False), torch.randint(50, (3, 7))
    with fused(model, subspace, strength=torch.tensor([0.0, 0.5, 1.0])):
        _, together = outputs(model, ids)
    for row, a in enumerate((0.0, 0.5, 1.0)):
        with fused(model, subspace, strength=a):
            _, alone = outputs(model, ids[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)


def test_baking_an_offset_needs_a_bias():
    model = pico("qwen2")
    with pytest.raises(KernelSurgeryError, match="no bias that could hold it"), baked(model, spaces(model, True)):
        pytest.fail("the block was entered")


def parts(**changed):
    edits = {i: oblique(48, 4, i, offset=True) for i in (1, 2)}
    made = {
        "bases": {i: e.basis for i, e in edits.items()},
        "duals": {i: e.dual for i, e in edits.items()},
        "offsets": {i: e.offset for i, e in edits.items()},
        "strengths": {1: 0.5},
    }
    return made | {name: change(made[name]) for name, change in changed.items()}


REFUSED = {
    "B^T A is not I": ({"duals": lambda b: {i: 1.001 * t for i, t in b.items()}}, "layer 1.*B.T A"),
    "A and B of two layers": ({"duals": lambda b: {1: b[2], 2: b[1]}}, "layer 1.*B.T A"),
    "dual of one layer": ({"duals": lambda b: {1: b[1]}}, "a dual for layers"),
    "offset of one layer": ({"offsets": lambda c: {2: c[2]}}, "an? offset for layers"),
    "offset too long": ({"offsets": lambda c: {i: torch.zeros(5) for i in c}}, "offset"),
    "dual not finite": ({"duals": lambda b: b | {1: b[1] * torch.inf}}, "finite|NaN"),
    "offset not finite": ({"offsets": lambda c: c | {1: c[1] * torch.nan}}, "finite|NaN"),
    "a strength of no layer": ({"strengths": lambda s: {7: 1.0}}, "7"),
    "a strength that is not finite": ({"strengths": lambda s: {1: float("nan")}}, "nan"),
    "a basis that is not orthonormal, without a dual": ({"duals": lambda b: {}}, "orthonormal"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_projection_is_refused(name):
    changes, message = REFUSED[name]
    with pytest.raises(SubspaceError, match=message):
        Subspace(**parts(**changes))


def test_a_file_keeps_everything_and_old_files_mean_an_orthogonal_edit(tmp_path):
    subspace = Subspace(**parts())
    subspace.save(tmp_path / "affine.safetensors")
    again = Subspace.load(tmp_path / "affine.safetensors", force=True)
    assert again.form == "affine" and again.strengths == {1: 0.5} and again.strength_at(2, 0.8) == 0.8
    for i, edit in again.projections.items():
        for part in ("basis", "dual", "offset"):
            assert torch.equal(getattr(edit, part), getattr(subspace.projections[i], part))
    fewer = again.truncate(2).select([2])
    assert fewer.rank == 2 and fewer.strengths == {} and fewer.offsets[2].shape == (2,)
    Subspace({1: basis(48, 4)}).save(tmp_path / "old.safetensors")
    (old,) = Subspace.load(tmp_path / "old.safetensors", force=True).projections.values()
    assert old.dual is None and old.offset is None
