"""A distillation in a folder: samples prompts, learns, saves after images, and goes on where it was interrupted.

The folder holds ``students/`` (a checkpoint), ``distill.jsonl`` (one row per layer and run), ``session.json`` (what the
session is about) and, if calls are recorded first, ``captures/``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from attn_dispatch import AttentionHandler, LayerKey
from torch import Tensor

from ttr_distill.checkpoint import CheckpointError
from ttr_distill.distributed import Sharing, Team, World, own_layers
from ttr_distill.files import write_atomically
from ttr_distill.image_gate import ImageGate, gate_on_images
from ttr_distill.metrics import MetricSink, QueuedSink, open_sinks
from ttr_distill.recorded_calls import Captures, CaptureWriter
from ttr_distill.saved_students import load_students, save_students
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.presets import StudentConfig
from ttr_distill.student.readiness import ReadinessConfig, ReadinessTracker
from ttr_distill.training.calibration import CalibrateConfig, calibrate, heldout_samples
from ttr_distill.training.distiller import DistillConfig, Distiller
from ttr_distill.training.recorder import CaptureRecorder

STUDENTS = "students"
CAPTURES = "captures"
METRICS = "distill.jsonl"
FACTS = "session.json"


class DrawnImages(Protocol):
    """Images as a sampler returns them."""

    @property
    def latent(self) -> Tensor:
        """``[B, ...]`` after the last step."""
        ...


class ImageSampler(Protocol):
    """Draws images; the same prompt and seed give the same image every time."""

    @property
    def layers(self) -> tuple[LayerKey, ...]:
        """Attention layers in running order."""
        ...

    @property
    def heads(self) -> int:
        """Heads of a layer."""
        ...

    @property
    def width(self) -> int:
        """Width of a head."""
        ...

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], handler: AttentionHandler | None = None
    ) -> DrawnImages:
        """Draw one image per prompt; with a handler every attention goes through it."""
        ...


@dataclass(frozen=True)
class SessionConfig:
    """What a session learns, and how.

    Attributes:
        student: Which students.
        distill: How they are captured, trained and replayed.
        images: Images to sample; prompts repeat with new seeds when there are fewer of them.
        seed: Seed of every draw; image ``n`` has the seed ``seed + n``.
        save_every: Save after so many images.
        include_replay: Save the replay too, so that an interrupted session goes on with the same numbers.
        calibrate: Record all calls first and learn from the recording, so often; ``None`` = learn while sampling.
        sharing: What processes started by ``torchrun`` divide among them.
        image_gate: Draw images that were not learned from, with the students and without, and keep back those that
            change them too much; ``None`` = readiness by held-out distances alone.
    """

    student: StudentConfig
    distill: DistillConfig = field(default_factory=DistillConfig)
    images: int = 16
    seed: int = 0
    save_every: int = 1
    include_replay: bool = True
    calibrate: CalibrateConfig | None = None
    sharing: Sharing = "layers"
    image_gate: ImageGate | None = None

    def __post_init__(self) -> None:
        if self.images < 1 or self.save_every < 1:
            raise ValueError(f"images and save_every must be at least 1, got {self.images} and {self.save_every}")
        if self.calibrate is not None and self.sharing == "images":
            raise ValueError('a recording is learned from layer by layer; use sharing="layers" with calibrate')


class DistillSession:
    """Makes or reopens a session; ``run`` does what is left of it.

    Args:
        folder: Its folder; made if missing.
        sampler: Samples the model, and knows its layers.
        prompts: What to sample; at least one.
        config: What to learn, and how.
        fingerprint: Identity of the model, e.g. a sha256 of its weights.
        about: JSON values that must be equal when the session is reopened, such as the image size.
        world: The processes that train together.
        sinks: Get the metric rows beside the file.
        trackers: Get them too, and are closed when the run ends.
        device: Where the students are.
        reserve: Asked before every image for the device memory that training is estimated to need, in bytes; ``None`` =
            nobody. See ``reserve_device_memory``.

    Raises:
        CheckpointError: The folder holds another session, or a damaged one.
    """

    def __init__(
        self,
        folder: Path | str,
        sampler: ImageSampler,
        prompts: Sequence[str],
        config: SessionConfig,
        *,
        fingerprint: str,
        about: Mapping[str, object] | None = None,
        world: World | None = None,
        sinks: Sequence[MetricSink] = (),
        trackers: Sequence[QueuedSink] = (),
        device: torch.device | str = "cpu",
        reserve: Callable[[int], None] | None = None,
    ) -> None:
        if not prompts:
            raise ValueError("a session needs at least one prompt")
        self.folder = Path(folder)
        self.config = config
        self.world = world or World()
        self._sampler = sampler
        self._prompts = tuple(prompts)
        self._fingerprint = fingerprint
        self._sinks = tuple(sinks)
        self._trackers = tuple(trackers)
        self._reserve = reserve
        self._about = {
            "fingerprint": fingerprint,
            "student": _json(config.student.to_dict()),
            "seed": config.seed,
            **_json(dict(about or {})),
        }
        self._check_about()
        self.bank, self.readiness, self.distiller = self._open(device)

    @property
    def students(self) -> Path:
        """Folder of the checkpoint."""
        return self.folder / STUDENTS

    def run(self, on_image: Callable[[int, int], None] | None = None) -> dict[LayerKey, bool]:
        """Do what is left: sample, learn, save; at the end each student keeps the better of its forms.

        Args:
            on_image: Called with the images or epochs done, and with their number.

        Returns:
            For each student with a training-free form whether the learned one was kept.

        Raises:
            OSError: The folder cannot be written.
        """
        tell = on_image or (lambda done, of: None)
        if self.world.main:
            write_atomically(self.folder / FACTS, json.dumps(self._about, indent=1).encode())
        with ExitStack() as stack:
            sinks: tuple[MetricSink, ...] = ()
            if self.world.main:
                own = stack.enter_context(open_sinks(self.folder / METRICS, *self._trackers))
                sinks = (*own, *self._sinks)
            team = Team(self.world, self.distiller, self.config.sharing, sinks=sinks)
            if self.config.calibrate is None:
                self._learn_while_sampling(team, tell)
                return self._finish(None)
            return self._calibrate(team, self.config.calibrate, tell)

    def _learn_while_sampling(self, team: Team, tell: Callable[[int, int], None]) -> None:
        parts = self.world.size if self.config.sharing == "images" else 1
        rounds = -(-self.config.images // parts)
        for done in range(self.distiller.runs, rounds):
            image = done * parts + (self.world.rank if parts > 1 else 0)
            if self._reserve is not None:
                self._reserve(self.distiller.memory_bytes)
            self._sample(image % self.config.images, self.distiller)
            self.distiller.raise_pending()
            team.end_round()
            if (done + 1) % self.config.save_every == 0 and done + 1 < rounds:
                self._save(include_replay=self.config.include_replay)
            tell(done + 1, rounds)

    def _calibrate(self, team: Team, config: CalibrateConfig, tell: Callable[[int, int], None]) -> dict[LayerKey, bool]:
        if self.world.main:
            self._record(config.epochs, tell)
        self.world.wait()
        recording = Captures(self.folder / CAPTURES, fingerprint=self._fingerprint)

        def after_epoch(epoch: int) -> None:
            team.end_round()
            self._save(include_replay=False)
            tell(recording.runs + epoch, recording.runs + config.epochs)

        calibrate(self.distiller, recording, config, on_epoch=after_epoch)
        return self._finish(recording)

    def _record(self, epochs: int, tell: Callable[[int, int], None]) -> None:
        writer = CaptureWriter(self.folder / CAPTURES, self._about)
        recorder = CaptureRecorder(
            self.bank,
            writer.take,
            self.config.distill.capture,
            heldout_period=self.config.distill.heldout_period,
            seed=self.config.seed,
            run=writer.runs,
        )
        for image in range(writer.runs, self.config.images):
            self._sample(image, recorder)
            writer.end_run()
            tell(image + 1, self.config.images + epochs)
        writer.flush()

    def _finish(self, recording: Captures | None) -> dict[LayerKey, bool]:
        if recording is None:
            kept = self.distiller.finish()
        else:
            kept = self.distiller.finish(lambda layer: heldout_samples(recording, layer))
        if self.config.sharing == "layers":
            # What each process decided about its layers reaches the one that saves.
            kept = {layer: learned for part in self.world.gather(kept) for layer, learned in part.items()}
            Team(self.world, self.distiller).collect()
        if self.config.image_gate is not None and self.world.main:
            self._measure_images(self.config.image_gate)
        self._save(include_replay=False)
        return kept

    def _measure_images(self, gate: ImageGate) -> None:
        prompts = gate.prompts or self._prompts
        shown = [prompts[index % len(prompts)] for index in range(gate.images)]
        # The first seeds that no image learned from has.
        seeds = [self.config.seed + self.config.images + index for index in range(gate.images)]

        def draw(handler: AttentionHandler | None) -> Tensor:
            drawn = [self._sampler.sample([prompt], [seed], handler) for prompt, seed in zip(shown, seeds, strict=True)]
            return torch.cat([one.latent for one in drawn])

        gate_on_images(self.bank, self.readiness, draw)

    def _sample(self, image: int, handler: AttentionHandler) -> None:
        prompt = self._prompts[image % len(self._prompts)]
        self._sampler.sample([prompt], [self.config.seed + image], handler)

    def _save(self, *, include_replay: bool) -> None:
        if self.world.main:
            save_students(
                self.students,
                self.bank,
                self.readiness,
                self.distiller,
                fingerprint=self._fingerprint,
                # One process has the samples of its own layers or images only.
                include_replay=include_replay and self.world.size == 1,
            )

    def _open(self, device: torch.device | str) -> tuple[StudentBank, ReadinessTracker, Distiller]:
        config, sampler = self.config, self._sampler
        gate = config.image_gate
        judged = ReadinessConfig(image_limit=None if gate is None else gate.limit)
        saved = None
        if self.students.exists():
            saved = load_students(
                self.students, fingerprint=self._fingerprint, readiness=judged, device=device, training=True
            )
            bank, readiness = saved.bank, saved.readiness
        else:
            bank = StudentBank.for_layers(
                config.student, sampler.layers, sampler.heads, sampler.width, seed=config.seed
            ).to(device)
            readiness = ReadinessTracker(judged)
        distiller = Distiller(
            bank,
            readiness,
            config.distill,
            seed=config.seed,
            layers=own_layers(self.world, bank.layers, config.sharing),
            worker=self.world.rank if config.sharing == "images" else 0,
        )
        if saved is not None and saved.training is not None:
            distiller.load_state_dict(saved.training)
        return bank, readiness, distiller

    def _check_about(self) -> None:
        path = self.folder / FACTS
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        different = [
            f"{name}: {value} here, {found.get(name)} there"
            for name, value in self._about.items()
            if found.get(name) != value
        ]
        if different:
            raise CheckpointError(
                f"{self.folder} holds a session with other settings ({'; '.join(different)}); choose another folder"
            )


def _json(values: Mapping[str, object]) -> dict[str, object]:
    """Return values as JSON gives them back, so that they compare equal."""
    plain: dict[str, object] = json.loads(json.dumps(values))
    return plain
