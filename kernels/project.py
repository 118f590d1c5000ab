"""Triton kernels: y = x - a A (B^T x - c) for rows x [M, d] and A, B [d, k], and what follows in a layer.

An orthogonal edit has A = B = U and c = 0. It is a case of its own at compile time, which reads U alone. DUAL: B is
another matrix than A. OFFSET: c is subtracted. In the comments below, U stands for either matrix.

There are three operations, chosen at compile time: y; h = residual + y (ADD); and also n = rmsnorm(h) * weight (NORM).
NORM reads x and the residual once and writes h and n once, as the addition and the norm alone would. Data that is read
again (U, and x or h) comes from the cache if it fits. How close this comes to free is measured: bench/results/.

Three kernels compute the same function:

    row         one row per program, float32 products without tensor cores. For few rows, where only latency counts.
                Packed U of up to 32768 elements (d = 2048, k = 16) is read once and stays in registers, as x does
    tile        x is read once and stays in registers, as the operands of the tensor cores; the warps share the
                columns. For bfloat16, packed U, k = 16
    two-pass    a block of rows is read twice, the second time from the cache if it fits. For every other shape

`form_of` chooses by shape alone. On either side of one of its thresholds the order of summation differs, and so may the
last bits: a row in a batch of 256 and in one of 257 may differ by a rounding. All forms meet the same bound.
`invariant` gives a row the same bits in any batch: it always chooses as for many rows, and few rows then take longer.

The numerically delicate step is z = U^T x. With bfloat16 inputs on tensor cores, as in LoRA kernels, twelve times as
much is left in span(U) as in float32 when x lies inside it, and random x does not show this. So U and z are each split
into two bfloat16 pieces (hi + lo), which keep 16 bits: z = x Uh + x Ul, then zh Uh + zl Uh + zh Ul. In float16 z cannot
be split (it overflows at 65504), so three TF32 products are used. float32 uses IEEE products without tensor cores. All
sums are float32, with one rounding at the store.

ADD and NORM have a choice of roundings. SEPARATE rounds where separate operations would: y, then h, then h / rms(h),
then n. Otherwise y and h / rms(h) stay in float32. n is always the norm of h as stored.

A program makes the pieces of U that it needs. The tile form can also read pieces that `prepared` has made once, with
the same bits; `bench.tune` tries it.

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
def pieces(u, PIECES: tl.constexpr):
    """Split finite float32 u into (hi, lo) of dtype PIECES, hi being u rounded to nearest, ties away from zero.

    hi is rounded by integer arithmetic. If it were made by conversion, one conversion would serve hi and lo, and the
    compiler would then convert element by element on a slow unit instead of two at once. Rounding with floating-point
    products (Veltkamp) would not survive a fused multiply-add.
    """
    below: tl.constexpr = 16 if tl.bfloat16 == PIECES else 13  # bits of a float32 below the last bit of hi
    rounded = (u.to(tl.int32, bitcast=True) + (1 << (below - 1))) & -(1 << below)
    hi = rounded.to(tl.float32, bitcast=True)
    return hi.to(PIECES), (u - hi).to(PIECES)


@triton.jit
def gather(x, u, z, PIECES: tl.constexpr, PRECISION: tl.constexpr):
    """Return z + x u for a chunk x [..., rows, columns] and u [..., columns, k] float32."""
    if PIECES is not None:
        u_hi, u_lo = pieces(u, PIECES)
        z = tl.dot(x, u_hi, z)
        return tl.dot(x, u_lo, z)
    else:
        return tl.dot(x.to(tl.float32), u, z, input_precision=PRECISION)


@triton.jit
def spread_pieces(z, u_hi, u_lo):
    """Return z u, with u as two pieces. The small terms come first."""
    z_hi = z.to(u_hi.dtype)
    z_lo = (z - z_hi.to(tl.float32)).to(u_hi.dtype)
    removed = tl.dot(z_hi, u_lo)
    removed = tl.dot(z_lo, u_hi, removed)
    return tl.dot(z_hi, u_hi, removed)


@triton.jit
def spread(z, u, PIECES: tl.constexpr, PRECISION: tl.constexpr):
    """Return z u, the part to remove from a chunk: z [..., rows, k], u [..., k, columns] float32."""
    if PIECES is not None:
        u_hi, u_lo = pieces(u, PIECES)
        return spread_pieces(z, u_hi, u_lo)
    else:
        return tl.dot(z, u, input_precision=PRECISION)


@triton.jit
def less_offset(z, offset_ptr, rank, k, OFFSET: tl.constexpr):
    """Return z - c with OFFSET, else z. rank: the number of each rank of z, shaped so that it broadcasts to z."""
    if OFFSET:
        z -= tl.load(offset_ptr + rank, mask=rank < k, other=0.0)
    return z


@triton.jit
def scaled(z, a):
    """Return a z, and 0 where the strength a is 0: such a row comes out bit-identical, even if its z is not finite."""
    return tl.where(a == 0.0, 0.0, a * z)


@triton.jit
def edited(x, removed, residual, kind: tl.constexpr, ADD: tl.constexpr, SEPARATE: tl.constexpr):
    """Return x - removed (with ADD: plus the residual), rounded once to `kind`, the stored dtype."""
    wide = x.to(tl.float32) - removed
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
    x_ptr, basis_ptr, dual_ptr, offset_ptr, residual_ptr, weight_ptr, row_strength_ptr, y_ptr, n_ptr,
    strength, eps, rows, d, k, stride_x, stride_residual, stride_basis_d, stride_basis_k,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr, PER_ROW: tl.constexpr,
    ADD: tl.constexpr, NORM: tl.constexpr, SEPARATE: tl.constexpr, DUAL: tl.constexpr, OFFSET: tl.constexpr,
):
    """One row per program; z is summed in float32 registers.

    WHOLE: BLOCK_D holds the whole row, and A and B fit into the registers. All loads are issued before the first wait,
    and the data stays in registers. That is one wait for memory instead of one per chunk and pass, and waiting is the
    whole cost of a small batch. Otherwise the row is read in chunks. x and U are then read a second time, and h too for
    the norm.
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
        b = u
        if DUAL:
            b = load_basis(dual_ptr, lane, d, k, stride_basis_d, stride_basis_k, BLOCK_K)
        r = x
        if ADD:
            r = tl.load(residual_row + lane, mask=inside, other=0.0)
        if NORM:
            w = tl.load(weight_ptr + lane, mask=inside, other=0.0)
        z = tl.sum(x.to(tl.float32)[:, None] * b, 0)
        z = scaled(less_offset(z, offset_ptr, tl.arange(0, BLOCK_K), k, OFFSET), a)
        # A sum of products that are all -0.0 is -0.0, and -0.0 - -0.0 would be 0.0: hence + 0.0.
        y = edited(x, tl.sum(u * z[None, :], 1) + 0.0, r, kind, ADD, SEPARATE)
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
            b = load_basis(dual_ptr, column, d, k, stride_basis_d, stride_basis_k, BLOCK_K)
            z += tl.sum(x.to(tl.float32)[:, None] * b, 0)
        z = scaled(less_offset(z, offset_ptr, tl.arange(0, BLOCK_K), k, OFFSET), a)
        squares = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, d, BLOCK_D):
            column = start + lane
            x = tl.load(x_row + column, mask=column < d, other=0.0)
            u = load_basis(basis_ptr, column, d, k, stride_basis_d, stride_basis_k, BLOCK_K)
            r = x
            if ADD:
                r = tl.load(residual_row + column, mask=column < d, other=0.0)
            y = edited(x, tl.sum(u * z[None, :], 1) + 0.0, r, kind, ADD, SEPARATE)
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
    x_ptr, basis_ptr, dual_ptr, offset_ptr, residual_ptr, weight_ptr, row_strength_ptr, y_ptr, n_ptr,
    strength, eps, rows, d, k, stride_x, stride_residual, stride_basis_d, stride_basis_k,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PER_ROW: tl.constexpr,
    ADD: tl.constexpr, NORM: tl.constexpr, SEPARATE: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    DUAL: tl.constexpr, OFFSET: tl.constexpr,
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
        b = load_basis(dual_ptr, column, d, k, stride_basis_d, stride_basis_k, BLOCK_K)
        z = gather(x, b, z, PIECES, PRECISION)
    z = scaled(less_offset(z, offset_ptr, tl.arange(0, BLOCK_K)[None, :], k, OFFSET), a[:, None])
    squares = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = row_in & (column < d)[None, :]
        x = tl.load(x_row + column[None, :], mask=inside, other=0.0)
        u = load_basis(basis_ptr, column, d, k, stride_basis_d, stride_basis_k, BLOCK_K)
        r = x
        if ADD:
            r = tl.load(residual_row + column[None, :], mask=inside, other=0.0)
        y = edited(x, spread(z, tl.trans(u), PIECES, PRECISION), r, kind, ADD, SEPARATE)
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


# The tile form. Between the two products nothing moves from lane to lane: what a lane loads is its own share of the
# operands of mma.m16n8k16, as Triton lays them out, and what the second product leaves in a lane belongs to the x that
# the lane holds. The order of the terms of a sum is free, as long as both operands have it; so columns and ranks are
# numbered in another order than in memory. The order of the columns of a result is that of x in the lane.
#
# Lane l of a warp has quad = l // 4 and inner = l % 4. Of 32 neighbouring columns it holds the 8 from 8 * inner on, one
# vector, in the rows quad, quad + 8, quad + 16, ... of its program: pieces of x [lanes, 8]. Of U it loads the ranks
# 2 * quad and 2 * quad + 1 of these columns for U^T x^T, and the ranks from 4 * inner on of the columns
# 8 * (quad // 2) + 2 * t + quad % 2 for z U^T. In other layouts than these the code is right but slow: data then moves
# through shared memory. `python -m kernel_surgery.aot` shows it.


@triton.jit
def ranks_by_columns(at, WARPS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load 4 columns a lane of U^T as the left operand of U^T x^T: float32 [WARPS, 16, 16]."""
    low = tl.join(tl.load(at), tl.load(at + BLOCK_K))
    high = tl.join(tl.load(at + 2 * BLOCK_K), tl.load(at + 3 * BLOCK_K))
    u = tl.permute(tl.reshape(tl.join(low, high), (WARPS, 8, 4, 2, 2, 2)), (0, 3, 1, 2, 5, 4))
    return tl.reshape(u, (WARPS, 16, 16))


@triton.jit
def rank_by_columns(at, WARPS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load 4 columns a lane of U^T as the right operand of z U^T: float32 [WARPS, 16, 32]."""
    low = tl.join(tl.load(at), tl.load(at + 2 * BLOCK_K))
    high = tl.join(tl.load(at + 4 * BLOCK_K), tl.load(at + 6 * BLOCK_K))
    u = tl.permute(tl.reshape(tl.join(low, high), (WARPS, 8, 16, 2, 2)), (0, 2, 4, 3, 1))
    return tl.reshape(u, (WARPS, 16, 32))


@triton.jit
def prepared_ranks(at, d: tl.constexpr, WARPS: tl.constexpr):
    """Load 8 columns a lane of one piece of U^T [16, d] as two left operands of U^T x^T, each [WARPS, 16, 16]."""
    u = tl.reshape(tl.join(tl.load(at), tl.load(at + d)), (WARPS, 8, 4, 2, 4, 2))
    return tl.split(tl.reshape(tl.permute(u, (0, 5, 1, 2, 4, 3)), (WARPS, 16, 16, 2)))


@triton.jit
def prepared_rank(at, WARPS: tl.constexpr):
    """Load 4 columns a lane of U's pieces [d, 4, 2, 4] as right operands of z U^T: hi and lo, each [WARPS, 16, 32]."""
    low = tl.join(tl.load(at), tl.load(at + 2 * 32))
    high = tl.join(tl.load(at + 4 * 32), tl.load(at + 6 * 32))
    u = tl.permute(tl.reshape(tl.join(low, high), (WARPS, 8, 4, 2, 4, 2, 2)), (0, 2, 4, 6, 5, 1, 3))
    return tl.split(tl.reshape(u, (WARPS, 16, 32, 2)))


@triton.jit
def columns_by_rows(kept, first: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr):
    """Take 2 * TILES pieces of x as right operands of U^T x^T: two of [WARPS, 16, 16 * TILES], 4 columns a lane."""
    if TILES == 1:
        x = tl.reshape(tl.join(kept[first], kept[first + 1]), (WARPS, 8, 4, 2, 4, 2))
        x = tl.reshape(tl.permute(x, (0, 2, 4, 5, 1, 3)), (WARPS, 16, 16, 2))
    else:
        low, high = tl.join(kept[first], kept[first + 1]), tl.join(kept[first + 2], kept[first + 3])
        x = tl.reshape(tl.join(low, high), (WARPS, 8, 4, 2, 4, 2, 2))
        x = tl.reshape(tl.permute(x, (0, 2, 4, 6, 5, 1, 3)), (WARPS, 16, 32, 2))
    return tl.split(x)


@triton.jit
def inside_products(
    kept, dual_ptr, d: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr, PRECISION: tl.constexpr, PREPARED: tl.constexpr,
):
    """Return each warp's part of B^T x^T, float32 [WARPS, 16, 16 * TILES], from all pieces of x."""
    wide: tl.constexpr = 32 * WARPS
    lane = tl.arange(0, wide)
    column, rank = lane // 32 * 32 + lane % 4 * 8, lane // 4 % 8 * 2
    z = tl.zeros([WARPS, BLOCK_K, 16 * TILES], tl.float32)
    if PREPARED:
        u_at = dual_ptr + (rank * d + column)[:, None] + tl.arange(0, 8)[None, :]
    else:
        u_at = dual_ptr + (column * BLOCK_K + rank)[:, None] + tl.arange(0, 2)[None, :]
    for chunk in tl.static_range(d // wide):
        x_of = columns_by_rows(kept, chunk * 2 * TILES, WARPS, TILES)
        if PREPARED:
            hi_of = prepared_ranks(u_at + chunk * wide, d, WARPS)
            lo_of = prepared_ranks(u_at + BLOCK_K * d + chunk * wide, d, WARPS)
        for half in tl.static_range(2):
            if PREPARED:
                z = tl.dot(hi_of[half], x_of[half], z)
                z = tl.dot(lo_of[half], x_of[half], z)
            else:
                u = ranks_by_columns(u_at + (chunk * wide + 4 * half) * BLOCK_K, WARPS, BLOCK_K)
                if PIECES is not None:
                    u_hi, u_lo = pieces(u, PIECES)
                    z = tl.dot(u_hi, x_of[half], z)
                    z = tl.dot(u_lo, x_of[half], z)
                else:
                    z = tl.dot(u, x_of[half].to(tl.float32), z, input_precision=PRECISION)
    return z


@triton.jit
def over_warps(z, WARPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Sum z [WARPS, 16, BLOCK_M] over the warps, as a tree.

    tl.sum would do the same in one step, but stores to shared memory with a stride of WARPS words: each store would
    then take WARPS cycles or more. A layout in which one thread holds both terms is reached without conflicts.
    """
    size: tl.constexpr = 16 * BLOCK_M
    a, b = tl.split(tl.reshape(tl.permute(z, (1, 2, 0)), (size, WARPS // 2, 2)))
    a, b = tl.split(tl.reshape(a + b, (size, WARPS // 4, 2)))
    if WARPS >= 8:
        a, b = tl.split(tl.reshape(a + b, (size, WARPS // 8, 2)))
    if WARPS >= 16:
        a, b = tl.split(tl.reshape(a + b, (size, WARPS // 16, 2)))
    return tl.reshape(a + b, (16, BLOCK_M))


@triton.jit
def rows_by_ranks(z, WARPS: tl.constexpr, TILES: tl.constexpr):
    """Take z [16, 16 * TILES] as left operands of z U^T: a tuple of TILES of [WARPS, 16, 16]."""
    z = tl.permute(tl.reshape(z, (2, 8, 16 * TILES)), (2, 1, 0))
    if TILES == 1:
        return (tl.broadcast_to(tl.reshape(z, (1, 16, 16)), [WARPS, 16, 16]),)
    else:
        one, two = tl.split(tl.permute(tl.reshape(z, (2, 16, 16)), (1, 2, 0)))
        return tl.broadcast_to(one[None, :, :], [WARPS, 16, 16]), tl.broadcast_to(two[None, :, :], [WARPS, 16, 16])


@triton.jit
def columns_of_lane(basis_ptr, warp, quad, inner, BLOCK_K: tl.constexpr, PREPARED: tl.constexpr):
    """Return where `loaded_columns` reads in the first chunk, for each lane."""
    column = warp * 32 + quad // 2 * 8 + quad % 2
    if PREPARED:
        return basis_ptr + (column * 2 * BLOCK_K + inner * 8)[:, None] + tl.arange(0, 8)[None, :]
    else:
        return basis_ptr + (column * BLOCK_K + inner * 4)[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def loaded_columns(at, column: tl.constexpr, WARPS: tl.constexpr, BLOCK_K: tl.constexpr, PREPARED: tl.constexpr):
    """Load U^T of the chunk from `column` on for `products`: its two pieces, or twice the same float32."""
    if PREPARED:
        return prepared_rank(at + column * 2 * BLOCK_K, WARPS)
    else:
        u = rank_by_columns(at + column * BLOCK_K, WARPS, BLOCK_K)
        return u, u


@triton.jit
def products(z, u, WARPS: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr, PREPARED: tl.constexpr):
    """Return z u for z [WARPS, 16, 16] and u of `loaded_columns`, as two pieces of rows [lanes, 8]."""
    both = spread_pieces(z, u[0], u[1]) if PREPARED else spread(z, u[0], PIECES, PRECISION)
    both = tl.permute(tl.reshape(both, (WARPS, 2, 8, 2, 2, 4, 2)), (0, 2, 5, 3, 4, 6, 1))
    return tl.split(tl.reshape(both, (WARPS * 32, 8, 2)))


@triton.jit
def inverse_rms_of(squares, d: tl.constexpr, eps, WARPS: tl.constexpr):
    """Return 1 / rms of a lane's row for every lane, [lanes, 1], from the lanes' own sums of squares [lanes]."""
    whole = tl.sum(tl.sum(tl.reshape(squares, (WARPS, 8, 4)), 2), 0)
    inverse = tl.rsqrt(whole / d + eps)[None, :, None]
    return tl.reshape(tl.broadcast_to(inverse, (WARPS, 8, 4)), (WARPS * 32, 1))


@triton.jit
def _project_tile_kernel(
    x_ptr, basis_ptr, dual_ptr, offset_ptr, residual_ptr, weight_ptr, row_strength_ptr, y_ptr, n_ptr,
    strength, eps, rows, d: tl.constexpr, stride_x, stride_residual,
    WARPS: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, KEEP: tl.constexpr,
    PER_ROW: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, SEPARATE: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, DUAL: tl.constexpr, OFFSET: tl.constexpr, PREPARED: tl.constexpr,
):
    """16 * TILES rows per program, read once and kept in registers. 32 * WARPS divides d, U is packed, BLOCK_K is 16.

    KEEP: h stays in registers until the norm; otherwise it is read again. PREPARED: A and B come as pieces that
    `prepared` has made, instead of float32; the program then makes none. KEEP, TILES and PREPARED change no bit.
    """
    kind: tl.constexpr = y_ptr.dtype.element_ty
    wide: tl.constexpr = 32 * WARPS
    chunks: tl.constexpr = d // wide
    parts: tl.constexpr = 2 * TILES
    lane = tl.arange(0, wide)
    warp, quad, inner = lane // 32, lane // 4 % 8, lane % 4
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    first, left = start + quad, (rows - start).to(tl.int32)  # what is left from here on
    across = (warp * 32 + inner * 8)[:, None] + tl.arange(0, 8)[None, :]
    x_first = x_ptr + first[:, None] * stride_x + across
    kept = ()
    for chunk in tl.static_range(chunks):
        for i in tl.static_range(parts):
            at = x_first + 8 * i * stride_x.to(tl.int64) + chunk * wide
            kept += (tl.load(at, mask=(quad + 8 * i < left)[:, None], other=0.0),)
    z = inside_products(kept, dual_ptr, d, WARPS, TILES, BLOCK_K, PIECES, PRECISION, PREPARED)
    a = strength
    if PER_ROW:
        row = start + tl.arange(0, BLOCK_M)
        a = tl.load(row_strength_ptr + row, mask=row < rows, other=0.0)[None, :] * strength
    slot = tl.arange(0, BLOCK_K)
    rank = 2 * (slot % 8) + slot // 8  # in the order of `ranks_by_columns`
    z = less_offset(over_warps(z, WARPS, BLOCK_M), offset_ptr, rank[:, None], BLOCK_K, OFFSET)
    z_of = rows_by_ranks(scaled(z, a), WARPS, TILES)
    u_by_columns = columns_of_lane(basis_ptr, warp, quad, inner, BLOCK_K, PREPARED)
    residual_first = residual_ptr + first[:, None] * stride_residual + across
    y_first = y_ptr + first[:, None] * d + across
    squares, made = (), ()
    for _ in tl.static_range(parts):
        squares += (tl.zeros([wide], tl.float32),)
    for chunk in tl.static_range(chunks):
        u = loaded_columns(u_by_columns, chunk * wide, WARPS, BLOCK_K, PREPARED)
        added = ()
        for tile in tl.static_range(TILES):
            removed_of = products(z_of[tile], u, WARPS, PIECES, PRECISION, PREPARED)
            for half in tl.static_range(2):
                below = 16 * tile + 8 * half
                inside = (quad + below < left)[:, None]
                x = kept[chunk * parts + 2 * tile + half]
                r = x
                if ADD:
                    at = residual_first + below * stride_residual.to(tl.int64) + chunk * wide
                    r = tl.load(at, mask=inside, other=0.0)
                h = edited(x, removed_of[half], r, kind, ADD, SEPARATE)
                tl.store(y_first + below * d + chunk * wide, h, mask=inside)
                if KEEP:
                    made += (h,)
                if NORM:
                    added += (squares[2 * tile + half] + tl.sum(h.to(tl.float32) * h.to(tl.float32), 1),)
        if NORM:
            squares = added
    if NORM:
        n_first = n_ptr + first[:, None] * d + across
        inverse = ()
        for i in tl.static_range(parts):
            inverse += (inverse_rms_of(squares[i], d, eps, WARPS),)
        for chunk in tl.static_range(chunks):
            w = tl.load(weight_ptr + chunk * wide + across)
            for i in tl.static_range(parts):
                inside = (quad + 8 * i < left)[:, None]
                if KEEP:
                    h = made[chunk * parts + i]
                else:  # a thread reads what it has stored itself
                    h = tl.load(y_first + 8 * i * d + chunk * wide, mask=inside, other=0.0)
                n = normalized(h, w, inverse[i], kind, SEPARATE)
                tl.store(n_first + 8 * i * d + chunk * wide, n, mask=inside)


KERNELS = {"row": _project_row_kernel, "tile": _project_tile_kernel, "two-pass": _project_two_pass_kernel}
# Up to here the row form is taken: 256 while U fits into the registers of a program (measured on an H100 at d = 2048,
# k = 10: `python -m bench.tune`), else 64 (by arithmetic: each row then reads all of U from the cache twice).
FEW_ROWS, FEW_ROWS_LARGE_U = 256, 64
IN_REGISTERS = 32768  # elements of U
MANY_ROWS = 4096  # what `invariant` chooses for: rows of a block have no part in each other's sums
# The largest d at which the tile form's norm spills nothing, with Triton 3.6 as with 3.7. A wider tile form is right,
# but its speed is not measured on a GPU yet.
TILE_WIDEST = 2560


def tile_warps(d: int) -> int | None:
    """Return the warps of a program of the tile form: None if none suit. A thread keeps 8 registers of x for each chunk
    of 32 * warps columns. 4 chunks are best. More than 5 would spill, or 8 of four warps, which may use more registers.
    The warps decide the order in which z is summed.
    """
    able = [warps for warps in (4, 8, 16) if d % (32 * warps) == 0 and d <= (256 if warps == 4 else 160) * warps]
    return next((warps for warps in able if d <= 128 * warps), able[-1] if able else None)


def form_of(dtype: torch.dtype, rows: int, d: int, k: int, packed: bool = True) -> str:
    """Return the kernel for x [rows, d] and a basis of k columns: "row", "tile" or "two-pass".

    packed: the basis is [d, k] in memory without gaps. `ops.packed` makes it so, and pads k with zero columns for the
    tile form. The choice is the same for all three operations: h is bit-identical with the norm and without.
    """
    whole = packed and k in (16, 32, 64) and triton.next_power_of_2(d) * k <= IN_REGISTERS
    if rows <= (FEW_ROWS if whole else FEW_ROWS_LARGE_U):
        return "row"
    fits = packed and k == 16 and d <= TILE_WIDEST and tile_warps(d) is not None
    return "tile" if dtype == torch.bfloat16 and fits else "two-pass"


def launch_options(
    dtype: torch.dtype,
    rows: int,
    d: int,
    k: int,
    form: str,
    add: bool = False,
    norm: bool = False,
    dual: bool = False,
    **overrides,
) -> dict:
    """Return constexprs and launch parameters of a form, for x of `dtype` [rows, d] and a basis of k columns.

    add, norm: whether the residual is added, and whether the norm follows. dual: whether B is another matrix than A.
    overrides: replace some of the options.
    `python -m kernel_surgery.aot` shows what they need on sm_80 and sm_90. They were tuned at d = 2048, k = 10.
    """
    block_k = max(16, triton.next_power_of_2(k))
    if form == "row":
        # 64 registers per thread for a chunk of U. If U is not padded, it is not read in whole vectors and takes more.
        block_d = min(triton.next_power_of_2(d), (IN_REGISTERS if k == block_k else 4096) // block_k)
        block_d = overrides.get("BLOCK_D", max(32, block_d))
        elements = block_d * block_k * (2 if dual else 1)
        whole = block_d >= d and elements <= IN_REGISTERS
        warps = max(4, (elements if whole else block_d * block_k) // 4096)  # a whole row keeps A and B
        options = {"BLOCK_D": block_d, "BLOCK_K": block_k, "num_warps": warps, "num_stages": 2}
        return options | overrides | {"WHOLE": whole}
    pieces, precision = {
        torch.bfloat16: (tl.bfloat16, "ieee"),
        torch.float16: (None, "tf32x3"),
        torch.float32: (None, "ieee"),
    }[dtype]
    options = {"BLOCK_M": 16, "BLOCK_D": 32, "BLOCK_K": block_k, "PIECES": pieces, "PRECISION": precision}
    options |= {"num_warps": 4, "num_stages": 2}
    if form == "tile":
        warps = tile_warps(d) or 16
        options = {name: value for name, value in options.items() if name != "BLOCK_D"}
        options |= {"WARPS": warps, "num_warps": warps, "maxnreg": max(128, 640 // warps)}
        few = d <= 128 * warps
        options |= {"TILES": 2 if rows >= 8192 and few and not add else 1, "KEEP": norm and few, "PREPARED": False}
        options |= overrides
        options["BLOCK_M"] = 16 * options["TILES"]
    elif pieces is not None:
        options |= {"BLOCK_M": 32 if rows > 4096 and block_k <= 32 else 16, "BLOCK_D": 64, "num_warps": 8}
    return options | overrides


def prepared(matrix: torch.Tensor, piece: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a packed matrix [d, 16] float32 into pieces once, as the tile form reads them with PREPARED.

    Returns (hi and lo lying across [2, 16, d], hi and lo of four ranks after one another [d, 4, 2, 4]), both of dtype
    `piece`: bfloat16 or float16. They have the bits that the kernel's own `pieces` makes. The kernel reads the first
    of a dual (B) and the second of a basis (A).
    """
    below = 16 if piece == torch.bfloat16 else 13
    bits = (matrix.contiguous().view(torch.int32) + (1 << (below - 1))) & -(1 << below)
    high = bits.view(torch.float32)
    both = torch.stack([high.to(piece), (matrix - high).to(piece)])
    return both.transpose(1, 2).contiguous(), both.unflatten(2, (4, 4)).permute(1, 2, 0, 3).contiguous()


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
    dual: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    split: tuple[torch.Tensor, torch.Tensor] | None = None,
    **overrides,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch a kernel. Return new contiguous (y, None), or with `weight` (h, n), each [M, d] of x's dtype.

    x: [M, d] bfloat16, float16 or float32, last stride 1, any row stride. basis: A [d, k] float32, any strides, k <=
    64.
    dual: B, float32 with the basis's shape and strides; None is the basis. offset: c [k] float32 contiguous, or None.
    row_strength: [M] float32 contiguous, multiplied by `strength`. residual: like x; it is added.
    weight: [d] contiguous of x's dtype, only with a residual. separate: SEPARATE above.
    invariant: a row has the same bits in any batch. form: a kernel instead of `form_of`'s choice. overrides: replace
    launch options. split: for the tile form, the pieces of B across and those of A, from `prepared`, which are then
    read instead of A and B. The caller checks shapes. Raises ValueError for a shape that the tile form cannot take, for
    a split that it cannot, and for a dual that lies in memory in another way than the basis.
    """
    rows, d = x.shape
    k = basis.shape[1]
    y = torch.empty((rows, d), dtype=x.dtype, device=x.device)
    n = None if weight is None else torch.empty((rows, d), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, n
    choice = MANY_ROWS if invariant else rows
    form = form or form_of(x.dtype, choice, d, k, basis.stride() == (k, 1))
    what = residual is not None, weight is not None, dual is not None
    options = launch_options(x.dtype, choice, d, k, form, *what, **overrides)
    if form == "tile" and (basis.stride() != (k, 1) or k != 16 or d % (32 * options["WARPS"])):
        raise ValueError(f"the tile form takes a packed basis [128 n, 16]: {tuple(basis.shape)} is not")
    if split is not None:
        if form != "tile" or options["PIECES"] is None or [t.shape for t in split] != [(2, k, d), (d, 4, 2, 4)]:
            raise ValueError(f"only the tile form in 16 bits takes prepared pieces, those of a basis {(d, k)}")
        options["PREPARED"] = True
    if dual is not None and (dual.shape, dual.stride()) != (basis.shape, basis.stride()):
        raise ValueError(f"the dual {tuple(dual.shape)} must lie in memory as the basis {tuple(basis.shape)} does")
    # Pointers that a form does not read are given x instead of nothing.
    of_b, of_a = split or (basis if dual is None else dual, basis)
    pointers = [x, of_a, of_b]
    pointers += [x if t is None else t for t in (offset, residual, weight, row_strength)]
    pointers += [y, x if n is None else n]
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
        DUAL=dual is not None,
        OFFSET=offset is not None,
        **options,
    )
    return y, n
