"""Whether Triton kernels can run on given tensors; reads metadata only and imports nothing until it is asked."""

import importlib.util
import os

from torch import Tensor

from attn_kernels.impl import Impl


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors: ``TRITON_INTERPRET=1`` in the environment.

    Triton reads the variable when a kernel is defined, that is when a ``fused`` module is imported.
    """
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "y", "yes", "True")


def refuse_fused(requested: Impl | str, *tensors: Tensor) -> str | None:
    """Say why the fused form of an operator cannot run on these tensors, or ``None`` if it can.

    ``AUTO`` never takes the interpreter: it is thousands of times slower than the reference.

    Args:
        requested: The caller's ``impl``.
        *tensors: Tensors of the call, at least one; float64 and tensors that require a gradient are the operator's
            own business.

    Returns:
        A reason that says what to do, or ``None``.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install triton (Linux) or triton-windows (Windows)"
    kinds = {tensor.device.type for tensor in tensors}
    if kinds == {"cuda"}:
        return "TRITON_INTERPRET is set; unset it to run on the GPU" if interpreted() else None
    if kinds == {"cpu"} and interpreted():
        return "the tensors are on the CPU" if requested == Impl.AUTO else None
    return f"Triton kernels need CUDA tensors, these are on {', '.join(sorted(kinds))}"
