"""project_add and project_add_rmsnorm as operators: against separate operations bit for bit, against the oracle, as
PyTorch sees them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernel_surgery.numerics.bounds import add_bound, rmsnorm_bound, rule_a_bound, worst_ratio
from kernel_surgery.numerics.oracle import project_oracle, rmsnorm_oracle
from kernel_surgery.ops.library import packed, project, project_add, project_add_rmsnorm
from tests.support.marks import everyday
from tests.support.models import basis

ADD = torch.ops.kernel_surgery.project_add.default
NORM = torch.ops.kernel_surgery.project_add_rmsnorm.default
KINDS = (torch.float32, torch.bfloat16, torch.float16)


def made(dtype, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, r = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(2))
    return x, r, torch.rand(shape[-1], generator=generator).to(dtype) - 0.5


@pytest.mark.parametrize("dtype", everyday(KINDS, torch.bfloat16))
@pytest.mark.parametrize("per_row", [False, True], ids=["number", "per row"])
@pytest.mark.parametrize("separate", [True, False])
def test_opcheck_passes(dtype, per_row, separate):
    x, r, w = (t.requires_grad_(dtype == torch.float32) for t in made(dtype, 5, 24))
    edit = (basis(24, 3), 0.7, torch.rand(5) if per_row else None, separate)
    assert torch.library.opcheck(ADD, (x, r, *edit))
    assert torch.library.opcheck(NORM, (x, r, w, 1e-6, *edit))
    edit = (basis(12, 3), 0.7, None, separate)
    assert torch.library.opcheck(NORM, (x[:, ::2], r[:, ::2], w[::2], 1e-6, *edit))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", KINDS)
def test_it_gives_the_bits_of_the_models_own_separate_operations(kind, dtype):
    from tests.support.models import pico

    norm = pico(kind, dtype=dtype).model.norm
    x, r, _ = made(dtype, 3, 7, 48)
    torch.nn.init.uniform_(norm.requires_grad_(False).weight)
    u = basis(48, 5)
    h, n = project_add_rmsnorm(x, r, norm.weight, norm.variance_epsilon, u, 0.7)
    apart = r + project(x, u, 0.7)
    assert torch.equal(h, apart) and torch.equal(project_add(x, r, u, 0.7), apart)
    assert torch.equal(n, norm(apart))
    # With one rounding fewer it is nearer to the exact value, and no longer the same.
    once, _ = project_add_rmsnorm(x, r, norm.weight, norm.variance_epsilon, u, 0.7, separate=False)
    exact = r.double() + project_oracle(x, u, 0.7)
    if dtype != torch.float32:
        assert not torch.equal(once, h)
        assert float((once.double() - exact).norm()) < float((h.double() - exact).norm())


@given(
    rows=st.integers(0, 6),
    d=st.integers(1, 70),
    k=st.integers(1, 64),
    strength=st.floats(-2, 2),
    dtype=st.sampled_from(KINDS),
    layout=st.sampled_from(["contiguous", "row stride", "stride 0", "transposed", "every second"]),
    eps=st.sampled_from([1e-6, 1e-5, 0.3]),
    separate=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_bound_holds_for_any_shape_layout_and_strength(rows, d, k, strength, dtype, layout, eps, separate, seed):
    x, r, w = made(dtype, rows, d, seed=seed)
    u = basis(d, min(k, d), seed)
    if layout == "row stride":
        x, r = (torch.cat([t, torch.full((rows, 3), torch.nan, dtype=dtype)], 1)[:, :d] for t in (x, r))
    elif layout == "stride 0" and rows:
        x, r = x[:1].expand(rows, d), r[:1].expand(rows, d)
    elif layout == "transposed":
        x, r, u = (t.T.contiguous().T for t in (x, r, u))
    elif layout == "every second":
        x, r = (torch.stack([t, torch.full_like(t, torch.nan)], 2).reshape(rows, 2 * d)[:, ::2] for t in (x, r))
    h, n = project_add_rmsnorm(x, r, w, eps, u, strength, separate=separate)
    for made_new in (h, n):
        assert made_new.shape == x.shape and made_new.dtype == dtype and made_new.is_contiguous()
    exact = r.double() + project_oracle(x, u, strength)
    assert worst_ratio((h.double() - exact).abs(), add_bound(x, r, u, strength, separate)) <= 1
    assert worst_ratio((n.double() - rmsnorm_oracle(h, w, eps)).abs(), rmsnorm_bound(h, w, eps, separate)) <= 1


WRONG_NORMS = {
    "eps outside the root": lambda h, w, eps: h / (h.square().mean(-1, keepdim=True).sqrt() + eps) * w,
    "no eps": lambda h, w, eps: h / h.square().mean(-1, keepdim=True).sqrt() * w,
    "weight forgotten": lambda h, w, eps: h / (h.square().mean(-1, keepdim=True) + eps).sqrt(),
    "1 + weight": lambda h, w, eps: h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + w),
    "layer norm": lambda h, w, eps: (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True) + eps).sqrt() * w,
}


@pytest.mark.parametrize("name", WRONG_NORMS)
def test_the_norms_bound_rejects_plausible_mistakes(name):
    h, _, w = made(torch.bfloat16, 9, 256)
    exact, bound = rmsnorm_oracle(h, w, 0.1), rmsnorm_bound(h, w, 0.1)
    right = (exact.bfloat16().double() - exact).abs()
    wrong = (WRONG_NORMS[name](h.double(), w.double(), 0.1).bfloat16().double() - exact).abs()
    print(f"{name}: {worst_ratio(wrong, bound):.1f} of the bound; right {worst_ratio(right, bound):.2f}")
    assert worst_ratio(right, bound) <= 1 < worst_ratio(wrong, bound)


def test_the_sums_bound_rejects_a_residual_rounded_twice_over():
    x, r, _ = made(torch.bfloat16, 9, 256)
    u = basis(256, 8)
    exact, bound = r.double() + project_oracle(x, u), add_bound(x, r, u, separate=False)
    twice = r + project(x, u)  # the bound of one rounding, met by two roundings?
    once = project_add(x, r, u, separate=False)
    assert worst_ratio((once.double() - exact).abs(), bound) <= 1 < worst_ratio((twice.double() - exact).abs(), bound)
    assert worst_ratio((twice.double() - exact).abs(), add_bound(x, r, u)) <= 1


def test_one_batch_holds_edited_and_unedited_sequences():
    x, r, w = made(torch.bfloat16, 4, 6, 32)
    u, a = basis(32, 5), torch.tensor([0.0, 1.0, 0.5, 0.0])
    y = project(x, u, a)
    each = project(x, u, a[:, None].expand(4, 6))
    assert torch.equal(y, each) and torch.equal(y[[0, 3]], x[[0, 3]])
    assert torch.equal(y[1], project(x[1], u)) and not torch.equal(y[2], x[2])
    assert worst_ratio((y[2].double() - project_oracle(x[2], u, 0.5)).abs(), rule_a_bound(x[2], u, 0.5)) <= 1
    h, n = project_add_rmsnorm(x, r, w, 1e-6, u, a)
    plain = (r + x)[[0, 3]]
    assert torch.equal(h[[0, 3]], plain) and torch.equal(n[1], project_add_rmsnorm(x[1], r[1], w, 1e-6, u)[1])


def test_gradients_are_those_of_the_separate_operations_in_float64():
    x, r, w = (t.requires_grad_() for t in made(torch.float32, 6, 24))
    u, a = basis(24, 3), torch.rand(6)
    gh, gn, _ = made(torch.float32, 6, 24, seed=1)
    h, n = project_add_rmsnorm(x, r, w, 1e-3, u, a)
    got = torch.autograd.grad((h * gh + n * gn).sum(), (x, r, w))
    x64, r64, w64 = (t.detach().double().requires_grad_() for t in (x, r, w))
    h64 = r64 + project_oracle(x64, u, a)
    n64 = rmsnorm_oracle(h64, w64, 1e-3)
    right = torch.autograd.grad((h64 * gh + n64 * gn).sum(), (x64, r64, w64))
    # A few dozen float32 roundings (sums over 24, the root, the products) of terms no larger than these:
    inverse = 1 / (h64.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    size = (
        gh.double().norm(dim=1, keepdim=True) + 2 * (gn.double() * w64).norm(dim=1, keepdim=True) * inverse
    ).detach()
    for name, one, other, bound in zip(
        ("x", "residual", "weight"), got, right, (size, size, (gn.double() * h64 * inverse).abs().sum(0)), strict=True
    ):
        ratio = worst_ratio((one.double() - other).abs(), 32 * 2.0**-24 * bound.detach().expand_as(other))
        print(f"gradient of {name}: {ratio:.3f} of its bound")
        assert ratio <= 1
    only = torch.autograd.grad(project_add(x, r, u, a).sum(), (x, r))
    assert torch.equal(only[0], project(torch.ones(6, 24), u, a)) and torch.equal(only[1], torch.ones(6, 24))


def test_a_packed_basis_is_the_same_edit():
    x, _, _ = made(torch.float32, 5, 64)
    for k, columns in ((1, 16), (10, 16), (16, 16), (17, 32), (64, 64)):
        u = basis(64, k).T.contiguous().T
        wide = packed(u)
        assert wide.shape == (64, columns) and wide.is_contiguous() and torch.equal(wide[:, :k], u)
        assert not wide[:, k:].any()
        error = (project(x, wide).double() - project_oracle(x, u)).abs()
        assert worst_ratio(error, rule_a_bound(x, u)) <= 1


WRONG = {
    "float64": (lambda x, r, w, u: project_add(x.double(), r.double(), u), TypeError, "float64"),
    "residual's shape": (lambda x, r, w, u: project_add(x, r[:3], u), ValueError, r"residual is \(3, 8\).*\(4, 8\)"),
    "residual's dtype": (lambda x, r, w, u: project_add(x, r.half(), u), ValueError, "float16.*float32"),
    "weight's shape": (lambda x, r, w, u: project_add_rmsnorm(x, r, w[:5], 0, u), ValueError, r"weight is \(5,\)"),
    "weight's dtype": (lambda x, r, w, u: project_add_rmsnorm(x, r, w.half(), 0, u), ValueError, "weight.*float16"),
    "weight's device": (lambda x, r, w, u: project_add_rmsnorm(x, r, w.to("meta"), 0, u), ValueError, "meta.*cpu"),
    "basis": (lambda x, r, w, u: project_add_rmsnorm(x, r, w, 0, basis(9, 2)), ValueError, r"\(9, 2\)"),
    "strength": (lambda x, r, w, u: project_add(x, r, u, torch.rand(3)), ValueError, r"\(3,\).*\(4,\)"),
    "no strength": (lambda x, r, w, u: project_add(x, r, u, torch.tensor(1.0)), ValueError, r"\(\)"),
    "basis with gradient": (lambda x, r, w, u: project_add(x, r, u.requires_grad_()), ValueError, "Detach"),
    "strength with gradient": (
        lambda x, r, w, u: project_add_rmsnorm(x, r, w, 0, u, torch.rand(4, requires_grad=True)),
        ValueError,
        "Detach",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_with_both_values(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call(*made(torch.float32, 4, 8), basis(8, 2))
