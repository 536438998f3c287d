"""Importing a package stays cheap: counted in modules, which no busy machine stretches."""

import subprocess
import sys
from functools import cache

import pytest

OURS = ("attn_kernels", "attn_dispatch", "ttr_distill", "ttr_controller", "comfy_nodes", "value_utils")

# For each package: whether it loads torch, at most so many modules of this workspace, and these packages of others.
BUDGETS = (
    ("value_utils", False, 8, frozenset()),
    ("attn_dispatch", False, 3, frozenset()),
    ("ttr_controller", False, 3, frozenset()),
    ("comfy_nodes", False, 6, frozenset()),
    ("attn_kernels", True, 75, frozenset()),
    ("ttr_distill", True, 130, frozenset({"safetensors"})),
)


@cache
def loaded(statement: str) -> frozenset[str]:
    """Modules in a fresh interpreter behind a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return frozenset(run.stdout.split())


def top(modules: frozenset[str]) -> frozenset[str]:
    return frozenset(name.partition(".")[0] for name in modules)


@pytest.mark.parametrize(("package", "needs_torch", "most", "others"), BUDGETS, ids=lambda value: str(value)[:14])
def test_importing_costs_no_more_than_this(package: str, needs_torch: bool, most: int, others: frozenset[str]) -> None:
    found = loaded(f"import {package}")
    assert ("torch" in found) is needs_torch
    ours = {name for name in found if name.partition(".")[0] in OURS}
    assert package in ours
    assert len(ours) <= most, f"{len(ours)} modules of this workspace"
    foreign = top(found - loaded("import torch" if needs_torch else "pass")) - set(OURS) - set(sys.stdlib_module_names)
    assert {name for name in foreign if not name.startswith("_")} <= others


def test_a_public_name_brings_what_it_needs() -> None:
    """Lazily, but surely: the name loads its module."""
    assert "torch" in loaded("from attn_dispatch import AttentionRouter")


HELP = """
import contextlib, io
from ttr_controller.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["--help"])
"""


def test_the_command_answers_help_without_torch() -> None:
    found = loaded(HELP)
    assert "typer" in found
    assert not {"torch", "diffusers", "matplotlib"} & top(found)
