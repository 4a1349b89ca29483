"""Triton kernels that attend to tiles. Imported only where triton is installed.

Shapes in comments: BQ query tiles, BN pseudo-keys, BM queries of a program: those of one tile, or
of two; D and DV padded widths of key and value. Text stands in tiles of its own behind those of
the image. Offsets that grow with tokens or heads are int64.
"""

import triton
import triton.language as tl

from ..taylor.triton_numeric import dot, narrow

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _correction(raw, BEND: tl.constexpr, MOST: tl.constexpr):
    """c' of c, in units of log 2."""
    return tl.minimum(raw / (raw * BEND + 1.0), MOST) * LOG2E


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
        s += _correction(raw, BEND, MOST)
    inside = live_q[:, None] & known[None, :]
    exact = tl.load(p_exact + (o_n // BLOCKS)[None, :], mask=inside, other=1)
    return tl.where(exact != 0, float("-inf"), s), raw


@triton.jit(do_not_specialize=["tiles", "blocks", "exact_g"])
def weigh_kernel(
    mean_query,
    mean_key,
    log_count,
    own_spread,
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
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights of the tiles' first-order terms for BQ query tiles, SHARED of them together."""
    i_g = tl.program_id(1).to(tl.int64)
    o_q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    o_d = tl.arange(0, D)
    live_q = o_q < tiles
    p_query = mean_query + (i_g * tiles + o_q)[:, None] * D + o_d[None, :]
    q = tl.load(p_query, mask=live_q[:, None], other=0.0)
    q_high = narrow(q, OPERAND)
    own = tl.zeros([BQ], dtype=tl.float32)
    if CORRECTION:
        own = tl.load(own_spread + i_g * tiles + o_q, mask=live_q, other=0.0)
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
        if SHARED > 1:
            w = tl.reshape(w, [BQ // SHARED, SHARED, BN // BLOCKS])
            w = tl.sum(w, axis=1) / SHARED
        o_row = tl.program_id(0) * (BQ // SHARED) + tl.arange(0, BQ // SHARED)
        o_t = start // BLOCKS + tl.arange(0, BN // BLOCKS)
        p_weights = weights + (i_g * (tiles // SHARED) + o_row)[:, None] * columns + o_t[None, :]
        inside = (o_row < tiles // SHARED)[:, None] & (o_t < tiles)[None, :]
        tl.store(p_weights, narrow(w, WIDE), mask=inside)


@triton.jit
def _bias(
    p_exact, known, count, share, own, CORRECTION: tl.constexpr, BEND: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """log₂ of the mass that pseudo-keys have beside q·k̄; -inf where their tile is exact."""
    if CORRECTION:
        count += _correction(own * share, BEND, MOST)
    return tl.where(tl.load(p_exact, mask=known, other=1) != 0, float("-inf"), count)


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
    own_spread,
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
    SHARED: tl.constexpr,
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
        far_0 = tl.where(image, tile_0, 0).to(tl.int64)
        far_1 = tl.where(image, tile_1, 0).to(tl.int64)
        p_exact = exact + i_g * exact_g
        own_0, own_1 = 0.0, 0.0
        if CORRECTION:
            own_0 = tl.load(own_spread + i_g * tiles + far_0)
            own_1 = tl.load(own_spread + i_g * tiles + far_1)
        for begin in range(0, tl.where(image, blocks, 0), BN):
            o_k = begin + tl.arange(0, BN)
            known = o_k < blocks
            p_k = p_far_key + o_k[:, None] * D + o_d[None, :]
            p_v = p_far_value + o_k[:, None] * DV + o_v[None, :]
            k = tl.load(p_k, mask=known[:, None], other=0.0)
            v = tl.load(p_v, mask=known[:, None], other=0.0)
            held = tl.load(log_count + o_k, mask=known, other=float("-inf"))
            some = held
            if CORRECTION:
                some = tl.load(p_share + o_k, mask=known, other=0.0)
            p_e = p_exact + o_k // BLOCKS
            bias = _bias(p_e + far_0 * tiles, known, held, some, own_0, CORRECTION, BEND, MOST)
            s = tl.zeros([BM, BN], dtype=tl.float32)
            s = dot(q, tl.trans(k), s, PRECISION)
            if TILES == 2:
                bias_1 = _bias(
                    p_e + far_1 * tiles, known, held, some, own_1, CORRECTION, BEND, MOST
                )
                s = s * scale_2 + tl.where((half == 0)[:, None], bias[None, :], bias_1[None, :])
            else:
                s = s * scale_2 + bias[None, :]
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
            p_term = terms + (i_g * (tiles // SHARED)) * (D * DV) + o_term
            term = tl.load(p_term + (far_0 // SHARED) * (D * DV))
            if TILES == 2 and SHARED == 1:
                q_0 = narrow(tl.where((half == 0)[:, None], q_far, 0.0), WIDE)
                acc = dot(q_0, term, acc, PRECISION)
                term = tl.load(p_term + far_1 * (D * DV))
                q_far = tl.where((half == 1)[:, None], q_far, 0.0)
            acc = dot(narrow(q_far, WIDE), term, acc, PRECISION)

    acc = acc / total[:, None]
    p_out = out + i_b * o_b + i_h * o_h + row[:, None] * o_n + o_v[None, :]
    in_out = there[:, None] & (o_v < value_dim)[None, :]
    tl.store(p_out, narrow(acc, out.dtype.element_ty), mask=in_out)
    if MASS:
        tl.store(mass + i_b * m_b + i_h * m_h + row, (top + tl.log2(total)) * LN2, mask=there)
