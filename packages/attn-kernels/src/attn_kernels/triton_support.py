"""Whether Triton kernels can run on given tensors; reads metadata only and imports nothing until it is asked."""

import importlib
import os
from functools import lru_cache

from torch import Tensor

from attn_kernels.impl import Impl
from attn_kernels.targets import Target, device_target


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors: ``TRITON_INTERPRET=1`` in the environment.

    Triton reads the variable when a kernel is defined, that is when a ``fused`` module is imported.
    """
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "y", "yes", "True")


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int] | str:
    """Return the major and minor version of Triton, or why it cannot be imported and what to do."""
    try:
        triton = importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "Triton is not installed; install triton (Linux) or triton-windows (Windows)"
        return f"Triton cannot be imported: it needs the module {error.name}; install it"
    except (ImportError, OSError) as error:
        return f"Triton cannot be imported: {error}; install the version that belongs to this torch"
    major, minor = str(triton.__version__).split(".")[:2]
    return int(major), int(minor)


def refuse_fused(
    requested: Impl | str,
    *tensors: Tensor,
    least: tuple[int, int] = (3, 2),
    failing: tuple[tuple[int, int], Target] | None = None,
) -> str | None:
    """Say why the fused form of an operator cannot run on these tensors, or ``None`` if it can.

    ``AUTO`` never takes the interpreter: it is thousands of times slower than the reference.

    Args:
        requested: The caller's ``impl``.
        *tensors: Tensors of the call, at least one; float64 and tensors that require a gradient are the operator's
            own business.
        least: The oldest version of Triton whose compiler takes the kernel.
        failing: A later version whose compiler fails on the kernel, and the family of GPUs for which it does.

    Returns:
        A reason that says what to do, or ``None``.
    """
    kinds = {tensor.device.type for tensor in tensors}
    if kinds == {"cpu"} and requested == Impl.AUTO:
        return "the tensors are on the CPU"
    if kinds != {"cuda"} and not (kinds == {"cpu"} and interpreted()):
        return f"Triton kernels need CUDA tensors, these are on {', '.join(sorted(kinds))}"
    version = triton_version()
    if isinstance(version, str):
        return version
    if kinds == {"cuda"} and interpreted():
        return "TRITON_INTERPRET is set; unset it to run on the GPU"
    if kinds == {"cuda"} and version < least:
        return (
            f"the compiler of Triton {version[0]}.{version[1]} cannot take it; install {least[0]}.{least[1]} or newer"
        )
    if kinds == {"cuda"} and failing is not None and version == failing[0]:
        target = device_target(tensors[0].device)
        if target == failing[1]:
            return f"the compiler of Triton {version[0]}.{version[1]} fails on it for {target}; install a newer one"
    return None
