"""Learns students while a host samples: an attention handler that returns the teacher's answer."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from attn_dispatch import AttentionCall, LayerKey, NativeAttention, TokenLayout
from torch import Tensor

from ttr_distill.grad import training_mode
from ttr_distill.metrics import MetricSink, MetricValue
from ttr_distill.student.backend import StudentBackend
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.readiness import ReadinessTracker
from ttr_distill.training.capture import CaptureConfig, capture, redraw
from ttr_distill.training.form_choice import keep_better_form
from ttr_distill.training.layer import LayerState, LayerTraining
from ttr_distill.training.memory import is_out_of_memory
from ttr_distill.training.replay import ReplayBuffer, ReplaySample
from ttr_distill.training.reservation import training_bytes
from ttr_distill.training.state import SavedState, integer, load_replay, mapping, replay_state
from ttr_distill.training.steps import StepDraw
from ttr_distill.training.update import UpdateConfig

logger = logging.getLogger(__name__)

_TRAINING_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    OSError,
    MemoryError,
)

Measurement = tuple[LayerKey, float, float]
"""Layer, cosine distance and relative L2 distance of a student on held-out queries."""


@dataclass(frozen=True)
class DistillConfig:
    """What is captured, how often it is trained on, and what a caller sees meanwhile.

    Attributes:
        capture: What is kept of a call.
        update: How students are optimised.
        replay_bytes: Budget of all replay samples together.
        train_steps_per_call: Updates after each captured call.
        min_swap_layers: Train at least so many layers in a diffusion step.
        max_swap_layers: Train at most so many; ``None`` = all. The number and the layers are drawn for every step.
        heldout_period: Of so many diffusion steps one is held out, the first so many excepted: its calls are measured,
            never trained on; 0 = none.
        maximum_updates: Stop training after so many updates of all layers together; ``None`` = never.
        preview: Answer with the student where it is ready, else always with the teacher.
    """

    capture: CaptureConfig = field(default_factory=CaptureConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    replay_bytes: int = 768 * 2**20
    train_steps_per_call: int = 1
    min_swap_layers: int = 1
    max_swap_layers: int | None = None
    heldout_period: int = 8
    maximum_updates: int | None = None
    preview: bool = False

    def __post_init__(self) -> None:
        if self.replay_bytes < 1 or self.train_steps_per_call < 0 or self.min_swap_layers < 0:
            raise ValueError(
                "need replay_bytes >= 1, train_steps_per_call >= 0 and min_swap_layers >= 0, got "
                f"{self.replay_bytes}, {self.train_steps_per_call} and {self.min_swap_layers}"
            )
        if self.max_swap_layers is not None and self.max_swap_layers < self.min_swap_layers:
            raise ValueError(f"max_swap_layers {self.max_swap_layers} is below min_swap_layers {self.min_swap_layers}")
        if self.heldout_period < 0:
            raise ValueError(f"heldout_period must not be negative, got {self.heldout_period}")
        if self.maximum_updates is not None and self.maximum_updates < 0:
            raise ValueError(f"maximum_updates must not be negative, got {self.maximum_updates}")


class Distiller:
    """An ``AttentionHandler`` that captures calls, trains the layer's student on them and returns the teacher.

    Works inside ``torch.inference_mode()`` and never changes the host's tensors or model. A training error never costs
    the image: training stops, the teacher goes on answering, and ``raise_pending`` raises the error when the caller
    asks for it. A layer that runs out of memory takes its ``MemoryLadder`` down instead, until the next run. Two runs
    with one seed on equal calls give equal students, and what a layer learns does not depend on which others learn
    beside it as long as the replay budget holds them all.

    Args:
        bank: The students; trained in place.
        readiness: Gets held-out distances, measured on each call before it is trained on.
        config: Settings.
        seed: Which queries, layers and samples are drawn; ``None`` = that of the state that is loaded, else 0.
        layers: Which layers of the bank to train; ``None`` = all.
        worker: Which of several processes that learn from different images; each draws its own queries.
        sinks: Get one row per trained layer at the end of every run.

    Attributes:
        metrics: The latest rows.
        declined: How often which reason kept a call from being captured.
        exchange: Called at the end of every run with its measurements; what it returns reaches the readiness.
            ``None`` = each measurement reaches it at once.
    """

    def __init__(
        self,
        bank: StudentBank,
        readiness: ReadinessTracker,
        config: DistillConfig | None = None,
        *,
        seed: int | None = None,
        layers: Collection[LayerKey] | None = None,
        worker: int = 0,
        sinks: Sequence[MetricSink] = (),
    ) -> None:
        self.bank = bank
        self.readiness = readiness
        self.config = config or DistillConfig()
        self._seed_given = seed is not None
        self.seed = seed or 0
        self.layers = tuple(layer for layer in bank.layers if layers is None or layer in layers)
        self.worker = worker
        self.sinks = tuple(sinks)
        self.replay = ReplayBuffer(self.config.replay_bytes)
        self.metrics: deque[dict[str, MetricValue]] = deque(maxlen=10_000)
        self.declined: Counter[str] = Counter()
        self.runs = 0
        self.exchange: Callable[[list[Measurement]], list[Measurement]] | None = None
        self._measured: list[Measurement] = []
        self._backend = StudentBackend(bank)
        self._layers: dict[LayerKey, LayerTraining] = {}
        self._steps = self._step_draw(self.seed)
        self._error: Exception | None = None
        self._said: set[tuple[LayerKey, int]] = set()

    @property
    def updates(self) -> int:
        """Updates of all layers so far."""
        return sum(state.updates for state in self._layers.values())

    @property
    def learning(self) -> bool:
        """Whether training goes on: no error, memory left, and the number of updates not reached."""
        limit = self.config.maximum_updates
        off = bool(self._layers) and all(self._off(layer) for layer in self.layers)
        return self._error is None and not off and (limit is None or self.updates < limit)

    @property
    def memory_bytes(self) -> int:
        """Device memory that the next run is estimated to need for training: what a host can be asked for before it."""
        newest = (self.replay.samples() or (None,))[-1]
        return training_bytes(self.bank, newest, self.config.update)

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer a call, ``[B, H, Nq, Dv]``, with ``native`` or, in a preview, with a ready student."""
        teacher = native(call)
        reason = self._backend.refuses(call)
        if reason is not None or call.layer is None or call.layout is None:
            self.declined[reason or "the call has no layer"] += 1
            return teacher
        layer, layout = call.layer, call.layout
        drawn = self._steps.layers(layer, call.step) if self.learning else ()
        if layer in drawn and layer in self.layers:
            self._safely(layer, lambda: self._learn(call, teacher, layer, layout))
        if self.config.preview and self.readiness.ready(layer):
            try:
                return self._backend(call)
            except torch.OutOfMemoryError:
                self.declined["out of memory"] += 1
        return teacher

    def study(self, sample: ReplaySample) -> None:
        """Learn from a sample captured earlier, or measure the student on it if the sample is not trainable.

        Errors and memory are dealt with as in a call. Works between ``begin_run`` and ``end_run``.
        """

        def work() -> None:
            state = self.layer_training(sample.layer)
            moved = sample.moved(next(state.student.parameters()).device)
            if sample.trainable:
                state.update(moved)
            else:
                state.held_back += 1
                self._measure(state, moved)

        if self.learning:
            self._safely(sample.layer, work)

    def begin_run(self) -> None:
        """A sampling run starts."""
        self._steps.begin_run()
        for state in self._layers.values():
            state.start_run()

    def end_run(self) -> None:
        """The run is over: fold its held-out distances into the readiness and write one row per trained layer."""
        self.runs += 1
        if self.exchange is not None:
            measured, self._measured = self.exchange(self._measured), []
            for measurement in measured:
                self.readiness.observe(*measurement)
        self.readiness.flush()
        rows = [
            state.row(self.readiness[layer])
            | {"run": self.runs, "replay_bytes": self.replay.layer_bytes(layer)}
            | {"layers_swapped": self._steps.number, "layers_total": len(self.bank)}
            for layer, state in sorted(self._layers.items())
            if state.heldout
        ]
        self.metrics.extend(rows)
        try:
            for sink in self.sinks:
                for row in rows:
                    sink.write(row)
        except (OSError, ValueError) as error:
            self._error = self._error or error

    def raise_pending(self) -> None:
        """Raise the error that stopped training, if there was one; call it when the image is safe."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self, samples: Callable[[LayerKey], Iterable[ReplaySample]] | None = None) -> dict[LayerKey, bool]:
        """End training: for each student with a training-free form keep the better of the two.

        See ``keep_better_form``. The readiness of a layer whose student is reset starts anew from what was measured.

        Args:
            samples: Gives the samples of a layer; ``None`` = those of the replay.

        Returns:
            For each such layer whether the trained form was kept.
        """
        kept: dict[LayerKey, bool] = {}
        with training_mode():
            for layer in self.layers:
                student = self.bank[layer]
                found = tuple((samples or self.replay.samples)(layer)) if student.untrained() is not None else ()
                if not found:
                    continue
                kept[layer], distance = keep_better_form(student, found)
                if not kept[layer]:
                    self.readiness.replace(layer, *distance)
                    self._layers.pop(layer, None)
        return kept

    def layer_training(self, layer: LayerKey) -> LayerTraining:
        """Return what training keeps of a layer, begun if it is the first time; call it inside ``training_mode``."""
        if layer not in self._layers:
            self._layers[layer] = LayerTraining.start(
                layer, self.bank[layer], self.config.update, seed=self.seed, worker=self.worker
            )
        return self._layers[layer]

    def layer_states(self) -> dict[LayerKey, LayerState]:
        """Return what training keeps of each layer begun so far, as tensors on the CPU and counters."""
        return {layer: state.state() for layer, state in sorted(self._layers.items())}

    def state_dict(self, *, include_replay: bool = True) -> SavedState:
        """Return all that training needs to go on exactly, taken between two runs.

        The students and the readiness have their own state; metrics are not part of it. Without the replay samples
        training goes on, but not with the same numbers.
        """
        states = {str(layer): state for layer, state in self.layer_states().items()}
        tensors = {f"optim/rng.{name}": value for name, value in self._steps.tensors().items()}
        for name, (own, _) in states.items():
            tensors |= {f"optim/{name}.{entry}": value for entry, value in own.items()}
        facts: dict[str, object] = {
            "seed": self.seed,
            "runs": self.runs,
            "steps": self._steps.facts(),
            "layers": {name: counters for name, (_, counters) in states.items()},
            "replay": None,
        }
        if include_replay:
            replay = replay_state(self.replay)
            tensors |= replay.tensors
            facts["replay"] = replay.facts
        return SavedState(tensors, facts)

    def load_state_dict(self, state: SavedState) -> None:
        """Go on where ``state_dict`` was taken. Settings such as the learning rate stay those of this distiller.

        With another seed than the state's, what was learned goes on under fresh draws of the seed given here. The bank
        and the readiness are loaded by the caller.

        Raises:
            ValueError: The state names a layer the bank lacks, or is malformed; use this distiller no further then.
        """
        tensors = dict(state.tensors)
        saved, self.runs = integer(state.facts, "seed"), integer(state.facts, "runs")
        self.seed = self.seed if self._seed_given else saved
        redrawn = self.seed != saved
        self._steps = self._step_draw(self.seed)
        streams = {name: tensors.pop(name) for name in list(tensors) if name.startswith("optim/rng.")}
        named = {name.removeprefix("optim/rng."): value for name, value in streams.items()}
        self._steps.restore(self._steps.tensors() if redrawn else named, mapping(state.facts, "steps"))
        replay = {name: tensors.pop(name) for name in list(tensors) if name.startswith("replay/")}
        self._layers = {}
        with training_mode():
            for name, entry in mapping(state.facts, "layers").items():
                layer = LayerKey.parse(name)
                if layer not in self.bank:
                    raise ValueError(f"the state trains layer {layer}, which the bank lacks")
                prefix = f"optim/{layer}."
                own = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
                if redrawn:
                    own = {name: value for name, value in own.items() if not name.startswith("rng.")}
                self.layer_training(layer).restore(own, mapping({name: entry}, name))
            if tensors:
                raise ValueError(f"the state has tensors of no layer: {', '.join(sorted(tensors)[:5])}")
            if state.facts.get("replay") is not None:
                load_replay(self.replay, replay, mapping(state.facts, "replay"))

    def _step_draw(self, seed: int) -> StepDraw:
        config = self.config
        return StepDraw(
            self.bank.layers,
            least=config.min_swap_layers,
            most=config.max_swap_layers,
            period=config.heldout_period,
            seed=seed,
        )

    def _off(self, layer: LayerKey) -> bool:
        return layer in self._layers and self._layers[layer].ladder.off

    def _safely(self, layer: LayerKey, work: Callable[[], None]) -> None:
        """Train; running out of memory costs a rung, any other error ends training, neither ends the caller's run."""
        if self._off(layer):
            return
        exhausted = False
        try:
            with training_mode():
                work()
        except _TRAINING_ERRORS as error:
            # Dealt with below: here the traceback still holds the tensors of the failed attempt.
            exhausted = is_out_of_memory(error)
            if not exhausted:
                self._error = error
                logger.warning("training stopped at layer %s, the teacher answers: %s", layer, error)
        if exhausted:
            self._step_down(layer)

    def _step_down(self, layer: LayerKey) -> None:
        with training_mode():
            ladder = self.layer_training(layer).ladder
        sentence = ladder.step_down()
        if ladder.kept_samples is not None:
            self.replay.clear(layer, keep=ladder.kept_samples)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if (layer, ladder.rung) not in self._said:
            self._said.add((layer, ladder.rung))
            logger.warning("out of memory while training layer %s: %s", layer, sentence)

    def _learn(self, call: AttentionCall, teacher: Tensor, layer: LayerKey, layout: TokenLayout) -> None:
        state = self.layer_training(layer)
        with torch.no_grad():
            selection = state.student.select(call)
        config = replace(self.config.capture, query_cap=state.ladder.queries(self.config.capture.query_cap))
        queries = state.generators["queries"]
        sample = capture(call, teacher, layer, layout, selection, config, seed=self.seed, generator=queries)
        if sample is None:
            state.refused += 1
            return
        sample = replace(sample, trainable=not self._steps.heldout)
        self._store(sample, state)
        moved = sample.moved(call.k.device)
        self._measure(state, moved)
        if not sample.trainable:
            state.held_back += 1
            return
        for _ in range(config.query_draws - 1):
            self._store(redraw(sample, call, teacher, config, seed=self.seed, generator=queries), state)
        for _ in range(self.config.train_steps_per_call):
            drawn = self.replay.draw(layer, state.generators["replay"])
            if drawn is None or not self.learning:
                return
            state.update(moved if drawn is sample else drawn.moved(call.k.device))

    def _store(self, sample: ReplaySample, state: LayerTraining) -> None:
        self.replay.add(sample)
        if state.ladder.kept_samples is not None:
            self.replay.clear(sample.layer, keep=state.ladder.kept_samples)

    def _measure(self, state: LayerTraining, sample: ReplaySample) -> None:
        measurement = (state.layer, *state.measure(sample))
        if self.exchange is None:
            self.readiness.observe(*measurement)
        else:
            self._measured.append(measurement)
