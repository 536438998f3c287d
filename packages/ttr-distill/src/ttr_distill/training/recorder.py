"""Records attention calls while a host samples, to learn from them later: a handler that returns the teacher."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from attn_dispatch import AttentionCall, NativeAttention
from torch import Tensor

from ttr_distill.grad import training_mode
from ttr_distill.seeding import stream
from ttr_distill.student.backend import StudentBackend
from ttr_distill.student.bank import StudentBank
from ttr_distill.training.capture import CaptureConfig, capture
from ttr_distill.training.replay import ReplaySample
from ttr_distill.training.steps import StepDraw


class CaptureRecorder:
    """An ``AttentionHandler`` that captures every call of the bank's layers and answers with the teacher.

    What is drawn depends on the seed, the layer and the number of the run only, so that recording goes on after an
    interruption as if there had been none.

    Args:
        bank: The students that will learn from the recording; they say what a call's sample needs.
        take: Gets every sample.
        config: What is kept of a call.
        heldout_period: Of so many diffusion steps one is held out, from the first on; 0 = none.
        seed: Which queries and steps.
        run: Number of the first run.

    Attributes:
        declined: How often which reason kept a call from being captured.
    """

    def __init__(
        self,
        bank: StudentBank,
        take: Callable[[ReplaySample], None],
        config: CaptureConfig | None = None,
        *,
        heldout_period: int = 8,
        seed: int = 0,
        run: int = 0,
    ) -> None:
        self.bank = bank
        self.config = config or CaptureConfig()
        self.declined: Counter[str] = Counter()
        self.run = run
        self._take = take
        self._period = heldout_period
        self._seed = seed
        self._backend = StudentBackend(bank)
        self._steps = self._begin_steps()
        self._queries: dict[object, torch.Generator] = {}

    def begin_run(self) -> None:
        """A sampling run starts."""
        self._steps = self._begin_steps()
        self._queries = {}

    def end_run(self) -> None:
        """The run is over."""
        self.run += 1

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer with ``native(call)`` and record the call.

        Raises:
            OSError: The recording cannot be written.
        """
        teacher = native(call)
        reason = self._backend.refuses(call)
        if reason is not None or call.layer is None or call.layout is None:
            self.declined[reason or "the call has no layer"] += 1
            return teacher
        self._steps.layers(call.layer, call.step)
        with training_mode():
            with torch.no_grad():
                selection = self.bank[call.layer].select(call)
            queries = self._queries.setdefault(call.layer, stream(self._seed, "recorded", call.layer, self.run))
            sample = capture(
                call, teacher, call.layer, call.layout, selection, self.config, seed=self._seed, generator=queries
            )
        if sample is None:
            self.declined["the call holds a number that is not finite"] += 1
        else:
            self._take(replace(sample, trainable=not self._steps.heldout))
        return teacher

    def _begin_steps(self) -> StepDraw:
        count = len(self.bank)
        seed = int(torch.randint(2**31, (1,), generator=stream(self._seed, "recorded steps", self.run)))
        return StepDraw(self.bank.layers, least=count, most=count, period=self._period, spared=0, seed=seed)
