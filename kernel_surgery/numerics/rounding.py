"""Rounding to a storage dtype: unit roundoff, spacing, underflow, and the noise of a stored weight."""

import math

import torch
from torch import Tensor

from kernel_surgery.numerics.precision import STORED, name_of
from kernel_surgery.numerics.projection import BasisLike, Projection


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the unit roundoff u, half of finfo(dtype).eps. Raises TypeError for a dtype outside `STORED`."""
    if (stored := STORED.get(name_of(dtype))) is None:
        raise TypeError(f"no rounding bound for {dtype}; known: {', '.join(str(s.dtype) for s in STORED.values())}")
    return stored.roundoff


def underflow(dtype: torch.dtype) -> float:
    """Return half the spacing of a dtype's smallest numbers: the absolute error of a rounding near 0."""
    return torch.finfo(dtype).smallest_normal * unit_roundoff(dtype)


def ulp(stored: Tensor) -> Tensor:
    """Return the spacing of the dtype's numbers at each element, float64, in the shape of `stored`."""
    _, exponent = torch.frexp(stored.double())
    # The spacing of numbers in [2^(e-1), 2^e) is 2 u 2^(e-1).
    spacing = 2 * unit_roundoff(stored.dtype) * torch.exp2(exponent.double() - 1)
    return spacing.clamp_min(2 * underflow(stored.dtype))


def storage_noise(stored: Tensor, basis: BasisLike) -> float:
    """Return the root mean square of norm(B^T E), where E are the rounding errors of a stored [d, columns] weight.

    Each error is taken as uniform noise in an ulp, so the result is sqrt(sum_ij ulp_ij^2 / 12 |B_i|^2). An exact zero
    has no error. Computed in float64, 256 rows at a time.
    """
    total, energies = 0.0, row_energies(basis)
    for start in range(0, stored.shape[0], 256):
        block = stored[start : start + 256]
        spacing = torch.where(block == 0, 0.0, ulp(block))
        total += float(((spacing**2).sum(1) * energies[start : start + 256]).sum())
    return math.sqrt(total / 12)


def storage_noise_at_most(stored: Tensor, basis: BasisLike) -> float:
    """Return an upper bound of `storage_noise` that costs one norm per row.

    It uses that the ulp of a number is at most 2 u times the number, or else the smallest spacing.
    """
    relative = 2 * unit_roundoff(stored.dtype) * stored.norm(dim=1, dtype=torch.float32).double()
    squares = relative**2 + (2 * underflow(stored.dtype)) ** 2 * stored.shape[1]
    return 1.01 * math.sqrt(float((squares * row_energies(basis)).sum()) / 12)


def row_energies(basis: BasisLike) -> Tensor:
    """Return norm(B_i)^2 of every row of what a projection reads: [d] float64."""
    return Projection.of(basis).reads.double().square().sum(1)
