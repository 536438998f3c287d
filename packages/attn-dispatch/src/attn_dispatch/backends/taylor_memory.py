"""Asking the host for the device memory that a call of Taylor attention will need."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from attn_kernels import TaylorConfig, taylor_feature_count, taylor_memory

from attn_dispatch.backends.taylor_config import TaylorBackendConfig
from attn_dispatch.call import AttentionCall

logger = logging.getLogger(__name__)

MemoryReserve = Callable[[int, torch.device], None]
"""Asks a host to make so many bytes free on a device; it must leave the running model where it is."""

_SizeKey = tuple[torch.Size, torch.Size, torch.Size, torch.dtype, torch.device]


class Reservation:
    """Asks once per run for each size of call; a later call of the same size finds the memory that is free again.

    Args:
        config: Options of the backend.
        reserve: Who is asked; ``None`` = nobody.
    """

    def __init__(self, config: TaylorBackendConfig, reserve: MemoryReserve | None) -> None:
        self.config = config
        self.reserve = reserve
        self._operator = config.operator()
        self._asked: set[_SizeKey] = set()

    def begin_run(self) -> None:
        """Forget what was asked for."""
        self._asked.clear()

    def ask(self, changed: AttentionCall) -> None:
        """Ask for what a call needs beside its inputs.

        Args:
            changed: The call as the series sees it, heads cut into blocks.
        """
        if self.reserve is None or not self.config.memory_reserve:
            return
        key = (changed.q.shape, changed.k.shape, changed.v.shape, changed.q.dtype, changed.q.device)
        if key in self._asked:
            return
        self._asked.add(key)
        needed = int(self.config.memory_reserve_factor * taylor_bytes(changed, self.config.P, self._operator))
        if self.config.memory_reserve_log:
            logger.info("Taylor attention asks for %.1f MB on %s", needed / 2**20, changed.q.device)
        self.reserve(needed, changed.q.device)


def taylor_bytes(call: AttentionCall, terms: int, config: TaylorConfig) -> int:
    """Estimate the memory of one call beside its inputs, in bytes: what the operator holds at most, and its answer.

    Args:
        call: The call, heads cut into blocks.
        terms: P.
        config: Settings of the operator.
    """
    batch, heads, queries, width = call.q.shape
    keys, columns = call.v.shape[2:]
    held = taylor_memory(
        batch,
        heads,
        queries,
        keys,
        width,
        columns,
        terms=terms,
        dtype=call.q.dtype,
        device=call.q.device.type,
        config=config,
    )
    if call.q.device.type != "cpu" and config.path == "full":
        # The kernels hold the sums of all heads at once.
        stored = 2 if config.store == "bfloat16" else 4
        held = max(held, batch * heads * taylor_feature_count(width, terms) * (stored * columns + 4))
    return held + batch * heads * queries * (columns * call.v.dtype.itemsize + 4)
