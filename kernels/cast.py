"""Casts that round the same way on a GPU and in Triton's interpreter."""

import triton
import triton.language as tl


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """fp32 to DTYPE, to the nearest, ties to even.

    The GPU does this by itself; the interpreter (Triton 3.9) truncates to bfloat16. Rounding the
    bits first makes the cast exact for both, at four integer instructions per output element.
    """
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)
