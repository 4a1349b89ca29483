"""Triton kernel that prepares whole heads. Imported only where triton is installed."""

import triton
import triton.language as tl

from .triton_numeric import narrow


@triton.jit
def lay_kernel(
    x,
    mean,
    other_mean,
    out,
    exponents,
    heads,
    tokens,
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
    EXPONENTS: tl.constexpr,
):
    """out[bh, part] = root · (x - mean) of each slice, [BT, W], and its product with other_mean.

    BT tokens, W padded width of a slice. ``mean`` and ``other_mean`` are [BH, PARTS * width].
    """
    i_part = tl.program_id(1) % PARTS
    i_bh = (tl.program_id(1) // PARTS).to(tl.int64)
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_w = tl.arange(0, W)
    live = o_t < tokens
    inside = live[:, None] & (o_w < width)[None, :]
    column = i_part * width + o_w
    p_x = x + i_bh // heads * x_b + i_bh % heads * x_h
    rows = tl.load(p_x + o_t[:, None] * x_n + column[None, :], mask=inside, other=0.0)
    rows = rows.to(tl.float32)
    o_mean = i_bh * (PARTS * width) + column
    if CENTRE:
        rows -= tl.load(mean + o_mean, mask=o_w < width, other=0.0)[None, :]
    rows *= root
    i_row = i_bh * PARTS + i_part
    if EXPONENTS:
        other = tl.load(other_mean + o_mean, mask=o_w < width, other=0.0) * other_root
        tl.store(
            exponents + i_row * tokens + o_t, tl.sum(rows * other[None, :], axis=1), mask=live
        )
    p_out = out + (i_row * tokens + o_t)[:, None] * width + o_w[None, :]
    tl.store(p_out, narrow(rows, out.dtype.element_ty), mask=inside)
