"""Triton kernels of the streaming path. Imported only where triton is installed.

Shapes in comments: BT keys, BM queries, BF monomials, DV padded width of the value chunk.
Offsets that grow with tokens or heads are int64.
"""

import triton
import triton.language as tl

from .triton_numeric import dot, narrow


@triton.jit
def _monomials(
    p_x,
    o_x,
    live,
    x_n,
    coordinates,
    o_f,
    head_dim,
    FEATURES: tl.constexpr,
    DEGREE: tl.constexpr,
    ROWS: tl.constexpr,
    BF: tl.constexpr,
):
    """Products of DEGREE coordinates, [ROWS, BF] fp32; rows that are not live are 0."""
    psi = tl.zeros([ROWS, BF], dtype=tl.float32) + live[:, None].to(tl.float32)
    for p in tl.static_range(DEGREE):
        c = tl.load(coordinates + p * FEATURES + o_f)
        # One row of x is one or two cache lines, so a row's gathers hit the same line.
        psi *= tl.load(
            p_x + o_x[:, None] * x_n + c[None, :],
            mask=live[:, None] & (c < head_dim)[None, :],
            other=1.0,
        ).to(tl.float32)
    return psi


@triton.jit
def build_chunk_kernel(
    key,
    value,
    weight,
    coordinates,
    factors,
    sums,
    masses,
    heads,
    tokens,
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
    FEATURES: tl.constexpr,
    DEGREE: tl.constexpr,
    DV: tl.constexpr,
    BF: tl.constexpr,
    BT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MASS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """sums[bh, f] = Σ_t w ψ_f(k_t) v_t / α!, masses[bh, f] = Σ_t w ψ_f(k_t) / α!."""
    i_f = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_f = i_f * BF + tl.arange(0, BF)
    o_v = tl.arange(0, DV)
    p_key = key + i_b * k_b + i_h * k_h
    p_value = value + i_b * v_b + i_h * v_h
    p_weight = weight + i_b * w_b + i_h * w_h
    acc = tl.zeros([BF, DV], dtype=tl.float32)
    mass = tl.zeros([BF], dtype=tl.float32)
    for start in range(0, tokens, BT):
        o_t = (start + tl.arange(0, BT)).to(tl.int64)
        live = o_t < tokens
        if WEIGHTED:
            w = tl.load(p_weight + o_t * w_n, mask=live, other=0.0).to(tl.float32)
            # 0 · NaN is NaN: a masked key is never read.
            live = live & (w != 0.0)
        v = tl.load(
            p_value + o_t[:, None] * v_n + o_v[None, :],
            mask=live[:, None] & (o_v < value_dim)[None, :],
            other=0.0,
        )
        if WEIGHTED:
            v = v.to(tl.float32) * w[:, None]
        psi = _monomials(
            p_key, o_t, live, k_n, coordinates, o_f, head_dim, FEATURES, DEGREE, BT, BF
        )
        psi = narrow(psi, OPERAND)  # [BT, BF]
        acc = dot(tl.trans(psi), narrow(v.to(tl.float32), OPERAND), acc, "ieee")
        if MASS:
            weighed = psi.to(tl.float32)
            if WEIGHTED:
                weighed = weighed * w[:, None]
            mass += tl.sum(weighed, axis=0)
    factor = tl.load(factors + o_f)
    row = i_bh * FEATURES + o_f
    tl.store(
        sums + row[:, None] * DV + o_v[None, :],
        narrow(acc * factor[:, None], sums.dtype.element_ty),
    )
    if MASS:
        tl.store(masses + row, mass * factor)


@triton.jit
def read_chunk_kernel(
    query,
    coordinates,
    sums,
    masses,
    numerator,
    denominator,
    heads,
    tokens,
    head_dim,
    value_dim,
    n_n,
    live_features,
    q_b,
    q_h,
    q_n,
    FEATURES: tl.constexpr,
    DEGREE: tl.constexpr,
    DV: tl.constexpr,
    BF: tl.constexpr,
    BM: tl.constexpr,
    MASS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """numerator += ψ(q) @ sums and denominator += ψ(q) @ masses, for one tile of queries."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = o_m < tokens
    o_v = tl.arange(0, DV)
    p_query = query + i_b * q_b + i_h * q_h
    acc = tl.zeros([BM, DV], dtype=tl.float32)
    den = tl.zeros([BM], dtype=tl.float32)
    for start in range(0, live_features, BF):
        o_f = start + tl.arange(0, BF)
        row = i_bh * FEATURES + o_f
        psi = _monomials(
            p_query, o_m, live, q_n, coordinates, o_f, head_dim, FEATURES, DEGREE, BM, BF
        )
        psi = narrow(psi, sums.dtype.element_ty)  # [BM, BF]
        s = tl.load(sums + row[:, None] * DV + o_v[None, :])  # [BF, DV]
        acc = dot(psi, s, acc, PRECISION)
        if MASS:
            den += tl.sum(psi.to(tl.float32) * tl.load(masses + row)[None, :], axis=1)
    # Programs own their queries and chunks come one after the other: no atomics, equal bits.
    p_num = numerator + (i_bh * tokens + o_m)[:, None] * n_n + o_v[None, :]
    inside = live[:, None] & (o_v < value_dim)[None, :]
    tl.store(p_num, tl.load(p_num, mask=inside, other=0.0) + acc, mask=inside)
    if MASS:
        p_den = denominator + i_bh * tokens + o_m
        tl.store(p_den, tl.load(p_den, mask=live, other=0.0) + den, mask=live)
