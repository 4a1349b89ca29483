"""Products and roundings of the Triton kernels. Imported only where triton is installed."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b with fp32 sums."""
    if INTERPRETED:
        # Triton's interpreter multiplies the bit patterns of bf16 operands as integers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """fp32 ``x`` in ``DTYPE``, rounded to nearest even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # Triton's interpreter cuts the mantissa off where the GPU rounds.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def times(a, b):
    """Product of two values of one dtype in that dtype, rounded to nearest even."""
    if INTERPRETED:
        return narrow(a.to(tl.float32) * b.to(tl.float32), a.dtype)
    return a * b
