"""Why this backend and not another, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attn_dispatch.native.catalog import CANDIDATES, SDPA
from attn_dispatch.native.kind import SHORT_TOKENS, CallKind
from attn_dispatch.native.plans import Plan, Refusal
from attn_dispatch.native.selection import Selection

_TYPICAL_SHAPE = (1, 24, 4608, 128)
_HEADINGS = ("", "backend", "candidate", "what it is", "available")


@dataclass(frozen=True)
class ExplanationRow:
    """What is known of one candidate for one kind of call.

    Attributes:
        backend: Name of the backend.
        candidate: Name of the candidate; several may share a backend.
        label: What would run, in words.
        reason: ``None`` if it is available, else why not.
        runs: It is the one that runs.
        asked: The selection's name covers it; another does not run, available or not.
    """

    backend: str
    candidate: str
    label: str
    reason: str | None
    runs: bool
    asked: bool

    @property
    def available(self) -> bool:
        """Whether it could answer such calls."""
        return self.reason is None


@dataclass(frozen=True)
class Explanation:
    """A table of backends; ``str()`` of it is meant to be read.

    Attributes:
        request: Name of the selection.
        device: Device, as text.
        call: Which calls the table is about, as text.
        rows: All candidates.
    """

    request: str
    device: str
    call: str
    rows: tuple[ExplanationRow, ...]

    @property
    def chosen(self) -> ExplanationRow:
        """The row that runs."""
        return next(row for row in self.rows if row.runs)

    def __getitem__(self, name: str) -> ExplanationRow:
        """Return the row of a candidate, or the best row of a backend.

        Raises:
            KeyError: There is no such row.
        """
        found = [row for row in self.rows if name in (row.candidate, row.backend)]
        if not found:
            raise KeyError(name)
        return next((row for row in found if row.runs), next((row for row in found if row.available), found[0]))

    def __str__(self) -> str:
        cells = [_HEADINGS]
        for row in self.rows:
            state = "yes" if row.reason is None else row.reason
            if row.reason is None and not row.asked:
                state = f"yes, but {self.request!r} does not ask for it"
            cells.append(("->" if row.runs else "", row.backend, row.candidate, row.label, state))
        widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS) - 1)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
            for line in cells
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([f"{self.request!r} on {self.device}, for {self.call}: {self.chosen.label}", "", *lines])


def explain(
    selection: Selection,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    *,
    keys: int | None = None,
    masked: bool = False,
) -> Explanation:
    """Say what would run, and why the rest would not. Probes what has not been probed.

    Args:
        selection: Whose choice.
        shape: Shape of q, ``(B, H, Nq, D)``; that of Flux at one megapixel if ``None``.
        dtype: Dtype of q, k and v; the device's best if ``None``.
        device: Their device; the host's, or the default accelerator, if ``None``.
        keys: Number of keys; as many as queries if ``None``.
        masked: There is a mask.

    Raises:
        ValueError: ``shape`` has not four sizes.
    """
    shape = tuple(_TYPICAL_SHAPE if shape is None else shape)
    if len(shape) != 4:
        raise ValueError(f"shape must be (B, H, Nq, D), got {shape}")
    dispatcher = selection.dispatcher
    device = dispatcher.device() if device is None else torch.device(device)
    arch = dispatcher.arch(device)
    dtype = dispatcher.precision(device) if dtype is None else dtype
    cross = keys is not None and keys != shape[2]
    kind = CallKind(dtype, device, shape[3], shape[3], masked, cross=cross, short=shape[2] <= SHORT_TOKENS)
    best = selection.best(kind)
    asked = {candidate.key for candidate in selection.candidates(device)}
    rows = []
    for candidate in CANDIDATES:
        found = dispatcher.plan(candidate, kind)
        reason = found.reason if isinstance(found, Refusal) else None
        label = found.label if isinstance(found, Plan) else candidate.label
        runs, covered = candidate.key == best.key, candidate.key in asked
        rows.append(ExplanationRow(candidate.backend, candidate.key, label, reason, runs, covered))
    rows.append(ExplanationRow(SDPA, SDPA, dispatcher.sdpa_plan(kind).label, None, best.key == SDPA, True))
    call = f"q {shape}" + (f" and {keys} keys" if cross else "") + f" of {str(dtype).removeprefix('torch.')}"
    where = str(device) if str(arch) == device.type else f"{device} ({arch})"
    return Explanation(selection.name, where, call + (" with a mask" if masked else ""), tuple(rows))
