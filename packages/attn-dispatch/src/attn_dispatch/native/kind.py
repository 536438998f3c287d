"""What decides which backends can answer a call: its kind. Calls of one kind share one plan and one probe."""

from __future__ import annotations

from typing import NamedTuple

import torch

SHORT_TOKENS = 1024
"""Up to so many queries a call is short; hosts may leave quantised attention out of short calls."""


class CallKind(NamedTuple):
    """Everything of a call that a backend may accept or refuse; nothing that changes from step to step.

    Attributes:
        dtype: Dtype of q, k and v.
        device: Device of q, k and v.
        width: Head width D.
        value_width: Width Dv of the values.
        masked: There is a mask.
        dropout: Dropout is wanted.
        gradient: The output must be differentiable.
        grouped: k and v have fewer heads than q.
        cross: q and k have different numbers of tokens.
        short: At most ``SHORT_TOKENS`` queries.
        varlen: Packed sequences.
    """

    dtype: torch.dtype
    device: torch.device
    width: int
    value_width: int
    masked: bool = False
    dropout: bool = False
    gradient: bool = False
    grouped: bool = False
    cross: bool = False
    short: bool = False
    varlen: bool = False

    def probed(self) -> CallKind:
        """Return the kind whose numbers can be checked: dropout is random, and a probe takes no gradient."""
        return self._replace(dropout=False, gradient=False, short=False)

    def any_length(self) -> CallKind:
        """Return the kind of such calls with any number of queries."""
        return self._replace(short=False)
