"""The edit as PyTorch operators: Triton on CUDA, ATen on the CPU, with fake tensors and gradients.

    kernel_surgery::project               y = x - a A (B^T x - c)
    kernel_surgery::project_add           h = residual + y
    kernel_surgery::project_add_rmsnorm   h, and n = rmsnorm(h) * weight

A is the basis, B the dual and c the offset. Without them A = B = U and c = 0: an orthogonal edit.

They are operators, not functions: torch.compile sees one opaque, differentiable call, and CUDA graphs capture it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.library import CustomOpDef
from torch.nn import Parameter

from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.ops.aten import inverse_rms, project_add_aten, project_add_rmsnorm_aten, project_aten

MAX_RANK = 64
UP_TO_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)
_invariant = False


def set_batch_invariant(enabled: bool) -> bool:
    """Choose whether a row has the same bits on CUDA whatever the other rows are. Return the setting before.

    Off by default. Few rows then use a faster kernel that sums in another order, so the last bits of a row depend
    on the number of rows. If it is on, few rows use the same kernel as many rows.

    The setting is global to the process and is read at every launch. A captured graph keeps the setting that it was
    captured with. Other operations are not affected: for invariant logits the model's own products (cuBLAS, attention)
    must be invariant too. On the CPU it changes nothing, because a BLAS library chooses by the number of rows.
    """
    global _invariant
    before, _invariant = _invariant, bool(enabled)
    return before


def provider(where: Tensor | torch.device | str) -> str:
    """Return the implementation that runs for a tensor or device: "triton/cuda" or "aten/cpu".

    Float64 on CUDA is "aten/cuda".
    """
    device = where.device if isinstance(where, Tensor) else torch.device(where)
    if device.type == "cuda" and not (isinstance(where, Tensor) and where.dtype == torch.float64):
        return "triton/cuda"
    return f"aten/{device.type}"


_project = torch.library.custom_op("kernel_surgery::project", project_aten, mutates_args=())
_project_add = torch.library.custom_op("kernel_surgery::project_add", project_add_aten, mutates_args=())
_project_add_rmsnorm = torch.library.custom_op(
    "kernel_surgery::project_add_rmsnorm", project_add_rmsnorm_aten, mutates_args=()
)


def _launch(
    x: Tensor,
    basis: Tensor,
    strength: float,
    row_strength: Tensor | None,
    dual: Tensor | None = None,
    offset: Tensor | None = None,
    **more,
):
    # Imported late: it needs triton, which does not exist on every platform.
    from kernel_surgery.kernels.project import project as launch

    # The kernel takes a broadcast row (stride 0), but not elements with a gap between them. A negated view stores its
    # minus sign as a flag, and a kernel would read the memory without it.
    x = (x if x.stride(-1) == 1 else x.contiguous()).resolve_neg()
    more = {name: v.resolve_neg() if isinstance(v, Tensor) else v for name, v in more.items()}
    row_strength = None if row_strength is None else row_strength.float().contiguous().resolve_neg()
    basis = basis.float().resolve_neg()
    if dual is not None:
        dual = dual.float().resolve_neg()
        if dual.stride() != basis.stride():
            basis, dual = basis.contiguous(), dual.contiguous()
        more["dual"] = dual
    if offset is not None:
        more["offset"] = offset.float().contiguous().resolve_neg()
    # Triton launches on the current device, which need not be x's.
    with torch.cuda.device(x.device):
        return launch(x, basis, strength, row_strength, invariant=_invariant, **more)


@_project.register_kernel("cuda")
def _project_cuda(x, basis, strength, row_strength, dual=None, offset=None) -> Tensor:
    if x.dtype == torch.float64:
        return project_aten(x, basis, strength, row_strength, dual, offset)
    return _launch(x, basis, strength, row_strength, dual, offset)[0]


@_project_add.register_kernel("cuda")
def _project_add_cuda(x, residual, basis, strength, row_strength, separate, dual=None, offset=None):
    residual = residual if residual.stride(-1) == 1 else residual.contiguous()
    return _launch(x, basis, strength, row_strength, dual, offset, residual=residual, separate=separate)[0]


@_project_add_rmsnorm.register_kernel("cuda")
def _project_add_rmsnorm_cuda(
    x, residual, weight, eps, basis, strength, row_strength, separate, dual=None, offset=None
):
    residual = residual if residual.stride(-1) == 1 else residual.contiguous()
    more = {"residual": residual, "weight": weight.contiguous(), "eps": eps, "separate": separate}
    return _launch(x, basis, strength, row_strength, dual, offset, **more)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_project.register_fake
def _project_fake(x, basis, strength, row_strength, dual=None, offset=None):
    return _like(x)


@_project_add.register_fake
def _project_add_fake(x, residual, basis, strength, row_strength, separate, dual=None, offset=None):
    return _like(x)


@_project_add_rmsnorm.register_fake
def _project_add_rmsnorm_fake(
    x, residual, weight, eps, basis, strength, row_strength, separate, dual=None, offset=None
):
    return _like(x), _like(x)


def _remember_edit(ctx, edit: tuple, *others: Tensor) -> None:
    """Keep the arguments of the edit, (basis, strength, row_strength, dual, offset), for the gradient."""
    basis, ctx.strength, row_strength, dual, offset = edit
    if any(t is not None and t.requires_grad for t in (basis, row_strength, dual, offset)):
        raise KernelSurgeryError(_NO_GRADIENT)
    ctx.save_for_backward(basis, row_strength, dual, *others)


def _gradient_through(ctx, gradient: Tensor) -> Tensor:
    """Return (I - a A B^T)^T g: the same operator with A and B exchanged, and without the offset."""
    basis, row_strength, dual = ctx.saved_tensors[:3]
    if dual is None:
        return _project(gradient, basis, ctx.strength, row_strength, None, None)
    return _project(gradient, dual, ctx.strength, row_strength, basis, None)


def _project_setup(ctx, inputs, output) -> None:
    _, *edit = inputs
    _remember_edit(ctx, edit)


def _project_backward(ctx, gradient: Tensor):
    return _gradient_through(ctx, gradient), *(None,) * 5


def _project_add_setup(ctx, inputs, output) -> None:
    _, _, basis, strength, row_strength, _, dual, offset = inputs
    _remember_edit(ctx, (basis, strength, row_strength, dual, offset))


def _project_add_backward(ctx, gradient: Tensor):
    return _gradient_through(ctx, gradient), gradient, *(None,) * 6


def _project_add_rmsnorm_setup(ctx, inputs, output) -> None:
    _, _, weight, ctx.eps, basis, strength, row_strength, _, dual, offset = inputs
    _remember_edit(ctx, (basis, strength, row_strength, dual, offset), weight, output[0])


def _project_add_rmsnorm_backward(ctx, gradient_h: Tensor, gradient_n: Tensor):
    weight, h = ctx.saved_tensors[3:]
    wide = h.float()
    inverse = inverse_rms(wide, ctx.eps)
    through = gradient_n.float() * weight.float()
    along = (through * wide).mean(-1, keepdim=True) * inverse.square()
    total = (gradient_h.float() + inverse * (through - wide * along)).to(h.dtype)
    gradient_weight = (gradient_n.float() * wide * inverse).sum(0).to(weight.dtype)
    return _gradient_through(ctx, total), total, gradient_weight, *(None,) * 7


_project.register_autograd(_project_backward, setup_context=_project_setup)
_project_add.register_autograd(_project_add_backward, setup_context=_project_add_setup)
_project_add_rmsnorm.register_autograd(_project_add_rmsnorm_backward, setup_context=_project_add_rmsnorm_setup)
_DIRECT = {
    _project: {"cpu": project_aten, "cuda": _project_cuda},
    _project_add: {"cpu": project_add_aten, "cuda": _project_add_cuda},
    _project_add_rmsnorm: {"cpu": project_add_rmsnorm_aten, "cuda": _project_add_rmsnorm_cuda},
}


def _called(op: CustomOpDef, *tensors: Tensor | None) -> Callable:
    """Return the operator, or its implementation if nothing needs to see the operator's call.

    The dispatcher costs more host time than a small edit itself (measured: 10 of 24 us at one row, and three times that
    within a model). So it is used only where it matters: for a gradient, a compiler, a tracer, a dispatch mode, a
    functional transform, or a subclass of Tensor.
    """
    needed = torch.is_grad_enabled()
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or _len_torch_dispatch_stack_pre_dispatch()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or any(t is not None and (type(t) not in (Tensor, Parameter) or (needed and t.requires_grad)) for t in tensors)
    )
    return op if watched else _DIRECT[op].get(tensors[0].device.type, op)  # type: ignore[union-attr]  # x comes first


_NO_GRADIENT = (
    "project has a gradient for x only, but the basis, the dual, the offset or the strength requires one. Detach it: "
    "an orthonormal basis would not stay one under a gradient step."
)


def check_rank(basis: Tensor) -> None:
    """Raise KernelSurgeryError for a basis [d_model, k] with k outside 1 .. MAX_RANK."""
    if not 1 <= basis.shape[1] <= MAX_RANK:
        raise KernelSurgeryError(
            f"the basis has k={basis.shape[1]} columns, but project takes 1 to {MAX_RANK}. Fit with a smaller --rank, "
            "or use Subspace.truncate."
        )


def packed(basis: Tensor) -> Tensor:
    """Return a basis, dual or offset in float32, contiguous, its rank padded with zeros to a multiple of 16.

    [d_model, k] becomes [d_model, k'], and [k] becomes [k']. The edit is the same; the memory layout is the one that
    the fastest kernel needs. The modes call this once, not at every call.
    """
    return torch.nn.functional.pad(basis.float(), (0, -basis.shape[-1] % 16)).contiguous()


def _rows(
    x: Tensor,
    basis: Tensor,
    strength: float | Tensor,
    dtypes: tuple,
    dual: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, float, Tensor | None]:
    """Check an operator's arguments. Return (x as [rows, d_model], strength of all rows, strengths per row or None)."""
    if x.dtype not in dtypes:
        raise TypeError(f"expected x of {', '.join(str(t).removeprefix('torch.') for t in dtypes)}, got {x.dtype}")
    if basis.ndim != 2 or x.ndim < 1 or basis.shape[0] != x.shape[-1]:
        raise KernelSurgeryError(
            f"cannot project x of shape {tuple(x.shape)} with a basis of shape {tuple(basis.shape)}: "
            "expected x [..., d_model] and basis [d_model, k]."
        )
    check_rank(basis)
    if basis.device != x.device:
        raise KernelSurgeryError(
            f"x is on {x.device}, but the basis is on {basis.device}. Move the basis: basis.to(x.device)."
        )
    for name, tensor, shape in (("dual", dual, basis.shape), ("offset", offset, basis.shape[1:])):
        if tensor is not None and (tensor.shape != shape or tensor.device != x.device):
            raise KernelSurgeryError(
                f"the {name} is {tuple(tensor.shape)} on {tensor.device}; expected {tuple(shape)} on {x.device}, for a "
                f"basis of shape {tuple(basis.shape)}."
            )
    row_strength, number = None, 1.0
    if isinstance(strength, Tensor):
        leading = x.shape[:-1]
        if strength.ndim == 0 or strength.shape != leading[: strength.ndim]:
            raise KernelSurgeryError(
                f"strength has shape {tuple(strength.shape)}; expected a number, {tuple(leading)} (one per row), or "
                f"{tuple(leading[:1])} (one per sequence)."
            )
        missing = (1,) * (len(leading) - strength.ndim)
        row_strength = strength.to(x.device).reshape(*strength.shape, *missing).expand(leading).reshape(-1)
    else:
        number = float(strength)
        if not math.isfinite(number):
            raise KernelSurgeryError(f"strength must be a finite number, got {number}.")
    # Made 2-D before the operator. On 3-D activations a compiled caller specialises on batch 1 and length 1 until it
    # reaches dynamo's recompile limit, and then runs eagerly without a warning.
    return x.reshape(-1, x.shape[-1]), number, row_strength


def project(
    x: Tensor,
    basis: Tensor,
    strength: float | Tensor = 1.0,
    *,
    dual: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Return y = x - a A (B^T x - c), a new contiguous tensor with x's shape and dtype. Differentiable in x.

    x: [..., d_model], float32, bfloat16, float16 or float64.
    basis: A [d_model, k] on the same device, k <= 64. Any floating dtype; it is used in float32.
    dual: B [d_model, k] with B^T A = I. By default it is the basis, whose columns are then orthonormal.
    offset: c [k], by default 0.
    strength: a. A number, a tensor of shape x.shape[:-1] (one per row), or of its leading dimensions (one per
    sequence). Rows with strength 0 are returned bit-identical.

    Numerics: float32 accumulation and one rounding when y is stored (bound: `numerics.bounds.rule_a_bound`). On CUDA
    the number of rows, d_model and k choose one of three kernels (`form_of` in kernels/project.py). The last bits of a
    row may differ between them; `set_batch_invariant` avoids that.

    Raises KernelSurgeryError for shapes or devices that do not fit, for k > 64, for a strength that is not finite, and
    for a basis or strength that requires a gradient. Raises TypeError for an x of another dtype.
    """
    rows, number, row_strength = _rows(x, basis, strength, (*UP_TO_FLOAT32, torch.float64), dual, offset)
    call = _called(_project, rows, basis, row_strength, dual, offset)
    return call(rows, basis, number, row_strength, dual, offset).reshape(x.shape)


def project_add(
    x: Tensor,
    residual: Tensor,
    basis: Tensor,
    strength: float | Tensor = 1.0,
    *,
    separate: bool = True,
    dual: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Return h = residual + x - a A (B^T x - c), new and contiguous: `project` and the residual addition in one pass.

    residual: of x's shape, dtype and device. It is differentiable too.
    separate: round y to x's dtype before the addition, as two separate operations do. Otherwise round once, at the end.

    Everything else is as in `project`, errors included, but float64 is not supported. Bound:
    `numerics.bounds.add_bound`.
    """
    rows, number, row_strength = _rows(x, basis, strength, UP_TO_FLOAT32, dual, offset)
    _check_beside(x, "residual", residual, x.shape)
    beside = residual.reshape(rows.shape)
    call = _called(_project_add, rows, beside, basis, row_strength, dual, offset)
    return call(rows, beside, basis, number, row_strength, separate, dual, offset).reshape(x.shape)


def project_add_rmsnorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    basis: Tensor,
    strength: float | Tensor = 1.0,
    *,
    separate: bool = True,
    dual: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (h, n) in one pass: h of `project_add`, and n = h / sqrt(mean(h^2) + eps) * weight.

    weight: [d_model] of x's dtype and device. It is differentiable too.
    separate: also round before the multiplication by weight, as Llama's norm does. Otherwise round once, at the end.

    Numerics: n is computed in float32 from h as returned (bound: `numerics.bounds.rmsnorm_bound`; RMSNorm: Zhang and
    Sennrich 2019, arXiv:1910.07467). Everything else is as in `project_add`.
    """
    rows, number, row_strength = _rows(x, basis, strength, UP_TO_FLOAT32, dual, offset)
    _check_beside(x, "residual", residual, x.shape)
    _check_beside(x, "weight", weight, x.shape[-1:])
    beside = residual.reshape(rows.shape)
    call = _called(_project_add_rmsnorm, rows, beside, weight, basis, row_strength, dual, offset)
    h, n = call(rows, beside, weight, float(eps), basis, number, row_strength, separate, dual, offset)
    return h.reshape(x.shape), n.reshape(x.shape)


def _check_beside(x: Tensor, name: str, other: Tensor, shape: torch.Size) -> None:
    if other.shape != shape or other.dtype != x.dtype or other.device != x.device:
        raise KernelSurgeryError(
            f"{name} is {tuple(other.shape)} {other.dtype} on {other.device}; expected {tuple(shape)} {x.dtype} on "
            f"{x.device}, like x."
        )
