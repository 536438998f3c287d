"""What a run of the hybrid backend did, as one line of JSON."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from attn_dispatch.backends.hybrid_config import HybridBackendConfig
from attn_dispatch.backends.quality import PendingValues, Quality, QualityTally
from attn_dispatch.call import AttentionCall

logger = logging.getLogger(__name__)

Meta = Mapping[str, str | int | float | bool]
"""Facts about a run, as values that ``json`` can write."""


class RunRecord:
    """Collects one run and appends it to a file of JSON lines.

    Args:
        config: Options of the backend.
        path: The file; ``None`` = nothing is written. Its folders are made.
        meta: Facts that the host knows, e.g. ``model_class``.
    """

    def __init__(self, config: HybridBackendConfig, path: Path | None, meta: Meta | None) -> None:
        self.config = config
        self.path = path
        self.meta: dict[str, str | int | float | bool] = dict(meta or {})
        self.tally = QualityTally()
        self._started = time.time()
        self._last: tuple[AttentionFacts, int, float] | None = None

    def begin_run(self) -> None:
        """Start anew."""
        self.tally = QualityTally()
        self._started = time.time()
        self._last = None

    def note(self, call: AttentionCall, window: int, weight: float) -> None:
        """Note a call that was answered, with the window and weight it had."""
        self._last = (AttentionFacts(call), window, weight)

    def end_run(self) -> Quality | None:
        """Log and append what was measured; ``None`` if nothing was. Waits for the device."""
        figures = self.tally.figures(PendingValues(self.tally.values()).read())
        if figures is None:
            return None
        record = self.to_dict(figures)
        logger.info("Hybrid attention: %s", json.dumps(record))
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                logger.warning("The record of hybrid attention could not be written to %s: %s", self.path, error)
        return figures

    def to_dict(self, figures: Quality) -> dict[str, object]:
        """Return the record: ``timestamp`` (seconds since 1970), ``quality``, ``config`` and ``meta``."""
        unrecorded = ("log_steps", "log_quality_stats")
        config = {name: value for name, value in asdict(self.config).items() if name not in unrecorded}
        meta: dict[str, object] = {"run_start_ts": self._started, **self.meta}
        if self._last is not None:
            facts, window, weight = self._last
            meta |= facts.to_dict()
            meta |= {"effective_local_window": window, "effective_global_weight": weight}
        return {"timestamp": time.time(), "quality": figures.to_dict(), "config": config, "meta": meta}


class AttentionFacts:
    """Sizes and place of a call, without its tensors.

    Args:
        call: The call; it is not kept.
    """

    def __init__(self, call: AttentionCall) -> None:
        batch, heads, queries, width = call.q.shape
        keys = call.k.shape[2]
        self._facts: dict[str, object] = {
            "batch": batch,
            "heads": heads,
            "head_dim": width,
            "token_dim": heads * width,
            "q_len": queries,
            "k_len": keys,
            "is_cross": queries != keys,
            "dtype": str(call.q.dtype).removeprefix("torch."),
            "device": str(call.q.device),
            "sigma": None if call.step is None else call.step.sigma,
        }
        if call.layer is not None:
            self._facts |= {"block_type": call.layer.stream, "block_index": call.layer.index}
        if call.layout is not None and call.layout.grids:
            grid = call.layout.grids[0]
            self._facts |= {"latent_h": grid.rows, "latent_w": grid.columns}

    def to_dict(self) -> dict[str, object]:
        """The facts, as values that ``json`` can write."""
        return dict(self._facts)
