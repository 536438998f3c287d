"""Use what a run learned: draw a picture with the policy deciding who answers each attention call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from attn_dispatch import DispatchReport
from ttr_distill.files import write_atomically
from ttr_distill.student import ReadyGuard
from ttr_distill.tiny import heldout_prompts

from ttr_controller.guard import Mode, PolicyGuard, threshold_from_quality_speed
from ttr_controller.pipeline.comparing import png_bytes
from ttr_controller.pipeline.distilling import load_trained
from ttr_controller.pipeline.routing import load_routing
from ttr_controller.pipeline.run_directory import RunDirectory
from ttr_controller.pipeline.settings import RunError
from ttr_controller.pipeline.workbench import Workbench
from ttr_controller.quality.latent import relative_rmse
from ttr_controller.quality.perceptual import psnr
from ttr_controller.routing_record import RoutingRecord


@dataclass(frozen=True)
class Drawn:
    """What a served picture cost and how close it is to the teacher's.

    Attributes:
        calls: Attention calls in all.
        by_student: Calls that a student answered.
        declined: Why the others ran exactly, with counts.
        routing: One line per step of what the policy chose.
        latent_rmse: Relative root mean square error of the latent against the teacher's.
        psnr_db: Peak signal-to-noise ratio against the teacher's picture; ``None`` if they are equal.
    """

    calls: int
    by_student: int
    declined: dict[str, int]
    routing: list[str]
    latent_rmse: float
    psnr_db: float | None

    def lines(self) -> list[str]:
        """The figures as lines for a terminal."""
        closeness = "equal to the teacher's" if self.psnr_db is None else f"PSNR {self.psnr_db:.1f} dB to the teacher's"
        lines = [
            f"student answered {self.by_student} of {self.calls} attention calls; "
            f"latent error {self.latent_rmse:.3f}, {closeness}"
        ]
        return lines + [f"exact in {count} calls: {reason}" for reason, count in sorted(self.declined.items())]


def draw(
    folder: Path,
    prompt: str,
    quality_speed: float,
    seed: int,
    out: Path,
    *,
    policy_mode: str = "threshold",
    temperature: float = 1.0,
) -> Drawn:
    """Draw one picture with a run's students and policy and write it as PNG.

    Args:
        folder: A run with a controller.
        prompt: What to draw.
        quality_speed: 0 = mostly full attention, 1 = mostly students.
        seed: Seed of the noise, and of the policy's draws with ``"stochastic"``: the same seed, the same picture.
        out: The PNG.
        policy_mode: ``"threshold"`` or ``"stochastic"``.
        temperature: Spreads (above 1) or sharpens the odds of ``"stochastic"``.

    Raises:
        RunError: The run is not finished, or the picture cannot be written.
        CheckpointError: A checkpoint is missing or damaged.
    """
    run = RunDirectory.open(folder)
    run.section("controller")
    bench = Workbench.open(run)
    students = load_trained(bench)
    routing = load_routing(bench)
    report = DispatchReport()
    record = RoutingRecord(bench.sampler.layers)
    policy = PolicyGuard(
        routing.policy,
        bench.sampler.layers,
        mode=_mode(policy_mode),
        threshold=threshold_from_quality_speed(quality_speed),
        temperature=temperature,
        seed=seed,
        on_step=record,
    )
    handler = bench.route(students.bank, (ReadyGuard(students.readiness), policy), report)
    try:
        samples = bench.sampler.sample([prompt], [seed], handler)
    except ValueError as error:
        raise RunError(f"{error}; the teacher draws, for example: {', '.join(heldout_prompts()[:4])}") from error
    teacher = bench.sampler.sample([prompt], [seed])
    distance = relative_rmse(samples.latent, teacher.latent).item()
    try:
        write_atomically(out, png_bytes(samples.images[0]))
    except OSError as failure:
        raise RunError(f"cannot write {out}: {failure.strerror or failure}; choose another --out") from failure
    rows = report.rows()
    return Drawn(
        calls=sum(row.count for row in rows),
        by_student=sum(row.count for row in rows if row.ran == "student"),
        declined=report.declines(),
        routing=record.lines(),
        latent_rmse=distance,
        psnr_db=None if distance == 0 else psnr(samples.images, teacher.images).item(),
    )


def _mode(policy_mode: str) -> Mode:
    if policy_mode == "threshold":
        return "threshold"
    if policy_mode == "stochastic":
        return "sample"
    raise RunError(f"the policy mode is threshold or stochastic, not {policy_mode!r}")
