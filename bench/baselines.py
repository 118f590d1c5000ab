"""Triton kernels that stand in for what other software runs on a GPU, so that one run can time everything.

    shrink, expand      the two kernels with which serving engines apply a LoRA adapter: z = x U goes to a buffer,
                        then y = x - a z U^T. The bases have x's dtype. z is stored in float32 and rounded to x's
                        dtype for the second product
    add_rmsnorm         h = residual + x and n = rmsnorm(h) * weight in one pass: the floor of project_add_rmsnorm

The package does not contain them.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _shrink_kernel(
    x_ptr, basis_ptr, z_ptr, rows, d, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, BLOCK_K)
    z = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = (row < rows)[:, None] & (column < d)[None, :]
        x = tl.load(x_ptr + row[:, None] * d + column[None, :], mask=inside, other=0.0)
        u = tl.load(basis_ptr + column[:, None] * BLOCK_K + rank[None, :], mask=(column < d)[:, None], other=0.0)
        z = tl.dot(x, u, z)
    tl.store(z_ptr + row[:, None] * BLOCK_K + rank[None, :], z, mask=(row < rows)[:, None])


@triton.jit
def _expand_kernel(
    x_ptr,
    basis_ptr,
    z_ptr,
    y_ptr,
    strength,
    rows,
    d,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    kind: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rank = tl.arange(0, BLOCK_K)
    inside = (row < rows)[:, None] & (column < d)[None, :]
    z = tl.load(z_ptr + row[:, None] * BLOCK_K + rank[None, :], mask=(row < rows)[:, None], other=0.0).to(kind)
    u = tl.load(basis_ptr + column[:, None] * BLOCK_K + rank[None, :], mask=(column < d)[:, None], other=0.0)
    at = row[:, None] * d + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (x - strength * tl.dot(z, tl.trans(u))).to(kind), mask=inside)


@triton.jit
def _add_rmsnorm_kernel(x_ptr, residual_ptr, weight_ptr, h_ptr, n_ptr, eps, d, BLOCK_D: tl.constexpr):
    kind: tl.constexpr = h_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * d
    column = tl.arange(0, BLOCK_D)
    inside = column < d
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
    h = (x + residual).to(kind)
    tl.store(h_ptr + row + column, h, mask=inside)
    wide = h.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / d + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(n_ptr + row + column, (wide.to(kind).to(tl.float32) * weight).to(kind), mask=inside)


def lora(x: torch.Tensor, basis: torch.Tensor, strength: float) -> torch.Tensor:
    """x - a U (U^T x) by shrink and expand. x [M, d], basis [d, k] in x's dtype, both contiguous; k 16, 32 or 64."""
    (rows, d), k = x.shape, basis.shape[1]
    z = torch.empty((rows, k), dtype=torch.float32, device=x.device)
    y = torch.empty_like(x)
    size = {"BLOCK_M": 32, "BLOCK_D": 128, "BLOCK_K": k}
    _shrink_kernel[(triton.cdiv(rows, 32),)](x, basis, z, rows, d, **size)
    _expand_kernel[(triton.cdiv(rows, 32), triton.cdiv(d, 128))](x, basis, z, y, strength, rows, d, **size)
    return y


def add_rmsnorm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float):
    """(h, n), each [M, d], rounded separately like project_add_rmsnorm. All tensors contiguous."""
    rows, d = x.shape
    h, n = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(d)
    warps = min(16, max(1, block // 512))
    _add_rmsnorm_kernel[(rows,)](x, residual, weight, h, n, eps, d, BLOCK_D=block, num_warps=warps)
    return h, n
