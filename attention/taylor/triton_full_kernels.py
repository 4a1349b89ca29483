"""Triton kernels of the fully fused path. Imported only where triton is installed.

Shapes in comments: BT keys, BM queries, D padded head_dim, KC base features of a chunk, L lifts
of a tile, DV padded value_dim. Offsets that grow with tokens or heads are int64.
"""

import triton
import triton.language as tl

from .triton_numeric import dot, narrow


@triton.jit
def _pairs(x, sel_a, sel_b, precision: tl.constexpr):
    # Selection keeps values as they are, so the product is rounded once, here.
    zero = tl.zeros([x.shape[0], sel_a.shape[1]], dtype=tl.float32)
    first = dot(x, sel_a, zero, precision)
    second = dot(x, sel_b, zero, precision)
    return narrow(first * second, x.dtype)


@triton.jit
def build_kernel(
    key,
    value,
    weight,
    selections,
    tile_chunk,
    tile_lift,
    partial,
    partial_sum,
    heads,
    tokens,
    tokens_per_split,
    head_dim,
    value_dim,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    w_b,
    w_h,
    w_n,
    D: tl.constexpr,
    DV: tl.constexpr,
    KC: tl.constexpr,
    L: tl.constexpr,
    BT: tl.constexpr,
    CHUNKS: tl.constexpr,
    PAIRS: tl.constexpr,
    LIFTED: tl.constexpr,
    COLUMN_SUM: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FINITE: tl.constexpr,
    WIDE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial[split, bh, tile] = (k_lift · w · V)ᵀ @ base(k), [L * DV, KC].

    With WIDE as Vᵀ @ (k_lift · w · base(k)): where values are wider than a chunk, fewer numbers
    are multiplied outside the tensor cores.
    """
    i_tile = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_split = tl.program_id(2).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_chunk = i_tile
    lift = 0
    if LIFTED:
        i_chunk = tl.load(tile_chunk + i_tile)
        # Tiles start at multiples of L: loads by whole vectors can be pipelined.
        lift = tl.multiple_of(tl.load(tile_lift + i_tile), L)

    o_d = tl.arange(0, D)
    o_v = tl.arange(0, DV)
    o_c = tl.arange(0, KC)
    o_l = lift + tl.arange(0, L)
    p_key = key + i_b * k_b + i_h * k_h
    p_value = value + i_b * v_b + i_h * v_h
    p_weight = weight + i_b * w_b + i_h * w_h
    if PAIRS:
        o_sel = (i_chunk * D + o_d)[:, None] * KC + o_c[None, :]
        sel_a = tl.load(selections + o_sel)  # [D, KC]
        sel_b = tl.load(selections + CHUNKS * D * KC + o_sel)

    if WIDE:
        acc = tl.zeros([DV, L * KC], dtype=tl.float32)
        column_sums = tl.zeros([BT, DV], dtype=tl.float32)
    else:
        acc = tl.zeros([L * DV, KC], dtype=tl.float32)
        column_sums = tl.zeros([BT, L * DV], dtype=tl.float32)
    begin = i_split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, tokens)
    for start in range(begin, end, BT):
        o_t = start + tl.arange(0, BT)
        live = o_t < end
        if WEIGHTED:
            w = tl.load(p_weight + o_t * w_n, mask=live, other=0.0).to(tl.float32)
            if not FINITE:
                # 0 · NaN is NaN: a masked key is never read. Loads that wait for the weight
                # can't be pipelined, so this is left out where nothing can be NaN.
                live = live & (w != 0.0)
        v = tl.load(
            p_value + o_t[:, None] * v_n + o_v[None, :],
            mask=live[:, None] & (o_v < value_dim)[None, :],
            other=0.0,
        ).to(tl.float32)
        # All loads stand before the first product, which hides their latency.
        if LIFTED:
            k_lift = tl.load(
                p_key + o_t[:, None] * k_n + o_l[None, :],
                mask=live[:, None] & (o_l < head_dim)[None, :],
                other=0.0,
            ).to(tl.float32)
        if PAIRS:
            k = tl.load(
                p_key + o_t[:, None] * k_n + o_d[None, :],
                mask=live[:, None] & (o_d < head_dim)[None, :],
                other=0.0,
            ).to(tl.float32)
            base = _pairs(narrow(k, OPERAND), sel_a, sel_b, PRECISION)  # [BT, KC]
        else:
            o_k = i_chunk * KC + o_c
            base = tl.load(
                p_key + o_t[:, None] * k_n + o_k[None, :],
                mask=live[:, None] & (o_k < head_dim)[None, :],
                other=0.0,
            )
            base = narrow(base.to(tl.float32), OPERAND)
        if WIDE:
            features = base.to(tl.float32)
            if WEIGHTED:
                features = features * w[:, None]
            if COLUMN_SUM:
                # Added up over rows only once: a reduction makes warps wait for each other.
                column_sums += v * w[:, None] if WEIGHTED else v
            if LIFTED:
                features = tl.reshape(k_lift[:, :, None] * features[:, None, :], [BT, L * KC])
            acc = dot(tl.trans(narrow(v, OPERAND)), narrow(features, OPERAND), acc, PRECISION)
        else:
            if WEIGHTED:
                v = v * w[:, None]
                if FINITE:
                    # A product of two values of the operands' dtype is half the work.
                    v = narrow(v, OPERAND).to(tl.float32)
            if LIFTED:
                v = tl.reshape(k_lift[:, :, None] * v[:, None, :], [BT, L * DV])
            if COLUMN_SUM:
                column_sums += v
            acc = dot(tl.trans(narrow(v, OPERAND)), base, acc, PRECISION)

    tiles = tl.num_programs(0)
    row = (i_split * tl.num_programs(1) + i_bh) * tiles + i_tile
    p_partial = partial + row * (L * DV * KC)
    if WIDE:
        o_f = tl.arange(0, L * KC)
        o_row = o_f // KC * DV
        tl.store(p_partial + (o_row[None, :] + o_v[:, None]) * KC + (o_f % KC)[None, :], acc)
    else:
        o_row = tl.arange(0, L * DV)
        tl.store(p_partial + o_row[:, None] * KC + o_c[None, :], acc)
    if COLUMN_SUM and i_tile == 0:
        # L is 1 here.
        p_sum = partial_sum + (i_split * tl.num_programs(1) + i_bh) * DV + o_v
        tl.store(p_sum, tl.sum(column_sums, axis=0))


@triton.jit
def reduce_kernel(
    partial,
    factors,
    sums,
    splits,
    DV: tl.constexpr,
    KC: tl.constexpr,
    L: tl.constexpr,
):
    """sums[bh, tile] = factors[tile] · Σ_split partial[split, bh, tile]ᵀ, [KC, L * DV]."""
    i_tile = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    tiles, bhs = tl.num_programs(0), tl.num_programs(1)
    o_row = tl.arange(0, L * DV)
    o_c = tl.arange(0, KC)
    total = tl.zeros([L * DV, KC], dtype=tl.float32)
    for i_split in range(splits):
        row = (i_split * bhs + i_bh) * tiles + i_tile
        total += tl.load(partial + (row * (L * DV) + o_row)[:, None] * KC + o_c[None, :])
    factor = tl.load(factors + (i_tile * L + o_row // DV)[:, None] * KC + o_c[None, :])
    out = narrow(tl.trans(total * factor), sums.dtype.element_ty)
    row = i_bh * tiles + i_tile
    tl.store(sums + (row * KC + o_c)[:, None] * (L * DV) + o_row[None, :], out)


@triton.jit
def read_kernel(
    query,
    pairs,
    s_0,
    s_1,
    s_2,
    s_top,
    z_0,
    z_1,
    z_2,
    z_3,
    first,
    count,
    value_mean,
    numerator,
    denominator,
    heads,
    tokens,
    head_dim,
    value_dim,
    tiles,
    parts,
    eps,
    q_b,
    q_h,
    q_n,
    o_b,
    o_h,
    o_n,
    D: tl.constexpr,
    DV: tl.constexpr,
    KC: tl.constexpr,
    L: tl.constexpr,
    BM: tl.constexpr,
    TERMS: tl.constexpr,
    COORDINATE_CHUNKS: tl.constexpr,
    PAIR_CHUNKS: tl.constexpr,
    DIVIDE: tl.constexpr,
    ROUND: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Numerator [BM, value_dim] and denominator [BM] of one tile of queries.

    With DIVIDE both are over the sum of the weights, the numerator is divided, value_mean added,
    and the ``parts`` slices of a head lie side by side in the output.
    """
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = o_m < tokens
    o_d = tl.arange(0, D)
    o_v = tl.arange(0, DV)
    o_c = tl.arange(0, KC)
    o_lv = tl.arange(0, L * DV)
    p_query = query + i_b * q_b + i_h * q_h
    q = tl.load(
        p_query + o_m[:, None] * q_n + o_d[None, :],
        mask=live[:, None] & (o_d < head_dim)[None, :],
        other=0.0,
    )

    # Denominator: z_0 + q · (z_1 + q @ z_2 + pairs @ z_3).
    gradient = tl.zeros([BM, D], dtype=tl.float32) + tl.load(z_1 + i_bh * D + o_d)[None, :]
    if TERMS >= 3:
        for c in range(COORDINATE_CHUNKS):
            o_k = c * KC + o_c
            base = tl.load(
                p_query + o_m[:, None] * q_n + o_k[None, :],
                mask=live[:, None] & (o_k < head_dim)[None, :],
                other=0.0,
            )
            base = narrow(base.to(tl.float32), OPERAND)
            row = (i_bh * COORDINATE_CHUNKS + c) * KC
            z = tl.load(z_2 + (row + o_c)[:, None] * D + o_d[None, :])  # [KC, D]
            gradient = dot(base, z, gradient, PRECISION)

    acc = tl.zeros([BM, DV], dtype=tl.float32) + tl.load(s_0 + i_bh * DV + o_v)[None, :]
    for c in range(COORDINATE_CHUNKS):
        o_k = c * KC + o_c
        base = tl.load(
            p_query + o_m[:, None] * q_n + o_k[None, :],
            mask=live[:, None] & (o_k < head_dim)[None, :],
            other=0.0,
        )
        base = narrow(base.to(tl.float32), OPERAND)
        row = (i_bh * COORDINATE_CHUNKS + c) * KC
        s = tl.load(s_1 + (row + o_c)[:, None] * DV + o_v[None, :])  # [KC, DV]
        acc = dot(base, s, acc, PRECISION)
        if TERMS == 3:
            i_first = tl.load(first + c)
            for i in range(tl.load(count + c)):
                acc = _lifted(
                    acc, base, s_top, i_bh * tiles + i_first + i, p_query, o_m, live, q_n,
                    i * L, head_dim, o_c, o_lv, BM, DV, KC, L, OPERAND, PRECISION,
                )  # fmt: skip
    if TERMS >= 4:
        for c in range(PAIR_CHUNKS):
            # Gathered from the cache, once for all lifts.
            p_row = p_query + o_m[:, None] * q_n
            o_k = c * KC + o_c
            a = tl.load(p_row + tl.load(pairs + o_k)[None, :], mask=live[:, None], other=0.0)
            o_k += PAIR_CHUNKS * KC
            b = tl.load(p_row + tl.load(pairs + o_k)[None, :], mask=live[:, None], other=0.0)
            base = narrow(a.to(tl.float32) * b.to(tl.float32), OPERAND)  # [BM, KC]
            row = (i_bh * PAIR_CHUNKS + c) * KC
            z = tl.load(z_3 + (row + o_c)[:, None] * D + o_d[None, :])
            gradient = dot(base, z, gradient, PRECISION)
            s = tl.load(s_2 + (row + o_c)[:, None] * DV + o_v[None, :])
            acc = dot(base, s, acc, PRECISION)
            i_first = tl.load(first + c)
            for i in range(tl.load(count + c)):
                acc = _lifted(
                    acc, base, s_top, i_bh * tiles + i_first + i, p_query, o_m, live, q_n,
                    i * L, head_dim, o_c, o_lv, BM, DV, KC, L, OPERAND, PRECISION,
                )  # fmt: skip
    mass = tl.load(z_0 + i_bh)
    den = mass + tl.sum(q.to(tl.float32) * gradient, axis=1)
    p_num = numerator + (i_bh * tokens + o_m)[:, None] * value_dim + o_v[None, :]
    if DIVIDE:
        den = den / mass
        if ROUND:
            den = narrow(den, numerator.dtype.element_ty).to(tl.float32)
        acc = acc / (tl.maximum(den, eps) * mass)[:, None]
        acc += tl.load(value_mean + i_bh * value_dim + o_v, mask=o_v < value_dim)[None, :]
        i_h = i_bh // parts
        p_num = numerator + i_h // (heads // parts) * o_b + i_h % (heads // parts) * o_h
        p_num += i_bh % parts * value_dim + o_m[:, None] * o_n + o_v[None, :]
    tl.store(denominator + i_bh * tokens + o_m, den, mask=live)
    acc = narrow(acc, numerator.dtype.element_ty)
    tl.store(p_num, acc, mask=live[:, None] & (o_v < value_dim)[None, :])


@triton.jit
def _lifted(
    acc,
    base,
    s_top,
    tile,
    p_query,
    o_m,
    live,
    q_n,
    lift,
    head_dim,
    o_c,
    o_lv,
    BM: tl.constexpr,
    DV: tl.constexpr,
    KC: tl.constexpr,
    L: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + Σ_l q_(lift + l) · (base @ s_top[tile, l]), [BM, DV]."""
    # Before the product, which hides the load.
    s = tl.load(s_top + (tile * KC + o_c)[:, None] * (L * DV) + o_lv[None, :])  # [KC, L * DV]
    if L == 1:
        q_one = tl.load(p_query + o_m * q_n + lift, mask=live & (lift < head_dim), other=0.0)
        lifted = narrow(base.to(tl.float32) * q_one.to(tl.float32)[:, None], OPERAND)
        return dot(lifted, s, acc, PRECISION)
    o_l = lift + tl.arange(0, L)
    q_lift = tl.load(
        p_query + o_m[:, None] * q_n + o_l[None, :],
        mask=live[:, None] & (o_l < head_dim)[None, :],
        other=0.0,
    ).to(tl.float32)
    t = dot(base, s, tl.zeros([BM, L * DV], dtype=tl.float32), PRECISION)
    return acc + tl.sum(tl.reshape(t, [BM, L, DV]) * q_lift[:, :, None], axis=1)
