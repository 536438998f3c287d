"""Who computes an operator: one enum, one rule.

An operator's name is its mathematics; ``impl`` only picks the code. ``AUTO`` takes the best form that can run here, an
explicit choice that cannot run raises: nothing falls back silently.
"""

from collections.abc import Mapping
from enum import StrEnum


class Impl(StrEnum):
    """Implementation of an operator."""

    AUTO = "auto"
    """The best available form, in the order fused, blocked, reference."""
    REFERENCE = "reference"
    """Clear torch: the specification. Differentiable, any device, quadratic memory allowed."""
    BLOCKED = "blocked"
    """Torch arranged for speed and bounded memory, any device."""
    FUSED = "fused"
    """Triton kernel."""


_PREFERENCE = (Impl.FUSED, Impl.BLOCKED, Impl.REFERENCE)


def resolve_impl(requested: Impl | str, refusals: Mapping[Impl, str | None]) -> Impl:
    """Pick the implementation to run.

    Args:
        requested: ``"auto"`` or the name of one implementation.
        refusals: For each implementation the operator has, ``None`` if it can run here, else the reason why not.

    Returns:
        The implementation to run, never ``AUTO``.

    Raises:
        ValueError: The name is unknown, the operator lacks that implementation, or it cannot run here.
    """
    try:
        impl = Impl(requested)
    except ValueError:
        names = ", ".join(repr(str(member)) for member in Impl)
        raise ValueError(f"impl must be one of {names}, got {requested!r}") from None
    if impl is Impl.AUTO:
        for candidate in _PREFERENCE:
            if candidate in refusals and refusals[candidate] is None:
                return candidate
        raise ValueError(f"no implementation can run here: {dict(refusals)}")
    if impl not in refusals:
        have = ", ".join(repr(str(member)) for member in refusals)
        raise ValueError(f"this operator has no impl {str(impl)!r}; it has {have}")
    reason = refusals[impl]
    if reason is not None:
        raise ValueError(f"impl {str(impl)!r} cannot run here: {reason}")
    return impl
