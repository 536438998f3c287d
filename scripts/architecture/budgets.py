"""Sizes and names of files and functions."""

import ast

from architecture.tree import Module, Tree, Violation

FILE_LINES = 400
FUNCTION_LINES = 60
EXECUTE_LINES = 25
EMPTY_NAMES = ("common", "helper", "helpers", "manager", "misc", "runtime", "util", "utils")


def file_length(tree: Tree) -> list[Violation]:
    """A file has at most 400 lines."""
    found = []
    for module in (*tree.sources, *tree.others):
        lines = len(module.text.splitlines())
        if lines > FILE_LINES:
            found.append(Violation("file-length", module.path, lines, f"{lines} lines, at most {FILE_LINES}"))
    return found


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the end without the docstring: documentation costs nothing."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def _limit(module: Module, name: str) -> int:
    return EXECUTE_LINES if module.package == "comfy_nodes" and name == "execute" else FUNCTION_LINES


def function_length(tree: Tree) -> list[Violation]:
    """A function has at most 60 lines, a node's ``execute`` 25, docstrings not counted; tests may list data."""
    found = []
    for module in (*tree.sources, *(other for other in tree.others if "tests" not in other.path.parts)):
        for node in ast.walk(module.syntax):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines, limit = function_lines(node), _limit(module, node.name)
                if lines > limit:
                    what = f"{node.name} has {lines} lines, at most {limit}"
                    found.append(Violation("function-length", module.path, node.lineno, what))
    return found


def file_name(tree: Tree) -> list[Violation]:
    """A file is named after what it holds, not after the fact that it holds something."""
    return [
        Violation("file-name", module.path, 1, f"{part!r} says nothing; use the field's word")
        for module in tree.sources
        for part in module.name.split(".")[1:]
        if part in EMPTY_NAMES
    ]


def init_file(tree: Tree) -> list[Violation]:
    """Every folder of modules is a package: import-linter and mypy pass over the others in silence."""
    packages = {module.path.parent for module in tree.sources if module.is_package}
    return [
        Violation("init", module.path, 1, f"{module.path.parent.as_posix()} has no __init__.py")
        for module in tree.sources
        if module.path.parent not in packages
    ]
