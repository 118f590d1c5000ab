"""The edit as a PyTorch operator, `kernel_surgery::project`: Triton on CUDA, ATen on the CPU, with fake and autograd.

An operator rather than a function so that torch.compile sees one opaque, differentiable call and CUDA graphs capture
it.
"""

import math

import torch
from torch import Tensor

MAX_RANK = 64


def provider(where: Tensor | torch.device | str) -> str:
    """What runs for a tensor or device: "triton/cuda" or "aten/cpu" (float64 on CUDA is "aten/cuda")."""
    device = where.device if isinstance(where, Tensor) else torch.device(where)
    if device.type == "cuda" and not (isinstance(where, Tensor) and where.dtype == torch.float64):
        return "triton/cuda"
    return f"aten/{device.type}"


@torch.library.custom_op("kernel_surgery::project", mutates_args=())
def _project(x: Tensor, basis: Tensor, strength: float, row_strength: Tensor | None) -> Tensor:
    """ATen: float32 arithmetic (float64 for float64 x), one rounding. x [rows, d], basis [d, k]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide, u = x.to(wide), basis.to(wide)
    removed = (x_wide @ u) @ u.T
    if row_strength is None:
        # At strength 0 the input comes back bit for bit, also where `removed` is not finite.
        y = x_wide - strength * removed if strength else x_wide
    else:
        a = (strength * row_strength.to(wide)).unsqueeze(1)
        y = torch.where(a == 0, x_wide, x_wide - a * removed)
    # Always fresh and contiguous: a custom op may return neither its input nor strides that the fake does not have.
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out.copy_(y)


@_project.register_kernel("cuda")
def _project_cuda(x: Tensor, basis: Tensor, strength: float, row_strength: Tensor | None) -> Tensor:
    if x.dtype == torch.float64:
        return _project._init_fn(x, basis, strength, row_strength)
    from kernel_surgery.kernels.project import project as launch

    # A broadcast row (stride 0) is read as it is; elements that do not lie side by side are not.
    x = x if x.stride(-1) == 1 else x.contiguous()
    row_strength = None if row_strength is None else row_strength.float().contiguous()
    return launch(x, basis.float(), strength, row_strength)


@_project.register_fake
def _project_fake(x: Tensor, basis: Tensor, strength: float, row_strength: Tensor | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output) -> None:
    _, basis, strength, row_strength = inputs
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
        raise ValueError(_NO_GRADIENT)
    ctx.save_for_backward(basis, row_strength)
    ctx.strength = strength


def _backward(ctx, gradient: Tensor):
    # I - a U U^T is symmetric: the gradient passes through the same operator.
    basis, row_strength = ctx.saved_tensors
    return _project(gradient, basis, ctx.strength, row_strength), None, None, None


_project.register_autograd(_backward, setup_context=_setup_context)

_NO_GRADIENT = (
    "project has a gradient for x only, but the basis or the strength requires one. Detach it: an orthonormal basis "
    "would not stay one under a gradient step."
)


def check_rank(basis: Tensor) -> None:
    """Raises ValueError for a basis [d_model, k] with k outside 1 .. MAX_RANK."""
    if not 1 <= basis.shape[1] <= MAX_RANK:
        raise ValueError(
            f"the basis has k={basis.shape[1]} columns; project takes 1 to {MAX_RANK}. Fit with a smaller --rank, or "
            "truncate: Subspace.truncate."
        )


def project(x: Tensor, basis: Tensor, strength: float | Tensor = 1.0) -> Tensor:
    """y = x - a U (U^T x), as a fresh contiguous tensor of x's shape and dtype.

    x [..., d_model] float32, bfloat16, float16 or float64; basis U [d_model, k], k <= 64, orthonormal columns, any
    floating dtype (used in float32), same device; strength a: a number, or a tensor of x.shape[:-1], one a row. Rows
    of strength 0 come back bit for bit. Float32 accumulation, one rounding at the store: `reference.rule_a_bound`. On
    CUDA up to 64 rows and more than 64 take different kernels (`kernels/project.py`): the last bits of a row may differ
    between the two. Differentiable in x.

    Raises ValueError for shapes or devices that do not fit, for k > 64, for a strength that is not finite, and for a
    basis or strength that requires a gradient; TypeError for an x of another dtype.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"project takes float32, bfloat16, float16 or float64, got {x.dtype}")
    if basis.ndim != 2 or x.ndim < 1 or basis.shape[0] != x.shape[-1]:
        raise ValueError(
            f"cannot project x of shape {tuple(x.shape)} with a basis of shape {tuple(basis.shape)}: "
            "expected x [..., d_model] and basis [d_model, k]."
        )
    check_rank(basis)
    if basis.device != x.device:
        raise ValueError(f"x is on {x.device}, the basis on {basis.device}. Move the basis: basis.to(x.device).")
    row_strength, number = None, 1.0
    if isinstance(strength, Tensor):
        if strength.shape != x.shape[:-1]:
            raise ValueError(
                f"strength has shape {tuple(strength.shape)}; expected a number, or one a row: {tuple(x.shape[:-1])}."
            )
        row_strength = strength.to(x.device).reshape(-1)
    else:
        number = float(strength)
        if not math.isfinite(number):
            raise ValueError(f"strength must be a finite number, got {number}.")
    # 2-D before the operator: on 3-D activations a compiled caller specialises on batch 1 and length 1 until dynamo's
    # recompile limit, and then runs eagerly without a word.
    return _project(x.reshape(-1, x.shape[-1]), basis, number, row_strength).reshape(x.shape)
