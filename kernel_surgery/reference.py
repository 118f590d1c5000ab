"""Oracles and bounds: what each form of the edit should give, and how far rounding may take it from there.

y = x - a U (U^T x), with x [rows, d], U [d, k] orthonormal and a the strength, a number or one a row. Oracles are
float64, computed from the exact stored low-precision inputs. u is the unit roundoff of the storage dtype. Nothing
here is fast; everything else is held against it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
# float32 accumulation over d terms, in units of sqrt(d) (probabilistic growth), with four units of room.
_ACCUMULATION = 2.0**-22
# What two bfloat16 pieces (hi + lo) leave of a float32 number.
_TWO_PIECES = 2.0**-15

Strength = float | Tensor


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half of finfo(dtype).eps. Raises TypeError for a dtype that the edit is not stored in."""
    if dtype not in _ROUNDOFF:
        raise TypeError(f"no rounding bound for {dtype}; known: {', '.join(str(d) for d in _ROUNDOFF)}")
    return _ROUNDOFF[dtype]


def _column(strength: Strength, x: Tensor) -> Tensor:
    """The strength as float64, shaped to multiply rows."""
    a = torch.as_tensor(strength, dtype=torch.float64, device=x.device)
    return a.reshape(*a.shape, *(1,) * (x.ndim - a.ndim)) if a.ndim else a


def project_oracle(x: Tensor, basis: Tensor, strength: Strength = 1.0) -> Tensor:
    """y in float64. x [..., d], basis [d, k], strength a number or [...]."""
    x64, u64 = x.double(), basis.double()
    return x64 - _column(strength, x64) * ((x64 @ u64) @ u64.T)


def project_eager(x: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """y as anyone would write it: float32 (float64 for float64 x) arithmetic, one rounding to x's dtype at the end."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide, u = x.to(wide), basis.to(wide)
    return (x_wide - strength * ((x_wide @ u) @ u.T)).to(x.dtype)


def rmsnorm_oracle(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """h / sqrt(mean(h^2) + eps) * weight in float64. h [..., d], weight [d]."""
    wide = h.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def bake_oracle(weight: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """W - a U (U^T W) in float64. weight [d, d_ff]."""
    return project_oracle(weight.T, basis, strength).T


def _row_norms(basis: Tensor) -> Tensor:
    """norm(U_i) of every row, [d]."""
    return basis.double().norm(dim=1)


def rule_a_bound(x: Tensor, basis: Tensor, strength: Strength = 1.0) -> Tensor:
    """Rule A, a projection against the oracle, [..., d] float64:

    1.01 [ u |y_i| + |a| norm(U_i) (2^-15 norm(z) + sqrt(d) 2^-22 norm(x)) ],  z = U^T x

    It admits z carried as two bfloat16 pieces and rejects z rounded to bfloat16. For float32 x the 2^-15 term is
    dropped (it would admit TF32).
    """
    u = unit_roundoff(x.dtype)
    y = project_oracle(x, basis, strength)
    z = (x.double() @ basis.double()).norm(dim=-1, keepdim=True)
    pieces = 0.0 if x.dtype == torch.float32 else _TWO_PIECES
    spread = pieces * z + math.sqrt(x.shape[-1]) * _ACCUMULATION * x.double().norm(dim=-1, keepdim=True)
    return 1.01 * (u * y.abs() + _column(strength, y).abs() * _row_norms(basis) * spread)


def add_bound(x: Tensor, residual: Tensor, basis: Tensor, strength: Strength = 1.0, separate: bool = True) -> Tensor:
    """h = residual + y against the oracle, [..., d] float64: Rule A for y, then the rounding of the sum,

        E + 1.01 u (|residual + y| + E),  E = `rule_a_bound`

    Without separate roundings y is a float32 number: E has 2^-24 |y_i| in place of u |y_i|, and the sum is rounded to
    float32 before it is rounded to the dtype.
    """
    u = unit_roundoff(x.dtype)
    y = project_oracle(x, basis, strength)
    error = rule_a_bound(x, basis, strength)
    if not separate:
        error = error - 1.01 * (u - 2.0**-24) * y.abs()
    rounding = u if x.dtype == torch.float32 else u + 2.0**-24
    return error + 1.01 * rounding * ((residual.double() + y).abs() + error)


def rmsnorm_bound(h: Tensor, weight: Tensor, eps: float, separate: bool = True) -> Tensor:
    """n against `rmsnorm_oracle` of the same stored h, [..., d] float64:

        1.01 |n_i| ( r u + (sqrt(d) / 2 + 8) 2^-24 ) + the smallest normal number's u (1 + |weight_i|)

    r = 2 roundings if they are separate (the quotient, the product), else 1. The sum of d squares grows like sqrt(d)
    float32 roundings, halved by the root; 8 are for the division, the root (2 ulp in hardware) and the products.
    """
    u = unit_roundoff(h.dtype)
    exact = rmsnorm_oracle(h, weight, eps).abs()
    roundings = (2 if separate else 1) * u + (math.sqrt(h.shape[-1]) / 2 + 8) * 2.0**-24
    underflow = torch.finfo(h.dtype).smallest_normal * 2 * u * (1 + weight.double().abs())
    return 1.01 * exact * roundings + underflow


def leak_bound(y: Tensor, x: Tensor, basis: Tensor) -> Tensor:
    """Leak rule (a = 1, x inside span(U)): norm(U^T y) <= 2 u norm(y) sqrt(k/d) + 2^-15 norm(z). [...] float64.

    For float32 x, whose z is never split, the second term is the accumulation of Rule A instead.
    """
    d, k = basis.shape
    u = unit_roundoff(x.dtype)
    z = (x.double() @ basis.double()).norm(dim=-1)
    second = math.sqrt(d) * _ACCUMULATION if x.dtype == torch.float32 else _TWO_PIECES
    return 2 * u * y.double().norm(dim=-1) * math.sqrt(k / d) + second * z


def leak(y: Tensor, basis: Tensor) -> Tensor:
    """norm(U^T y), [...] float64."""
    return (y.double() @ basis.double()).norm(dim=-1)


@dataclass(frozen=True)
class Exact:
    """What an edited `down_proj` gives in exact arithmetic, with what its roundings scale with; [rows, d] float64.

    x = W h + b, y = P_a x, P_a = I - a U U^T; sigma_i = sqrt(sum_j (P_a W)_ij^2 h_j^2) and tau_i the same of W.
    edited_bias = P_a b [d].
    """

    x: Tensor
    y: Tensor
    sigma: Tensor
    tau: Tensor
    edited_bias: Tensor


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
    return Exact(x + b, y + edited_bias, sigma.sqrt(), tau.sqrt(), edited_bias)


def rule_b_bounds(
    weight: Tensor, h: Tensor, basis: Tensor, strength: float = 1.0, exact: Exact | None = None
) -> tuple[Tensor, Tensor]:
    """Rule B, hook against baked, as (componentwise [rows, d], per row [rows]), float64.

    weight [d, d_ff] and h [rows, d_ff] in the storage dtype; x, y, sigma as in `Exact` (`exact`: where it is known
    already; with a bias, whose rounding joins the fourth term, it must be):

        |hook - baked|_i    <= u ( |x_i| + |a| norm(U_i) norm(x) + 2 |y_i| + 7 sigma_i )
        norm(hook - baked)  <= u ( norm(P_a) norm(x) + 2 norm(y) + norm(sigma) )

    The first term is the rounding of W h before the projection, the second its spread by U, the third both final
    roundings, the fourth the rounded weights (Hoeffding: failure below 1e-10 an element at 7). In float32 the sums
    over d_ff and d weigh as much: with g = sqrt(d_ff) 2^-24 and f = sqrt(d) 2^-22 each element gains

        g (sigma_i + tau_i + |a| norm(U_i) norm(tau)) + |a| norm(U_i) f (norm(tau) + norm(x))

    and a row the norm of that. tau, not sigma: a hook sums the unedited products, which can be far larger.
    """
    u, (d, k) = unit_roundoff(weight.dtype), basis.shape
    exact = exact_output(weight, h, basis, strength) if exact is None else exact
    x, y, sigma, tau = (t.norm(dim=-1, keepdim=True) for t in (exact.x, exact.y, exact.sigma, exact.tau))
    spread, norm_p = abs(strength) * _row_norms(basis), max(1.0, abs(1 - strength))
    each = u * (exact.x.abs() + spread * x + 2 * exact.y.abs() + 7 * exact.sigma + exact.edited_bias.abs())
    row = u * (norm_p * x + 2 * y + exact.edited_bias.norm() + sigma)
    if weight.dtype == torch.float32:
        g, f = math.sqrt(weight.shape[1]) * 2.0**-24, math.sqrt(d) * _ACCUMULATION
        each = each + g * (exact.sigma + exact.tau + spread * tau) + spread * f * (tau + x)
        row = row + g * (sigma + norm_p * tau) + abs(strength) * math.sqrt(k) * f * (tau + x)
    return each, row.squeeze(-1)


def applied_bound(mode: str, exact: Exact, basis: Tensor, d_ff: int, dtype: torch.dtype, strength: float) -> Tensor:
    """|output - y|_i of one mode ("hook", "fused", "baked" or "lora") against the exact y of the same h, [rows, d].

    Every mode rounds y, and sums d_ff products in float32 (g = sqrt(d_ff) 2^-24, in units of tau, or sigma where the
    weights are edited):

        all    1.01 u |y_i|
        hook, fused  + 1.01 u |x_i| + g tau_i, and both spread by U: |a| norm(U_i) (u norm(x) + g norm(tau)),
                     and Rule A's own spread
        baked  + u (7 sigma_i + |(P_a b)_i|) + g sigma_i, and float32's part in the weights, |a| norm(U_i) f norm(tau)
        lora   + 1.01 u |x_i| + g tau_i, and |a| norm(U_i) (f + g) norm(tau) for float32's part in A and in A h

    f = sqrt(d) 2^-22. The sum of two modes' bounds bounds their difference; of hook and baked it is Rule B with the
    terms below u written out.
    """
    u, d = unit_roundoff(dtype), basis.shape[0]
    g, f = math.sqrt(d_ff) * 2.0**-24, math.sqrt(d) * _ACCUMULATION
    spread = abs(strength) * _row_norms(basis)
    norm_x, norm_tau = exact.x.norm(dim=-1, keepdim=True), exact.tau.norm(dim=-1, keepdim=True)
    bound = 1.01 * u * exact.y.abs()
    if mode == "baked":
        bound = bound + u * (7 * exact.sigma + exact.edited_bias.abs()) + g * exact.sigma
        return bound + spread * f * norm_tau
    bound = bound + 1.01 * u * exact.x.abs() + g * exact.tau
    if mode == "lora":
        return bound + spread * (f + g) * norm_tau
    pieces = 0.0 if dtype == torch.float32 else _TWO_PIECES
    norm_z = (exact.x @ basis.double()).norm(dim=-1, keepdim=True)
    return bound + spread * (u * norm_x + g * norm_tau + 1.01 * (pieces * norm_z + f * norm_x))


def expected_rule_b(weight: Tensor, h: Tensor) -> Tensor:
    """The typical norm(hook - baked) for a = 1: 0.88 u norm(x), [rows]. A gate stands at 2 u norm(x)."""
    return 0.88 * unit_roundoff(weight.dtype) * (h.double() @ weight.double().T).norm(dim=-1)


def leak_of_weight(after: Tensor, before: Tensor, basis: Tensor, strength: float = 1.0) -> float:
    """norm(U^T W' - (1 - a) U^T W) / norm(U^T W) in float64: what a stored baked weight kept of the subspace."""
    u64 = basis.double()
    inside = u64.T @ before.double()
    return float((u64.T @ after.double() - (1 - strength) * inside).norm() / inside.norm())


def storage_noise(stored: Tensor, basis: Tensor) -> float:
    """norm(U^T E) for E the rounding of a stored [d, columns]: sqrt(sum_ij ulp_ij^2 / 12 |U_i|^2)."""
    total = 0.0
    for start in range(0, stored.shape[0], 256):
        part = stored[start : start + 256].double()
        _, exponent = torch.frexp(part)
        # ulp of a number in [2^(e-1), 2^e) with unit roundoff u is 2u 2^(e-1).
        ulp = torch.where(part == 0, 0.0, 2 * unit_roundoff(stored.dtype) * torch.exp2(exponent.double() - 1))
        total += float(((ulp**2).sum(1) * _row_norms(basis[start : start + 256]) ** 2).sum())
    return math.sqrt(total / 12)


def leak_floor(after: Tensor, before: Tensor, basis: Tensor) -> float:
    """The leak that correct rounding leaves: `storage_noise` of W' over norm(U^T W)."""
    return storage_noise(after, basis) / float((basis.double().T @ before.double()).norm())


def baked_element_bound(weight: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """|W' - exact|_ij of a baked file: Rule A on W's columns without 2^-15 norm(z), plus 2^-23 |W_ij|."""
    exact = bake_oracle(weight, basis, strength)
    columns = weight.double().norm(dim=0)
    spread = math.sqrt(weight.shape[0]) * _ACCUMULATION * columns
    bound = unit_roundoff(weight.dtype) * exact.abs() + abs(strength) * _row_norms(basis)[:, None] * spread
    return 1.01 * bound + 2.0**-23 * weight.double().abs()


def adapter_bound(weight: Tensor, strength: float = 1.0) -> Tensor:
    """|A - a U^T W|_rj of a float32 adapter: 1.01 |a| sqrt(d) 2^-22 norm(W_:j), [1, d_ff]; for weight [d, d_ff]."""
    return 1.01 * abs(strength) * math.sqrt(weight.shape[0]) * _ACCUMULATION * weight.double().norm(dim=0, keepdim=True)


def undo_bound(weight: Tensor, baked: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """|restored - W|_ij of an edit taken back: 1.01 u (|W_ij| + |W'_ij|), both roundings, plus float32's own part."""
    columns = weight.double().norm(dim=0)
    spread = math.sqrt(weight.shape[0]) * _ACCUMULATION * columns
    rounding = unit_roundoff(weight.dtype) * (weight.double().abs() + baked.double().abs())
    return 1.01 * (rounding + abs(strength) * _row_norms(basis)[:, None] * spread) + 2.0**-23 * weight.double().abs()


def worst_ratio(error: Tensor, bound: Tensor) -> float:
    """The largest error/bound: 0/0 counts as 0, an error that is NaN or that meets a bound of 0 as infinity."""
    if error.numel() == 0:
        return 0.0
    ratio = torch.where(error == 0, 0.0, error / bound)
    return float(torch.where(torch.isnan(ratio), math.inf, ratio).max())
