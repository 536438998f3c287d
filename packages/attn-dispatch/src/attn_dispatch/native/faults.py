"""Which errors say that a backend cannot do something, and which must reach the caller."""

from __future__ import annotations

from subprocess import SubprocessError
from types import TracebackType

import torch

_REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SubprocessError,
    SyntaxError,
    TypeError,
    ValueError,
)
# Compilers whose errors derive from Exception directly; named by package, so that none is imported for its errors.
_COMPILERS = ("cutlass", "torch", "triton")
_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")
# After these the device context is lost: whatever ran next would fail too, and take the blame.
_LOST = (
    "illegal memory access",
    "illegal instruction",
    "device-side assert triggered",
    "misaligned address",
    "unspecified launch failure",
)
_LONGEST = 160


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory, of a device or of the machine, ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in _MEMORY)


def is_refusal(error: BaseException) -> bool:
    """Say whether an error means that a backend cannot answer such a call.

    Out of memory, a lost device, interrupts and the exceptions of a host are not refusals.
    """
    if is_out_of_memory(error):
        return False
    text = str(error).lower()
    if any(part in text for part in _LOST):
        return False
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, _REFUSALS) or (isinstance(error, Exception) and package in _COMPILERS)


def describe(error: BaseException) -> str:
    """Return the type of an error and the first line of its message, short enough for a table."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


class Attempt:
    """Context in which a backend may refuse: a refusal becomes ``reason``, every other error passes.

    The error itself is not kept, so what its traceback holds on to is freed.

    Attributes:
        reason: What the refusal said; ``None`` if there was none.
        missing: Name of the module that a failed import asked for; ``None`` for every other refusal.
    """

    __slots__ = ("missing", "reason")

    def __init__(self) -> None:
        self.reason: str | None = None
        self.missing: str | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or not is_refusal(error):
            return False
        self.reason = describe(error)
        if isinstance(error, ModuleNotFoundError):
            self.missing = error.name
        return True
