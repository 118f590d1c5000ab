"""What each form of the edit gives in exact arithmetic: float64, from the stored inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

Strength = float | Tensor


def strength_column(strength: Strength, x: Tensor) -> Tensor:
    """The strength as float64, shaped to multiply rows."""
    a = torch.as_tensor(strength, dtype=torch.float64, device=x.device)
    return a.reshape(*a.shape, *(1,) * (x.ndim - a.ndim)) if a.ndim else a


def project_oracle(x: Tensor, basis: Tensor, strength: Strength = 1.0) -> Tensor:
    """y in float64. x [..., d], basis [d, k], strength a number or [...]."""
    x64, u64 = x.double(), basis.double()
    return x64 - strength_column(strength, x64) * ((x64 @ u64) @ u64.T)


def rmsnorm_oracle(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """h / sqrt(mean(h^2) + eps) * weight in float64. h [..., d], weight [d]."""
    wide = h.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def bake_oracle(weight: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """W - a U (U^T W) in float64. weight [d, d_ff]."""
    return project_oracle(weight.T, basis, strength).T


def leak(y: Tensor, basis: Tensor) -> Tensor:
    """norm(U^T y), [...] float64."""
    return (y.double() @ basis.double()).norm(dim=-1)


@dataclass(frozen=True)
class Exact:
    """What an edited `down_proj` gives in exact arithmetic, with what its roundings scale with; [rows, d] float64.

    x = W h + b, y = P_a x, P_a = I - a U U^T; sigma_i = sqrt(sum_j (P_a W)_ij^2 h_j^2) and tau_i the same of W.
    edited_bias = P_a b [d]; length = norm(h) [rows, 1].
    """

    x: Tensor
    y: Tensor
    sigma: Tensor
    tau: Tensor
    edited_bias: Tensor
    length: Tensor


def exact_output(weight: Tensor, h: Tensor, basis: Tensor, strength: float = 1.0, bias: Tensor | None = None) -> Exact:
    """weight [d, d_ff], h [rows, d_ff], bias [d] or None, as stored. A block of columns in float64 at a time."""
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
    """norm(U^T W' - (1 - a) U^T W) / norm(U^T W) in float64: what a stored baked weight kept of the subspace."""
    u64 = basis.double()
    inside = u64.T @ before.double()
    return float((u64.T @ after.double() - (1 - strength) * inside).norm() / inside.norm())
