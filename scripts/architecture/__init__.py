"""The architecture as rules over syntax trees: what import-linter and ruff cannot say.

Every rule takes a ``Tree`` and returns the places that break it; ``check`` runs them all. The rules read source text
only, nothing of the workspace is imported.
"""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

from architecture import budgets, documentation, imports, mirror, state, text
from architecture.tree import Tree, Violation, read_tree

Rule = Callable[[Tree], list[Violation]]

RULES: MappingProxyType[str, Rule] = MappingProxyType(
    {
        "floors": imports.floors,
        "hosts": imports.hosts,
        "triton": imports.triton,
        "laws": imports.laws,
        "private": imports.private,
        "any": imports.any_type,
        "file-length": budgets.file_length,
        "function-length": budgets.function_length,
        "file-name": budgets.file_name,
        "init": budgets.init_file,
        "module-state": state.module_state,
        "global": state.global_statement,
        "broad-except": state.broad_except,
        "print": state.print_call,
        "inference-mode": state.inference_mode,
        "generator": state.generator,
        "docstring": documentation.docstring,
        "shapes": documentation.shapes,
        "todo": text.todo,
        "machine-path": text.machine_path,
        "address": text.address,
        "mirror": mirror.tests_have_sources,
        "tested": mirror.sources_have_tests,
    }
)

__all__ = ["RULES", "Rule", "Tree", "Violation", "check", "read_tree"]


def check(root: Path) -> list[Violation]:
    """Apply every rule to the workspace at ``root``."""
    tree = read_tree(root)
    return [violation for rule in RULES.values() for violation in rule(tree)]
