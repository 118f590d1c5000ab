"""The edit as one would write it first."""

from torch import Tensor

from kernel_surgery.numerics.precision import computed_in, in_full


def project_eager(x: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """y as anyone would write it: float32 (float64 for float64 x) arithmetic, one rounding to x's dtype at the end."""
    wide = computed_in(x)
    x_wide, u = x.to(wide), basis.to(wide)
    with in_full(x):
        return (x_wide - strength * ((x_wide @ u) @ u.T)).to(x.dtype)
