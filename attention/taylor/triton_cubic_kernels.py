"""Triton kernels of the cubic series (P = 4 in 16 bits). Imported only where triton is installed.

Shapes in comments: BT keys, BM queries, D padded head_dim, F features of a tile, L lifts of a
tile, DV padded value_dim, M columns for the denominator. Offsets that grow with tokens or heads
are int64.
"""

import triton
import triton.language as tl

from .triton_numeric import dot, narrow, times


@triton.jit
def cubic_build_kernel(
    key,
    value,
    weight,
    chosen,
    ones,
    partial,
    partial_mass,
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
    CHUNKS: tl.constexpr,
    BLOCK_LIFTS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    F: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
    BT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FINITE: tl.constexpr,
):
    """partial[split, bh, tile] = Σ_t features(k_t) (k_lift w v)_t, [F, L * DV].

    partial_mass [F, M] is the same with 1 for v, partial_sum [DV] the sum of w v.
    """
    i_tile = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_split = tl.program_id(2).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_lift = i_tile // CHUNKS
    lift = tl.multiple_of(i_lift * L, L)
    table = i_lift // BLOCK_LIFTS * CHUNKS + i_tile % CHUNKS

    o_d = tl.arange(0, D)
    o_v = tl.arange(0, DV)
    o_f = tl.arange(0, F)
    o_l = lift + tl.arange(0, L)
    o_m = tl.arange(0, M)
    p_key = key + i_b * k_b + i_h * k_h
    p_value = value + i_b * v_b + i_h * v_h
    p_weight = weight + i_b * w_b + i_h * w_h
    p_chosen = chosen + (table * 2 * F + o_f)[:, None] * D + o_d[None, :]
    choose_a = tl.load(p_chosen)  # [F, D]
    choose_b = tl.load(p_chosen + F * D)
    one_a = tl.load(ones + table * 2 * F + o_f)
    one_b = tl.load(ones + (table * 2 + 1) * F + o_f)

    acc = tl.zeros([F, L * DV], dtype=tl.float32)
    mass = tl.zeros([F, M], dtype=tl.float32)
    column_sums = tl.zeros([BT, 1, DV], dtype=tl.float32)
    begin = i_split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, tokens)
    for start in range(begin, end, BT):
        o_t = start + tl.arange(0, BT)
        live = o_t < end
        if WEIGHTED:
            w = tl.load(p_weight + o_t * w_n, mask=live, other=0.0).to(tl.float32)
            if not FINITE:
                # 0 · NaN is NaN: a masked key is never read.
                live = live & (w != 0.0)
        p_row = p_key + o_t[:, None] * k_n
        k = tl.load(
            p_row + o_d[None, :], mask=live[:, None] & (o_d < head_dim)[None, :], other=0.0
        )
        # As three dimensions from the start: so a thread gets whole vectors of values.
        k_lift = tl.load(
            p_key + (o_t[:, None] * k_n + o_l[None, :])[:, :, None],
            mask=(live[:, None] & (o_l < head_dim)[None, :])[:, :, None],
            other=0.0,
        )
        k_mass = tl.load(
            p_row + lift + o_m[None, :],
            mask=live[:, None] & ((o_m < L) & (lift + o_m < head_dim))[None, :],
            other=0.0,
        )
        v = tl.load(
            p_value + (o_t[:, None] * v_n + o_v[None, :])[:, None, :],
            mask=(live[:, None] & (o_v < value_dim)[None, :])[:, None, :],
            other=0.0,
        )
        k = narrow(k.to(tl.float32), tl.bfloat16)
        k_lift = narrow(k_lift.to(tl.float32), tl.bfloat16)
        k_mass = narrow(k_mass.to(tl.float32), tl.bfloat16)
        v = v.to(tl.float32)
        if WEIGHTED:
            v = v * w[:, None, None]
            k_mass = narrow(k_mass.to(tl.float32) * w[:, None], tl.bfloat16)
        column_sums += v
        v = narrow(v, tl.bfloat16)
        lifted = tl.reshape(times(k_lift, v), [BT, L * DV])
        k_across = tl.trans(k)
        zero = tl.zeros([F, BT], dtype=tl.float32)
        first = dot(choose_a, k_across, zero, "ieee") + one_a[:, None]
        second = dot(choose_b, k_across, zero, "ieee") + one_b[:, None]
        base = narrow(first * second, tl.bfloat16)  # [F, BT]
        acc = dot(base, lifted, acc, "ieee")
        mass = dot(base, k_mass, mass, "ieee")

    row = (i_split * tl.num_programs(1) + i_bh) * tl.num_programs(0) + i_tile
    o_row = (row * F + o_f)[:, None]
    o_lv = tl.arange(0, L * DV)
    tl.store(partial + o_row * (L * DV) + o_lv[None, :], acc)
    tl.store(partial_mass + o_row * M + o_m[None, :], mass)
    if i_tile == 0:
        p_sum = partial_sum + (i_split * tl.num_programs(1) + i_bh) * DV + o_v
        tl.store(p_sum, tl.sum(tl.reshape(column_sums, [BT, DV]), axis=0))


@triton.jit
def cubic_reduce_kernel(
    partial,
    partial_mass,
    weights,
    sums,
    masses,
    splits,
    DV: tl.constexpr,
    F: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
    BF: tl.constexpr,
):
    """sums[bh, tile] = weights[tile] · Σ_split partial[split, bh, tile]; likewise the masses."""
    i_row = tl.program_id(0) * BF
    i_bh = tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(0) * BF
    o_f = i_row + tl.arange(0, BF)
    o_lv = tl.arange(0, L * DV)
    o_m = tl.arange(0, M)
    total = tl.zeros([BF, L * DV], dtype=tl.float32)
    mass = tl.zeros([BF, M], dtype=tl.float32)
    for i_split in range(splits):
        row = (i_split * tl.num_programs(1) + i_bh) * rows + o_f
        total += tl.load(partial + row[:, None] * (L * DV) + o_lv[None, :])
        mass += tl.load(partial_mass + row[:, None] * M + o_m[None, :])
    total *= tl.load(weights + o_f[:, None] * L + (o_lv // DV)[None, :])
    mass *= tl.load(weights + o_f[:, None] * L + o_m[None, :], mask=(o_m < L)[None, :], other=0.0)
    row = i_bh * rows + o_f
    tl.store(sums + row[:, None] * (L * DV) + o_lv[None, :], narrow(total, tl.bfloat16))
    tl.store(masses + row[:, None] * M + o_m[None, :], narrow(mass, tl.bfloat16))


@triton.jit
def cubic_read_kernel(
    query,
    chosen,
    ones,
    sums,
    masses,
    s_0,
    z_0,
    value_mean,
    numerator,
    denominator,
    heads,
    tokens,
    head_dim,
    value_dim,
    groups,
    parts,
    eps,
    q_b,
    q_h,
    q_n,
    o_b,
    o_h,
    o_n,
    COMMON: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_LIFTS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    F: tl.constexpr,
    L: tl.constexpr,
    LR: tl.constexpr,
    M: tl.constexpr,
    BM: tl.constexpr,
    DIVIDE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Numerator [BM, value_dim] and denominator [BM] of one tile of queries; see `read_kernel`.

    LR lifts are multiplied at once.
    """
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_q = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = o_q < tokens
    o_d = tl.arange(0, D)
    o_v = tl.arange(0, DV)
    o_f = tl.arange(0, F)
    p_query = query + i_b * q_b + i_h * q_h + o_q[:, None] * q_n
    q = tl.load(p_query + o_d[None, :], mask=live[:, None] & (o_d < head_dim)[None, :], other=0.0)
    q = narrow(q.to(tl.float32), tl.bfloat16)
    acc = tl.zeros([BM, DV], dtype=tl.float32) + tl.load(s_0 + i_bh * DV + o_v)[None, :]
    mass = tl.zeros([BM, M], dtype=tl.float32)
    zero = tl.zeros([BM, F], dtype=tl.float32)
    for i_common in tl.static_range(COMMON):
        # Pairs that every coordinate lifts are formed once.
        p_chosen = chosen + (i_common * 2 * F + o_f)[:, None] * D + o_d[None, :]
        first = dot(q, tl.trans(tl.load(p_chosen)), zero, "ieee")
        second = dot(q, tl.trans(tl.load(p_chosen + F * D)), zero, "ieee")
        base = narrow(first * second, tl.bfloat16)  # [BM, F]
        for i_group in range(groups):
            acc, mass = _lifted_tile(
                acc, mass, base, sums, masses, (i_bh * groups + i_group) * CHUNKS + i_common,
                p_query, live, i_group * L, head_dim, DV, F, L, LR, M, BM,
            )  # fmt: skip
    for i in range(groups * (CHUNKS - COMMON)):
        i_lift = i // (CHUNKS - COMMON)
        chunk = COMMON + i % (CHUNKS - COMMON)
        table = i_lift // BLOCK_LIFTS * CHUNKS + chunk
        p_chosen = chosen + (table * 2 * F + o_f)[:, None] * D + o_d[None, :]
        choose_a = tl.load(p_chosen)
        choose_b = tl.load(p_chosen + F * D)
        one_a = tl.load(ones + table * 2 * F + o_f)
        one_b = tl.load(ones + (table * 2 + 1) * F + o_f)
        first = dot(q, tl.trans(choose_a), zero, "ieee") + one_a[None, :]
        second = dot(q, tl.trans(choose_b), zero, "ieee") + one_b[None, :]
        base = narrow(first * second, tl.bfloat16)
        acc, mass = _lifted_tile(
            acc, mass, base, sums, masses, (i_bh * groups + i_lift) * CHUNKS + chunk,
            p_query, live, i_lift * L, head_dim, DV, F, L, LR, M, BM,
        )  # fmt: skip
    total = tl.load(z_0 + i_bh)
    den = total + tl.sum(mass, axis=1)
    p_num = numerator + (i_bh * tokens + o_q)[:, None] * value_dim + o_v[None, :]
    if DIVIDE:
        den = den / total
        if ROUND:
            den = narrow(den, numerator.dtype.element_ty).to(tl.float32)
        acc = acc / (tl.maximum(den, eps) * total)[:, None]
        acc += tl.load(value_mean + i_bh * value_dim + o_v, mask=o_v < value_dim)[None, :]
        i_h = i_bh // parts
        p_num = numerator + i_h // (heads // parts) * o_b + i_h % (heads // parts) * o_h
        p_num += i_bh % parts * value_dim + o_q[:, None] * o_n + o_v[None, :]
    tl.store(denominator + i_bh * tokens + o_q, den, mask=live)
    acc = narrow(acc, numerator.dtype.element_ty)
    tl.store(p_num, acc, mask=live[:, None] & (o_v < value_dim)[None, :])


@triton.jit
def _lifted_tile(
    acc,
    mass,
    base,
    sums,
    masses,
    tile,
    p_query,
    live,
    lift,
    head_dim,
    DV: tl.constexpr,
    F: tl.constexpr,
    L: tl.constexpr,
    LR: tl.constexpr,
    M: tl.constexpr,
    BM: tl.constexpr,
):
    """acc + Σ_l q_(lift + l) · (base @ sums[tile, l]), [BM, DV], and mass likewise, [BM, M]."""
    o_m = tl.arange(0, M)
    o_r = tl.arange(0, LR)
    o_rv = tl.arange(0, LR * DV)
    row = tile * F + tl.arange(0, F)
    for i_part in tl.static_range(L // LR):
        s = tl.load(sums + row[:, None] * (L * DV) + i_part * LR * DV + o_rv[None, :])
        o_l = lift + i_part * LR + o_r
        q_lift = tl.load(
            p_query + o_l[None, :], mask=live[:, None] & (o_l < head_dim)[None, :], other=0.0
        ).to(tl.float32)
        t = dot(base, s, tl.zeros([BM, LR * DV], dtype=tl.float32), "ieee")
        acc += tl.sum(tl.reshape(t, [BM, LR, DV]) * q_lift[:, :, None], axis=1)
    z = tl.load(masses + row[:, None] * M + o_m[None, :])
    q_mass = tl.load(
        p_query + lift + o_m[None, :],
        mask=live[:, None] & ((o_m < L) & (lift + o_m < head_dim))[None, :],
        other=0.0,
    ).to(tl.float32)
    mass += dot(base, z, tl.zeros([BM, M], dtype=tl.float32), "ieee") * q_mass
    return acc, mass
