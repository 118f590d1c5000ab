"""The edit in plain ATen: what runs on a CPU, in float64, and where Triton is not used."""

import torch
from torch import Tensor

from kernel_surgery.numerics.precision import computed_in, in_full


def projected(x: Tensor, basis: Tensor, strength: float, row_strength: Tensor | None) -> Tensor:
    """ATen: y in float32 (float64 for float64 x), not rounded further. x [rows, d], basis [d, k].

    Two matrix products, the second with the subtraction in it: half the passes over [rows, d] of the written formula.
    """
    wide = computed_in(x)
    # Row by row: of a column-major U a BLAS may add column after column to a few rows of x, each time rounding at the
    # size of x (seen: 6 times the bound at k = 64 and a small strength).
    x_wide, u = x.to(wide), basis.to(wide).contiguous()
    with in_full(x):
        if row_strength is None:
            # At strength 0 the input comes back bit for bit, also where what would be removed is not finite.
            return torch.addmm(x_wide, x_wide @ u, u.T, alpha=-strength) if strength else x_wide
        a = (strength * row_strength.to(wide)).unsqueeze(1)
        return torch.where(a == 0, x_wide, torch.addmm(x_wide, (x_wide @ u) * -a, u.T))


def _fresh(value: Tensor, given: Tensor) -> Tensor:
    """`value` in the dtype of `given`, contiguous: a custom op may return neither its input nor strides that the fake
    does not have."""
    made = value.to(given.dtype).contiguous()
    return made.clone() if made.data_ptr() == given.data_ptr() else made


def project_aten(x: Tensor, basis: Tensor, strength: float, row_strength: Tensor | None) -> Tensor:
    return _fresh(projected(x, basis, strength, row_strength), x)


def project_add_aten(
    x: Tensor, residual: Tensor, basis: Tensor, strength: float, row_strength: Tensor | None, separate: bool
) -> Tensor:
    y = projected(x, basis, strength, row_strength)
    return (residual + (y.to(x.dtype) if separate else y)).to(x.dtype).contiguous()


def project_add_rmsnorm_aten(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    basis: Tensor,
    strength: float,
    row_strength: Tensor | None,
    separate: bool,
) -> tuple[Tensor, Tensor]:
    h = project_add_aten(x, residual, basis, strength, row_strength, separate)
    wide = h.float()
    n = wide * inverse_rms(wide, eps)
    return h, (weight * n.to(x.dtype) if separate else weight.float() * n).to(x.dtype)


def inverse_rms(wide: Tensor, eps: float) -> Tensor:
    """1 / rms of every row of a float32 tensor, [rows, 1]."""
    return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
