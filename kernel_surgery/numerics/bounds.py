"""Oracles and bounds: what each form of the edit should give, and how far rounding may take it from there.

y = x - a U (U^T x), with x [rows, d], U [d, k] orthonormal and a the strength, a number or one a row. Oracles are
float64, computed from the exact stored low-precision inputs. u is the unit roundoff of the storage dtype. Nothing
here is fast; everything else is held against it.
"""

import math

import torch
from torch import Tensor

from kernel_surgery.numerics.oracle import (
    Exact,
    Strength,
    bake_oracle,
    exact_output,
    project_oracle,
    rmsnorm_oracle,
    strength_column,
)
from kernel_surgery.numerics.rounding import row_norms, storage_noise, underflow, unit_roundoff

# float32 accumulation over d terms, in units of sqrt(d) (probabilistic growth), with four units of room.
_ACCUMULATION = 2.0**-22
# What two bfloat16 pieces (hi + lo) leave of a float32 number.
_TWO_PIECES = 2.0**-15


def rule_a_bound(x: Tensor, basis: Tensor, strength: Strength = 1.0) -> Tensor:
    """Rule A, a projection against the oracle, [..., d] float64:

    1.01 [ u |y_i| + |a| norm(U_i) (2^-15 norm(z) + sqrt(d) 2^-22 norm(x)) ],  z = U^T x

    and the dtype's `underflow`. It admits z carried as two bfloat16 pieces and rejects z rounded to bfloat16. For
    float32 x the 2^-15 term is dropped (it would admit TF32).
    """
    u = unit_roundoff(x.dtype)
    y = project_oracle(x, basis, strength)
    z = (x.double() @ basis.double()).norm(dim=-1, keepdim=True)
    pieces = 0.0 if x.dtype == torch.float32 else _TWO_PIECES
    spread = pieces * z + math.sqrt(x.shape[-1]) * _ACCUMULATION * x.double().norm(dim=-1, keepdim=True)
    return 1.01 * (u * y.abs() + strength_column(strength, y).abs() * row_norms(basis) * spread) + underflow(x.dtype)


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

    And sqrt(d) times the dtype's `underflow`. For float32 x, whose z is never split, the second term is the
    accumulation of Rule A instead.
    """
    d, k = basis.shape
    u = unit_roundoff(x.dtype)
    z = (x.double() @ basis.double()).norm(dim=-1)
    second = math.sqrt(d) * _ACCUMULATION if x.dtype == torch.float32 else _TWO_PIECES
    return 2 * u * y.double().norm(dim=-1) * math.sqrt(k / d) + second * z + math.sqrt(d) * underflow(x.dtype)


def accumulated(scale: Tensor, value: Tensor, terms: int) -> Tensor:
    """What a float32 sum of `terms` products may be off by: 3 sqrt(terms) 2^-24 (scale + |value|).

    scale: root of the sum of the squared products. Added one by one, in random order the partial sums wander to
    `scale`, and the error has a standard deviation of .41 sqrt(terms) 2^-24 scale; all of one sign they grow to
    `value`, and it is .33. Seven of either. Blocked sums, as libraries make them, stay far below.
    """
    return 3 * math.sqrt(terms) * 2.0**-24 * (scale + value.abs())


def rule_b_bounds(
    weight: Tensor, h: Tensor, basis: Tensor, strength: float = 1.0, exact: Exact | None = None
) -> tuple[Tensor, Tensor]:
    """Rule B, hook against baked, as (componentwise [rows, d], per row [rows]), float64.

    weight [d, d_ff] and h [rows, d_ff] in the storage dtype; x, y, sigma as in `Exact` (`exact`: where it is known
    already; with a bias, whose rounding joins the fourth term, it must be):

        |hook - baked|_i    <= u ( |x_i| + |a| norm(U_i) norm(x) + 2 |y_i| + 7 sigma_i )
        norm(hook - baked)  <= u ( norm(P_a) norm(x) + 2 norm(y) + norm(sigma) )

    The first term is the rounding of W h before the projection, the second its spread by U, the third both final
    roundings, the fourth the rounded weights (Hoeffding: failure below 1e-10 an element at 7; for a row, the largest
    of its elements seven times and the norm of all once). In float32 the sums over d_ff and d weigh as much:
    each element gains, with `accumulated` and f = sqrt(d) 2^-22,

        accumulated(sigma_i, y_i) + accumulated(tau_i, x_i) + |a| norm(U_i) accumulated(norm(tau), norm(x))
        + |a| norm(U_i) f (norm(tau) + norm(x))

    and a row the norm of that. tau, not sigma: a hook sums the unedited products, which can be far larger. Where
    numbers underflow, the dtype's `underflow` is added for both roundings, their spread, and the weights.
    """
    u, (d, k) = unit_roundoff(weight.dtype), basis.shape
    exact = exact_output(weight, h, basis, strength) if exact is None else exact
    x, y, sigma, tau = (t.norm(dim=-1, keepdim=True) for t in (exact.x, exact.y, exact.sigma, exact.tau))
    spread, norm_p = abs(strength) * row_norms(basis), max(1.0, abs(1 - strength))
    each = u * (exact.x.abs() + spread * x + 2 * exact.y.abs() + 7 * exact.sigma + exact.edited_bias.abs())
    row = u * (norm_p * x + 2 * y + exact.edited_bias.norm() + sigma + 7 * exact.sigma.amax(-1, keepdim=True))
    tiny = underflow(weight.dtype)
    each = each + tiny * (2 + spread * math.sqrt(d) + 7 * exact.length)
    row = row + tiny * math.sqrt(d) * (2 + norm_p + 7 * exact.length)
    if weight.dtype == torch.float32:
        f, d_ff = math.sqrt(d) * _ACCUMULATION, weight.shape[1]
        both = accumulated(exact.sigma, exact.y, d_ff) + accumulated(exact.tau, exact.x, d_ff)
        each = each + both + spread * (accumulated(tau, x, d_ff) + f * (tau + x))
        row = row + accumulated(sigma, y, d_ff) + norm_p * accumulated(tau, x, d_ff)
        row = row + abs(strength) * math.sqrt(k) * f * (tau + x)
    return each, row.squeeze(-1)


def applied_bound(mode: str, exact: Exact, basis: Tensor, d_ff: int, dtype: torch.dtype, strength: float) -> Tensor:
    """|output - y|_i of one mode ("hook", "fused", "baked" or "lora") against the exact y of the same h, [rows, d].

    Every mode rounds y, and sums d_ff products in float32 (`accumulated`: of tau and x, or sigma and y where the
    weights are edited):

        all    1.01 u |y_i|
        hook, fused  + 1.01 u |x_i| + acc_i, and both spread by U: |a| norm(U_i) (u norm(x) + acc), and Rule A's own
                     spread
        baked  + u (7 sigma_i + |(P_a b)_i|) + acc_i, and float32's part in the weights, |a| norm(U_i) f norm(tau)
        lora   + 1.01 u |x_i| + acc_i, and |a| norm(U_i) (f norm(tau) + acc) for float32's part in A and in A h

    f = sqrt(d) 2^-22; and the dtype's `underflow` once a rounding. The sum of two modes' bounds bounds their
    difference; of hook and baked it is Rule B with the terms below u written out.
    """
    u, d = unit_roundoff(dtype), basis.shape[0]
    f, tiny = math.sqrt(d) * _ACCUMULATION, underflow(dtype)
    spread = abs(strength) * row_norms(basis)
    norm_x, norm_tau = exact.x.norm(dim=-1, keepdim=True), exact.tau.norm(dim=-1, keepdim=True)
    bound = 1.01 * u * exact.y.abs() + tiny
    if mode == "baked":
        bound = bound + u * (7 * exact.sigma + exact.edited_bias.abs()) + accumulated(exact.sigma, exact.y, d_ff)
        return bound + 7 * tiny * exact.length + spread * f * norm_tau
    bound = bound + 1.01 * u * exact.x.abs() + accumulated(exact.tau, exact.x, d_ff) + tiny
    inside = accumulated(norm_tau, norm_x, d_ff)
    if mode == "lora":
        return bound + spread * (f * norm_tau + inside)
    pieces = 0.0 if dtype == torch.float32 else _TWO_PIECES
    norm_z = (exact.x @ basis.double()).norm(dim=-1, keepdim=True)
    spread_out = u * norm_x + inside + math.sqrt(d) * tiny + 1.01 * (pieces * norm_z + f * norm_x)
    return bound + spread * spread_out


def expected_rule_b(weight: Tensor, h: Tensor) -> Tensor:
    """The typical norm(hook - baked) for a = 1: 0.88 u norm(x), [rows]. A gate stands at 2 u norm(x)."""
    return 0.88 * unit_roundoff(weight.dtype) * (h.double() @ weight.double().T).norm(dim=-1)


def leak_floor(after: Tensor, before: Tensor, basis: Tensor) -> float:
    """The leak that correct rounding leaves: `storage_noise` of W' over norm(U^T W)."""
    return storage_noise(after, basis) / float((basis.double().T @ before.double()).norm())


def baked_element_bound(weight: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """|W' - exact|_ij of a baked file: Rule A on W's columns without 2^-15 norm(z), plus 2^-23 |W_ij|; and the dtype's
    `underflow`."""
    exact = bake_oracle(weight, basis, strength)
    columns = weight.double().norm(dim=0)
    spread = math.sqrt(weight.shape[0]) * _ACCUMULATION * columns
    bound = unit_roundoff(weight.dtype) * exact.abs() + abs(strength) * row_norms(basis)[:, None] * spread
    return 1.01 * bound + 2.0**-23 * weight.double().abs() + underflow(weight.dtype)


def adapter_bound(weight: Tensor, strength: float = 1.0) -> Tensor:
    """|A - a U^T W|_rj of a float32 adapter: 1.01 |a| sqrt(d) 2^-22 norm(W_:j), [1, d_ff]; for weight [d, d_ff]."""
    return 1.01 * abs(strength) * math.sqrt(weight.shape[0]) * _ACCUMULATION * weight.double().norm(dim=0, keepdim=True)


def undo_bound(weight: Tensor, baked: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """|restored - W|_ij of an edit taken back: 1.01 u (|W_ij| + |W'_ij|), both roundings, plus float32's own part."""
    columns = weight.double().norm(dim=0)
    spread = math.sqrt(weight.shape[0]) * _ACCUMULATION * columns
    rounding = unit_roundoff(weight.dtype) * (weight.double().abs() + baked.double().abs())
    float32 = abs(strength) * row_norms(basis)[:, None] * spread
    return 1.01 * (rounding + float32) + 2.0**-23 * weight.double().abs() + 2 * underflow(weight.dtype)


def worst_ratio(error: Tensor, bound: Tensor) -> float:
    """The largest error/bound: 0/0 counts as 0, an error that is NaN or that meets a bound of 0 as infinity."""
    if error.numel() == 0:
        return 0.0
    ratio = torch.where(error == 0, 0.0, error / bound)
    return float(torch.where(torch.isnan(ratio), math.inf, ratio).max())
