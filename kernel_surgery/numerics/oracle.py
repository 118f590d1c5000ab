"""Oracles: the exact result of each form of the edit, computed in float64 from the stored inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

Strength = float | Tensor


def strength_column(strength: Strength, x: Tensor) -> Tensor:
    """Return the strength as float64. A tensor [...] is reshaped to multiply the rows of x [..., d]."""
    a = torch.as_tensor(strength, dtype=torch.float64, device=x.device)
    return a.reshape(*a.shape, *(1,) * (x.ndim - a.ndim)) if a.ndim else a


def project_oracle(x: Tensor, basis: Tensor, strength: Strength = 1.0) -> Tensor:
    """Return y = x - a U (U^T x) in float64. x is [..., d], basis U is [d, k], strength a is a number or [...]."""
    x64, u64 = x.double(), basis.double()
    return x64 - strength_column(strength, x64) * ((x64 @ u64) @ u64.T)


def rmsnorm_oracle(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return h / sqrt(mean(h^2) + eps) * weight in float64. h is [..., d], weight is [d]."""
    wide = h.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def bake_oracle(weight: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """Return W - a U (U^T W) in float64. weight W is [d, d_ff], basis U is [d, k]."""
    return project_oracle(weight.T, basis, strength).T


def leak(y: Tensor, basis: Tensor) -> Tensor:
    """Return norm(U^T y), the size of y inside the subspace: [...] float64. y is [..., d]."""
    return (y.double() @ basis.double()).norm(dim=-1)


@dataclass(frozen=True)
class Exact:
    """The exact output of an edited `down_proj`, and the scales of its rounding errors. Tensors are float64.

    x: W h + b, the output before the edit, [rows, d].
    y: P_a x, the output after the edit, with P_a = I - a U U^T, [rows, d].
    sigma: sqrt(sum_j (P_a W)_ij^2 h_j^2), the scale of the edited products, [rows, d].
    tau: sqrt(sum_j W_ij^2 h_j^2), the scale of the unedited products, [rows, d].
    edited_bias: P_a b, [d].
    length: norm(h), [rows, 1].
    """

    x: Tensor
    y: Tensor
    sigma: Tensor
    tau: Tensor
    edited_bias: Tensor
    length: Tensor


def exact_output(weight: Tensor, h: Tensor, basis: Tensor, strength: float = 1.0, bias: Tensor | None = None) -> Exact:
    """Return the exact output of an edited `down_proj`, with the scales of its rounding errors.

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


def leak_of_weight(after: Tensor, before: Tensor, basis: Tensor, strength: float = 1.0) -> float:
    """Return the leak of a baked weight in float64: norm(U^T W' - (1 - a) U^T W) / norm(U^T W).

    The edit at strength a should leave (1 - a) U^T W. The leak is the difference from that, relative to norm(U^T W).
    after: W' as stored, [d, d_ff]. before: W, [d, d_ff].
    """
    u64 = basis.double()
    inside = u64.T @ before.double()
    return float((u64.T @ after.double() - (1 - strength) * inside).norm() / inside.norm())
