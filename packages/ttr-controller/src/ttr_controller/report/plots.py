"""The report's plots: values in, one inline SVG out. Colours and style come from ``svg``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from ttr_controller.report import findings, svg
from ttr_controller.report.results import Controller, Curve, Fidelity, Pareto, Timing
from ttr_controller.report.units import pretty, significant, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

MANY = 8
"""More lines than this are drawn thin and unnamed, or with a legend of two columns."""

_METHOD_STYLES = (
    ("random", svg.RANDOM, "X", ":"),
    ("first steps full", svg.FIRST, "s", "--"),
    ("last steps full", svg.LAST, "D", "-."),
    ("distillation error by layer", svg.MUTED, "<", ":"),
    ("budget", svg.MUTED, ">", "-."),
    ("probe", svg.PROBE, "^", "--"),
    ("flips", svg.INK, "v", "--"),
    ("pairs", svg.INK, "h", "-."),
    ("pairs around exact sampling", svg.INK, "h", "-."),
    ("policy", svg.POLICY, "o", "-"),
)


def fidelity_plot(fidelity: Fidelity) -> Markup | None:
    """Cosine distance of every layer and variant on a logarithmic axis, with the two limits."""
    known = [row for row in fidelity.rows if row.cosine_distance is not None and row.cosine_distance > 0]
    if not known:
        return None
    layers = list(dict.fromkeys(row.layer for row in known))
    drawn = {(row.variant, row.when) for row in known}
    series = [pair for pair in findings.variants_of_fidelity(fidelity) if pair in drawn]
    with svg.plotting():
        figure = svg.new_figure(130 + 26 * len(layers) + 22 * len(series))
        axes = figure.add_subplot()
        for row, layer in enumerate(layers):
            values = _numbers(item.cosine_distance for item in known if item.layer == layer)
            axes.plot([min(values), max(values)], [row, row], color=svg.GRID, linewidth=4, zorder=1)
        for index, (variant, when) in enumerate(series):
            rows = [item for item in known if (item.variant, item.when) == (variant, when)]
            colour = svg.SERIES[(1 if when == "after" else 0) if len(series) == 2 else index % len(svg.SERIES)]
            axes.plot(
                _numbers(item.cosine_distance for item in rows),
                [layers.index(item.layer) for item in rows],
                linestyle="none",
                marker=svg.MARKERS[index % len(svg.MARKERS)],
                markersize=10 if when == "before" else 8,
                color=colour,
                markerfacecolor="none" if when == "before" else colour,
                markeredgewidth=2,
                label=f"{pretty(variant)}, {when} training",
                zorder=3,
            )
        for limit, style in ((findings.READY, "-"), (findings.PARTLY_READY, "--")):
            axes.axvline(limit, color=svg.LIMIT, linestyle=style, linewidth=1.5, label=f"limit {limit}", zorder=2)
        distances = [row.cosine_distance or 1.0 for row in known]
        axes.set_xscale("log")
        axes.set_xlim(min(*distances, findings.READY) / 1.6, max(*distances, findings.PARTLY_READY) * 1.6)
        _plain_log(axes.xaxis)
        axes.set_xlabel("cosine distance to the teacher (log scale, less is better)")
        axes.set_yticks(range(len(layers)), layers)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        _legend_below(axes, columns=1 if len(series) > 2 else 2)
        label = f"Dot plot: cosine distance of {len(layers)} layers, {_names(f'{v} {w} training' for v, w in series)}."
        return svg.to_svg(figure, "fidelity", label)


def training_plot(curves: Sequence[Curve], name: str) -> Markup | None:
    """``"loss"`` or ``"cosine_distance"`` of each layer over its updates."""
    lines = []
    for curve in curves:
        values = curve.loss if name == "loss" else curve.cosine_distance
        pairs = [(x, y) for x, y in zip(curve.update, values, strict=False) if y is not None]
        if pairs:
            lines.append((curve.layer, pairs))
    if not lines:
        return None
    words = {"loss": "training loss", "cosine_distance": "cosine distance"}[name]
    with svg.plotting():
        figure = svg.new_figure(360)
        axes = figure.add_subplot()
        for index, (layer, pairs) in enumerate(lines):
            xs, ys = zip(*pairs, strict=True)
            if len(lines) > MANY:
                axes.plot(xs, ys, color=svg.MUTED, linewidth=0.8, alpha=0.6)
            else:
                colour = svg.SERIES[index % len(svg.SERIES)]
                axes.plot(
                    xs, ys, color=colour, linestyle=svg.DASHES[index % 4], label=layer, marker=_dot(pairs), markersize=5
                )
        # A loss with learned weights may be negative, which a logarithmic axis cannot show.
        logarithmic = all(y > 0 for _, pairs in lines for _, y in pairs)
        if logarithmic:
            axes.set_yscale("log")
            _plain_log(axes.yaxis)
        else:
            _plain(axes.yaxis)
        if name == "cosine_distance":
            axes.axhline(findings.READY, color=svg.LIMIT, linewidth=1.5)
        _whole_numbers(axes.xaxis)
        axes.set_xlabel("updates of the layer")
        axes.set_ylabel(f"{words} (log scale)" if logarithmic else words)
        if len(lines) <= MANY:
            _legend_below(axes, columns=3)
        first, last = lines[0][1][0][1], lines[0][1][-1][1]
        label = f"Line plot: {words} of {len(lines)} layers over updates; {lines[0][0]} goes from "
        return svg.to_svg(figure, f"train-{name}", f"{label}{significant(first)} to {significant(last)}.")


def learning_plot(controller: Controller, fields: Sequence[tuple[str, str]], words: str) -> Markup | None:
    """Fields of the learning curve, as (field, name), over rollouts; ``words`` is the axis label with its unit."""
    with svg.plotting():
        figure = svg.new_figure(340)
        axes = figure.add_subplot()
        drawn = []
        for index, (field, name) in enumerate(fields):
            values = [(point.rollouts, getattr(point, field)) for point in controller.curve]
            pairs = [(x, y) for x, y in values if y is not None]
            if not pairs:
                continue
            xs, ys = zip(*pairs, strict=True)
            colour = svg.SERIES[(index + 1) % len(svg.SERIES)]
            axes.plot(
                xs, ys, color=colour, linestyle=svg.DASHES[index % 4], label=name, marker=_dot(pairs), markersize=5
            )
            drawn.append(f"{name} from {significant(ys[0])} to {significant(ys[-1])}")
        if not drawn:
            return None
        _whole_numbers(axes.xaxis)
        axes.set_xlabel("rollouts (sampled pictures)")
        axes.set_ylabel(words)
        _plain(axes.yaxis)
        if len(drawn) > 1:
            _legend_below(axes, columns=3)
        return svg.to_svg(figure, f"learning-{fields[0][0]}", f"Line plot over rollouts: {_names(drawn)}.")


def pareto_plot(pareto: Pareto) -> Markup | None:
    """Latent error over attention cost, one line per method, the policy on top."""
    methods = [name for name in findings.methods_of(pareto) if findings.points_of(pareto, name)]
    if not methods:
        return None
    with svg.plotting():
        many = len(methods) > MANY
        figure = svg.new_figure(550 if many else 470)
        axes = figure.add_subplot()
        for method in sorted(methods, key=lambda name: name == findings.POLICY):
            if method not in (findings.ALL_FULL, findings.ALL_STUDENT):
                _method_line(axes, pareto, method)
        for method, marker in ((findings.ALL_STUDENT, "P"), (findings.ALL_FULL, "*")):
            points = findings.points_of(pareto, method)
            if points:
                spread = [point.latent_rmse_se or 0.0 for point in points]
                axes.errorbar(
                    [100 * point.cost for point in points],
                    _numbers(point.latent_rmse for point in points),
                    yerr=spread if any(spread) else None,
                    linestyle="none",
                    color=svg.INK,
                    label=method,
                    capsize=4,
                    marker=marker,
                    markersize=13,
                    markeredgecolor=svg.CARD,
                    zorder=6,
                )
        if pareto.not_run:
            by_reason: dict[str, list[str]] = {}
            for name, why in pareto.not_run.items():
                by_reason.setdefault(why, []).append(name)
            text = "\n".join(f"not run: {_names(names)}\n({why})" for why, names in by_reason.items())
            axes.set_ylim(top=1.15 * axes.get_ylim()[1])
            axes.text(0.98, 0.98, text, transform=axes.transAxes, ha="right", va="top", color=svg.MUTED, fontsize=12)
        axes.set_xlabel("attention cost, % of full attention everywhere")
        axes.set_ylabel("latent error (relative RMSE)")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        _plain(axes.yaxis)
        _legend_below(axes, columns=2 if many else 3)
        return svg.to_svg(figure, "pareto", f"Scatter plot: latent error over attention cost for {_names(methods)}.")


def _method_line(axes: Axes, pareto: Pareto, method: str) -> None:
    styles = {name: (colour, marker, dash) for name, colour, marker, dash in _METHOD_STYLES}
    colour, marker, dash = styles.get(method, (svg.MUTED, "v", ":"))
    strong = method == findings.POLICY
    curve, points = findings.curve_of(pareto, method), findings.points_of(pareto, method)
    axes.plot(
        [100 * point.cost for point in curve],
        _numbers(point.latent_rmse for point in curve),
        color=colour,
        linestyle=dash,
        linewidth=3.5 if strong else 1.5,
        zorder=5 if strong else 3,
    )
    spread = [point.latent_rmse_se or 0.0 for point in points]
    axes.errorbar(
        [100 * point.cost for point in points],
        _numbers(point.latent_rmse for point in points),
        yerr=spread if any(spread) else None,
        linestyle="none",
        marker=marker,
        markersize=11 if strong else 8,
        markeredgecolor=svg.CARD,
        color=colour,
        elinewidth=2.5 if strong else 1.5,
        capsize=4,
        label=method,
        zorder=6 if strong else 4,
    )


def timing_plot(timing: Timing, kind: findings.Kind) -> Markup | None:
    """Milliseconds over tokens on logarithmic axes, the break-even points marked."""
    variants = [findings.EXACT, *findings.variants_of(timing)]
    known = {name: findings.times_of(timing, name, kind) for name in variants}
    known = {name: times for name, times in known.items() if times}
    if not known:
        return None
    words = {"attention": "attention of one step", "step": "one whole step"}[kind]
    marks = []
    with svg.plotting():
        figure = svg.new_figure(390)
        axes = figure.add_subplot()
        for index, (name, times) in enumerate(known.items()):
            exact = name == findings.EXACT
            colour = svg.INK if exact else (svg.POLICY, svg.FIRST, svg.PROBE, svg.LAST)[(index - 1) % 4]
            dash, marker = "-" if exact else svg.DASHES[index % 4], svg.MARKERS[index % 6]
            axes.plot(
                list(times), list(times.values()), marker=marker, ls=dash, color=colour, label=pretty(name), zorder=4
            )
            if kind == "attention":
                for row in timing.rows:
                    if row.variant == name and row.attention_ms_spread and len(row.attention_ms_spread) == 2:
                        axes.plot([row.tokens] * 2, row.attention_ms_spread, color=colour, linewidth=5, alpha=0.35)
            found = findings.payoff(timing, name, kind) if not exact else None
            if found is not None and found.tokens is not None:
                axes.axvline(found.tokens, color=colour, linestyle=":", linewidth=2)
                marks.append((found.tokens, f"{pretty(name)}: {significant(found.tokens, 2)}", colour))
        axes.set_xscale("log")
        axes.set_yscale("log")
        for row_index, (tokens, text, colour) in enumerate(marks):
            frame = axes.get_xaxis_transform()
            shift = (6, 18.0 * row_index)
            axes.annotate(text, (tokens, 0.03), shift, frame, "offset points", color=colour)
        sizes = sorted({tokens for times in known.values() for tokens in times})
        axes.set_xticks(sizes, [whole(tokens) for tokens in sizes])
        axes.minorticks_off()
        _plain_log(axes.yaxis)
        axes.set_xlabel("image tokens (log scale)")
        axes.set_ylabel(f"{words}, ms (log scale)")
        _legend_below(axes, columns=3)
        label = f"Line plot on logarithmic axes: {words} in milliseconds over image tokens for {_names(known)}; "
        label += f"break-even at {_names(text for _, text, _ in marks)} tokens." if marks else "no break-even point."
        return svg.to_svg(figure, f"timing-{kind}", label)


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _dot(pairs: Sequence[object]) -> str:
    return "o" if len(pairs) <= 20 else ""


def _formatter() -> Callable[[float, float], str]:
    return lambda value, _: (
        significant(value, 6).rstrip("0").rstrip(".") if "." in significant(value, 6) else whole(value)
    )


def _whole_numbers(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _plain(axis: Axis) -> None:
    axis.set_major_formatter(_formatter())


def _plain_log(axis: Axis) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high / max(low, 1e-12) < 1500 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(_formatter())
    axis.set_minor_formatter(NullFormatter())


def _legend_below(axes: Axes, columns: int) -> None:
    axes.figure.legend(loc="outside lower center", ncols=columns, columnspacing=1.4)
