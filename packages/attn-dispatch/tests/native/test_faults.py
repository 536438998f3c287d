import subprocess

import pytest
import torch
from attn_dispatch.native.faults import Attempt, describe, is_out_of_memory, is_refusal


class TritonError(Exception):
    """As Triton's, whose errors derive from Exception."""


TritonError.__module__ = "triton.runtime.errors"


class InterruptProcessingException(Exception):
    """As ComfyUI's before 0.33."""


InterruptProcessingException.__module__ = "comfy.model_management"

MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    MemoryError(),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED"),
]
PASSING = [
    *MEMORY,
    KeyboardInterrupt(),
    SystemExit(1),
    GeneratorExit(),
    InterruptProcessingException(),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
]
REFUSALS = [
    ValueError("Unsupported head_dim: 96"),
    AssertionError("last dim must be contiguous"),
    NotImplementedError("no"),
    ImportError("libcudart.so.12: cannot open shared object file"),
    OSError("undefined symbol"),
    RuntimeError(
        "CUDA error: no kernel image is available for execution on the device\n"
        "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
    ),
    TritonError("out of resource: shared memory"),
    subprocess.CalledProcessError(1, ["gcc"]),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_is_nobodys_refusal_passes(error: BaseException) -> None:
    assert not is_refusal(error)
    with pytest.raises(type(error)), Attempt():
        raise error


@pytest.mark.parametrize("error", REFUSALS, ids=repr)
def test_a_refusal_becomes_a_reason(error: BaseException) -> None:
    with Attempt() as attempt:
        raise error
    assert attempt.reason == describe(error)
    assert type(error).__name__ in (attempt.reason or "")


@pytest.mark.parametrize("error", MEMORY, ids=repr)
def test_memory_is_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)


def test_shared_memory_of_a_kernel_is_no_memory_of_the_device() -> None:
    assert not is_out_of_memory(TritonError("out of resource: shared memory, Required: 200000, Hardware limit: 101376"))


def test_an_attempt_without_error_has_no_reason() -> None:
    with Attempt() as attempt:
        pass
    assert attempt.reason is None
    assert attempt.missing is None


def test_a_missing_module_is_named() -> None:
    with Attempt() as attempt:
        raise ModuleNotFoundError("No module named 'x'", name="x")
    assert attempt.missing == "x"


def test_a_long_message_is_cut_to_a_line_of_a_table() -> None:
    assert describe(ValueError("first\nsecond")) == "ValueError: first"
    assert len(describe(ValueError("x" * 1000))) == 160
    assert describe(ValueError()) == "ValueError"
