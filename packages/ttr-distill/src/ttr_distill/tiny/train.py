"""Train a tiny teacher from pictures.

``python -m ttr_distill.tiny.train --pictures DIR --out DIR --minutes 40 --seed 0 --threads 1``

Rectified flow on a genuine Flux transformer: the network predicts noise minus data at a logit-normal time, moved
towards noise with Flux's resolution-dependent shift. Training goes from few tokens to many; position ids span the same
canvas at every resolution, so the stages share what was learnt. The run is seeded, resumes from its last checkpoint,
and counts its budget in CPU seconds of the process. The number of steps of a stage is measured once at the start and
then fixed (``--steps`` repeats a run exactly).
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ttr_distill.tiny.data import THUMBNAILS_FILE, PictureSet
from ttr_distill.tiny.store import Progress, RunStore, write_teacher
from ttr_distill.tiny.trainer import ARCHITECTURE, TrainConfig, Trainer

logger = logging.getLogger(__name__)


def schedule(config: TrainConfig, steps: Sequence[int]) -> Iterator[tuple[int, int, float, float]]:
    """Yield side, batch, learning-rate factor and decay of the average for every update of the run."""
    total = sum(stage.share for stage in config.stages)
    before, number = 0.0, 0
    for stage, count in zip(config.stages, steps, strict=True):
        decay = 1 - 1 / max(2.0, min(config.ema_horizon, 0.1 * count))
        for index in range(count):
            progress = (before + stage.share * index / count) / total
            rate = min(1.0, (number + 1) / config.warmup) * max(0.02, 1 - progress)
            side, batch = stage.parts[index % len(stage.parts)]
            yield side, batch, rate, decay
            number += 1
        before += stage.share


def measure_steps(
    pictures: PictureSet, config: TrainConfig, architecture: Mapping[str, object] = ARCHITECTURE
) -> tuple[int, ...]:
    """Time a few updates of every stage on a throwaway model and fit the budget."""
    trainer = Trainer(pictures, config, architecture)
    total = sum(stage.share for stage in config.stages)
    steps = []
    for stage in config.stages:
        trainer.step(*stage.parts[0], 0.1, 0.9)
        start = time.process_time()
        for side, batch in stage.parts * 2:
            trainer.step(side, batch, 0.1, 0.9)
        seconds = (time.process_time() - start) / (2 * len(stage.parts))
        steps.append(max(1, int(config.minutes * 60 * stage.share / total / seconds)))
    return tuple(steps)


def train(
    pictures: PictureSet,
    config: TrainConfig,
    out: Path,
    *,
    architecture: Mapping[str, object] = ARCHITECTURE,
    stop_after: int | None = None,
) -> Progress:
    """Train, and write a teacher that ``load_teacher(directory=out)`` reads.

    Args:
        pictures: What to learn.
        config: Options; a resumed run must have the same.
        out: Folder for checkpoint, log and result; an unfinished run in it is continued.
        architecture: Config of the transformer.
        stop_after: Stop after this many updates in all, with a checkpoint and without a result.

    Returns:
        The state of the run.

    Raises:
        ValueError: ``out`` holds a run with other options.
    """
    store = RunStore(out, repr((config, sorted(architecture.items()))))
    stored = store.load()
    trainer = Trainer(pictures, config, architecture)
    if stored is None:
        progress = Progress(config.steps or measure_steps(pictures, config, architecture))
    else:
        progress = stored["progress"]
        trainer.load_state_dict(stored["trainer"])
    logger.info("training %s steps of %d concepts, from step %d", progress.steps, len(pictures.concepts), progress.done)
    validate_every = max(1, sum(progress.steps) // 25)
    middle = sorted(trainer.pictures)[len(trainer.pictures) // 2]
    saved = time.process_time()
    for number, (side, batch, rate, decay) in enumerate(schedule(config, progress.steps)):
        if number < progress.done:
            continue
        if stop_after is not None and number >= stop_after:
            store.save(trainer.state_dict(), progress)
            return progress
        start = time.process_time()
        loss = trainer.step(side, batch, rate, decay)
        progress.cpu_seconds += time.process_time() - start
        progress.done = number + 1
        progress.samples[str(side)] = progress.samples.get(str(side), 0) + batch
        row = {"step": number, "side": side, "loss": round(loss, 5), "cpu_seconds": round(progress.cpu_seconds, 1)}
        if progress.done % validate_every == 0 or progress.done == sum(progress.steps):
            row["validation_loss"] = round(trainer.validation_loss(middle), 5)
        store.log(row)
        if time.process_time() - saved > config.checkpoint_seconds:
            store.save(trainer.state_dict(), progress)
            saved = time.process_time()
    store.save(trainer.state_dict(), progress)
    export(trainer, progress, store, out)
    return progress


def export(trainer: Trainer, progress: Progress, store: RunStore, out: Path) -> None:
    """Write the averaged weights with everything that sampling and retrieval need."""
    facts = {
        "seed": trainer.config.seed,
        "steps": list(progress.steps),
        "samples_by_side": progress.samples,
        "cpu_minutes": round(progress.cpu_seconds / 60, 2),
        "concepts": len(trainer.vocabulary.concepts),
        "torch": torch.__version__.partition("+")[0],
        **store.curve(),
    }
    write_teacher(
        out,
        config=trainer.architecture,
        weights=trainer.average,
        codec=trainer.codec,
        vocabulary=trainer.vocabulary.dumps(),
        extra={
            THUMBNAILS_FILE: trainer.thumbnails.dumps(),
            "training.json": (json.dumps(facts, indent=1) + "\n").encode(),
        },
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m ttr_distill.tiny.train", description="Train a tiny teacher.")
    parser.add_argument("--pictures", type=Path, required=True, help="unpacked npm package @iconify-json/noto")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an unfinished run is continued")
    parser.add_argument("--minutes", type=float, default=TrainConfig.minutes, help="budget in CPU minutes")
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs="+", default=(), help="steps of each stage instead of --minutes")
    options = parser.parse_args(arguments)
    from ttr_distill.tiny.pictures import render_set

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    config = TrainConfig(minutes=options.minutes, seed=options.seed, steps=tuple(options.steps))
    progress = train(render_set(options.pictures, size=128), config, options.out)
    logger.info("wrote %s after %.1f CPU minutes", options.out, progress.cpu_seconds / 60)


if __name__ == "__main__":
    main()
