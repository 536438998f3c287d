"""Distilling in ComfyUI: one session per checkpoint and model, one handler per node execution.

The checkpoint is the truth: a run begins by looking whether another one has saved since, and ends by saving, also when
it was stopped or failed. What a run cannot do is told after it, and never costs the image.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from attn_dispatch import AttentionCall, NativeAttention
from torch import Tensor

from ttr_distill.adapters.comfyui_session import DistillSession, SessionPlan, SinkMaker

logger = logging.getLogger(__name__)

TELL_SECONDS = 1.0
"""While a run goes on, the user is told how far training is every so often."""

_SESSIONS = "ttr_sessions"

Tell = Callable[[str], None]


class DistillHandler:
    """An ``AttentionHandler`` that lets a session learn from every run of one patched model.

    Args:
        session: What learns.
        updates: Updates that this model may make, over all its runs.
        check: Called before every attention call; a host raises its interrupt from here.
        tell: Shows a line to the user.
        reserve: Asks the host to free so many bytes on the device before a run.
    """

    def __init__(
        self,
        session: DistillSession,
        updates: int,
        *,
        check: Callable[[], None] | None = None,
        tell: Tell | None = None,
        reserve: Callable[[int], None] | None = None,
    ) -> None:
        self.session = session
        self.left = updates
        self.check = check
        self.tell = tell
        self.reserve = reserve
        self._before: int | None = None
        self._seen = 0
        self._unnamed = 0
        self._told = 0.0

    def __deepcopy__(self, memo: dict[int, Any]) -> DistillHandler:
        return self

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer ``call`` with ``[B, H, Nq, Dv]``, the teacher's unless the session previews students."""
        if self.check is not None:
            self.check()
        self._seen += 1
        if call.layer is None:
            self._unnamed += 1
        if call.layer not in self.session.plan.layers:
            return native(call)
        output = self.session.distiller(call, native)
        if self.tell is not None and time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            self.tell(self.session.progress())
        return output

    def begin_run(self) -> None:
        """Open the session for one sampling run."""
        self._before = None
        self._seen = self._unnamed = 0
        self.session.begin_run(self.left)
        self._before = self.session.distiller.updates
        if self.reserve is not None:
            self.reserve(self.session.distiller.memory_bytes)

    def end_run(self) -> None:
        """Close it: save, and tell how far training has come."""
        if self._before is None:
            return
        before, self._before = self._before, None
        try:
            self.session.end_run(before)
        finally:
            self.left = max(0, self.left - (self.session.distiller.updates - before))
            text = "\n".join([self.session.summary(), *self._hints(self.session.distiller.updates - before)])
            logger.info("distillation: %s", text.replace("\n", "; "))
            if self.tell is not None:
                self.tell(text)

    def _hints(self, updates: int) -> Iterable[str]:
        """Sentences that say why a run learned nothing."""
        if updates or not self._seen:
            return
        if self._unnamed == self._seen:
            yield "nothing was trained: this ComfyUI does not name the blocks of the model; update it"
        elif self.left == 0:
            yield "nothing was trained: the steps are used up; run the node again, or raise steps"
        else:
            for reason, count in self.session.distiller.declined.most_common(1):
                yield f"nothing was trained: {reason} ({count} calls)"


class _Sessions:
    """Sessions of one model by checkpoint; shared by all its clones."""

    def __init__(self) -> None:
        self.by_path: dict[Path, DistillSession] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Sessions:
        return self


def open_session(patcher: Any, plan: SessionPlan, sinks: SinkMaker | None = None) -> DistillSession:
    """Return the session of a checkpoint on a model: the one that is there, or a new one if the plan has changed.

    It belongs to the model: several executions of a node on one model, as a list of prompts makes them, share it.

    Args:
        patcher: ComfyUI's ``ModelPatcher``.
        plan: What is trained.
        sinks: As in ``DistillSession``; replaces the sinks of a session that is there.

    Raises:
        CheckpointError: See ``DistillSession.refresh``.
    """
    sessions = patcher.model_options.setdefault(_SESSIONS, _Sessions())
    session: DistillSession | None = sessions.by_path.get(plan.path)
    if session is None or session.plan != plan:
        if session is not None:
            session.release()
        session = DistillSession(plan)
        sessions.by_path[plan.path] = session
    session.sinks = sinks
    session.refresh()
    return session


def check_writable(path: Path) -> None:
    """Make the folder of a checkpoint, to learn before a run that it can be written.

    Raises:
        ValueError: It cannot; the message says why and what to do.
    """
    probe = path / f"tmp-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"checkpoints cannot be written to {path}: {error.strerror or error}; choose another checkpoint_path"
        ) from error
