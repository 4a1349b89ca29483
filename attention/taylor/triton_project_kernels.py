"""Triton kernels that find a head's projection. Imported only where triton is installed.

Shapes in comments: W padded width of a slice, R padded rank, BT tokens.
"""

import triton
import triton.language as tl

from .triton_numeric import dot

EPS = tl.constexpr(2.0**-23)
TINY = tl.constexpr(2.0**-126)


@triton.jit
def _sampled(
    p_x, indices, start, samples, column, inside, mean, root, x_n,
    BT: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """root · (x - mean) of BT samples, [BT, W] fp32, and which of them there are."""
    o_t = start + tl.arange(0, BT)
    live = o_t < samples
    o_x = o_t.to(tl.int64)
    if SAMPLED:
        o_x = tl.load(indices + o_t, mask=live, other=0)
    both = live[:, None] & inside[None, :]
    rows = tl.load(p_x + o_x[:, None] * x_n + column[None, :], mask=both, other=0.0)
    rows = (rows.to(tl.float32) - mean[None, :]) * root
    return tl.where(both, rows, 0.0), live


@triton.jit
def moment_kernel(
    x,
    mean,
    other_mean,
    indices,
    partial,
    tops,
    heads,
    samples,
    samples_per_split,
    width,
    root,
    other_root,
    x_b,
    x_h,
    x_n,
    PARTS: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    CENTRE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SAMPLED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial[split, bh, part] = Σ w x xᵀ of some of one slice's samples, [W, W].

    The weights are exp(x · other_mean - top) with WEIGHTED, with the split's own top in tops, else
    1 and 0.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(0) % PARTS
    i_bh = i_row // PARTS
    o_w = tl.arange(0, W)
    inside = o_w < width
    column = i_part * width + o_w
    p_x = x + i_bh // heads * x_b + i_bh % heads * x_h
    o_mean = i_bh * (PARTS * width) + column
    begin = tl.program_id(1) * samples_per_split
    end = tl.minimum(begin + samples_per_split, samples)
    centre = tl.zeros([W], dtype=tl.float32)
    if CENTRE:
        centre = tl.load(mean + o_mean, mask=inside, other=0.0)
    other = tl.zeros([W], dtype=tl.float32)
    top = 0.0
    if WEIGHTED:
        top = float("-inf")
        other = tl.load(other_mean + o_mean, mask=inside, other=0.0) * other_root
        for start in range(begin, end, BT):
            rows, live = _sampled(
                p_x, indices, start, end, column, inside, centre, root, x_n, BT, SAMPLED
            )
            exponent = tl.where(live, tl.sum(rows * other[None, :], axis=1), float("-inf"))
            top = tl.maximum(top, tl.max(exponent, axis=0))
    acc = tl.zeros([W, W], dtype=tl.float32)
    for start in range(begin, end, BT):
        rows, live = _sampled(
            p_x, indices, start, end, column, inside, centre, root, x_n, BT, SAMPLED
        )
        left = rows
        if WEIGHTED:
            weight = tl.exp(tl.sum(rows * other[None, :], axis=1) - top)
            left = rows * tl.where(live, weight, 0.0)[:, None]
        acc = dot(tl.trans(left), rows, acc, PRECISION)
    row = tl.program_id(1) * tl.num_programs(0) + i_row
    tl.store(partial + (row * W + o_w)[:, None] * W + o_w[None, :], acc)
    tl.store(tops + row, top)


@triton.jit
def moment_sum_kernel(partial, tops, moment, splits, W: tl.constexpr):
    """moment[bh, part] = Σ_split exp(top) partial, over its trace, regularised: [W, W]."""
    i_row = tl.program_id(0).to(tl.int64)
    o_w = tl.arange(0, W)
    o_square = o_w[:, None] * W + o_w[None, :]
    top = float("-inf")
    for i_split in range(splits):
        top = tl.maximum(top, tl.load(tops + i_split * tl.num_programs(0) + i_row))
    acc = tl.zeros([W, W], dtype=tl.float32)
    for i_split in range(splits):
        row = i_split * tl.num_programs(0) + i_row
        # A common factor does not count.
        acc += tl.exp(tl.load(tops + row) - top) * tl.load(partial + row * W * W + o_square)
    diagonal = o_w[:, None] == o_w[None, :]
    trace = tl.sum(tl.sum(tl.where(diagonal, acc, 0.0), axis=1), axis=0)
    acc = acc / tl.maximum(trace, TINY) + tl.where(diagonal, 10.0 * EPS, 0.0)
    tl.store(moment + i_row * W * W + o_square, acc)


@triton.jit
def _inverse_factor(gram, rank, R: tl.constexpr):
    """L⁻¹ for ``L Lᵀ = gram``, [R, R], by elimination beside the identity."""
    o_r = tl.arange(0, R)
    diagonal = o_r[:, None] == o_r[None, :]
    mean = tl.sum(tl.sum(tl.where(diagonal, gram, 0.0), axis=1), axis=0) / rank
    # What a factor needs where a basis has fewer directions than columns; 1 where it is padded.
    gram += tl.where(diagonal, tl.where(o_r < rank, mean * (EPS * rank), 1.0)[:, None], 0.0)
    inverse = tl.where(diagonal, 1.0, 0.0)
    for j in range(rank):
        chosen = (o_r == j)[:, None]
        row = tl.sum(tl.where(chosen, gram, 0.0), axis=0)
        inverse_row = tl.sum(tl.where(chosen, inverse, 0.0), axis=0)
        column = tl.sum(tl.where((o_r == j)[None, :], gram, 0.0), axis=1)
        pivot = tl.sum(tl.where(o_r == j, row, 0.0), axis=0)
        factor = tl.where(o_r > j, column / tl.maximum(pivot, TINY), 0.0)
        gram -= factor[:, None] * row[None, :]
        inverse -= factor[:, None] * inverse_row[None, :]
    pivots = tl.sum(tl.where(diagonal, gram, 0.0), axis=1)
    return inverse * tl.rsqrt(tl.maximum(pivots, TINY))[:, None]


@triton.jit
def _applied(
    matrix, scratch, basis, i_row,
    W: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """matrix[i_row] @ basis, [W, R], by BK columns at a time: all at once fill a GPU's registers.

    Rows of a tensor in registers can't be chosen, so the basis goes by way of ``scratch``.
    """
    o_w = tl.arange(0, W)
    o_r = tl.arange(0, R)
    o_k = tl.arange(0, BK)
    tl.debug_barrier()
    tl.store(scratch + (i_row * W + o_w)[:, None] * R + o_r[None, :], basis)
    tl.debug_barrier()
    acc = tl.zeros([W, R], dtype=tl.float32)
    for k in range(0, W, BK):
        left = tl.load(matrix + (i_row * W + o_w)[:, None] * W + (k + o_k)[None, :])
        right = tl.load(scratch + (i_row * W + k + o_k)[:, None] * R + o_r[None, :])
        acc = dot(left, right, acc, PRECISION)
    return acc


@triton.jit
def factors_kernel(
    of_query,
    of_key,
    start,
    scratch,
    query_factor,
    key_factor,
    width,
    rank,
    W: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    ITERATIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A and B of `projection.factors` for one slice, [width, rank], from its moments [W, W].

    The basis Y is kept orthonormal in the keys' moment, ``Yᵀ Ck Y = I``, so that every iteration
    ends with ``A = Ck Y`` and ``B = Y``; the next is Cq A.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_w = tl.arange(0, W)
    o_r = tl.arange(0, R)
    both = (o_w < width)[:, None] & (o_r < rank)[None, :]
    zero = tl.zeros([W, R], dtype=tl.float32)
    basis = tl.load(start + o_w[:, None] * rank + o_r[None, :], mask=both, other=0.0)
    a = zero
    b = zero
    for _ in range(ITERATIONS + 1):
        norm = tl.sqrt(tl.sum(basis * basis, axis=0))
        basis = basis / tl.maximum(norm, TINY)[None, :]
        left = _applied(of_key, scratch, basis, i_row, W, R, BK, PRECISION)
        gram = dot(tl.trans(basis), left, tl.zeros([R, R], dtype=tl.float32), PRECISION)
        inverse = tl.trans(_inverse_factor(gram, rank, R))
        a = dot(left, inverse, zero, PRECISION)
        b = dot(basis, inverse, zero, PRECISION)
        basis = _applied(of_query, scratch, a, i_row, W, R, BK, PRECISION)
    # Split the scale between the sides: Σ Aᵀ Cq A on one, rank on the other.
    spread = tl.sum(tl.sum(a * basis, axis=1), axis=0) / rank
    balance = tl.sqrt(tl.sqrt(tl.maximum(spread, TINY)))
    o_out = (i_row * width + o_w)[:, None] * rank + o_r[None, :]
    tl.store(query_factor + o_out, a / balance, mask=both)
    tl.store(key_factor + o_out, b * balance, mask=both)
