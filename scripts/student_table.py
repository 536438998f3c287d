"""Measure every student preset on the embedded teacher: held-out distance, operations and time.

    uv run scripts/student_table.py
    uv run scripts/student_table.py --sizes 256 --updates 400 --only hkr,hkr-joint --no-write

The teacher samples training prompts and held-out prompts with exact attention; every attention call of some steps is
recorded. Each preset's students then learn from the very same calls through the online distiller, with equally many
updates, and are compared with the teacher on all queries of the held-out calls, in the form that serves. Time is the
process's own on one thread, for one call of all heads and both guidance rows. Writes
``benchmarks/results/students-cpu-<processor>-<date>.json``, keeping what an earlier run of the day found and this
one did not measure again, and the table of ``packages/ttr-distill/README.md``.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from attn_dispatch import AttentionCall, NativeAttention
from attn_kernels import cosine_distance, relative_l2
from attn_kernels.cost import exact_flops
from torch import Tensor
from torch.nn import functional as F
from ttr_distill import DistillConfig, Distiller, ReadinessTracker, StudentBackend, StudentBank, UpdateConfig, preset
from ttr_distill.student import PRESETS
from ttr_distill.tiny import TinySampler, heldout_prompts, load_teacher, training_prompts

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "packages" / "ttr-distill" / "benchmarks"))
from machine import best_milliseconds, result_path, write  # noqa: E402 - its folder is no package

README = ROOT / "packages" / "ttr-distill" / "README.md"
MARKS = ("<!-- students: begin -->", "<!-- students: end -->")
RATE = 2e-3


@dataclass(frozen=True)
class Size:
    """How much is done at one number of image tokens.

    Attributes:
        side: Rows and columns of tokens.
        steps: Steps of the sampler.
        recorded: Which of them are recorded.
        images: Training images; one more is held out.
        updates: Updates of each layer, about.
    """

    side: int
    steps: int
    recorded: tuple[int, ...]
    images: int
    updates: int

    @property
    def tokens(self) -> int:
        """Image tokens."""
        return self.side**2


SIZES = (
    Size(16, 8, (0, 3, 5, 7), images=4, updates=64),
    Size(32, 8, (1, 4, 7), images=2, updates=24),
    Size(64, 4, (0, 2, 3), images=1, updates=9),
)


@dataclass(frozen=True)
class Row:
    """One preset at one size.

    Attributes:
        student: Name of the preset; ``near_far, untrained`` is that preset before any update.
        tokens: Image tokens.
        updates: Of each layer.
        cosine_distance: Mean over layers and held-out calls, all queries.
        worst_layer: The largest of the layers' means.
        relative_l2: Mean of the relative L2 distances.
        flops_share: Operations of matrix products as a share of those of exact attention.
        milliseconds: One call.
        sdpa_milliseconds: The same call by torch's exact attention.
        training_seconds: All updates of all layers.
    """

    student: str
    tokens: int
    updates: int
    cosine_distance: float
    worst_layer: float
    relative_l2: float
    flops_share: float
    milliseconds: float
    sdpa_milliseconds: float
    training_seconds: float


class Recorder:
    """Answers with the teacher and keeps the calls of some steps, of one guidance row each where ``halved``."""

    def __init__(self, steps: tuple[int, ...], *, halved: bool) -> None:
        self.steps = steps
        self.halved = halved
        self.step = 0
        self.calls: list[tuple[AttentionCall, Tensor]] = []

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer a call."""
        output = native(call)
        if self.step in self.steps:
            # Conditional and unconditional rows by turns, so that learning from both costs half.
            rows = slice(self.step % 2, self.step % 2 + 1) if self.halved else slice(None)
            kept = replace(call, q=call.q[rows].clone(), k=call.k[rows].clone(), v=call.v[rows].clone(), rope=None)
            self.calls.append((kept, output[rows].clone()))
        return output

    def begin_run(self) -> None:
        """Start with the first step."""
        self.step = 0

    def end_run(self) -> None:
        """Nothing to do."""

    def on_step(self, index: int) -> None:
        """Count steps."""
        self.step = index + 1


def record(sampler: TinySampler, recorder: Recorder, prompts: tuple[str, ...], seed: int) -> Recorder:
    """Sample images one by one and keep their calls."""
    for number, prompt in enumerate(prompts):
        sampler.sample([prompt], [seed + number], recorder, recorder.on_step)
    return recorder


def learn(bank: StudentBank, calls: list[tuple[AttentionCall, Tensor]], updates: int) -> tuple[Distiller, float]:
    """Let the distiller meet the calls as if they came from a sampler; return it and the seconds it took."""
    per_call = max(1, round(updates * len(bank) / len(calls)))
    config = DistillConfig(
        min_swap_layers=len(bank),
        train_steps_per_call=per_call,
        heldout_period=0,
        update=UpdateConfig(learning_rate=RATE),
    )
    distiller = Distiller(bank, ReadinessTracker(), config, seed=0)
    start = time.process_time()
    distiller.begin_run()
    for call, target in calls:
        distiller(call, lambda _, target=target: target)
    distiller.end_run()
    distiller.raise_pending()
    return distiller, time.process_time() - start


def judge(name: str, bank: StudentBank, size: Size, heldout: Recorder, updates: int, seconds: float) -> Row:
    """Compare a bank with the teacher on the held-out calls and time it."""
    backend = StudentBackend(bank)
    layers: dict[str, list[float]] = {}
    lengths = []
    for call, target in heldout.calls:
        output = backend(call)
        layers.setdefault(str(call.layer), []).append(float(cosine_distance(output, target).mean()))
        lengths.append(float(relative_l2(output, target)))
    means = [sum(values) / len(values) for values in layers.values()]
    call = heldout.calls[-1][0]
    assert call.layer is not None
    assert call.layout is not None
    batch, heads, tokens, width = call.q.shape
    exact = exact_flops(batch, heads, tokens, tokens, width, width)
    times = best_milliseconds(
        {"student": lambda: backend(call), "sdpa": lambda: F.scaled_dot_product_attention(call.q, call.k, call.v)}, 3
    )
    return Row(
        name,
        size.tokens,
        updates,
        sum(means) / len(means),
        max(means),
        sum(lengths) / len(lengths),
        bank[call.layer].flops(call.layout, batch, heads, width) / exact,
        times["student"],
        times["sdpa"],
        seconds,
    )


def measure(size: Size, names: tuple[str, ...]) -> list[Row]:
    """Train and judge the presets at one size."""
    sampler = TinySampler(load_teacher(), rows=size.side, columns=size.side, steps=size.steps)
    prompts = training_prompts()
    chosen = tuple(prompts[(17 * number) % len(prompts)] for number in range(size.images))
    train = record(sampler, Recorder(size.recorded, halved=True), chosen, seed=100)
    heldout = record(sampler, Recorder(size.recorded[::2], halved=False), heldout_prompts()[3:4], seed=9000)
    rows = []
    for name in names:
        bank = StudentBank.for_layers(preset(name), sampler.layers, sampler.heads, sampler.width, seed=0)
        if name == "near_far":
            rows.append(judge("near_far, untrained", bank, size, heldout, 0, 0.0))
            show(rows[-1])
        distiller, seconds = learn(bank, train.calls, size.updates)
        rows.append(judge(name, bank, size, heldout, distiller.updates // len(bank), seconds))
        show(rows[-1])
    return rows


def show(row: Row) -> None:
    """Print a row as soon as it is known."""
    print(
        f"{row.tokens:6}{row.student:>22}{row.updates:5} updates  cosine {row.cosine_distance:z.5f}"
        f"  worst {row.worst_layer:z.5f}  L2 {row.relative_l2:.4f}  FLOPs {row.flops_share:7.2f}x"
        f"  {row.milliseconds:8.2f} ms  sdpa {row.sdpa_milliseconds:8.2f} ms  trained {row.training_seconds:6.1f} s",
        flush=True,
    )


def markdown(rows: list[Row]) -> str:
    """Draw the table of the README."""
    sizes = sorted({row.tokens for row in rows})
    updates = {tokens: max(row.updates for row in rows if row.tokens == tokens) for tokens in sizes}
    heads = [f"{tokens:,} tokens ({updates[tokens]} updates)" for tokens in sizes]
    lines = ["| student | " + " | ".join(heads) + " |", "|---" * (len(sizes) + 1) + "|"]
    for name in dict.fromkeys(row.student for row in rows):
        cells = []
        for tokens in sizes:
            found = [row for row in rows if (row.student, row.tokens) == (name, tokens)]
            cells.append(
                f"{found[0].cosine_distance:z.5f} / {found[0].relative_l2:.3f} / {found[0].flops_share:.2f} / "
                f"{found[0].milliseconds / found[0].sdpa_milliseconds:.2f}"
                if found
                else "-"
            )
        lines.append(f"| `{name.split(',')[0]}`{', untrained' if ',' in name else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def joined(rows: list[Row]) -> list[Row]:
    """Add what an earlier run of the same day found and this one did not measure again; in the order of the presets."""
    path = result_path("students")
    found = {(row.tokens, row.student): row for row in rows}
    if path.exists():
        for row in (Row(**entry) for entry in json.loads(path.read_text())["rows"]):
            found.setdefault((row.tokens, row.student), row)
    order = {name: number for number, name in enumerate(PRESETS)}
    return sorted(found.values(), key=lambda row: (row.tokens, order[row.student.split(",")[0]], row.updates))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256,1024,4096", help="image tokens, with commas between")
    parser.add_argument("--only", default=",".join(PRESETS), help="presets, with commas between")
    parser.add_argument("--updates", type=int, help="updates of each layer at every size")
    parser.add_argument("--draw", action="store_true", help="only draw the README's table, from the results of the day")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [] if arguments.draw else [int(part) for part in arguments.sizes.split(",")]
    rows: list[Row] = []
    for size in (size for size in SIZES if size.tokens in wanted):
        rows += measure(
            size if arguments.updates is None else replace(size, updates=arguments.updates),
            tuple(arguments.only.split(",")),
        )
    if arguments.no_write:
        print(markdown(rows))
        return
    rows = joined(rows)
    table = markdown(rows)
    print(table)
    print(write("students", {"learning_rate": RATE, "queries": 128, "rows": [asdict(row) for row in rows]}))
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise SystemExit(f"{README} lacks the marks {MARKS}")
    README.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
