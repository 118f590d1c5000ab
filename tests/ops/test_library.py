"""kernel_surgery::project as a PyTorch operator: schema, fake, autograd, compile, errors; Rule A on awkward inputs."""

from contextlib import contextmanager

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from hypothesis import given
from hypothesis import strategies as st

from kernel_surgery.edit.lora import add_pair, lora_pair
from kernel_surgery.numerics.bounds import rule_a_bound, worst_ratio
from kernel_surgery.numerics.oracle import project_oracle
from kernel_surgery.ops import library
from kernel_surgery.ops.library import _DIRECT, project, project_add, project_add_rmsnorm, provider
from tests.support.marks import everyday
from tests.support.models import basis, oblique

OPERATOR = torch.ops.kernel_surgery.project.default


@pytest.mark.parametrize(
    "dtype", everyday([torch.float32, torch.bfloat16, torch.float16, torch.float64], torch.bfloat16)
)
@pytest.mark.parametrize("per_row", [False, True], ids=["number", "per row"])
def test_opcheck_passes(dtype, per_row):
    x = torch.randn(5, 24).to(dtype).requires_grad_(dtype in (torch.float32, torch.float64))
    assert torch.library.opcheck(OPERATOR, (x, basis(24, 3), 0.7, torch.rand(5) if per_row else None))
    assert torch.library.opcheck(OPERATOR, (x[:, ::2], basis(12, 3), 1.0, None))


@given(
    rows=st.integers(0, 6),
    d=st.integers(1, 70),
    k=st.integers(1, 64),
    strength=st.floats(-2, 2),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    layout=st.sampled_from(["contiguous", "row stride", "stride 0", "transposed", "every second"]),
    seed=st.integers(0, 2**16),
)
def test_rule_a_holds_for_any_shape_layout_and_strength(rows, d, k, strength, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d, generator=generator).to(dtype)
    u = basis(d, min(k, d), seed)
    if layout == "row stride":
        x = torch.cat([x, torch.full((rows, 3), torch.nan, dtype=dtype)], 1)[:, :d]
    elif layout == "stride 0":
        x = x[:1].expand(rows, d) if rows else x
    elif layout == "transposed":
        x, u = x.T.contiguous().T, u.T.contiguous().T
    elif layout == "every second":
        x = torch.stack([x, torch.full_like(x, torch.nan)], 2).reshape(rows, 2 * d)[:, ::2]
    y = project(x, u, strength)
    assert y.shape == x.shape and y.dtype == dtype and y.is_contiguous()
    assert worst_ratio((y.double() - project_oracle(x, u, strength)).abs(), rule_a_bound(x, u, strength)) <= 1


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 65])
def test_few_rows_and_a_column_major_basis_at_a_small_strength_meet_rule_a(rows):
    """Where a BLAS adds the columns of U to x one by one, k roundings at the size of x take the place of one."""
    worst = 0.0
    for seed in range(20):
        x, u = torch.randn(rows, 128), basis(128, 64, seed).T.contiguous().T
        for a in (0.03125, -0.01):
            off = (project(x, u, a).double() - project_oracle(x, u, a)).abs()
            worst = max(worst, worst_ratio(off, rule_a_bound(x, u, a)))
    print(f"{rows} rows: error/bound {worst:.2f}")
    assert worst <= 1


def test_a_rows_strength_is_its_own_and_strength_0_returns_the_bits():
    x, u = torch.randn(3, 4, 32).bfloat16(), basis(32, 5)
    a = torch.rand(3, 4)
    a[0], a[1, 2] = 0.0, 1.0
    y = project(x, u, a)
    assert worst_ratio((y.double() - project_oracle(x, u, a)).abs(), rule_a_bound(x, u, a)) <= 1
    assert torch.equal(y[0], x[0]) and torch.equal(y[1, 2], project(x[1, 2], u, 1.0))
    x[0, 0, 0] = torch.inf  # removed is NaN there; 0 times NaN would be too
    for strength in (a, 0.0):
        assert torch.equal(project(x, u, strength)[0], x[0])


def test_a_bad_row_stays_in_its_row_and_the_input_is_untouched():
    x, u = torch.randn(6, 32), basis(32, 5)
    clean = project(x, u)
    x[2, 3], x[4, 0] = torch.nan, torch.inf
    kept = x.clone()
    y = project(x, u)
    assert torch.equal(y[[0, 1, 3, 5]], clean[[0, 1, 3, 5]]) and not torch.isfinite(y[[2, 4]]).any(1).all()
    assert torch.equal(x.nan_to_num(), kept.nan_to_num()) and y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_the_result_never_aliases_the_input(strength):
    x = torch.randn(2, 8)
    assert project(x, basis(8, 2), strength).data_ptr() != x.data_ptr()


def test_the_gradient_is_the_same_projection():
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    u, a = basis(10, 3), torch.rand(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: project(x, u, 0.7), x)
    assert torch.autograd.gradcheck(lambda x: project(x, u, a), x)
    upstream = torch.randn(4, 10, dtype=torch.float64)
    project(x, u, 0.7).backward(upstream)
    # float64 both: sums over d = 10 and k = 3, and a subtraction, in units of 2^-53.
    assert float((x.grad - project_oracle(upstream, u, 0.7)).abs().max()) <= 15 * 2**-53 * float(upstream.norm())


def test_it_compiles_into_one_graph_whatever_the_batch_and_length():
    graphs = []

    def backend(graph, _):
        graphs.append(sum(node.target is OPERATOR for node in graph.graph.nodes))
        return graph.forward

    u = basis(16, 3)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: project(torch.relu(x), u, 0.5) + 1, fullgraph=True, backend=backend, dynamic=True
    )
    for shape in ((2, 7, 16), (3, 5, 16), (1, 9, 16), (4, 1, 16), (8, 33, 16), (1, 1, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), project(torch.relu(x), u, 0.5) + 1, rtol=0, atol=0)
    print(f"{len(graphs)} graphs for 6 shapes")
    assert graphs and set(graphs) == {1}
    assert len(graphs) <= 4  # sizes 1 are compiled apart, once for each place; not one graph a shape
    torch._dynamo.reset()


def calls(monkeypatch):
    """What runs of the operators themselves: the list of their names, filled as they are called."""
    seen = []
    for name in ("_project", "_project_add", "_project_add_rmsnorm"):
        op = getattr(library, name)

        def counted(*args, op=op, name=name):
            seen.append(name)
            return op(*args)

        monkeypatch.setattr(library, name, counted)
        monkeypatch.setitem(_DIRECT, counted, _DIRECT[op])
    return seen


def all_three(x, u, strength=0.7):
    h = project_add(x, x, u, strength)
    return (project(x, u, strength), h, *project_add_rmsnorm(x, x, torch.ones(x.shape[-1]), 1e-6, u, strength))


def test_the_way_around_the_dispatcher_gives_the_same_bits_and_is_left_where_someone_looks(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    class Own(torch.Tensor):
        pass

    x, u, names, seen = torch.randn(5, 24), basis(24, 3), [], calls(monkeypatch)
    every = ["_project_add", "_project", "_project_add_rmsnorm"]
    direct = all_three(x, u)
    assert seen == []
    with Watching():
        through = all_three(x, u)
    assert seen == every and [n for n in names if n.startswith("kernel_surgery")] == [
        f"kernel_surgery.{name[1:]}.default" for name in every
    ]
    for one, other in zip(direct, through, strict=True):
        assert torch.equal(one, other)
    watched = x.clone().requires_grad_()
    for call in (lambda: all_three(watched, u), lambda: all_three(x.as_subclass(Own), u)):
        seen.clear()
        assert torch.equal(call()[1], direct[1]) and seen == every
    seen.clear()
    with torch.no_grad():
        all_three(watched, u)
    assert seen == []
    # A tracer above autograd sees the operator too, not what it is made of.
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: project(x, u, 0.7), pre_dispatch=True)(x)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert "kernel_surgery.project.default" in targets and "aten.addmm.default" not in targets
    # Of torch.func's transforms vmap goes row by row, and grad says that there is no rule; on every device alike.
    seen.clear()
    y = torch.func.vmap(lambda x: project(x, u, 0.7))(x)
    assert worst_ratio((y.double() - project_oracle(x, u, 0.7)).abs(), rule_a_bound(x, u, 0.7)) <= 1
    assert seen == ["_project"]
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: project(x, u, 0.7).sum())(x)


def products_of_the_edit():
    """({name: call} of everything that multiplies for the edit, a product of somebody else's, x, basis, weight)."""
    from kernel_surgery.edit.baked import bake_weight, remove
    from kernel_surgery.ops.eager import project_eager

    x, u, weight, h = torch.randn(64, 256), basis(256, 3), torch.randn(256, 512), torch.randn(64, 512)
    pair = lora_pair(weight, u)
    output = h @ weight.T
    forms = {
        "project": lambda: project(x, u),
        "per row": lambda: project(x, u, torch.ones(64)),
        "eager": lambda: project_eager(x, u),
        "bake": lambda: bake_weight(weight, u),
        "undo": lambda: remove(weight, u)[1],
        "adapter": lambda: lora_pair(weight, u).a,
        "lora": lambda: add_pair(output, pair.a, pair.b, h),
    }
    return forms, lambda: h @ weight.T, x, u, weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_edits_own_products(dtype):
    """Float32 products made of 16 bits would break Rule A by a factor of thousands: nobody's autocast may do that."""
    forms, other, *_ = products_of_the_edit()
    right, before = {name: form() for name, form in forms.items()}, other()
    with torch.autocast("cpu", dtype):
        assert {name for name, form in forms.items() if not torch.equal(form(), right[name])} == set()
        assert not torch.equal(other(), before)  # it is on for everything else


@contextmanager
def fewer_bits():
    """A process that lets float32 products be made of bfloat16, as torch.set_float32_matmul_precision does."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_process_with_fewer_bits_in_float32_still_edits_in_full():
    """The setting exists for speed and is recommended by torch.compile's own warning; on CUDA "high" is TF32."""
    from kernel_surgery.numerics.bounds import baked_element_bound
    from kernel_surgery.numerics.oracle import bake_oracle
    from kernel_surgery.numerics.precision import whole_products

    forms, other, x, u, weight = products_of_the_edit()
    right, before = {name: form() for name, form in forms.items()}, other()
    with fewer_bits():
        found = {name: form() for name, form in forms.items()}
        coarse = float((other() - before).abs().max())
        with whole_products():
            assert torch.equal(other(), before)
        assert float((other() - before).abs().max()) == coarse  # and put back
        eager = torch.compile(forms["eager"], backend="eager", fullgraph=True)
        found["compiled"] = eager()
    # What this CPU does with the setting on: nothing, if it has no bfloat16 instructions.
    print(f"somebody else's product is off by {coarse:.3g}")
    off = (found["bake"].double() - bake_oracle(weight, u)).abs()
    assert worst_ratio(off, baked_element_bound(weight, u)) <= 1
    for name in ("project", "per row", "eager", "compiled"):
        ratio = worst_ratio((found[name].double() - project_oracle(x, u)).abs(), rule_a_bound(x, u))
        print(f"{name}: error/bound {ratio:.3f}")
        assert ratio <= 1
    for name in ("undo", "adapter", "lora"):
        assert float((found[name] - right[name]).norm() / right[name].norm()) < 2.0**-20
        assert found[name].dtype == right[name].dtype


def test_what_the_edit_is_computed_in_follows_the_setting():
    """As on every machine, also those whose CPU would not use fewer bits."""
    from kernel_surgery.numerics.precision import computed_in

    x = torch.zeros(1)
    assert computed_in(x) == computed_in(x.bfloat16()) == torch.float32 and computed_in(x.double()) == torch.float64
    with fewer_bits():
        assert computed_in(x.bfloat16()) == torch.float64 and computed_in(x.to("meta")) == torch.float32
        traced = torch.compile(lambda x: x.to(computed_in(x)), backend="eager", fullgraph=True)
        assert traced(x).dtype == torch.float64
    assert traced(x).dtype == torch.float32  # traced again


WRONG = {
    "integers": (lambda x, u: project(x.int(), u), TypeError, "int32"),
    "d": (lambda x, u: project(x, basis(9, 2)), ValueError, r"\(4, 8\).*\(9, 2\)"),
    "one-dimensional basis": (lambda x, u: project(x, u[:, 0]), ValueError, r"basis of shape \(8,\)"),
    "k": (lambda x, u: project(torch.randn(2, 80), basis(80, 65)), ValueError, "k=65.*64"),
    "no columns": (lambda x, u: project(x, u[:, :0]), ValueError, "k=0"),
    "NaN strength": (lambda x, u: project(x, u, float("nan")), ValueError, "finite"),
    "strength's shape": (lambda x, u: project(x, u, torch.rand(3)), ValueError, r"\(3,\).*\(4,\)"),
    "device": (lambda x, u: project(x, u.to("meta")), ValueError, "cpu.*meta"),
    "basis with gradient": (lambda x, u: project(x, u.requires_grad_()), ValueError, "Detach"),
    "strength with gradient": (lambda x, u: project(x, u, torch.rand(4, requires_grad=True)), ValueError, "Detach"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_with_both_values(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call(torch.randn(4, 8), basis(8, 2))


def test_a_minus_sign_that_is_a_bit_and_a_device_without_autocast():
    from kernel_surgery.ops.eager import project_eager

    x, u = torch.randn(4, 16), basis(16, 3)
    assert torch.equal(project(torch._neg_view(x), u), project(-x, u))
    assert project_eager(x.to("meta"), u.to("meta")).shape == project(x.to("meta"), u.to("meta")).shape == (4, 16)


def test_the_provider_is_named_for_what_runs():
    assert provider(torch.zeros(1)) == provider("cpu") == "aten/cpu"
    assert provider("cuda") == "triton/cuda"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the compiled kernel is run")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [5, 300])
def test_on_a_gpu_opcheck_passes(rows, dtype):
    """Schema, fake, autograd and AOT dispatch of every operator on CUDA, with strengths a row and without."""
    operators = torch.ops.kernel_surgery
    x, r = (torch.randn(rows, 128, device="cuda").to(dtype).requires_grad_(dtype == torch.float32) for _ in range(2))
    w, u = torch.rand(128, device="cuda").to(dtype), basis(128, 16).cuda()
    other = (oblique(128, 16, offset=True)).to("cuda")
    for strengths, edit in ((None, ()), (torch.rand(rows, device="cuda"), (other.dual, other.offset))):
        a = other.basis if edit else u
        assert torch.library.opcheck(operators.project.default, (x, a, 0.7, strengths, *edit))
        for separate in (True, False):
            more = (a, 0.7, strengths, separate, *edit)
            assert torch.library.opcheck(operators.project_add.default, (x, r, *more))
            assert torch.library.opcheck(operators.project_add_rmsnorm.default, (x, r, w, 1e-6, *more))


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_tf32_does_not_reach_the_edit():
    """As after torch.set_float32_matmul_precision("high"), which torch.compile recommends."""
    from kernel_surgery.edit.baked import bake_weight
    from kernel_surgery.numerics.bounds import baked_element_bound
    from kernel_surgery.numerics.oracle import bake_oracle
    from kernel_surgery.ops.eager import project_eager
    from kernel_surgery.ops.library import project

    x, u, weight = torch.randn(64, 2048, device="cuda"), basis(2048, 10).cuda(), torch.randn(2048, 512, device="cuda")
    square = torch.randn(1024, 1024, device="cuda")  # a shape for which cuBLAS takes its tensor cores
    torch.set_float32_matmul_precision("high")
    try:
        product = square.double() @ square.double()
        coarse = float(((square @ square).double() - product).norm() / product.norm())
        ratios = {
            name: worst_ratio((call(x, u).double() - project_oracle(x, u)).abs(), rule_a_bound(x, u))
            for name, call in (("triton", project), ("eager", project_eager))
        }
        off = (bake_weight(weight, u).double() - bake_oracle(weight, u)).abs()
        ratios["bake"] = worst_ratio(off, baked_element_bound(weight, u))
    finally:
        torch.set_float32_matmul_precision("highest")
    print(f"somebody else's product is off by {coarse:.1e}; the edit's error/bound {ratios}")
    assert max(ratios.values()) <= 1 and coarse > 2.0**-16  # float32's would be 2^-23
