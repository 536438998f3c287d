"""Learns students while a host samples: an attention handler that returns the teacher's answer."""

import logging
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from attn_dispatch import AttentionCall, LayerKey, NativeAttention, StepContext, TokenLayout
from torch import Tensor

from ttr_distill.grad import training_mode
from ttr_distill.metrics import MetricSink, MetricValue
from ttr_distill.seeding import stream
from ttr_distill.student.backend import StudentBackend
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.readiness import ReadinessTracker
from ttr_distill.training.capture import CaptureConfig, capture
from ttr_distill.training.layer import COUNTERS, LayerTraining
from ttr_distill.training.memory import MemoryLadder
from ttr_distill.training.replay import ReplayBuffer
from ttr_distill.training.state import SavedState, integer, load_replay, mapping, replay_state
from ttr_distill.training.update import UpdateConfig, measure_heldout, update_student

logger = logging.getLogger(__name__)

_STREAMS = ("layers", "queries", "replay")
_WORTH_KEEPING = 0.99
_TRAINING_ERRORS = (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, OSError)


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
        maximum_updates: Stop training after so many updates of all layers together; ``None`` = never.
        preview: Answer with the student where it is ready, else always with the teacher.
    """

    capture: CaptureConfig = field(default_factory=CaptureConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    replay_bytes: int = 768 * 2**20
    train_steps_per_call: int = 1
    min_swap_layers: int = 1
    max_swap_layers: int | None = None
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
        if self.maximum_updates is not None and self.maximum_updates < 0:
            raise ValueError(f"maximum_updates must not be negative, got {self.maximum_updates}")


class Distiller:
    """An ``AttentionHandler`` that captures calls, trains the layer's student on them and returns the teacher.

    Works inside ``torch.inference_mode()`` and never changes the host's tensors or model. A training error never costs
    the image: training stops, the teacher goes on answering, and ``raise_pending`` raises the error when the caller
    asks for it. Running out of memory takes a ``MemoryLadder`` down instead. Two runs with one seed on equal calls give
    equal students.

    Args:
        bank: The students; trained in place.
        readiness: Gets held-out distances, measured on each call before it is trained on.
        config: Settings.
        seed: Which queries, layers and samples are drawn.
        sinks: Get one row per trained layer at the end of every run.

    Attributes:
        metrics: The latest rows.
        declined: How often which reason kept a call from being captured.
    """

    def __init__(
        self,
        bank: StudentBank,
        readiness: ReadinessTracker,
        config: DistillConfig | None = None,
        *,
        seed: int = 0,
        sinks: Sequence[MetricSink] = (),
    ) -> None:
        self.bank = bank
        self.readiness = readiness
        self.config = config or DistillConfig()
        self.seed = seed
        self.sinks = tuple(sinks)
        self.replay = ReplayBuffer(self.config.replay_bytes)
        self.ladder = MemoryLadder()
        self.metrics: deque[dict[str, MetricValue]] = deque(maxlen=10_000)
        self.declined: Counter[str] = Counter()
        self.runs = 0
        self._backend = StudentBackend(bank)
        self._layers: dict[LayerKey, LayerTraining] = {}
        self._generators = {name: stream(seed, name) for name in _STREAMS}
        self._error: Exception | None = None
        self._step: tuple[StepContext | None, int] | None = None
        self._swap: frozenset[LayerKey] = frozenset()
        self._seen: Counter[LayerKey] = Counter()

    @property
    def updates(self) -> int:
        """Updates of all layers so far."""
        return sum(state.updates for state in self._layers.values())

    @property
    def learning(self) -> bool:
        """Whether training goes on: no error, memory left, and the number of updates not reached."""
        limit = self.config.maximum_updates
        return self._error is None and not self.ladder.off and (limit is None or self.updates < limit)

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer a call, ``[B, H, Nq, Dv]``, with ``native`` or, in a preview, with a ready student."""
        teacher = native(call)
        reason = self._backend.refuses(call)
        if reason is not None or call.layer is None or call.layout is None:
            self.declined[reason or "the call has no layer"] += 1
            return teacher
        if self.learning and call.layer in self._drawn_layers(call.layer, call.step):
            self._learn_safely(call, teacher, call.layer, call.layout)
        if self.config.preview and self.readiness.ready(call.layer):
            try:
                return self._backend(call)
            except torch.OutOfMemoryError:
                self.declined["out of memory"] += 1
        return teacher

    def begin_run(self) -> None:
        """A sampling run starts."""
        self._step = None
        self._seen.clear()
        for state in self._layers.values():
            state.start_run()

    def end_run(self) -> None:
        """The run is over: fold its held-out distances into the readiness and write one row per trained layer."""
        self.runs += 1
        self.readiness.flush()
        rows = [
            state.row(self.readiness[layer]) | {"run": self.runs, "replay_bytes": self.replay.layer_bytes(layer)}
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

    def finish(self) -> dict[LayerKey, bool]:
        """End training: for each student with a training-free form keep the better of the two.

        Both are measured on the held-out queries of the layer's replay samples; the trained one stays only if its mean
        cosine distance is at least one percent smaller, since less than that may turn around on other prompts. The
        readiness of a layer whose student is reset starts anew from what was measured.

        Returns:
            For each such layer whether the trained form was kept.
        """
        kept: dict[LayerKey, bool] = {}
        with training_mode():
            for layer in self.bank.layers:
                initial = self.bank[layer].untrained()
                if initial is None or not self.replay.samples(layer):
                    continue
                trained = {name: value.clone() for name, value in self.bank[layer].state_dict().items()}
                trained_distance, _ = self._distance(layer)
                self.bank[layer].load_state_dict(initial)
                initial_distance = self._distance(layer)
                kept[layer] = trained_distance < _WORTH_KEEPING * initial_distance[0]
                if kept[layer]:
                    self.bank[layer].load_state_dict(trained)
                else:
                    self.readiness.replace(layer, *initial_distance)
                    self._layers.pop(layer, None)
        return kept

    def state_dict(self, *, include_replay: bool = True) -> SavedState:
        """Return all that training needs to go on exactly, taken between two runs.

        The students and the readiness have their own state; metrics are not part of it. Without the replay samples
        training goes on, but not with the same numbers.
        """
        tensors: dict[str, Tensor] = {}
        for layer, state in sorted(self._layers.items()):
            tensors |= {f"optim/{layer}.{name}": value for name, value in state.tensors().items()}
        tensors |= {f"optim/rng.{name}": generator.get_state() for name, generator in self._generators.items()}
        facts: dict[str, object] = {
            "seed": self.seed,
            "runs": self.runs,
            "rung": self.ladder.rung,
            "layers": {
                str(layer): {name: getattr(state, name) for name in COUNTERS}
                for layer, state in sorted(self._layers.items())
            },
            "replay": None,
        }
        if include_replay:
            replay = replay_state(self.replay)
            tensors |= replay.tensors
            facts["replay"] = replay.facts
        return SavedState(tensors, facts)

    def load_state_dict(self, state: SavedState) -> None:
        """Go on where ``state_dict`` was taken. Settings such as the learning rate stay those of this distiller.

        The bank and the readiness are loaded by the caller.

        Raises:
            ValueError: The state names a layer the bank lacks, or is malformed; use this distiller no further then.
        """
        tensors = dict(state.tensors)
        for name, generator in self._generators.items():
            if f"optim/rng.{name}" not in tensors:
                raise ValueError(f"the state lacks the random stream {name!r}")
            generator.set_state(tensors.pop(f"optim/rng.{name}").cpu())
        replay = {name: tensors.pop(name) for name in list(tensors) if name.startswith("replay/")}
        layers: dict[LayerKey, LayerTraining] = {}
        with training_mode():
            for name, entry in mapping(state.facts, "layers").items():
                layer = LayerKey.parse(name)
                if layer not in self.bank:
                    raise ValueError(f"the state trains layer {layer}, which the bank lacks")
                prefix = f"optim/{layer}."
                own = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
                layers[layer] = LayerTraining.start(layer, self.bank[layer], self.config.update)
                layers[layer].restore(own, mapping({name: entry}, name))
            if tensors:
                raise ValueError(f"the state has tensors of no layer: {', '.join(sorted(tensors)[:5])}")
            if state.facts.get("replay") is not None:
                load_replay(self.replay, replay, mapping(state.facts, "replay"))
        self._layers = layers
        self.seed, self.runs = integer(state.facts, "seed"), integer(state.facts, "runs")
        self.ladder = MemoryLadder(integer(state.facts, "rung"))

    def _drawn_layers(self, layer: LayerKey, step: StepContext | None) -> frozenset[LayerKey]:
        """Return the layers to train in this diffusion step, drawn at its first call."""
        # Without a step from the host, a layer that comes again begins the next one.
        passes = 0 if step is not None else self._seen[layer]
        self._seen[layer] += 1
        if (step, passes) != self._step:
            self._step = (step, passes)
            count = len(self.bank)
            most = count if self.config.max_swap_layers is None else min(count, self.config.max_swap_layers)
            least = min(most, self.config.min_swap_layers)
            generator = self._generators["layers"]
            number = int(torch.randint(least, most + 1, (1,), generator=generator))
            order = torch.randperm(count, generator=generator)[:number].tolist()
            self._swap = frozenset(self.bank.layers[position] for position in order)
        return self._swap

    def _learn_safely(self, call: AttentionCall, teacher: Tensor, layer: LayerKey, layout: TokenLayout) -> None:
        exhausted = False
        try:
            with training_mode():
                self._learn(call, teacher, layer, layout)
        except torch.OutOfMemoryError:
            # Dealt with below: here the traceback still holds the tensors of the failed attempt.
            exhausted = True
        except _TRAINING_ERRORS as error:
            self._error = error
            logger.warning("training stopped at layer %s, the teacher answers: %s", layer, error)
        if exhausted:
            self.replay.clear(layer)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning("out of memory while training layer %s: %s", layer, self.ladder.step_down())

    def _learn(self, call: AttentionCall, teacher: Tensor, layer: LayerKey, layout: TokenLayout) -> None:
        student, state = self.bank[layer], self._training(layer)
        with torch.no_grad():
            selection = student.select(call)
        sample = capture(
            call,
            teacher,
            layer,
            layout,
            selection,
            replace(self.config.capture, query_cap=self.ladder.queries(self.config.capture.query_cap)),
            seed=self.seed,
            generator=self._generators["queries"],
        )
        if sample is None:
            state.refused += 1
            return
        self.replay.add(sample)
        distance = measure_heldout(student, sample.moved(call.k.device))
        state.heldout.append(distance)
        self.readiness.observe(layer, *distance)
        for _ in range(self.config.train_steps_per_call):
            drawn = self.replay.draw(layer, self._generators["replay"])
            if drawn is None or not self.learning:
                return
            rows = self.ladder.rows(drawn.k.shape[0], self._generators["replay"])
            moved = drawn.moved(call.k.device, rows)
            result = update_student(student, state.loss, state.optimizer, moved, self.config.update)
            state.results.append(result)
            state.updates += not result.skipped
            state.skipped += result.skipped

    def _training(self, layer: LayerKey) -> LayerTraining:
        if layer not in self._layers:
            self._layers[layer] = LayerTraining.start(layer, self.bank[layer], self.config.update)
        return self._layers[layer]

    def _distance(self, layer: LayerKey) -> tuple[float, float]:
        device = next(self.bank[layer].parameters()).device
        samples = self.replay.samples(layer)
        pairs = [measure_heldout(self.bank[layer], sample.moved(device)) for sample in samples]
        return sum(pair[0] for pair in pairs) / len(pairs), sum(pair[1] for pair in pairs) / len(pairs)
