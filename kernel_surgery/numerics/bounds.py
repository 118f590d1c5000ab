"""Error bounds: the largest difference that rounding may cause between a form of the edit and its oracle.

The edit is y = x - a A (B^T x - c). x is [rows, d], A and B are [d, k] with B^T A = I, and c is [k]. The strength a is
a number or a [rows] tensor. u is the unit roundoff of the storage dtype. The oracles (`numerics.oracle`) compute in
float64 from the stored inputs. This module is slow. Every other implementation is checked against it.

Three scales of the edit stand in the bounds:

    g_i   sqrt(sum_j A_ij^2 norm(B_j)^2)   how far an error of B^T x reaches into element i (`Projection.gain`)
    m_i   norm of row i of A B^T           how far an error of x reaches into element i (`Projection.mixing`)
    o_i   sqrt(sum_j A_ij^2 c_j^2)         the offset's part of element i (`Projection.offset_rows`)

For an orthogonal edit, A = B = U and c = 0, so g_i = m_i = norm(U_i) and o_i = 0. An oblique edit amplifies errors: B
may be much longer than 1.
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
from kernel_surgery.numerics.projection import BasisLike, Projection
from kernel_surgery.numerics.rounding import row_energies, storage_noise, underflow, unit_roundoff

# Relative error of a float32 sum over d terms, divided by sqrt(d): the error grows like a random walk. The value is
# four times the unit roundoff 2^-24.
_ACCUMULATION = 2.0**-22
# Relative error of a float32 number that is stored as two bfloat16 pieces (hi + lo).
_TWO_PIECES = 2.0**-15


def rule_a_bound(x: Tensor, basis: BasisLike, strength: Strength = 1.0) -> Tensor:
    """Return the bound of Rule A: the error of a projection against `project_oracle`, [..., d] float64.

        1.01 [ u |y_i| + |a| (2^-15 norm(A_i) norm(z) + sqrt(d) 2^-22 (g_i norm(x) + o_i)) ],  z = B^T x - c

    The dtype's `underflow` is added. x is [..., d].

    The bound accepts z as two bfloat16 pieces, and rejects z rounded to bfloat16. For float32 x there is no 2^-15 term,
    because that term would accept TF32.
    """
    u, edit = unit_roundoff(x.dtype), Projection.of(basis).double()
    y = project_oracle(x, edit, strength)
    spread = _projection_error(edit, x.double(), x.dtype)
    return 1.01 * (u * y.abs() + strength_column(strength, y).abs() * spread) + underflow(x.dtype)


def _projection_error(edit: Projection, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the error of A (B^T x - c) as a kernel computes it, [..., d] float64: Rule A without its rounding of y."""
    z, length = edit.inside(x).norm(dim=-1, keepdim=True), x.norm(dim=-1, keepdim=True)
    pieces = 0.0 if dtype == torch.float32 else _TWO_PIECES
    scale = edit.gain() * length + edit.offset_rows()
    return pieces * edit.basis.norm(dim=1) * z + math.sqrt(x.shape[-1]) * _ACCUMULATION * scale


def add_bound(x: Tensor, residual: Tensor, basis: BasisLike, strength: Strength = 1.0, separate: bool = True) -> Tensor:
    """Return the error bound of h = residual + y, [..., d] float64: Rule A for y, then the rounding of the sum.

        E + 1.01 u (|residual + y| + E),  E = `rule_a_bound`

    separate: whether y is rounded to the dtype before the sum. If not, y stays a float32 number, and E has 2^-24 |y_i|
    instead of u |y_i|. The sum is then rounded to float32, and after that to the dtype.
    """
    u = unit_roundoff(x.dtype)
    y = project_oracle(x, basis, strength)
    error = rule_a_bound(x, basis, strength)
    if not separate:
        error = error - 1.01 * (u - 2.0**-24) * y.abs()
    rounding = u if x.dtype == torch.float32 else u + 2.0**-24
    return error + 1.01 * rounding * ((residual.double() + y).abs() + error)


def rmsnorm_bound(h: Tensor, weight: Tensor, eps: float, separate: bool = True) -> Tensor:
    """Return the error bound of an RMSNorm n against `rmsnorm_oracle` of the same stored h, [..., d] float64.

        1.01 |n_i| ( r u + (sqrt(d) / 2 + 8) 2^-24 ) + 2 u m (1 + |weight_i|),  m the smallest normal number

    r is the number of roundings to the dtype: 2 if they are `separate` (the quotient, then the product), else 1. The
    error of the sum of d squares grows like sqrt(d) float32 roundings, and the root halves it. The 8 covers the
    division, the root (2 ulp in hardware) and the products.
    """
    u = unit_roundoff(h.dtype)
    exact = rmsnorm_oracle(h, weight, eps).abs()
    roundings = (2 if separate else 1) * u + (math.sqrt(h.shape[-1]) / 2 + 8) * 2.0**-24
    tiny = torch.finfo(h.dtype).smallest_normal * 2 * u * (1 + weight.double().abs())
    return 1.01 * exact * roundings + tiny


def leak_bound(y: Tensor, x: Tensor, basis: BasisLike) -> Tensor:
    """Return the bound of the leak rule, [...] float64, for a = 1 and x inside span(A).

        norm(B^T y - c) <= 2 u norm(B o y) + 2^-15 max_j norm(B_j) norm(x),  norm(B o y)^2 = sum_i norm(B_i)^2 y_i^2

    sqrt(d) max_j norm(B_j) times the dtype's `underflow` is added. For float32 x, z is never split, so 2^-15 becomes
    sqrt(d) 2^-22, from the accumulation of Rule A. With an offset, norm(c) joins norm(x).

    For an orthonormal U this is 2 u norm(y) sqrt(k/d) + 2^-15 norm(z) where the rows of U are equally long: inside
    span(U), norm(x) is norm(z).
    """
    edit, d, u = Projection.of(basis).double(), y.shape[-1], unit_roundoff(x.dtype)
    longest = float(edit.reads.norm(dim=0).max())
    second = math.sqrt(d) * _ACCUMULATION if x.dtype == torch.float32 else _TWO_PIECES
    rounding = 2 * u * (row_energies(edit) * y.double().square()).sum(-1).sqrt()
    scale = longest * x.double().norm(dim=-1) + (0.0 if edit.offset is None else float(edit.offset.norm()))
    return rounding + second * scale + math.sqrt(d) * longest * underflow(x.dtype)


def accumulated(scale: Tensor, value: Tensor, terms: int) -> Tensor:
    """Return the error bound of a float32 sum of `terms` products: 3 sqrt(terms) 2^-24 (scale + |value|).

    scale: root of the sum of the squared products. value: the sum.

    The factor 3 is at least seven standard deviations of the error of a sum that adds one product at a time. If the
    signs are random, the partial sums reach about `scale`, and the standard deviation is .41 sqrt(terms) 2^-24 scale.
    If all signs are equal, they grow to `value`, and it is .33 sqrt(terms) 2^-24 |value|. Libraries sum in blocks,
    which stays far below the bound.
    """
    return 3 * math.sqrt(terms) * 2.0**-24 * (scale + value.abs())


def rule_b_bounds(
    weight: Tensor, h: Tensor, basis: BasisLike, strength: float = 1.0, exact: Exact | None = None
) -> tuple[Tensor, Tensor]:
    """Return the bounds of Rule B, the difference of hook and baked: per element [rows, d] and per row [rows], float64.

    weight is [d, d_ff] and h is [rows, d_ff], both in the storage dtype. x, y, sigma and tau are those of `Exact`.
    exact: `exact_output` of the same inputs. By default it is computed without a bias. A layer with a bias must pass
    it, and the rounding of the edited bias then joins the fourth term.

        |hook - baked|_i    <= u ( |x_i| + |a| m_i norm(x) + 2 |y_i| + 7 sigma_i )
        norm(hook - baked)  <= u ( norm(P_a) norm(x) + 2 norm(y) + norm(sigma) + 7 max_i sigma_i )

    The four terms are:

    1. the rounding of W h before the projection
    2. the spread of that rounding by the edit
    3. the final rounding of both modes
    4. the rounding of the baked weights: by Hoeffding's inequality, an element exceeds 7 sigma_i with a probability
       below 1e-10. A row takes norm(sigma) once and its largest sigma seven times.

    In float32, the sums over d_ff and d cause errors of the same size. With `accumulated` and f = sqrt(d) 2^-22, these
    terms are added to each element, and the norm of these terms to a row:

        accumulated(sigma_i, y_i) + accumulated(tau_i, x_i) + |a| m_i accumulated(norm(tau), norm(x))
        + |a| f (g_i (norm(tau) + norm(x)) + o_i)

    They use tau because a hook sums the unedited products, which can be much larger than the edited ones. The dtype's
    `underflow` is added for both roundings, their spread, and the weights. In 16 bits the last line is added for an
    oblique edit too: for an orthogonal one it is small beside the second term.
    """
    u, d, edit = unit_roundoff(weight.dtype), len(weight), Projection.of(basis).double()
    exact = exact_output(weight, h, edit, strength) if exact is None else exact
    x, y, sigma, tau = (t.norm(dim=-1, keepdim=True) for t in (exact.x, exact.y, exact.sigma, exact.tau))
    spread, norm_p = abs(strength) * edit.mixing(), edit.norm(strength)
    each = u * (exact.x.abs() + spread * x + 2 * exact.y.abs() + 7 * exact.sigma + exact.edited_bias.abs())
    row = u * (norm_p * x + 2 * y + exact.edited_bias.norm() + sigma + 7 * exact.sigma.amax(-1, keepdim=True))
    tiny = underflow(weight.dtype)
    each = each + tiny * (2 + spread * math.sqrt(d) + 7 * exact.length)
    row = row + tiny * math.sqrt(d) * (2 + norm_p + 7 * exact.length)
    if weight.dtype == torch.float32 or edit.dual is not None:
        scale = edit.gain() * (tau + x) + edit.offset_rows()
        arithmetic = abs(strength) * math.sqrt(d) * _ACCUMULATION * scale
        each, row = each + arithmetic, row + arithmetic.norm(dim=-1, keepdim=True)
    if weight.dtype == torch.float32:
        d_ff = weight.shape[1]
        both = accumulated(exact.sigma, exact.y, d_ff) + accumulated(exact.tau, exact.x, d_ff)
        each = each + both + spread * accumulated(tau, x, d_ff)
        row = row + accumulated(sigma, y, d_ff) + norm_p * accumulated(tau, x, d_ff)
    return each, row.squeeze(-1)


def applied_bound(mode: str, exact: Exact, basis: BasisLike, d_ff: int, dtype: torch.dtype, strength: float) -> Tensor:
    """Return the error bound of one mode against the exact y of the same h: |output - y|_i, [rows, d] float64.

    mode: "hook", "fused", "baked" or "lora". exact: `exact_output` of that h.

    Every mode rounds y and sums d_ff products in float32. acc_i is `accumulated` of tau and x. In baked mode, where the
    weights are edited, it is that of sigma and y. acc without an index is that of norm(tau) and norm(x). f is
    sqrt(d) 2^-22. The bound is the sum of these terms:

        every mode   1.01 u |y_i|
        hook, fused  1.01 u |x_i| + acc_i
                     |a| m_i (u norm(x) + acc), the spread of both errors by the edit
                     the second term of Rule A, for the projection itself
        baked        u (7 sigma_i + |(edited bias)_i|) + acc_i
                     |a| f (g_i norm(tau) + o_i), the float32 error of the weights
        lora         1.01 u |x_i| + acc_i
                     |a| g_i (f norm(tau) + acc), the float32 error of the adapter and of its products

    The dtype's `underflow` is added for each rounding. The difference of two modes is at most the sum of their bounds.
    For hook and baked, that sum is Rule B with the float32 terms written out.
    """
    u, d, a, edit = unit_roundoff(dtype), exact.x.shape[-1], abs(strength), Projection.of(basis).double()
    f, tiny = math.sqrt(d) * _ACCUMULATION, underflow(dtype)
    norm_x, norm_tau = exact.x.norm(dim=-1, keepdim=True), exact.tau.norm(dim=-1, keepdim=True)
    bound = 1.01 * u * exact.y.abs() + tiny
    if mode == "baked":
        bound = bound + u * (7 * exact.sigma + exact.edited_bias.abs()) + accumulated(exact.sigma, exact.y, d_ff)
        return bound + 7 * tiny * exact.length + a * f * (edit.gain() * norm_tau + edit.offset_rows())
    bound = bound + 1.01 * u * exact.x.abs() + accumulated(exact.tau, exact.x, d_ff) + tiny
    inside = accumulated(norm_tau, norm_x, d_ff)
    if mode == "lora":
        return bound + a * edit.gain() * (f * norm_tau + inside)
    spread_out = edit.mixing() * (u * norm_x + inside + math.sqrt(d) * tiny)
    return bound + a * (spread_out + 1.01 * _projection_error(edit, exact.x, dtype))


def split_bound(mode: str, parts: Tensor, basis: BasisLike, dtype: torch.dtype, strength: float, bias: bool) -> Tensor:
    """Return the error that splitting the sum W h over processes adds to `applied_bound`, [rows, d] float64.

    parts: [processes, rows, d], the exact partial outputs; of the edited weights in baked mode. Each of n parts is
    rounded to the dtype, and they are added one by one: 1.01 n u sum_p |part_p,i| in all. If there is a `bias`, it is
    added to the rounded sum, which is one rounding more. A hook spreads these errors as in `applied_bound`.
    """
    u, edit = unit_roundoff(dtype), Projection.of(basis).double()
    size = parts.double().abs().sum(0)
    error = 1.01 * u * (len(parts) * size + (size if bias else 0.0)) + (len(parts) + bias) * underflow(dtype)
    if mode in ("hook", "fused"):
        error = error + abs(strength) * edit.mixing() * error.norm(dim=-1, keepdim=True)
    return error


def expected_rule_b(weight: Tensor, h: Tensor) -> Tensor:
    """Return the typical norm(hook - baked) for a = 1: 0.88 u norm(x), [rows] float64. A gate is at 2 u norm(x)."""
    return 0.88 * unit_roundoff(weight.dtype) * (h.double() @ weight.double().T).norm(dim=-1)


def leak_floor(after: Tensor, before: Tensor, basis: BasisLike) -> float:
    """Return the leak that correct rounding leaves: `storage_noise` of W' divided by norm(B^T W).

    after: W' as stored. before: W. Both are [d, d_ff].
    """
    return storage_noise(after, basis) / float((Projection.of(basis).reads.double().T @ before.double()).norm())


def _weight_error(weight: Tensor, basis: BasisLike, strength: float) -> Tensor:
    """Return the float32 error of a A (B^T W), [d, columns] float64: |a| sqrt(d) 2^-22 (g_i norm(W_:j) + o_i).

    weight: [d, columns] or a bias [d], which alone takes the offset.
    """
    edit = Projection.of(basis).double().for_tensor(weight.ndim)
    columns = weight.double().norm(dim=0)
    scale = (edit.gain()[:, None] * columns).reshape(weight.shape) + edit.offset_rows()
    return abs(strength) * math.sqrt(weight.shape[0]) * _ACCUMULATION * scale


def baked_element_bound(
    weight: Tensor, basis: BasisLike, strength: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the bound of |W' - exact|_ij for a baked weight [d, d_ff] or bias [d], in its shape, float64.

    It is Rule A on the columns of W without the 2^-15 term, plus 2^-23 |W_ij| and the dtype's `underflow`. dtype: of
    W', by default W's.
    """
    exact, kind = bake_oracle(weight, basis, strength), dtype or weight.dtype
    bound = unit_roundoff(kind) * exact.abs() + _weight_error(weight, basis, strength)
    return 1.01 * bound + 2.0**-23 * weight.double().abs() + underflow(kind)


def requantised_bound(half: Tensor, exact: Tensor, weight: Tensor, spread: Tensor) -> Tensor:
    """Return the bound of |W' - exact|_ij for a weight that was edited in float32 and quantised again, float64.

        half + 1.01 2^-22 spread + 2^-22 (|exact_ij| + |W_ij|)

    half: half a step of the grid at each element; 0 before it is quantised. spread: |a| sqrt(d) g_i norm(W_:j), which
    is Rule A's term for the sum over d products. The last term covers the float32 roundings of an element: W from its
    number and scale, the edit, and the quotient by the new scale, each 2^-24 of a number that is at most their sum.
    """
    return half + 1.01 * _ACCUMULATION * spread + 2.0**-22 * (exact.abs() + weight.abs())


def adapter_bound(weight: Tensor, strength: float = 1.0, basis: BasisLike | None = None) -> Tensor:
    """Return the bound of |A - a B^T W|_rj for a float32 adapter A, [k or 1, d_ff] float64. weight is [d, d_ff].

    It is 1.01 |a| sqrt(d) 2^-22 norm(B_r) norm(W_:j). Without a basis, or with an orthonormal one, norm(B_r) is 1.
    """
    edit = None if basis is None else Projection.of(basis)
    columns = weight.double().norm(dim=0, keepdim=True)
    lengths = 1.0 if edit is None or edit.dual is None else edit.dual.double().norm(dim=0)[:, None]
    return 1.01 * abs(strength) * math.sqrt(weight.shape[0]) * _ACCUMULATION * lengths * columns


def undo_bound(
    weight: Tensor, baked: Tensor, basis: BasisLike, strength: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the bound of |restored - W|_ij after an undo, in the weight's shape, float64.

    It is 1.01 u (|W_ij| + |W'_ij|) for the two roundings, plus the error of the float32 arithmetic and `underflow`.
    dtype: of the restored weight and of W', by default W's.
    """
    kind = dtype or weight.dtype
    rounding = unit_roundoff(kind) * (weight.double().abs() + baked.double().abs())
    float32 = _weight_error(weight, basis, strength)
    return 1.01 * (rounding + float32) + 2.0**-23 * weight.double().abs() + 2 * underflow(kind)


def worst_ratio(error: Tensor, bound: Tensor) -> float:
    """Return the largest error / bound. 0 / 0 counts as 0. A NaN, or an error against a bound of 0, is infinity."""
    if error.numel() == 0:
        return 0.0
    ratio = torch.where(error == 0, 0.0, error / bound)
    return float(torch.where(torch.isnan(ratio), math.inf, ratio).max())
