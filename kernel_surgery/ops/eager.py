"""The edit as the plain formula, which the mode `hook` runs."""

from torch import Tensor

from kernel_surgery.numerics.precision import computed_in, in_full
from kernel_surgery.numerics.projection import BasisLike, Projection


def project_eager(x: Tensor, basis: BasisLike, strength: float = 1.0) -> Tensor:
    """Return y = x - a A (B^T x - c), computed in float32 (float64 for float64 x) and rounded once to x's dtype.

    x: [..., d_model]. basis: U [d_model, k], where A = B = U and c = 0, or a `Projection`.
    """
    wide = computed_in(x)
    x_wide, edit = x.to(wide), Projection.of(basis).to(wide)
    with in_full(x):
        return (x_wide - strength * (edit.inside(x_wide) @ edit.basis.T)).to(x.dtype)
