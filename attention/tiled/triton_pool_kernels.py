"""Triton kernels that pool tiles. Imported only where triton is installed.

Shapes in comments: 64 slots of a tile, M blocks, T tiles, D and DV padded widths of key and
value. Text stands in tiles of its own behind those of the image. Offsets that grow with tokens or
heads are int64.
"""

import triton
import triton.language as tl

from ..taylor.triton_numeric import dot, narrow

TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit(do_not_specialize=["first_head", "heads", "tiles", "all_tiles"])
def pool_kernel(
    query,
    key,
    value,
    rows,
    live,
    near_key,
    near_value,
    mean_query,
    mean_key,
    mean_value,
    cross,
    norm,
    first_head,
    heads,
    tiles,
    all_tiles,
    scale,
    head_dim,
    value_dim,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCKS: tl.constexpr,
    POOLED: tl.constexpr,
    CROSS: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one head: its copy in order of slots, means, and C."""
    tile = tl.program_id(0)
    i_g = tl.program_id(1).to(tl.int64)
    i_bh = i_g + first_head
    i_b, i_h = i_bh // heads, i_bh % heads
    p_query = query + i_b * q_b + i_h * q_h
    p_key = key + i_b * k_b + i_h * k_h
    p_value = value + i_b * v_b + i_h * v_h
    o_s = tl.arange(0, 64)
    o_d = tl.arange(0, D)
    o_v = tl.arange(0, DV)
    o_b = tl.arange(0, BLOCKS)
    SIZE: tl.constexpr = 64 // BLOCKS
    # Text is copied only: it has no pseudo-keys.
    image = tile < tiles
    count = tl.load(live + tile)
    alive = o_s < count
    row = tl.load(rows + tile * 64 + o_s).to(tl.int64)
    in_key = alive[:, None] & (o_d < head_dim)[None, :]
    in_value = alive[:, None] & (o_v < value_dim)[None, :]
    k = tl.load(p_key + row[:, None] * k_n + o_d[None, :], mask=in_key, other=0.0)
    v = tl.load(p_value + row[:, None] * v_n + o_v[None, :], mask=in_value, other=0.0)
    if POOLED:
        in_query = in_key & image
        q = tl.load(p_query + row[:, None] * q_n + o_d[None, :], mask=in_query, other=0.0)
    i_slot = (i_g * all_tiles + tile) * 64 + o_s
    tl.store(near_key + i_slot[:, None] * D + o_d[None, :], k)
    tl.store(near_value + i_slot[:, None] * DV + o_v[None, :], v)
    if POOLED and image:
        i_tile = i_g * tiles + tile
        wide_count = count.to(tl.float32)
        q_mean = tl.sum(q.to(tl.float32), axis=0) * (scale / wide_count)
        tl.store(mean_query + i_tile * D + o_d, q_mean)
        k_wide, v_wide = k.to(tl.float32), v.to(tl.float32)
        if BLOCKS == 1:
            k_mean = tl.sum(k_wide, axis=0) / wide_count
            v_mean = tl.sum(v_wide, axis=0) / wide_count
            tl.store(mean_key + i_tile * D + o_d, narrow(k_mean, OPERAND))
            tl.store(mean_value + i_tile * DV + o_v, narrow(v_mean, OPERAND))
            offset = k_wide - k_mean[None, :]
        else:
            held = tl.minimum(tl.maximum(count - o_b * SIZE, 1), SIZE).to(tl.float32)
            k_mean = tl.sum(tl.reshape(k_wide, [BLOCKS, SIZE, D]), axis=1) / held[:, None]
            v_mean = tl.sum(tl.reshape(v_wide, [BLOCKS, SIZE, DV]), axis=1) / held[:, None]
            i_block = i_tile * BLOCKS + o_b
            p_mean_key = mean_key + i_block[:, None] * D + o_d[None, :]
            p_mean_value = mean_value + i_block[:, None] * DV + o_v[None, :]
            tl.store(p_mean_key, narrow(k_mean, OPERAND))
            tl.store(p_mean_value, narrow(v_mean, OPERAND))
            over_slots = tl.broadcast_to(k_mean[:, None, :], [BLOCKS, SIZE, D])
            offset = k_wide - tl.reshape(over_slots, [64, D])
        if CROSS:
            offset = narrow(tl.where(alive[:, None], offset, 0.0), OPERAND)
            product = tl.zeros([D, DV], dtype=tl.float32)
            product = dot(tl.trans(offset), v, product, PRECISION)
            tl.store(norm + i_tile, tl.sqrt(tl.sum(product * product)))
            p_cross = cross + i_tile * (D * DV) + o_d[:, None] * DV + o_v[None, :]
            tl.store(p_cross, narrow(product / wide_count, WIDE))


@triton.jit
def _sampled_offsets(
    near_key, mean_key, live, i_g, first, blocks, all_tiles,
    D: tl.constexpr, BLOCKS: tl.constexpr, SAMPLE: tl.constexpr, SAMPLES: tl.constexpr,
    BB: tl.constexpr,
):  # fmt: skip
    """k - k̄ of the sampled slots of BB blocks, 16 rows each, 0 where there is none; and where."""
    o_r = tl.arange(0, BB * 16)
    o_d = tl.arange(0, D)
    block = first + o_r // 16
    tile = block // BLOCKS
    slot = (block % BLOCKS) * (64 // BLOCKS) + (o_r % 16) * SAMPLE
    known = block < blocks
    valid = known & (o_r % 16 < SAMPLES)
    valid = valid & (slot < tl.load(live + tile, mask=known, other=0))
    p_key = near_key + ((i_g * all_tiles + tile) * 64 + slot)[:, None] * D + o_d[None, :]
    k = tl.load(p_key, mask=valid[:, None], other=0.0).to(tl.float32)
    p_mean = mean_key + (i_g * blocks + block)[:, None] * D + o_d[None, :]
    return k - tl.load(p_mean, mask=valid[:, None], other=0.0).to(tl.float32), valid


@triton.jit(do_not_specialize=["blocks", "all_tiles", "per_program"])
def spread_kernel(
    near_key,
    mean_key,
    live,
    partial,
    blocks,
    all_tiles,
    per_program,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    SAMPLE: tl.constexpr,
    SAMPLES: tl.constexpr,
    BB: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A part of the sum that Σ̄ is made of: that of the sampled slots of a run of blocks."""
    i_part = tl.program_id(0)
    i_g = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, D)
    total = tl.zeros([D, D], dtype=tl.float32)
    first = i_part * per_program
    for start in range(first, tl.minimum(first + per_program, blocks), BB):
        offset, _ = _sampled_offsets(
            near_key, mean_key, live, i_g, start, blocks, all_tiles,
            D, BLOCKS, SAMPLE, SAMPLES, BB,
        )  # fmt: skip
        some = narrow(offset, OPERAND)
        total = dot(tl.trans(some), some, total, PRECISION)
    i_partial = i_g * tl.num_programs(0) + i_part
    tl.store(partial + i_partial * (D * D) + o_d[:, None] * D + o_d[None, :], total)


@triton.jit(do_not_specialize=["blocks", "all_tiles"])
def share_kernel(
    near_key,
    mean_key,
    live,
    summed,
    share,
    factor,
    blocks,
    all_tiles,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    SAMPLE: tl.constexpr,
    SAMPLES: tl.constexpr,
    BB: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """s of BB blocks."""
    i_g = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BB
    offset, valid = _sampled_offsets(
        near_key, mean_key, live, i_g, first, blocks, all_tiles, D, BLOCKS, SAMPLE, SAMPLES, BB
    )
    matrix = _spread_matrix(summed, factor, i_g, D)
    # Tiles of one token, or of equal keys, have no spread at all.
    size = tl.maximum(tl.sum(matrix * matrix), TINY)
    held = tl.reshape(valid.to(tl.float32), [BB, 16])
    own = _quadratic(offset, matrix, D, BB, WIDE, PRECISION)
    own = own / tl.maximum(tl.sum(held, axis=1), 1.0)
    o_b = first + tl.arange(0, BB)
    tl.store(share + i_g * blocks + o_b, own / size, mask=o_b < blocks)


@triton.jit
def _spread_matrix(summed, factor, i_g, D: tl.constexpr):
    """Σ̄ of a head, [D, D]."""
    o_d = tl.arange(0, D)
    return tl.load(summed + i_g * (D * D) + o_d[:, None] * D + o_d[None, :]) * factor


@triton.jit
def _quadratic(
    x, matrix, D: tl.constexpr, BB: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr
):
    """Σ xᵀ·matrix·x over each 16 rows of x [BB · 16, D]: [BB]."""
    product = tl.zeros([BB * 16, D], dtype=tl.float32)
    product = dot(narrow(x, WIDE), narrow(matrix, WIDE), product, PRECISION)
    return tl.sum(tl.reshape(tl.sum(product * x, axis=1), [BB, 16]), axis=1)


@triton.jit(do_not_specialize=["first_head", "heads", "tiles"])
def own_kernel(
    query,
    rows,
    summed,
    own,
    factor,
    first_head,
    heads,
    tiles,
    head_dim,
    q_b,
    q_h,
    q_n,
    D: tl.constexpr,
    SAMPLE: tl.constexpr,
    SAMPLES: tl.constexpr,
    BB: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ qᵀ·summed·q over the sampled queries of BB tiles, times the factor."""
    i_g = tl.program_id(1).to(tl.int64)
    i_bh = i_g + first_head
    i_b, i_h = i_bh // heads, i_bh % heads
    o_r = tl.arange(0, BB * 16)
    o_d = tl.arange(0, D)
    tile = tl.program_id(0) * BB + o_r // 16
    # Dead slots repeat the tile's first query and count, as in `pool`.
    valid = (tile < tiles) & (o_r % 16 < SAMPLES)
    row = tl.load(rows + tile * 64 + (o_r % 16) * SAMPLE, mask=valid, other=0).to(tl.int64)
    p_query = query + i_b * q_b + i_h * q_h + row[:, None] * q_n + o_d[None, :]
    q = tl.load(p_query, mask=valid[:, None] & (o_d < head_dim)[None, :], other=0.0)
    matrix = _spread_matrix(summed, factor, i_g, D)
    total = _quadratic(q.to(tl.float32), matrix, D, BB, WIDE, PRECISION)
    o_t = tl.program_id(0) * BB + tl.arange(0, BB)
    tl.store(own + i_g * tiles + o_t, total, mask=o_t < tiles)
