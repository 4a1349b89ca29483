"""Triton kernels of attention by tiles. Imported only where triton is installed.

Shapes in comments: 64 slots of a tile, M pseudo-keys, T tiles, D and DV padded widths of key and
value, BM queries of a program: those of one tile, or of two. Text stands in tiles of its own
behind those of the image. Offsets that grow with tokens or heads are int64.
"""

import triton
import triton.language as tl

from ..taylor.triton_numeric import INTERPRETED, dot, narrow

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _reciprocal(x):
    if INTERPRETED:
        return 1.0 / x
    # Within 1 ulp, where an exact quotient takes a dozen instructions.
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _shortfall(raw, BEND: tl.constexpr, MOST: tl.constexpr):
    """A - c' with A = 1 / BEND, for c and all results in units of log 2.

    c / (1 + BEND·c) = A - A² / (A + c): one reciprocal and few products, whose count decides how
    fast pseudo-keys go.
    """
    A: tl.constexpr = LOG2E / BEND
    LEAST: tl.constexpr = (A - MOST * LOG2E) / (A * A)
    return tl.maximum(_reciprocal(raw + A), LEAST) * (A * A)


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
    spread,
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
    """s of BB blocks; the first program of a head stores Σ̄ too."""
    i_g = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BB
    o_d = tl.arange(0, D)
    offset, valid = _sampled_offsets(
        near_key, mean_key, live, i_g, first, blocks, all_tiles, D, BLOCKS, SAMPLE, SAMPLES, BB
    )
    o_matrix = i_g * (D * D) + o_d[:, None] * D + o_d[None, :]
    matrix = tl.load(summed + o_matrix) * factor
    stored = narrow(matrix, WIDE)
    if tl.program_id(0) == 0:
        tl.store(spread + o_matrix, stored)
    # Tiles of one token, or of equal keys, have no spread at all.
    size = tl.maximum(tl.sum(matrix * matrix), TINY)
    product = tl.zeros([BB * 16, D], dtype=tl.float32)
    product = dot(narrow(offset, WIDE), stored, product, PRECISION)
    quadratic = tl.reshape(tl.sum(product * offset, axis=1), [BB, 16])
    held = tl.reshape(valid.to(tl.float32), [BB, 16])
    own = tl.sum(quadratic, axis=1) / tl.maximum(tl.sum(held, axis=1), 1.0)
    o_b = first + tl.arange(0, BB)
    tl.store(share + i_g * blocks + o_b, own / size, mask=o_b < blocks)


@triton.jit
def _tile_scores(
    q, q_high, own, start, p_key, log_count, p_share, p_exact, live_q, blocks, tiles,
    D: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr, CORRECTION: tl.constexpr,
    BEND: tl.constexpr, MOST: tl.constexpr, OPERAND: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of BN pseudo-keys for mean queries, -inf where exact, and c."""
    o_n = start + tl.arange(0, BN)
    o_d = tl.arange(0, D)
    known = o_n < blocks
    k = tl.load(p_key + o_n[:, None] * D + o_d[None, :], mask=known[:, None], other=0.0)
    s = tl.zeros([q.shape[0], BN], dtype=tl.float32)
    if SPLIT:
        # A mean query is not a number of 16 bits; two of them hold it well.
        s = dot(narrow(q - q_high.to(tl.float32), OPERAND), tl.trans(k), s, PRECISION)
    s = dot(q_high, tl.trans(k), s, PRECISION) * LOG2E
    s += tl.load(log_count + o_n, mask=known, other=float("-inf"))[None, :]
    raw = s
    if CORRECTION:
        raw = own[:, None] * tl.load(p_share + o_n, mask=known, other=0.0)[None, :]
        s += LOG2E / BEND - _shortfall(raw * LOG2E, BEND, MOST)
    inside = live_q[:, None] & known[None, :]
    exact = tl.load(p_exact + (o_n // BLOCKS)[None, :], mask=inside, other=1)
    return tl.where(exact != 0, float("-inf"), s), raw


@triton.jit(do_not_specialize=["tiles", "blocks", "exact_g"])
def weigh_kernel(
    mean_query,
    mean_key,
    log_count,
    spread,
    share,
    exact,
    weights,
    tiles,
    blocks,
    columns,
    exact_g,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BLOCKS: tl.constexpr,
    CORRECTION: tl.constexpr,
    BEND: tl.constexpr,
    MOST: tl.constexpr,
    DAMPING: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights of the tiles' first-order terms for BQ query tiles, as `far.tile_weights`."""
    i_g = tl.program_id(1).to(tl.int64)
    o_q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    o_d = tl.arange(0, D)
    live_q = o_q < tiles
    p_query = mean_query + (i_g * tiles + o_q)[:, None] * D + o_d[None, :]
    q = tl.load(p_query, mask=live_q[:, None], other=0.0)
    q_high = narrow(q, OPERAND)
    own = tl.zeros([BQ], dtype=tl.float32)
    if CORRECTION:
        matrix = tl.load(spread + i_g * (D * D) + o_d[:, None] * D + o_d[None, :])
        product = tl.zeros([BQ, D], dtype=tl.float32)
        product = dot(narrow(q, WIDE), matrix, product, PRECISION)
        own = tl.sum(product * q, axis=1) * 0.5
    p_key = mean_key + i_g * blocks * D
    p_share = share + i_g * blocks
    p_exact = exact + i_g * exact_g + o_q[:, None].to(tl.int64) * tiles
    top = tl.full([BQ], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BQ], dtype=tl.float32)
    for start in range(0, blocks, BN):
        s, _ = _tile_scores(
            q, q_high, own, start, p_key, log_count, p_share, p_exact, live_q, blocks, tiles,
            D, BN, BLOCKS, CORRECTION, BEND, MOST, OPERAND, SPLIT, PRECISION,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(s, axis=1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(s - safe[:, None]), axis=1)
        top = new
    safe = tl.where(top == float("-inf"), 0.0, top)
    # Where nothing is far, all weights are 0.
    inverse = tl.where(total > 0.0, 1.0 / tl.maximum(total, TINY), 0.0)
    for start in range(0, blocks, BN):
        s, raw = _tile_scores(
            q, q_high, own, start, p_key, log_count, p_share, p_exact, live_q, blocks, tiles,
            D, BN, BLOCKS, CORRECTION, BEND, MOST, OPERAND, SPLIT, PRECISION,
        )  # fmt: skip
        w = tl.exp2(s - safe[:, None]) * inverse[:, None]
        if CORRECTION:
            w = w / (1.0 + DAMPING * raw)
        if BLOCKS > 1:
            w = tl.sum(tl.reshape(w, [BQ, BN // BLOCKS, BLOCKS]), axis=2)
        o_t = start // BLOCKS + tl.arange(0, BN // BLOCKS)
        p_weights = weights + (i_g * tiles + o_q)[:, None] * columns + o_t[None, :]
        inside = live_q[:, None] & (o_t < tiles)[None, :]
        tl.store(p_weights, narrow(w, WIDE), mask=inside)


@triton.jit(
    do_not_specialize=[
        "first_head",
        "heads",
        "tiles",
        "all_tiles",
        "blocks",
        "first_group",
        "picks",
        "exact_g",
    ]
)
def attend_kernel(
    query,
    out,
    mass,
    near_key,
    near_value,
    far_key,
    far_value,
    log_count,
    share,
    spread,
    terms,
    exact,
    rows,
    live,
    groups,
    starts,
    counts,
    listed,
    picked,
    first_head,
    heads,
    tiles,
    all_tiles,
    blocks,
    first_group,
    picks,
    scale,
    head_dim,
    value_dim,
    exact_g,
    q_b,
    q_h,
    q_n,
    o_b,
    o_h,
    o_n,
    m_b,
    m_h,
    D: tl.constexpr,
    DV: tl.constexpr,
    TILES: tl.constexpr,
    BN: tl.constexpr,
    BLOCKS: tl.constexpr,
    FULL: tl.constexpr,
    FAR: tl.constexpr,
    PICKS: tl.constexpr,
    CORRECTION: tl.constexpr,
    FIRST_ORDER: tl.constexpr,
    MASS: tl.constexpr,
    BEND: tl.constexpr,
    MOST: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Queries of a group of TILES tiles over listed tiles and all pseudo-keys."""
    BM: tl.constexpr = 64 * TILES
    i_group = tl.program_id(0) + first_group
    i_g = tl.program_id(1).to(tl.int64)
    i_bh = i_g + first_head
    i_b, i_h = i_bh // heads, i_bh % heads
    o_m = tl.arange(0, BM)
    o_s = tl.arange(0, 64)
    o_d = tl.arange(0, D)
    o_v = tl.arange(0, DV)
    half = o_m // 64
    own_tile = tl.load(groups + i_group * TILES + half)
    there = own_tile >= 0
    own_tile = tl.maximum(own_tile, 0)
    there = there & (o_m % 64 < tl.load(live + own_tile))
    row = tl.load(rows + own_tile * 64 + o_m % 64).to(tl.int64)
    p_query = query + i_b * q_b + i_h * q_h + row[:, None] * q_n + o_d[None, :]
    q = tl.load(p_query, mask=there[:, None] & (o_d < head_dim)[None, :], other=0.0)
    scale_2 = scale * LOG2E

    tile_0 = tl.maximum(tl.load(groups + i_group * TILES), 0)
    tile_1 = tile_0
    if TILES == 2:
        tile_1 = tl.maximum(tl.load(groups + i_group * TILES + 1), 0)
    image = tile_0 < tiles
    own = tl.zeros([BM], dtype=tl.float32)
    if FAR and CORRECTION:
        matrix = tl.load(spread + i_g * (D * D) + o_d[:, None] * D + o_d[None, :])
        product = tl.zeros([BM, D], dtype=tl.float32)
        product = dot(narrow(q.to(tl.float32), WIDE), matrix, product, PRECISION)
        own = tl.sum(product * q.to(tl.float32), axis=1) * (0.5 * scale * scale * LOG2E)

    top = tl.full([BM], float("-inf"), dtype=tl.float32)
    near_sum = tl.zeros([BM], dtype=tl.float32)
    acc = tl.zeros([BM, DV], dtype=tl.float32)
    p_near_key = near_key + i_g * all_tiles * (64 * D)
    p_near_value = near_value + i_g * all_tiles * (64 * DV)
    start = tl.load(starts + i_group)
    fixed = tl.load(counts + i_group)
    count = fixed
    if PICKS:
        count = fixed + tl.where(image, picks * TILES, 0)
        groups_of_image = tl.num_programs(0) + first_group
        p_picked = picked + (i_g * groups_of_image + i_group) * (picks * TILES) - fixed
    for i in range(count):
        if PICKS:
            entry = tl.load(listed + start + i, mask=i < fixed, other=0)
            entry += tl.load(p_picked + i, mask=i >= fixed, other=0)
        else:
            entry = tl.load(listed + start + i)
        tile = (entry // 4).to(tl.int64)
        o_key = tile * (64 * D) + (o_s[:, None] * D + o_d[None, :])
        k = tl.load(p_near_key + o_key)
        o_value = tile * (64 * DV) + (o_s[:, None] * DV + o_v[None, :])
        v = tl.load(p_near_value + o_value)
        s = tl.zeros([BM, 64], dtype=tl.float32)
        s = dot(q, tl.trans(k), s, PRECISION)
        if TILES == 2:
            s = tl.where(((entry >> half) & 1)[:, None] != 0, s, float("-inf"))
        if not FULL:
            s = tl.where((o_s < tl.load(live + tile))[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, axis=1) * scale_2)
        # A tile of the other half alone leaves nothing to subtract.
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s * scale_2 - safe[:, None])
        shrink = tl.exp2(top - safe)
        near_sum = near_sum * shrink + tl.sum(p, axis=1)
        acc = dot(narrow(p, OPERAND), v, acc * shrink[:, None], PRECISION)
        top = new

    total = near_sum
    if FAR:
        far_sum = tl.zeros([BM], dtype=tl.float32)
        p_far_key = far_key + i_g * blocks * D
        p_far_value = far_value + i_g * blocks * DV
        p_share = share + i_g * blocks
        p_exact_0 = exact + i_g * exact_g + tile_0.to(tl.int64) * tiles
        p_exact_1 = exact + i_g * exact_g + tile_1.to(tl.int64) * tiles
        o_k = tl.arange(0, BN)
        for begin in range(0, tl.where(image, blocks, 0), BN):
            o_b_ = begin + o_k
            known = o_b_ < blocks
            k = tl.load(
                p_far_key + o_b_[:, None] * D + o_d[None, :],
                mask=known[:, None],
                other=0.0,
            )
            v = tl.load(
                p_far_value + o_b_[:, None] * DV + o_v[None, :],
                mask=known[:, None],
                other=0.0,
            )
            bias = tl.load(log_count + o_b_, mask=known, other=float("-inf"))
            if CORRECTION:
                bias += LOG2E / BEND
            exact_0 = tl.load(p_exact_0 + o_b_ // BLOCKS, mask=known, other=1)
            bias_0 = tl.where(exact_0 != 0, float("-inf"), bias)
            s = tl.zeros([BM, BN], dtype=tl.float32)
            s = dot(q, tl.trans(k), s, PRECISION)
            if TILES == 2:
                exact_1 = tl.load(p_exact_1 + o_b_ // BLOCKS, mask=known, other=1)
                bias_1 = tl.where(exact_1 != 0, float("-inf"), bias)
                both = tl.where((half == 0)[:, None], bias_0[None, :], bias_1[None, :])
                s = s * scale_2 + both
            else:
                s = s * scale_2 + bias_0[None, :]
            if CORRECTION:
                some = tl.load(p_share + o_b_, mask=known, other=0.0)
                s -= _shortfall(own[:, None] * some[None, :], BEND, MOST)
            new = tl.maximum(top, tl.max(s, axis=1))
            safe = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(s - safe[:, None])
            shrink = tl.exp2(top - safe)
            near_sum = near_sum * shrink
            far_sum = far_sum * shrink + tl.sum(p, axis=1)
            acc = dot(narrow(p, OPERAND), v, acc * shrink[:, None], PRECISION)
            top = new
        total = near_sum + far_sum
        if FIRST_ORDER:
            # The factor goes into the query, so that the product adds to acc in place.
            q_far = q.to(tl.float32) * (far_sum * scale)[:, None]
            o_term = o_d[:, None] * DV + o_v[None, :]
            i_term = i_g * tiles + tl.where(image, tile_0, 0)
            term = tl.load(terms + i_term * (D * DV) + o_term)
            if TILES == 2:
                q_0 = narrow(tl.where((half == 0)[:, None], q_far, 0.0), WIDE)
                acc = dot(q_0, term, acc, PRECISION)
                i_term = i_g * tiles + tl.where(image, tile_1, 0)
                term = tl.load(terms + i_term * (D * DV) + o_term)
                q_1 = narrow(tl.where((half == 1)[:, None], q_far, 0.0), WIDE)
                acc = dot(q_1, term, acc, PRECISION)
            else:
                acc = dot(narrow(q_far, WIDE), term, acc, PRECISION)

    acc = acc / total[:, None]
    p_out = out + i_b * o_b + i_h * o_h + row[:, None] * o_n + o_v[None, :]
    in_out = there[:, None] & (o_v < value_dim)[None, :]
    tl.store(p_out, narrow(acc, out.dtype.element_ty), mask=in_out)
    if MASS:
        tl.store(mass + i_b * m_b + i_h * m_h + row, (top + tl.log2(total)) * LN2, mask=there)
