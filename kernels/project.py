"""y = x - a U (U^T x) for rows x [M, d] and an orthonormal basis U [d, k], and what follows it in a decoder layer.

Three operations, told apart at compile time: y alone; h = residual + y (ADD); and also n = rmsnorm(h) * weight (NORM).
The last needs x, the residual, h and n once each, as adding and normalising alone do; what a form reads again (U, and x
or h) comes from cache where it fits there. How near that comes to free is not measured on a GPU yet.

Three kernels, one function:

    row         one row a program, float32 products without tensor cores: few rows, where only latency counts. U of up
                to 32768 elements (d = 2048, k = 16), packed, is read once and stays in registers, as x does
    tile        x is read once and stays in registers, the warps share the columns: bfloat16, packed U, k = 16
    two-pass    a block of rows is read twice, the second time from cache where it fits: every other shape

`form_of` chooses by shape alone. Crossing one of its thresholds changes the order of summation and so the last bits of
a row: the same row in a batch of 64 and of 65 may differ by a rounding. Every form meets the same bound. Where a row
must have the same bits in any batch, `invariant` chooses as for many rows, whatever their number; few rows then take
longer.

The danger in a kernel like this is z = U^T x. Handing it to the tensor cores in bfloat16, as LoRA kernels do, leaks
twelve times what float32 arithmetic leaks when x lies inside span(U), and random x does not show it. So U and z both
go in as two bfloat16 pieces (hi + lo), which keeps 16 bits of each: z = x Uh + x Ul, then zh Uh + zl Uh + zh Ul.
float16 has no such pieces for z (it overflows at 65504) and takes three TF32 products instead; float32 takes IEEE
products and no tensor cores. All sums are float32, with one rounding at the store.

With ADD and NORM there is a choice of roundings. SEPARATE rounds where separate operations would round: y, then h, then
h / rms(h), then n. Otherwise y and h / rms(h) stay in float32. n is always the norm of h as it was stored.

Not here: a form that splits d for very small M and large U.
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
    """z + x u for a chunk x [..., rows, columns] and u [..., columns, k] float32."""
    if PIECES is not None:
        u_hi = u.to(PIECES)
        u_lo = (u - u_hi.to(tl.float32)).to(PIECES)
        z = tl.dot(x, u_hi, z)
        return tl.dot(x, u_lo, z)
    else:
        return tl.dot(x.to(tl.float32), u, z, input_precision=PRECISION)


@triton.jit
def spread(z, u, PIECES: tl.constexpr, PRECISION: tl.constexpr):
    """z u, what is to be removed from a chunk: z [..., rows, k], u [..., k, columns] float32. Small terms first."""
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
    """x - a removed, plus the residual with ADD; one rounding to `kind`, the dtype that is stored.

    A row of strength 0 comes back bit for bit, whatever its z became.
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
    """h / rms(h) * weight in `kind`."""
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
    """One row a program, z summed in float32 registers.

    WHOLE: BLOCK_D holds all of the row. Whatever is needed is asked for before anything is waited for, read once, and
    stays in registers: one wait for memory instead of one a chunk and pass, which is all that a small batch costs.
    Otherwise chunk by chunk, with x and U read a second time, and h too for the norm.
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
    """(row numbers int64 [BLOCK_M], strengths float32 [BLOCK_M]) of this program."""
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
    """BLOCK_M rows a program, walked over twice (with NORM a third time over h). PIECES: dtype of the hi and lo
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
    """BLOCK_M rows a program, read once: chunks of BLOCK_D columns in registers. d a multiple of BLOCK_D, U packed.

    Every tensor has a leading dimension of SPLIT, one slice of the columns a warp: [SPLIT, BLOCK_M, BLOCK_D / SPLIT].
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
    """Which kernel runs for x [rows, d] and a basis of k columns: "row", "tile" or "two-pass".

    packed: the basis lies in memory as [d, k] without gaps. `ops.packed` makes it so, with zero columns for a k that
    the tile form does not take. The same for all three operations: h has the same bits with the norm and without.
    """
    if rows <= FEW_ROWS:
        return "row"
    fits = packed and k == 16 and d % 128 == 0 and d <= TILE_WIDEST
    return "tile" if dtype == torch.bfloat16 and fits else "two-pass"


def launch_options(dtype: torch.dtype, rows: int, d: int, k: int, form: str, **overrides) -> dict:
    """Constexprs and launch parameters of a form for x of `dtype` [rows, d] and a basis of k columns; `overrides`
    replace some of them.

    None of them spills on sm_80 or sm_90: see `python -m kernel_surgery.aot`. Not tuned on a GPU yet.
    """
    block_k = max(16, triton.next_power_of_2(k))
    if form == "row":
        # 64 registers a thread for a chunk of U. One that is not padded is not read in whole vectors and takes more.
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
    """Launch a kernel; returns fresh contiguous (y, None), or with `weight` (h, n), each [M, d] of x's dtype.

    x [M, d] bfloat16, float16 or float32, last stride 1, any row stride; basis [d, k] float32, any strides, k <= 64;
    row_strength [M] float32 contiguous, multiplied by `strength`; residual like x, added; weight [d] contiguous of x's
    dtype, only with a residual. separate: SEPARATE above. invariant: a row's bits are the same in any batch. Shapes are
    the caller's to check. `form` names a kernel instead of `form_of`; `overrides` replace launch options. Raises
    ValueError for a tile form that cannot be.
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
