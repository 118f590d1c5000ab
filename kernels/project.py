"""y = x - a U (U^T x) for rows x [M, d] and an orthonormal basis U [d, k]: two Triton kernels, one function.

    row         one row a program, float32 products without tensor cores: few rows, where only latency counts
    two-pass    a block of rows is read twice, the second time from cache where it fits: every other shape

`form_of` chooses by shape alone. Crossing one of its thresholds changes the order of summation and so the last bits of
a row: the same row in a batch of 64 and of 65 may differ by a rounding. Every form meets the same bound.

The danger in a kernel like this is z = U^T x. Handing it to the tensor cores in bfloat16, as LoRA kernels do, leaks
twelve times what float32 arithmetic leaks when x lies inside span(U), and random x does not show it. So U and z both
go in as two bfloat16 pieces (hi + lo), which keeps 16 bits of each: z = x Uh + x Ul, then zh Uh + zl Uh + zh Ul.
float16 has no such pieces for z (it overflows at 65504) and takes three TF32 products instead; float32 takes IEEE
products and no tensor cores. All sums are float32, with one rounding at the store.

Not here: a form that reads x once and keeps it in registers (as first written it spills), one that splits d for very
small M and large U, and one that gives a row the same bits in any batch.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def load_basis(basis_ptr, column, d, k, stride_d, stride_k, BLOCK_K: tl.constexpr):
    """Rows `column` of U as float32 [len(column), BLOCK_K], zero beyond d and k."""
    column_k = tl.arange(0, BLOCK_K)
    return tl.load(
        basis_ptr + column[:, None].to(tl.int64) * stride_d + column_k[None, :] * stride_k,
        mask=(column < d)[:, None] & (column_k < k)[None, :],
        other=0.0,
    )


@triton.jit
def gather(x, u, z, PIECES: tl.constexpr, PRECISION: tl.constexpr):
    """z + x u for a chunk x [rows, columns] and u [columns, k] float32."""
    if PIECES is not None:
        u_hi = u.to(PIECES)
        u_lo = (u - u_hi.to(tl.float32)).to(PIECES)
        z = tl.dot(x, u_hi, z)
        return tl.dot(x, u_lo, z)
    else:
        return tl.dot(x.to(tl.float32), u, z, input_precision=PRECISION)


@triton.jit
def spread(z, u, PIECES: tl.constexpr, PRECISION: tl.constexpr):
    """z u^T, what is to be removed from a chunk: z [rows, k] and u [columns, k] float32. Small terms first."""
    if PIECES is not None:
        z_hi = z.to(PIECES)
        z_lo = (z - z_hi.to(tl.float32)).to(PIECES)
        u_hi = u.to(PIECES)
        u_lo = (u - u_hi.to(tl.float32)).to(PIECES)
        removed = tl.dot(z_hi, tl.trans(u_lo))
        removed = tl.dot(z_lo, tl.trans(u_hi), removed)
        return tl.dot(z_hi, tl.trans(u_hi), removed)
    else:
        return tl.dot(z, tl.trans(u), input_precision=PRECISION)


@triton.jit
def subtract(x, removed, a):
    """x - a removed in float32. A row of strength 0 comes back bit for bit, whatever its z became."""
    x_wide = x.to(tl.float32)
    return tl.where(a == 0.0, x_wide, x_wide - a * removed)


@triton.jit
def _project_row_kernel(
    x_ptr,
    basis_ptr,
    y_ptr,
    row_strength_ptr,
    strength,
    rows,
    d,
    k,
    stride_x,
    stride_basis_d,
    stride_basis_k,
    stride_y,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    """One row a program: partial sums [BLOCK_D, BLOCK_K] in float32 registers, one reduction, x and U read again."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_D)
    partial = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + lane
        x = tl.load(x_ptr + row * stride_x + column, mask=column < d, other=0.0).to(tl.float32)
        u = load_basis(basis_ptr, column, d, k, stride_basis_d, stride_basis_k, BLOCK_K)
        partial += x[:, None] * u
    z = tl.sum(partial, 0)
    a = strength
    if PER_ROW:
        a = strength * tl.load(row_strength_ptr + row)
    for start in range(0, d, BLOCK_D):
        column = start + lane
        x = tl.load(x_ptr + row * stride_x + column, mask=column < d, other=0.0)
        u = load_basis(basis_ptr, column, d, k, stride_basis_d, stride_basis_k, BLOCK_K)
        y = subtract(x, tl.sum(u * z[None, :], 1), a)
        tl.store(y_ptr + row * stride_y + column, y.to(y_ptr.dtype.element_ty), mask=column < d)


@triton.jit
def block_of_rows(row_strength_ptr, strength, rows, BLOCK_M: tl.constexpr, PER_ROW: tl.constexpr):
    """(row numbers int64 [BLOCK_M], strengths [BLOCK_M, 1]) of this program."""
    # int64 before any multiplication by a stride: M * d may pass 2^31.
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if PER_ROW:
        a = tl.load(row_strength_ptr + row, mask=row < rows, other=0.0)[:, None] * strength
    else:
        a = tl.zeros([BLOCK_M, 1], tl.float32) + strength
    return row, a


@triton.jit
def _project_two_pass_kernel(
    x_ptr,
    basis_ptr,
    y_ptr,
    row_strength_ptr,
    strength,
    rows,
    d,
    k,
    stride_x,
    stride_basis_d,
    stride_basis_k,
    stride_y,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_ROW: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M rows a program, walked over twice. PIECES: dtype of the hi and lo pieces, or None for float32 products
    of PRECISION ("ieee" or "tf32x3")."""
    row, a = block_of_rows(row_strength_ptr, strength, rows, BLOCK_M, PER_ROW)
    x_row = x_ptr + row[:, None] * stride_x
    y_row = y_ptr + row[:, None] * stride_y
    row_in = (row < rows)[:, None]
    z = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_row + column[None, :], mask=row_in & (column < d)[None, :], other=0.0)
        u = load_basis(basis_ptr, column, d, k, stride_basis_d, stride_basis_k, BLOCK_K)
        z = gather(x, u, z, PIECES, PRECISION)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = row_in & (column < d)[None, :]
        x = tl.load(x_row + column[None, :], mask=inside, other=0.0)
        u = load_basis(basis_ptr, column, d, k, stride_basis_d, stride_basis_k, BLOCK_K)
        y = subtract(x, spread(z, u, PIECES, PRECISION), a)
        tl.store(y_row + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


KERNELS = {"row": _project_row_kernel, "two-pass": _project_two_pass_kernel}
FEW_ROWS = 64  # by arithmetic a launch costs more than the work up to here; not measured on a GPU yet


def form_of(rows: int) -> str:
    """Which kernel runs for x [rows, d]: "row" or "two-pass"."""
    return "row" if rows <= FEW_ROWS else "two-pass"


def launch_options(dtype: torch.dtype, rows: int, d: int, k: int, form: str) -> dict:
    """Constexprs and launch parameters of a form for x of `dtype` [rows, d] and a basis of k columns.

    None of them spills on sm_80 or sm_90: see `python -m kernel_surgery.aot`. Not tuned on a GPU yet.
    """
    block_k = max(16, triton.next_power_of_2(k))
    if form == "row":
        block_d = max(32, min(triton.next_power_of_2(d), 4096 // block_k))
        return {"BLOCK_D": block_d, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 2}
    pieces, precision = {
        torch.bfloat16: (tl.bfloat16, "ieee"),
        torch.float16: (None, "tf32x3"),
        torch.float32: (None, "ieee"),
    }[dtype]
    return {
        "BLOCK_M": 32 if rows > 4096 and pieces is not None and block_k <= 32 else 16,
        "BLOCK_D": 64,
        "BLOCK_K": block_k,
        "PIECES": pieces,
        "PRECISION": precision,
        "num_warps": 8 if pieces is not None else 4,
        "num_stages": 2,
    }


def project(
    x: torch.Tensor,
    basis: torch.Tensor,
    strength: float,
    row_strength: torch.Tensor | None = None,
    form: str | None = None,
    **overrides,
) -> torch.Tensor:
    """Launch a kernel; returns a fresh contiguous y [M, d] of x's dtype.

    x [M, d] bfloat16, float16 or float32, last stride 1, any row stride; basis [d, k] float32, any strides, k <= 64;
    row_strength [M] float32 contiguous, multiplied by `strength`. Shapes are the caller's to check. `form` names a
    kernel instead of `form_of`; `overrides` replace launch options.
    """
    rows, d = x.shape
    k = basis.shape[1]
    y = torch.empty((rows, d), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    form = form or form_of(rows)
    options = launch_options(x.dtype, rows, d, k, form) | overrides
    KERNELS[form][(triton.cdiv(rows, options.get("BLOCK_M", 1)),)](
        x,
        basis,
        y,
        row_strength if row_strength is not None else x,  # never read without PER_ROW
        strength,
        rows,
        d,
        k,
        x.stride(0),
        basis.stride(0),
        basis.stride(1),
        y.stride(0),
        PER_ROW=row_strength is not None,
        **options,
    )
    return y
