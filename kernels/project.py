"""y = x - a U (U^T x) for rows x [M, d] and an orthonormal basis U [d, k]: one Triton kernel for every shape.

Each program owns BLOCK_M rows and walks over d twice: once to gather z = U^T x in float32 registers, once to subtract
a U z. The second walk finds x in cache when the rows of all resident programs fit there; for short rows (d to a few
thousand) they do.

The danger in a kernel like this is z. Handing it to the tensor cores in bfloat16, as LoRA kernels do, leaks twelve
times what float32 arithmetic leaks when x lies inside span(U), and random x does not show it. So U and z both go in
as two bfloat16 pieces (hi + lo), which keeps 16 bits of each: z = x Uh + x Ul, then zh Uh + zl Uh + zh Ul. float16
has no such pieces for z (it overflows at 65504) and takes three TF32 products instead; float32 takes IEEE products
and no tensor cores. All sums are float32, with one rounding at the store.

Not covered: a form that reads x once (needs a whole row in registers), and one that splits d for very small M.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _project_kernel(
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
    """PIECES: dtype of the hi and lo pieces, or None for float32 products of PRECISION ("ieee" or "tf32x3")."""
    # int64 before any multiplication by a stride: M * d may pass 2^31.
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in = row < rows
    column_k = tl.arange(0, BLOCK_K)
    k_in = column_k < k
    x_row = x_ptr + row[:, None] * stride_x
    y_row = y_ptr + row[:, None] * stride_y

    z = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        column_in = column < d
        x = tl.load(x_row + column[None, :], mask=row_in[:, None] & column_in[None, :], other=0.0)
        u = tl.load(
            basis_ptr + column[:, None].to(tl.int64) * stride_basis_d + column_k[None, :] * stride_basis_k,
            mask=column_in[:, None] & k_in[None, :],
            other=0.0,
        )
        if PIECES is not None:
            u_hi = u.to(PIECES)
            u_lo = (u - u_hi.to(tl.float32)).to(PIECES)
            z = tl.dot(x, u_hi, z)
            z = tl.dot(x, u_lo, z)
        else:
            z = tl.dot(x.to(tl.float32), u, z, input_precision=PRECISION)

    if PER_ROW:
        a = tl.load(row_strength_ptr + row, mask=row_in, other=0.0)[:, None] * strength
    else:
        a = tl.zeros([BLOCK_M, 1], tl.float32) + strength
    if PIECES is not None:
        z_hi = z.to(PIECES)
        z_lo = (z - z_hi.to(tl.float32)).to(PIECES)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        column_in = column < d
        inside = row_in[:, None] & column_in[None, :]
        x = tl.load(x_row + column[None, :], mask=inside, other=0.0)
        u = tl.load(
            basis_ptr + column[:, None].to(tl.int64) * stride_basis_d + column_k[None, :] * stride_basis_k,
            mask=column_in[:, None] & k_in[None, :],
            other=0.0,
        )
        if PIECES is not None:
            u_hi = u.to(PIECES)
            u_lo = (u - u_hi.to(tl.float32)).to(PIECES)
            removed = tl.dot(z_hi, tl.trans(u_lo))
            removed = tl.dot(z_lo, tl.trans(u_hi), removed)
            removed = tl.dot(z_hi, tl.trans(u_hi), removed)
        else:
            removed = tl.dot(z, tl.trans(u), input_precision=PRECISION)
        x_wide = x.to(tl.float32)
        # A row of strength 0 comes back bit for bit, whatever its z became.
        y = tl.where(a == 0.0, x_wide, x_wide - a * removed)
        tl.store(y_row + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def launch_options(dtype: torch.dtype, rows: int, k: int) -> dict:
    """Constexprs and launch parameters for x of `dtype` [rows, d] and a basis of k columns."""
    block_k = max(16, triton.next_power_of_2(k))
    pieces, precision = {
        torch.bfloat16: (tl.bfloat16, "ieee"),
        torch.float16: (None, "tf32x3"),
        torch.float32: (None, "ieee"),
    }[dtype]
    # 16 rows is the smallest tl.dot; with more rows than cores, 32 a program read U half as often. Larger blocks
    # spill, and so do the two pieces with four warps: see the table of `python -m kernel_surgery.aot`.
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
    x: torch.Tensor, basis: torch.Tensor, strength: float, row_strength: torch.Tensor | None = None, **overrides
) -> torch.Tensor:
    """Launch the kernel; returns a fresh contiguous y [M, d] of x's dtype.

    x [M, d] bfloat16, float16 or float32, last stride 1, any row stride; basis [d, k] float32, any strides, k <= 64;
    row_strength [M] float32 contiguous, multiplied by `strength`. Shapes are the caller's to check. `overrides`
    replace launch options.
    """
    rows, d = x.shape
    k = basis.shape[1]
    y = torch.empty((rows, d), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    options = launch_options(x.dtype, rows, k) | overrides
    _project_kernel[(triton.cdiv(rows, options["BLOCK_M"]),)](
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
