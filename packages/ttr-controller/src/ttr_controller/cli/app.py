"""Entry point of the ``ttr`` command: its subcommands, and how errors end."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from ttr_controller.cli import converting, distilling, inspecting, running, sampling

INTERRUPTED = 130
INTERRUPTED_TEXT = "interrupted; nothing is lost, run the same command again to go on"
FAILED = 1
USAGE = 2

# typer brings its own click or uses the installed one; its public names lead to the base of all usage errors.
_USAGE_ERROR: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="ttr",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=(
        "Learn where a diffusion transformer can use cheap attention.\n\n"
        "**Teacher**: the model with its own exact attention. **Student**: a cheap stand-in for one layer's attention. "
        "Phase 1 (`distill`) teaches the students while the teacher samples; phase 2 (`train-controller`) learns in "
        "which layers and steps they may be used. `quickstart` does both on a small embedded teacher, on a laptop, "
        "and writes a report; start there."
    ),
)
app.command("quickstart", rich_help_panel="Start here")(running.quickstart)
app.command("report", rich_help_panel="Start here")(running.report)
app.command("distill", rich_help_panel="One phase at a time")(distilling.distill)
app.command("train-controller", rich_help_panel="One phase at a time")(running.train_controller)
app.command("sample", rich_help_panel="Use what was learned")(sampling.sample)
app.command("inspect", rich_help_panel="Use what was learned")(inspecting.inspect)
app.command("convert", rich_help_panel="Use what was learned")(converting.convert)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit; what a user can mend ends in one line and a non-zero status, never in a traceback.

    Args:
        arguments: Words after ``ttr``; those of the process if ``None``.
    """
    command = typer.main.get_command(app)
    try:
        status = command.main(args=None if arguments is None else list(arguments), standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _complain(INTERRUPTED_TEXT)
        sys.exit(INTERRUPTED)
    except _USAGE_ERROR as error:
        text = _usage_text(error)
        if text:  # without any words the help was printed already
            _complain(f"{text}; see ttr --help")
        sys.exit(USAGE)
    except (ValueError, OSError) as error:
        if not _is_for_users(error):
            raise
        _complain(_one_line(error))
        sys.exit(FAILED)
    if status == INTERRUPTED:  # some versions of typer answer Ctrl-C themselves, silently
        _complain(INTERRUPTED_TEXT)
    sys.exit(status if isinstance(status, int) else 0)


def _usage_text(error: Exception) -> str:
    """The sentence of a usage error, on one line; ``str`` leaves out which option it is about."""
    text: str = getattr(error, "format_message", error.__str__)()
    return " ".join(text.split()).rstrip(".")


def _is_for_users(error: BaseException) -> bool:
    """Whether the error says what a user can do; any other exception is a bug and keeps its traceback."""
    from ttr_distill.checkpoint import CheckpointError

    from ttr_controller.pipeline.settings import RunError
    from ttr_controller.quality.models import QualityError
    from ttr_controller.report.results import ResultsError

    return isinstance(error, RunError | ResultsError | CheckpointError | QualityError | OSError)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _complain(text: str) -> None:
    print(f"ttr: {text}", file=sys.stderr)
