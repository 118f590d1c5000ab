"""Oracles: the exact result of each form of the edit, computed in float64 from the stored inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_surgery.numerics.projection import BasisLike, Projection

Strength = float | Tensor


def strength_column(strength: Strength, x: Tensor) -> Tensor:
    """Return the strength as float64. A tensor [...] is reshaped to multiply the rows of x [..., d]."""
    a = torch.as_tensor(strength, dtype=torch.float64, device=x.device)
    return a.reshape(*a.shape, *(1,) * (x.ndim - a.ndim)) if a.ndim else a


def project_oracle(x: Tensor, basis: BasisLike, strength: Strength = 1.0) -> Tensor:
    """Return y = x - a A (B^T x - c) in float64. x is [..., d], strength a is a number or [...].

    basis: U [d, k], where A = B = U and c = 0, or a `Projection`.
    """
    x64, exact = x.double(), Projection.of(basis).double()
    return x64 - strength_column(strength, x64) * (exact.inside(x64) @ exact.basis.T)


def rmsnorm_oracle(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return h / sqrt(mean(h^2) + eps) * weight in float64. h is [..., d], weight is [d]."""
    wide = h.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def bake_oracle(weight: Tensor, basis: BasisLike, strength: float = 1.0) -> Tensor:
    """Return W - a A (B^T W) in float64 for a weight [d, d_ff], or b - a A (B^T b - c) for a bias [d]."""
    if weight.ndim == 1:
        return project_oracle(weight, basis, strength)
    return project_oracle(weight.T, Projection.of(basis).linear, strength).T


def leak(y: Tensor, basis: BasisLike) -> Tensor:
    """Return norm(B^T y - c), what an edit at strength 1 should have made 0: [...] float64. y is [..., d]."""
    return Projection.of(basis).double().inside(y.double()).norm(dim=-1)


@dataclass(frozen=True)
class Exact:
    """The exact output of an edited linear module, and the scales of its rounding errors. Tensors are float64.

    x: W h + b, the output before the edit, [rows, d].
    y: P_a x + a A c, the output after the edit, with P_a = I - a A B^T, [rows, d].
    sigma: sqrt(sum_j (P_a W)_ij^2 h_j^2), the scale of the edited products, [rows, d].
    tau: sqrt(sum_j W_ij^2 h_j^2), the scale of the unedited products, [rows, d].
    edited_bias: P_a b + a A c, [d].
    length: norm(h), [rows, 1].
    """

    x: Tensor
    y: Tensor
    sigma: Tensor
    tau: Tensor
    edited_bias: Tensor
    length: Tensor


def exact_output(
    weight: Tensor, h: Tensor, basis: BasisLike, strength: float = 1.0, bias: Tensor | None = None
) -> Exact:
    """Return the exact output of an edited linear module, with the scales of its rounding errors.

    weight is [d, d_ff], h is [rows, d_ff], bias is [d] or None, all as stored. Only one block of 1024 columns is
    converted to float64 at a time.
    """
    x, y, sigma, tau = (h.new_zeros((len(h), len(weight)), dtype=torch.float64) for _ in range(4))
    for start in range(0, weight.shape[1], 1024):
        w64, h64 = weight[:, start : start + 1024].double(), h[:, start : start + 1024].double()
        edited = bake_oracle(w64, basis, strength)
        x += h64 @ w64.T
        y += h64 @ edited.T
        tau += h64.square() @ w64.square().T
        sigma += h64.square() @ edited.square().T
    b = h.new_zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    edited_bias = project_oracle(b, basis, strength)
    length = h.double().norm(dim=-1, keepdim=True)
    return Exact(x + b, y + edited_bias, sigma.sqrt(), tau.sqrt(), edited_bias, length)


def leak_of_weight(after: Tensor, before: Tensor, basis: BasisLike, strength: float = 1.0) -> float:
    """Return the leak of a baked weight in float64: norm(B^T W' - (1 - a) B^T W) / norm(B^T W).

    The edit at strength a should leave (1 - a) B^T W. The leak is the difference from that, relative to norm(B^T W).
    after: W' as stored, [d, d_ff]. before: W, [d, d_ff].
    """
    reads = Projection.of(basis).reads.double()
    inside = reads.T @ before.double()
    return float((reads.T @ after.double() - (1 - strength) * inside).norm() / inside.norm())


def quantised_oracle(matrix: Tensor, grid: Tensor, block: tuple[int, int], scale: torch.dtype, power: bool) -> Tensor:
    """Return a matrix [rows, columns] as a symmetric format holds it, in float64: the nearest of `grid` times a scale.

    grid: the numbers of the format, ascending. block: (rows, columns) that share a scale. scale: its dtype. power: it
    is a power of two.

    The scale of a block is its largest absolute value over half the range of the grid. Numerics: float64, without the
    code that writes checkpoints (`quantised.blocks`).
    """
    wide, numbers = matrix.double(), grid.double()
    top = (numbers[-1] - numbers[0]) / 2
    row, column = (torch.arange(n, device=matrix.device) // size for n, size in zip(matrix.shape, block, strict=True))
    which = row[:, None] * (int(column[-1]) + 1) + column
    most = torch.zeros(int(which.max()) + 1, dtype=torch.float64, device=matrix.device)
    most.scatter_reduce_(0, which.flatten(), wide.abs().flatten(), "amax")
    scales = most / top
    if power:
        scales = torch.where(scales > 0, 2.0 ** torch.ceil(torch.log2(scales)), scales)
    scales = scales.clamp_min(torch.finfo(scale).smallest_normal).to(scale).double()[which]
    ratio = (wide / scales).clamp(numbers[0], numbers[-1])
    above = torch.searchsorted(numbers, ratio.contiguous()).clamp_max(len(numbers) - 1)
    below = (above - 1).clamp_min(0)
    nearer = torch.where(ratio - numbers[below] < numbers[above] - ratio, numbers[below], numbers[above])
    return nearer * scales
