"""The ``ttr`` command."""

from ttr_controller.cli.app import main

__all__ = ["main"]
