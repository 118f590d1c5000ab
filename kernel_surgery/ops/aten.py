"""The edit in plain ATen. It runs on a CPU, for float64, and wherever Triton is not used."""

import torch
from torch import Tensor

from kernel_surgery.numerics.precision import computed_in, in_full


def projected(
    x: Tensor,
    basis: Tensor,
    strength: float,
    row_strength: Tensor | None,
    dual: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Return y in float32 (float64 for float64 x), not rounded to x's dtype.

    x: [rows, d]. basis: A [d, k]. dual: B [d, k], by default A. offset: c [k], by default 0.

    Two matrix products; the second does the subtraction too. That halves the passes over [rows, d].
    """
    wide = computed_in(x)
    # Row-major: with a column-major U, BLAS may add one column after another to a few rows of x, and round at the size
    # of x each time (measured: 6 times the bound at k = 64 and a small strength).
    x_wide, u = x.to(wide), basis.to(wide).contiguous()
    reads = u if dual is None else dual.to(wide)
    if row_strength is None and not strength:
        # At strength 0 the input is returned bit-identical, even if the removed part would not be finite.
        return x_wide
    with in_full(x):
        z = x_wide @ reads
        if offset is not None:
            z = z - offset.to(wide)
        if row_strength is None:
            return torch.addmm(x_wide, z, u.T, alpha=-strength)
        a = (strength * row_strength.to(wide)).unsqueeze(1)
        return torch.where(a == 0, x_wide, torch.addmm(x_wide, z * -a, u.T))


def _fresh(value: Tensor, given: Tensor) -> Tensor:
    """Return `value` in the dtype of `given`, contiguous and never `given` itself.

    A custom operator must not return its input, or strides that its fake implementation does not have.
    """
    made = value.to(given.dtype).contiguous()
    return made.clone() if made.data_ptr() == given.data_ptr() else made


def project_aten(
    x: Tensor,
    basis: Tensor,
    strength: float,
    row_strength: Tensor | None,
    dual: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    return _fresh(projected(x, basis, strength, row_strength, dual, offset), x)


def project_add_aten(
    x: Tensor,
    residual: Tensor,
    basis: Tensor,
    strength: float,
    row_strength: Tensor | None,
    separate: bool,
    dual: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    y = projected(x, basis, strength, row_strength, dual, offset)
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
    dual: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h = project_add_aten(x, residual, basis, strength, row_strength, separate, dual, offset)
    wide = h.float()
    n = wide * inverse_rms(wide, eps)
    return h, (weight * n.to(x.dtype) if separate else weight.float() * n).to(x.dtype)


def inverse_rms(wide: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(row^2) + eps) of every row of a float32 tensor, as [rows, 1]."""
    return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
