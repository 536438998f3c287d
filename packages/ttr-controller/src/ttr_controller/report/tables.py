"""Tables of the page: rows ready to print."""

from __future__ import annotations

from dataclasses import dataclass

from ttr_controller.report import findings
from ttr_controller.report.findings import Comparison
from ttr_controller.report.results import Fidelity, FidelityRow, Pareto, ParetoPoint, Results, Teacher, Timing
from ttr_controller.report.units import (
    DASH,
    NBSP,
    TIMES,
    anything,
    duration,
    large,
    listing,
    percent,
    pretty,
    quantity,
    significant,
    whole,
)


@dataclass(frozen=True)
class Tile:
    """One figure of the page's head."""

    value: str
    label: str
    note: str


def tiles(results: Results) -> list[Tile]:
    """The run's main figures, those that were measured."""
    found = []
    if results.pareto is not None:
        found.extend(_pareto_tiles(results.pareto))
    if results.fidelity is not None:
        series = findings.preset_series(results.fidelity, results.preset)
        if series is not None:
            note = f"{pretty(series.variant)}, {series.when} training, mean of {series.layers} layers"
            found.append(Tile(significant(series.mean), "cosine distance to the teacher", note))
    if results.timing is not None and results.preset in findings.variants_of(results.timing):
        found.append(_payoff_tile(findings.payoff(results.timing, results.preset, "step")))
    return found


def _pareto_tiles(pareto: Pareto) -> list[Tile]:
    found = []
    middle = min(findings.compare_policy(pareto), key=lambda item: abs(item.cost - 0.5), default=None)
    if middle is not None:
        best = middle.best_simple
        note = (
            "no baseline measured there"
            if best is None
            else f"{'worse than the ' if middle.worse else ''}best simple baseline: {significant(best.error)}"
        )
        label = f"latent error of the policy at {percent(middle.cost)} of the attention cost"
        found.append(Tile(significant(middle.policy.error), label, note))
    for point in findings.points_of(pareto, findings.ALL_STUDENT)[:1]:
        if point.psnr is not None:
            note = f"at {percent(point.cost)} of the attention cost"
            found.append(Tile(quantity(point.psnr, "dB"), "PSNR with students everywhere", note))
    return found


def _payoff_tile(found: findings.Payoff) -> Tile:
    label = "image tokens from which a whole step pays"
    if found.verdict == "from":
        return Tile(f"\u2248{NBSP}{significant(found.tokens, 2)}", label, "on this machine")
    if found.verdict == "always":
        return Tile(f"\u2264{NBSP}{whole(found.sizes[0])}", label, "the smallest size measured, on this machine")
    if found.verdict == "never":
        return Tile("none", label, f"not up to {whole(found.sizes[-1])} tokens on this machine")
    return Tile(DASH, label, "no single break-even point" if found.verdict == "mixed" else "not measured")


@dataclass(frozen=True)
class FidelityTable:
    """Layers by (variant, when); each row ends with the last cell that knows whether the layer is ready."""

    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[FidelityRow | None, ...], FidelityRow | None], ...]


def fidelity_table(fidelity: Fidelity) -> FidelityTable:
    """Arrange the rows by layer."""
    columns = tuple(findings.variants_of_fidelity(fidelity))
    cells = {(row.layer, row.variant, row.when): row for row in fidelity.rows}
    rows = []
    for layer in dict.fromkeys(row.layer for row in fidelity.rows):
        line = tuple(cells.get((layer, *column)) for column in columns)
        known = [cell for cell in line if cell is not None and cell.ready is not None]
        rows.append((layer, line, known[-1] if known else None))
    return FidelityTable(columns, tuple(rows))


def level(distance: float | None) -> str:
    """Which limit a cosine distance keeps: ``"ready"``, ``"partly"``, ``"over"`` or ``"unknown"``."""
    if distance is None:
        return "unknown"
    if distance <= findings.READY:
        return "ready"
    return "partly" if distance <= findings.PARTLY_READY else "over"


def pareto_rows(pareto: Pareto) -> list[ParetoPoint]:
    """The points by method, in the order of the file, then by cost; the policy last but for the end points."""
    order = {name: place for place, name in enumerate(findings.methods_of(pareto))}
    order[findings.ALL_STUDENT], order[findings.ALL_FULL] = -2, -1
    return sorted(pareto.points, key=lambda point: (order[point.method], point.cost))


def comparison_methods(comparisons: list[Comparison]) -> list[str]:
    """Names of the methods that were compared with the policy at any cost."""
    return list(dict.fromkeys(reading.method for item in comparisons for reading in item.others))


def is_lowest(item: Comparison, method: str) -> bool:
    """Whether a method has the lowest error of a comparison."""
    own = item.reading(method)
    return own is not None and all(own.error <= other.error for other in (item.policy, *item.others))


@dataclass(frozen=True)
class TimingCell:
    """Time of one variant at one size and how it compares with exact attention."""

    time: str
    spread: str
    ratio: str
    faster: bool | None


def timing_rows(timing: Timing, kind: findings.Kind) -> list[tuple[int, list[TimingCell]]]:
    """For each size, one cell for exact attention and one for each variant."""
    names = [findings.EXACT, *findings.variants_of(timing)]
    times = {name: findings.times_of(timing, name, kind) for name in names}
    spreads = {
        (row.tokens, row.variant): row.attention_ms_spread for row in timing.rows if row.attention_ms_spread is not None
    }
    rows = []
    for tokens in sorted({row.tokens for row in timing.rows}):
        exact, cells = times[findings.EXACT].get(tokens), []
        for name in names:
            own = times[name].get(tokens)
            both = own is not None and exact is not None and name != findings.EXACT
            ratio = exact / own if both and own and exact else None
            spread = spreads.get((tokens, name)) if kind == "attention" else None
            between = f"{significant(spread[0])} to {significant(spread[-1])}" if spread else ""
            text = "" if ratio is None else f"{significant(ratio)}{NBSP}{TIMES}"
            cells.append(TimingCell(quantity(own, "ms"), between, text, None if ratio is None else ratio > 1))
        rows.append((tokens, cells))
    return rows


def phase_rows(results: Results) -> list[tuple[str, str, float]]:
    """Name, time and share of each phase of the run; the total last."""
    known = {name: value for name, value in results.seconds.items() if value is not None}
    total = known.pop("total", sum(known.values()))
    rows = [(name, duration(value), value / total if total else 0.0) for name, value in known.items()]
    return [*rows, ("total", duration(total), 1.0)] if rows else []


def command(results: Results) -> str:
    """The command line that starts the same run again."""
    parts = ["uv run ttr quickstart", f"--preset {results.preset}"]
    device = results.settings.get("device")
    if isinstance(device, str):
        parts.append(f"--device {device}")
    if results.budget_minutes is not None:
        parts.append(f"--budget {significant(results.budget_minutes, 6).rstrip('0').rstrip('.')}")
    if results.seed:
        parts.append(f"--seed {results.seed}")
    return " ".join([*parts, "--out my-run"])


Facts = list[tuple[str, str]]


def machine_facts(results: Results) -> Facts:
    """The machine, and the software that times depend on most."""
    machine = results.machine
    pairs = (
        ("processor", machine.cpu),
        ("threads", None if machine.threads is None else whole(machine.threads)),
        ("device", machine.device),
        ("system", machine.system),
        ("Python", machine.python),
        ("torch", machine.torch),
        ("diffusers", machine.diffusers),
    )
    return [(name, value or "not recorded") for name, value in pairs]


def version_facts(results: Results) -> Facts:
    """The workspace's packages."""
    return list(results.versions.items()) or [("packages", "not recorded")]


def run_facts(results: Results) -> Facts:
    """Settings and amounts of work of the run."""
    budget = "not recorded" if results.budget_minutes is None else quantity(results.budget_minutes, "min", 2)
    facts = [("preset", pretty(results.preset)), ("seed", whole(results.seed)), ("budget", budget)]
    shown = {"preset", "seed", "budget_minutes"}
    facts.extend((_words(name), _plain(value)) for name, value in results.settings.items() if name not in shown)
    facts.extend((_words(name), _plain(value)) for name, value in results.plan.items())
    return facts


def teacher_facts(teacher: Teacher) -> Facts:
    """Size and sampling of the teacher."""
    return [
        ("parameters", large(teacher.parameters)),
        ("layers", listing(teacher.layers) or DASH),
        ("heads", f"{whole(teacher.heads)}, width {whole(teacher.width)}"),
        ("tokens", f"{whole(teacher.tokens)} image, {whole(teacher.text_tokens)} text"),
        ("steps", whole(teacher.steps)),
        ("guidance", significant(teacher.guidance, 2)),
        ("fingerprint", (teacher.fingerprint or DASH)[:16]),
    ]


def variants(timing: Timing) -> list[str]:
    """Names of the timed variants but exact attention."""
    return findings.variants_of(timing)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plain(value: bool | float | tuple[float, ...] | str | None) -> str:
    if isinstance(value, tuple):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, float) and value == int(value):
        return whole(value)
    return anything(value)
