"""The edit as the plain formula, which the mode `hook` runs."""

from torch import Tensor

from kernel_surgery.numerics.precision import computed_in, in_full


def project_eager(x: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """Return y = x - a U (U^T x), computed in float32 (float64 for float64 x) and rounded once to x's dtype.

    x: [..., d_model]. basis: U [d_model, k].
    """
    wide = computed_in(x)
    x_wide, u = x.to(wide), basis.to(wide)
    with in_full(x):
        return (x_wide - strength * ((x_wide @ u) @ u.T)).to(x.dtype)
