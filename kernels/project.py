"""Triton kernels: y = x - a U (U^T x) for rows x [M, d] and an orthonormal basis U [d, k], and what follows in a layer.

There are three operations, chosen at compile time: y; h = residual + y (ADD); and also n = rmsnorm(h) * weight (NORM).
NORM reads x and the residual once and writes h and n once, as the addition and the norm alone would. Data that is read
again (U, and x or h) comes from the cache if it fits. How close this comes to free is not measured on a GPU yet.

Three kernels compute the same function:

    row         one row per program, float32 products without tensor cores. For few rows, where only latency counts.
                Packed U of up to 32768 elements (d = 2048, k = 16) is read once and stays in registers, as x does
    tile        x is read once and stays in registers; the warps share the columns. For bfloat16, packed U, k = 16
    two-pass    a block of rows is read twice, the second time from the cache if it fits. For every other shape

`form_of` chooses by shape alone. On either side of one of its thresholds the order of summation differs, and so may the
last bits: a row in a batch of 64 and in one of 65 may differ by a rounding. All forms meet the same bound. `invariant`
gives a row the same bits in any batch: it always chooses as for many rows, and few rows then take longer.

The numerically delicate step is z = U^T x. With bfloat16 inputs on tensor cores, as in LoRA kernels, twelve times as
much is left in span(U) as in float32 when x lies inside it, and random x does not show this. So U and z are each split
into two bfloat16 pieces (hi + lo), which keep 16 bits: z = x Uh + x Ul, then zh Uh + zl Uh + zh Ul. In float16 z cannot
be split (it overflows at 65504), so three TF32 products are used. float32 uses IEEE products without tensor cores. All
sums are float32, with one rounding at the store.

ADD and NORM have a choice of roundings. SEPARATE rounds where separate operations would: y, then h, then h / rms(h),
then n. Otherwise y and h / rms(h) stay in float32. n is always the norm of h as stored.

There is no form that splits d for very small M and large U.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def load_basis(basis_ptr, column, d, k, stride_d, stride_k, BLOCK_K: tl.constexpr):
    """Load rows `column` of U as float32 [len(column), BLOCK_K], with zeros beyond d and k."""
    column_k = tl.arange(0, BLOCK_K)
    return tl.load(
        basis_ptr + column[:, None].to(tl.int64) * stride_d + column_k[None, :] * stride_k,
        mask=(column < d)[:, None] & (column_k < k)[None, :],
        other=0.0,
    )


@triton.jit
def gather(x, u, z, PIECES: tl.constexpr, PRECISION: tl.constexpr):
    """Return z + x u for a chunk x [..., rows, columns] and u [..., columns, k] float32."""
    if PIECES is not None:
        u_hi = u.to(PIECES)
        u_lo = (u - u_hi.to(tl.float32)).to(PIECES)
        z = tl.dot(x, u_hi, z)
        return tl.dot(x, u_lo, z)
    else:
        return tl.dot(x.to(tl.float32), u, z, input_precision=PRECISION)


@triton.jit
def spread(z, u, PIECES: tl.constexpr, PRECISION: tl.constexpr):
    """Return z u, the part to remove from a chunk: z [..., rows, k], u [..., k, columns] float32. Small terms first."""
    if PIECES is not None:
        z_hi = z.to(PIECES)
        z_lo = (z - z_hi.to(tl.float32)).to(PIECES)
        u_hi = u.to(PIECES)
        u_lo = (u - u_hi.to(tl.float32)).to(PIECES)
        removed = tl.dot(z_hi, u_lo)
        removed = tl.dot(z_lo, u_hi, removed)
        return tl.dot(z_hi, u_hi, removed)
    else:
        return tl.dot(z, u, input_precision=PRECISION)


@triton.jit
def edited(x, removed, a, residual, kind: tl.constexpr, ADD: tl.constexpr, SEPARATE: tl.constexpr):
    """Return x - a removed (with ADD: plus the residual), rounded once to `kind`, the stored dtype.

    A row with strength 0 is returned bit-identical, even if its z is not finite.
    """
    wide = x.to(tl.float32)
    wide = tl.where(a == 0.0, wide, wide - a * removed)
    if ADD:
        if SEPARATE:
            wide = wide.to(kind).to(tl.float32)
        wide += residual.to(tl.float32)
    return wide.to(kind)


@triton.jit
def normalized(h, weight, inverse_rms, kind: tl.constexpr, SEPARATE: tl.constexpr):
    """Return h / rms(h) * weight in `kind`."""
    wide = h.to(tl.float32) * inverse_rms
    if SEPARATE:
        wide = wide.to(kind).to(tl.float32)
    return (wide * weight.to(tl.float32)).to(kind)


@triton.jit
def _project_row_kernel(
    x_ptr, basis_ptr, residual_ptr, weight_ptr, row_strength_ptr, y_ptr, n_ptr,
    strength, eps, rows, d, k, stride_x, stride_residual, stride_basis_d, stride_basis_k,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr, PER_ROW: tl.constexpr,
    ADD: tl.constexpr, NORM: tl.constexpr, SEPARATE: tl.constexpr,
):
    """One row per program; z is summed in float32 registers.

    WHOLE: BLOCK_D holds the whole row. All loads are issued before the first wait, and the data stays in registers.
    That is one wait for memory instead of one per chunk and pass, and waiting is the whole cost of a small batch.
    Otherwise the row is read in chunks. x and U are then read a second time, and h too for the norm.
    """
    kind: tl.constexpr = y_ptr.dtype.element_ty
    # int64 before any multiplication by a stride: M * d may pass 2^31.
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_D)
    x_row = x_ptr + row * stride_x
    residual_row = residual_ptr + row * stride_residual
    y_row = y_ptr + row * d
    n_row = n_ptr + row * d
    a = strength
    if PER_ROW:
        a = strength * tl.load(row_strength_ptr + row)
    if WHOLE:
        inside = lane < d
        x = tl.load(x_row + lane, mask=inside, other=0.0)
        u = load_basis(basis_ptr, lane, d, k, stride_basis_d, stride_basis_k, BLOCK_K)
        r = x
        if ADD:
            r = tl.load(residual_row + lane, mask=inside, other=0.0)
        if NORM:
            w = tl.load(weight_ptr + lane, mask=inside, other=0.0)
        z = tl.sum(x.to(tl.float32)[:, None] * u, 0)
        y = edited(x, tl.sum(u * z[None, :], 1), a, r, kind, ADD, SEPARATE)
        tl.store(y_row + lane, y, mask=inside)
        if NORM:
            wide = y.to(tl.float32)
            inverse_rms = tl.rsqrt(tl.sum(wide * wide, 0) / d + eps)
            tl.store(n_row + lane, normalized(y, w, inverse_rms, kind, SEPARATE), mask=inside)
    else:
        z = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, d, BLOCK_D):
            column = start + lane
            x = tl.load(x_row + column, mask=column < d, other=0.0)
            u = load_basis(basis_ptr, column, d, k, stride_basis_d, stride_basis_k, BLOCK_K)
            z += tl.sum(x.to(tl.float32)[:, None] * u, 0)
        squares = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, d, BLOCK_D):
            column = start + lane
            x = tl.load(x_row + column, mask=column < d, other=0.0)
            u = load_basis(basis_ptr, column, d, k, stride_basis_d, stride_basis_k, BLOCK_K)
            r = x
            if ADD:
                r = tl.load(residual_row + column, mask=column < d, other=0.0)
            y = edited(x, tl.sum(u * z[None, :], 1), a, r, kind, ADD, SEPARATE)
            tl.store(y_row + column, y, mask=column < d)
            if NORM:
                squares += y.to(tl.float32) * y.to(tl.float32)
        if NORM:
            inverse_rms = tl.rsqrt(tl.sum(squares, 0) / d + eps)
            # What other threads of this program have stored is read below.
            tl.debug_barrier()
            for start in range(0, d, BLOCK_D):
                column = start + lane
                h = tl.load(y_row + column, mask=column < d, other=0.0)
                w = tl.load(weight_ptr + column, mask=column < d, other=0.0)
                tl.store(n_row + column, normalized(h, w, inverse_rms, kind, SEPARATE), mask=column < d)


@triton.jit
def block_of_rows(row_strength_ptr, strength, rows, BLOCK_M: tl.constexpr, PER_ROW: tl.constexpr):
    """Return (row numbers int64 [BLOCK_M], strengths float32 [BLOCK_M]) of this program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if PER_ROW:
        a = tl.load(row_strength_ptr + row, mask=row < rows, other=0.0) * strength
    else:
        a = tl.zeros([BLOCK_M], tl.float32) + strength
    return row, a


@triton.jit
def _project_two_pass_kernel(
    x_ptr,
    basis_ptr,
    residual_ptr,
    weight_ptr,
    row_strength_ptr,
    y_ptr,
    n_ptr,
    strength,
    eps,
    rows,
    d,
    k,
    stride_x,
    stride_residual,
    stride_basis_d,
    stride_basis_k,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_ROW: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    SEPARATE: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M rows per program, read twice (with NORM, h is read a third time). PIECES: dtype of the hi and lo
    pieces, or None for float32 products of PRECISION ("ieee" or "tf32x3")."""
    kind: tl.constexpr = y_ptr.dtype.element_ty
    row, a = block_of_rows(row_strength_ptr, strength, rows, BLOCK_M, PER_ROW)
    x_row = x_ptr + row[:, None] * stride_x
    residual_row = residual_ptr + row[:, None] * stride_residual
    y_row = y_ptr + row[:, None] * d
    row_in = (row < rows)[:, None]
    z = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_row + column[None, :], mask=row_in & (column < d)[None, :], other=0.0)
        u = load_basis(basis_ptr, column, d, k, stride_basis_d, stride_basis_k, BLOCK_K)
        z = gather(x, u, z, PIECES, PRECISION)
    squares = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = row_in & (column < d)[None, :]
        x = tl.load(x_row + column[None, :], mask=inside, other=0.0)
        u = load_basis(basis_ptr, column, d, k, stride_basis_d, stride_basis_k, BLOCK_K)
        r = x
        if ADD:
            r = tl.load(residual_row + column[None, :], mask=inside, other=0.0)
        y = edited(x, spread(z, tl.trans(u), PIECES, PRECISION), a[:, None], r, kind, ADD, SEPARATE)
        tl.store(y_row + column[None, :], y, mask=inside)
        if NORM:
            squares += y.to(tl.float32) * y.to(tl.float32)
    if NORM:
        inverse_rms = tl.rsqrt(tl.sum(squares, 1) / d + eps)[:, None]
        n_row = n_ptr + row[:, None] * d
        tl.debug_barrier()  # as in the row form
        for start in range(0, d, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            inside = row_in & (column < d)[None, :]
            h = tl.load(y_row + column[None, :], mask=inside, other=0.0)
            w = tl.load(weight_ptr + column, mask=column < d, other=0.0)[None, :]
            tl.store(n_row + column[None, :], normalized(h, w, inverse_rms, kind, SEPARATE), mask=inside)


@triton.jit
def _project_tile_kernel(
    x_ptr,
    basis_ptr,
    residual_ptr,
    weight_ptr,
    row_strength_ptr,
    y_ptr,
    n_ptr,
    strength,
    eps,
    rows,
    d: tl.constexpr,
    stride_x,
    stride_residual,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PER_ROW: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    SEPARATE: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M rows per program, read once: chunks of BLOCK_D columns in registers. BLOCK_D divides d, U is packed.

    Every tensor has a leading dimension of SPLIT, one slice of the columns per warp: [SPLIT, BLOCK_M, BLOCK_D / SPLIT].
    Without it every warp would hold all of x and U as matrix operands, and the kernel would spill kilobytes.
    """
    kind: tl.constexpr = y_ptr.dtype.element_ty
    row, a = block_of_rows(row_strength_ptr, strength, rows, BLOCK_M, PER_ROW)
    slice_d: tl.constexpr = BLOCK_D // SPLIT
    part = tl.arange(0, SPLIT)[:, None] * slice_d + tl.arange(0, slice_d)[None, :]
    across = part[:, None, :]
    # U is packed so that these are constants: with a stride known at launch alone the pointers fill the registers.
    basis_at = part[:, :, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    x_row = x_ptr + row[None, :, None] * stride_x + across
    residual_row = residual_ptr + row[None, :, None] * stride_residual + across
    y_row = y_ptr + row[None, :, None] * d + across
    row_in = (row < rows)[None, :, None]
    chunks: tl.constexpr = d // BLOCK_D
    kept = ()
    for chunk in tl.static_range(chunks):
        kept += (tl.load(x_row + chunk * BLOCK_D, mask=row_in, other=0.0),)
    z = tl.zeros([SPLIT, BLOCK_M, BLOCK_K], tl.float32)
    for chunk in tl.static_range(chunks):
        u = tl.load(basis_ptr + chunk * BLOCK_D * BLOCK_K + basis_at)
        z = gather(kept[chunk], u, z, PIECES, PRECISION)
    z = tl.broadcast_to(tl.sum(z, 0)[None, :, :], [SPLIT, BLOCK_M, BLOCK_K])
    squares = tl.zeros([SPLIT, BLOCK_M, slice_d], tl.float32)
    for chunk in tl.static_range(chunks):
        # The eviction policy makes this another load than the first. The compiler would take them for one, and keep
        # all of U in registers between the two.
        u = tl.load(basis_ptr + chunk * BLOCK_D * BLOCK_K + basis_at, eviction_policy="evict_last")
        r = kept[chunk]
        if ADD:
            r = tl.load(residual_row + chunk * BLOCK_D, mask=row_in, other=0.0)
        removed = spread(z, tl.permute(u, (0, 2, 1)), PIECES, PRECISION)
        y = edited(kept[chunk], removed, a[None, :, None], r, kind, ADD, SEPARATE)
        tl.store(y_row + chunk * BLOCK_D, y, mask=row_in)
        if NORM:
            squares += y.to(tl.float32) * y.to(tl.float32)
    if NORM:
        inverse_rms = tl.rsqrt(tl.sum(tl.sum(squares, 2), 0) / d + eps)[None, :, None]
        n_row = n_ptr + row[None, :, None] * d + across
        tl.debug_barrier()  # as in the row form
        for chunk in range(chunks):
            w = tl.load(weight_ptr + chunk * BLOCK_D + across)
            h = tl.load(y_row + chunk * BLOCK_D, mask=row_in, other=0.0)
            n = normalized(h, w, inverse_rms, kind, SEPARATE)
            tl.store(n_row + chunk * BLOCK_D, n, mask=row_in)


KERNELS = {"row": _project_row_kernel, "tile": _project_tile_kernel, "two-pass": _project_two_pass_kernel}
FEW_ROWS = 64  # by arithmetic a launch costs more than the work up to here; not measured on a GPU yet
MANY_ROWS = 4096  # what `invariant` chooses for: rows of a block have no part in each other's sums
# The largest d at which the tile form spills nowhere, with Triton 3.6 as with 3.7 (`python -m kernel_surgery.aot`).
TILE_WIDEST = 2560


def form_of(dtype: torch.dtype, rows: int, d: int, k: int, packed: bool = True) -> str:
    """Return the kernel for x [rows, d] and a basis of k columns: "row", "tile" or "two-pass".

    packed: the basis is [d, k] in memory without gaps. `ops.packed` makes it so, and pads k with zero columns for the
    tile form. The choice is the same for all three operations: h is bit-identical with the norm and without.
    """
    if rows <= FEW_ROWS:
        return "row"
    fits = packed and k == 16 and d % 128 == 0 and d <= TILE_WIDEST
    return "tile" if dtype == torch.bfloat16 and fits else "two-pass"


def launch_options(dtype: torch.dtype, rows: int, d: int, k: int, form: str, **overrides) -> dict:
    """Return constexprs and launch parameters of a form, for x of `dtype` [rows, d] and a basis of k columns.

    overrides: replace some of them. No choice spills registers on sm_80 or sm_90 (`python -m kernel_surgery.aot`). They
    are not tuned on a GPU yet.
    """
    block_k = max(16, triton.next_power_of_2(k))
    if form == "row":
        # 64 registers per thread for a chunk of U. If U is not padded, it is not read in whole vectors and takes more.
        block_d = min(triton.next_power_of_2(d), (32768 if k == block_k else 4096) // block_k)
        warps = max(4, block_d * block_k // 2048)
        options = {"BLOCK_D": max(32, block_d), "BLOCK_K": block_k, "num_warps": warps, "num_stages": 2} | overrides
        return options | {"WHOLE": options["BLOCK_D"] >= d}
    pieces, precision = {
        torch.bfloat16: (tl.bfloat16, "ieee"),
        torch.float16: (None, "tf32x3"),
        torch.float32: (None, "ieee"),
    }[dtype]
    options = {"BLOCK_M": 16, "BLOCK_D": 32, "BLOCK_K": block_k, "PIECES": pieces, "PRECISION": precision}
    options |= {"num_warps": 4, "num_stages": 2}
    if form == "tile":
        # Each warp takes 16 columns of a chunk. Sixteen warps halve the registers of a thread, and k = 32 needs those.
        split = 16 if d % 256 == 0 and block_k == 16 else 8
        options |= {"BLOCK_D": 16 * split, "SPLIT": split, "num_warps": split}
    elif pieces is not None:
        options |= {"BLOCK_M": 32 if rows > 4096 and block_k <= 32 else 16, "BLOCK_D": 64, "num_warps": 8}
    return options | overrides


def project(
    x: torch.Tensor,
    basis: torch.Tensor,
    strength: float,
    row_strength: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    eps: float = 0.0,
    separate: bool = True,
    form: str | None = None,
    invariant: bool = False,
    **overrides,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch a kernel. Return new contiguous (y, None), or with `weight` (h, n), each [M, d] of x's dtype.

    x: [M, d] bfloat16, float16 or float32, last stride 1, any row stride. basis: [d, k] float32, any strides, k <= 64.
    row_strength: [M] float32 contiguous, multiplied by `strength`. residual: like x; it is added.
    weight: [d] contiguous of x's dtype, only with a residual. separate: SEPARATE above.
    invariant: a row has the same bits in any batch. form: a kernel instead of `form_of`'s choice. overrides: replace
    launch options. The caller checks shapes. Raises ValueError for a shape that the tile form cannot take.
    """
    rows, d = x.shape
    k = basis.shape[1]
    y = torch.empty((rows, d), dtype=x.dtype, device=x.device)
    n = None if weight is None else torch.empty((rows, d), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, n
    choice = MANY_ROWS if invariant else rows
    form = form or form_of(x.dtype, choice, d, k, basis.stride() == (k, 1))
    options = launch_options(x.dtype, choice, d, k, form, **overrides)
    if form == "tile" and (basis.stride() != (k, 1) or k != options["BLOCK_K"] or d % options["BLOCK_D"]):
        raise ValueError(f"the tile form takes a packed basis of 16, 32 or 64 columns: {tuple(basis.shape)} is not")
    # Pointers that a form does not read are given x instead of nothing.
    pointers = [x, basis, *(x if t is None else t for t in (residual, weight, row_strength)), y, x if n is None else n]
    sizes = [strength, eps, rows, d]
    if form != "tile":
        sizes.append(k)
    sizes += [x.stride(0), 0 if residual is None else residual.stride(0)]
    if form != "tile":
        sizes += [*basis.stride()]
    KERNELS[form][(triton.cdiv(rows, options.get("BLOCK_M", 1)),)](
        *pointers,
        *sizes,
        PER_ROW=row_strength is not None,
        ADD=residual is not None,
        NORM=weight is not None,
        SEPARATE=separate,
        **options,
    )
    return y, n
