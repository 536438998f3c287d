"""Device functions that the Triton kernels of several operators share."""

import triton
import triton.language as tl


@triton.jit
def mma_operand(x, dtype: tl.constexpr, interpret: tl.constexpr):
    """Round ``x`` to the dtype of a matrix product's operand.

    Triton's interpreter computes bfloat16 arithmetic wrongly but casts rightly: there the rounded values go back to
    float32, so that a test sees the rounding that the device makes.
    """
    rounded = x.to(dtype)
    if interpret:
        rounded = rounded.to(tl.float32)
    return rounded
