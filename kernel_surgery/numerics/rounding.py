"""What rounding to a storage dtype does."""

import math

import torch
from torch import Tensor

from kernel_surgery.numerics.precision import STORED, name_of


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half of finfo(dtype).eps. Raises TypeError for a dtype that the edit is not stored in."""
    if (stored := STORED.get(name_of(dtype))) is None:
        raise TypeError(f"no rounding bound for {dtype}; known: {', '.join(str(s.dtype) for s in STORED.values())}")
    return stored.roundoff


def underflow(dtype: torch.dtype) -> float:
    """Half the spacing of a dtype's smallest numbers: what a rounding may be off by where it is not relative."""
    return torch.finfo(dtype).smallest_normal * unit_roundoff(dtype)


def row_norms(basis: Tensor) -> Tensor:
    """norm(U_i) of every row, [d]."""
    return basis.double().norm(dim=1)


def ulp(stored: Tensor) -> Tensor:
    """The spacing of the stored dtype's numbers at each element, float64."""
    _, exponent = torch.frexp(stored.double())
    # A number in [2^(e-1), 2^e) with unit roundoff u.
    spacing = 2 * unit_roundoff(stored.dtype) * torch.exp2(exponent.double() - 1)
    return spacing.clamp_min(2 * underflow(stored.dtype))


def storage_noise(stored: Tensor, basis: Tensor) -> float:
    """norm(U^T E) for E the rounding of a stored [d, columns]: sqrt(sum_ij ulp_ij^2 / 12 |U_i|^2)."""
    total = 0.0
    for start in range(0, stored.shape[0], 256):
        part = stored[start : start + 256]
        spacing = torch.where(part == 0, 0.0, ulp(part))
        total += float(((spacing**2).sum(1) * row_norms(basis[start : start + 256]) ** 2).sum())
    return math.sqrt(total / 12)


def storage_noise_at_most(stored: Tensor, basis: Tensor) -> float:
    """No less than `storage_noise`, at the cost of a norm: an ulp is at most 2 u of its number, or the smallest one."""
    relative = 2 * unit_roundoff(stored.dtype) * stored.norm(dim=1, dtype=torch.float32).double()
    squares = relative**2 + (2 * underflow(stored.dtype)) ** 2 * stored.shape[1]
    return 1.01 * math.sqrt(float((squares * row_norms(basis) ** 2).sum()) / 12)
