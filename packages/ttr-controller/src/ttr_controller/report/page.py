"""The report page: a run's results as one HTML file that opens from disk and loads nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from ttr_distill.files import write_atomically

from ttr_controller.report import findings, plots, sentences, svg, tables, units
from ttr_controller.report.pictures import sheet_rows
from ttr_controller.report.results import Controller, Results, load_results

REPORT_NAME = "report.html"
_SECTIONS = (
    ("pictures", "Pictures", "sheet"),
    ("fidelity", "Fidelity of each layer", "fidelity"),
    ("training", "Training the students", "distillation"),
    ("routing", "What the policy chose", "controller"),
    ("pareto", "Quality against cost", "pareto"),
    ("learning", "How the policy learnt", "controller"),
    ("timing", "Time on this machine", "timing"),
    ("checks", "Checks", "checks"),
    ("reproduce", "Reproduce this", None),
    ("glossary", "Six words", None),
)


@dataclass(frozen=True)
class Section:
    """A section of the page; ``measured`` is false where the run has not reached its phase."""

    anchor: str
    number: int
    title: str
    measured: bool


def write_report(run_dir: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of a run as one self-contained HTML file.

    The file appears whole or not at all: a report that was there before is replaced only when the new one is complete.
    The same results give the same bytes.

    Args:
        run_dir: Folder of a run, with ``results.json`` and its pictures.
        out: Where to write; ``None`` = ``report.html`` in the run's folder.

    Returns:
        The path written.

    Raises:
        ResultsError: The results are missing, broken or of another schema; the message is one line.
        OSError: The report cannot be written.
    """
    folder = Path(run_dir)
    target = folder / REPORT_NAME if out is None else Path(out)
    page = render(load_results(folder), folder)
    write_atomically(target, page.encode("utf-8"))
    return target


def render(results: Results, run_dir: Path) -> str:
    """Render the page of a run's results.

    Args:
        results: The results.
        run_dir: Folder that the picture paths are relative to.

    Returns:
        The HTML text.

    Raises:
        ResultsError: A picture lies outside the run's folder.
    """
    environment = Environment(
        loader=PackageLoader("ttr_controller", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: tuple[Callable[..., str], ...] = (
        units.significant,
        units.quantity,
        units.percent,
        units.whole,
        units.duration,
        units.large,
        units.anything,
        units.pretty,
    )
    environment.filters.update({function.__name__: function for function in filters})
    template = environment.get_template("page.html.j2")
    pictures = sheet_rows(results.sheet, run_dir) if results.sheet is not None else []
    return template.render(
        r=results,
        say=sentences,
        tables=tables,
        shade=svg.shade,
        limits=(findings.READY, findings.PARTLY_READY),
        sections={section.anchor: section for section in _sections(results)},
        plots=_plots(results),
        pictures=pictures,
        comparisons=findings.compare_policy(results.pareto) if results.pareto is not None else [],
    )


def _sections(results: Results) -> list[Section]:
    return [
        Section(anchor, number, title, field is None or bool(getattr(results, field)))
        for number, (anchor, title, field) in enumerate(_SECTIONS, start=1)
    ]


def _plots(results: Results) -> dict[str, Markup | None]:
    drawn: dict[str, Markup | None] = {}
    if results.fidelity is not None:
        drawn["fidelity"] = plots.fidelity_plot(results.fidelity)
    if results.distillation is not None:
        drawn["loss"] = plots.training_plot(results.distillation.curves, "loss")
        drawn["cosine"] = plots.training_plot(results.distillation.curves, "cosine_distance")
    if results.controller is not None:
        drawn |= _learning_plots(results.controller)
    if results.pareto is not None:
        drawn["pareto"] = plots.pareto_plot(results.pareto)
    if results.timing is not None:
        drawn["attention"] = plots.timing_plot(results.timing, "attention")
        drawn["step"] = plots.timing_plot(results.timing, "step")
    return drawn


def _learning_plots(controller: Controller) -> dict[str, Markup | None]:
    errors = [("picture_error", "rollouts"), ("validation_error", "validation prompts")]
    return {
        "reward": plots.learning_plot(controller, [("reward", "reward")], "reward (more is better)"),
        "error": plots.learning_plot(controller, errors, "picture error (less is better)"),
    }
