"""Distil a student per layer while a model draws, save the students, load them, and let those that are ready serve.

    uv run python examples/03_distill_and_serve.py [--out FOLDER] [--images 4]

The model is the embedded teacher, a real Flux transformer that is small enough for a CPU. Needs ttr-distill[diffusers].
"""

import argparse
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from attn_dispatch import AttentionRouter, Route
from torch import Tensor
from ttr_distill import (
    DistillConfig,
    Distiller,
    ReadinessTracker,
    ReadyGuard,
    StudentBackend,
    StudentBank,
    load_students,
    preset,
    save_students,
)
from ttr_distill.tiny import TinySampler, heldout_prompts, load_teacher, training_prompts


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels of images ``[B, 3, rows, columns]`` in [0, 1]."""
    return -10 * math.log10(max(float((image - reference).square().mean()), 1e-12))


def distil(sampler: TinySampler, folder: Path, fingerprint: str, images: int) -> None:
    """Draw training prompts with the teacher; each layer's student learns beside it, the pictures stay as they are."""
    bank = StudentBank.for_layers(preset("near_far"), sampler.layers, sampler.heads, sampler.width, seed=0)
    readiness = ReadinessTracker()
    # So few images: every layer learns in every step.
    distiller = Distiller(bank, readiness, DistillConfig(min_swap_layers=len(sampler.layers)), seed=0)
    for seed, prompt in enumerate(training_prompts()[:images]):
        sampler.sample([prompt], [seed], distiller)
        # An error in training never costs the picture; it waits here.
        distiller.raise_pending()
    # Near-far is of use untrained: keep what was learned only where held-out queries say that it helps.
    kept = distiller.finish()
    save_students(folder, bank, readiness, distiller, fingerprint=fingerprint, include_replay=False)
    print(f"{distiller.updates} updates on {images} images; learned form kept in {sum(kept.values())} of {len(kept)}")


def serve(sampler: TinySampler, folder: Path, fingerprint: str) -> None:
    """Draw a prompt that no student has seen, with every ready student in the place of exact attention."""
    saved = load_students(folder, fingerprint=fingerprint)
    print("\nlayer       held-out cosine distance  level")
    for layer in saved.bank.layers:
        state = saved.readiness[layer]
        print(f"{layer!s:11} {state.ema_cosine or math.nan:24.5f}  {state.level}")
    router = AttentionRouter([Route(StudentBackend(saved.bank), (ReadyGuard(saved.readiness),))])
    prompt = heldout_prompts()[0]
    teacher, student = sampler.sample([prompt], [7]), sampler.sample([prompt], [7], router)
    print(f"\n{prompt!r}: {router.report.counts()}")
    for reason, number in router.report.declines().items():
        print(f"  {number} x {reason}")
    print(f"PSNR to the teacher's picture: {psnr(student.images, teacher.images):.1f} dB")


def main() -> None:
    """Distil, save, load, serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the students are saved; a temporary folder if left out")
    parser.add_argument("--images", type=int, default=4, help="images to learn from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher = load_teacher()
    sampler = TinySampler(teacher, rows=16, columns=16)
    with TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary) / "students"
        distil(sampler, folder, teacher.fingerprint, options.images)
        serve(sampler, folder, teacher.fingerprint)


if __name__ == "__main__":
    main()
