"""The figures of a run as lines that a user reads."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from attn_dispatch.call import LayerKey
from attn_dispatch.probe import FidelityRow
from attn_dispatch.report import DispatchRow
from attn_dispatch.router import NATIVE

from .measured import RunFigures

EXACT = "exact"
"""What native attention is called."""

_MOST_REASONS = 8


def summary(named: Mapping[str, RunFigures]) -> str:
    """Say in a few lines what ran, for the node itself.

    Args:
        named: Figures of each installation, the one that is asked first at the front.
    """
    if not named:
        return "No attention node of this pack is on the model: link the MODEL that the sampler used."
    return "\n".join(f"{name}: {_headline(figures)}" for name, figures in named.items())


def full_text(named: Mapping[str, RunFigures], refused: Mapping[str, Mapping[str, int]]) -> str:
    """Write the whole report.

    Args:
        named: Figures of each installation, the one that is asked first at the front.
        refused: For each installation how often which reason kept a call from being understood at all.
    """
    if not named:
        return summary(named)
    parts = [_section(name, figures, refused.get(name, {})) for name, figures in named.items()]
    if len(parts) > 1:
        parts.insert(0, "Asked in this order; what one leaves to exact attention, the next one is asked for.")
    return "\n\n".join(parts)


def layer_name(layer: LayerKey | None) -> str:
    """Name a layer; a host that names none has one row for all."""
    return "all layers" if layer is None else str(layer)


def _headline(figures: RunFigures) -> str:
    counts = figures.report.counts()
    calls = sum(counts.values())
    if not calls:
        return "no sampling run yet"
    ran = ", ".join(f"{_name(who)} {count} of {calls} calls" for who, count in counts.items())
    text = f"{ran}, {figures.report.attention_seconds():.3g} s in attention"
    if figures.seconds:
        text += f" of {figures.seconds:.3g} s"
    worst = _worst(figures.errors)
    return text if worst is None else f"{text}, mean error {100 * _mean_error(figures.errors):.2g}%"


def _section(name: str, figures: RunFigures, refused: Mapping[str, int]) -> str:
    rows = figures.report.rows()
    lines = [f"[{name}] {_headline(figures)}"]
    if rows:
        lines += ["", *_by_backend(rows)]
    reasons = figures.report.decline_kinds()
    lines += _reasons("Left to exact attention because:", reasons)
    lines += _reasons("Calls of an unknown kind, in all runs:", refused)
    worst = _worst(figures.errors)
    if worst is not None:
        lines += [
            "",
            f"Distance from exact attention: mean {_mean_error(figures.errors):.2g}, "
            f"worst {worst.relative_l2:.2g} in {layer_name(worst.layer)} at sigma {_sigma(worst.sigma)} "
            f"(relative L2), cosine distance {_mean(one.cosine_distance for one in figures.errors):.2g}",
        ]
    if rows:
        lines += ["", *_by_layer(rows, figures.errors)]
    return "\n".join(lines)


def _by_backend(rows: Iterable[DispatchRow]) -> list[str]:
    calls: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for row in rows:
        calls[row.ran] += row.count
        spent[row.ran] += row.milliseconds  # type: ignore[assignment]
    table = [("", "calls", "seconds", "ms a call")]
    for who, count in calls.items():
        table.append((_name(who), str(count), f"{spent[who] / 1e3:.3f}", f"{spent[who] / count:.3f}"))
    return _table(table)


def _by_layer(rows: Iterable[DispatchRow], errors: Iterable[FidelityRow]) -> list[str]:
    layers: dict[LayerKey | None, list[DispatchRow]] = {}
    for row in rows:
        layers.setdefault(row.layer, []).append(row)
    distances: dict[LayerKey | None, list[float]] = {}
    for one in errors:
        if one.calls > one.exact:
            distances.setdefault(one.layer, []).append(one.relative_l2)
    table = [("layer", "ran", "ms a call", *(("error",) if distances else ()))]
    for layer, found in layers.items():
        calls: Counter[str] = Counter()
        for row in found:
            calls[_name(row.ran)] += row.count
        ran = ", ".join(f"{who} {count}" for who, count in calls.items())
        spent = sum(row.milliseconds for row in found) / max(1, sum(row.count for row in found))
        error = f"{_mean(distances[layer]):.2g}" if layer in distances else "0"
        table.append((layer_name(layer), ran, f"{spent:.3f}", *((error,) if distances else ())))
    return _table(table)


def _reasons(title: str, reasons: Mapping[str, int]) -> list[str]:
    if not reasons:
        return []
    shown = list(reasons.items())[:_MOST_REASONS]
    lines = ["", title, *(f"  {count} x {reason}" for reason, count in shown)]
    left = sum(reasons.values()) - sum(count for _, count in shown)
    return [*lines, f"  {left} x other reasons"] if left else lines


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _worst(errors: Iterable[FidelityRow]) -> FidelityRow | None:
    return max((one for one in errors if one.calls > one.exact), key=lambda one: one.relative_l2, default=None)


def _mean_error(errors: Iterable[FidelityRow]) -> float:
    return _mean(one.relative_l2 for one in errors)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _name(ran: str) -> str:
    return EXACT if ran == NATIVE else ran


def _sigma(sigma: float | None) -> str:
    return "unknown" if sigma is None else f"{sigma:.3g}"
