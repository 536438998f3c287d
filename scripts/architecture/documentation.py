"""Docstrings of what users call: present, and with the shapes of tensors."""

import ast
import re
from collections.abc import Iterator

from architecture.tree import Module, Tree, Violation

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

# ``[B, H, N, D]``, ``[...]``, ``[]``; words for what has no fixed shape; or the method that this one implements.
_SHAPE = re.compile(
    r"\[[\w\s,.*+/()=|-]*\]|\bany (?:shape|tensor)\b|\bscalars?\b|\b0-d\b|\bsame shape\b|\bshaped like\b|\bsee ``\w",
    re.IGNORECASE,
)


def _is_overload(node: Documented) -> bool:
    return any(
        isinstance(one, ast.Name | ast.Attribute) and ast.unparse(one).endswith("overload")
        for one in node.decorator_list
    )


def _is_override(node: Documented) -> bool:
    return any(ast.unparse(one).endswith("override") for one in node.decorator_list)


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Documented]]:
    """Public classes, functions and methods with dotted names; nothing below a private name."""
    for node in body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


def _is_public(module: Module) -> bool:
    return not any(part.startswith("_") for part in module.name.split("."))


def docstring(tree: Tree) -> list[Violation]:
    """Every module, and every public class, function and method, says what it is."""
    found = []
    for module in tree.sources:
        if ast.get_docstring(module.syntax) is None:
            found.append(Violation("docstring", module.path, 1, "the module has no docstring"))
        for name, node in public_definitions(module.syntax.body):
            exempt = _is_overload(node) or _is_override(node)
            if not exempt and ast.get_docstring(node) is None:
                found.append(Violation("docstring", module.path, node.lineno, f"{name} has no docstring"))
    return found


def _names_tensor(annotation: ast.expr | None) -> bool:
    """Whether a value of this annotation is a tensor itself, perhaps optional."""
    if annotation is None:
        return False
    if isinstance(annotation, ast.BinOp):
        return _names_tensor(annotation.left) or _names_tensor(annotation.right)
    return ast.unparse(annotation).strip("'\"") in ("Tensor", "torch.Tensor")


def _tensor_names(node: Documented) -> list[str]:
    """Tensor parameters of a function, tensor fields of a class."""
    if isinstance(node, ast.ClassDef):
        fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and _names_tensor(one.annotation)]
        return [one.target.id for one in fields if isinstance(one.target, ast.Name)]
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument.arg for argument in arguments if _names_tensor(argument.annotation)]


def shapes(tree: Tree) -> list[Violation]:
    """A public function with tensor arguments, or class with tensor fields, gives their shapes."""
    found = []
    for module in tree.sources:
        for name, node in public_definitions(module.syntax.body) if _is_public(module) else ():
            tensors = _tensor_names(node)
            text = ast.get_docstring(node)
            if tensors and text is not None and not _SHAPE.search(text):
                what = f"{name}: give the shape of {', '.join(tensors)}, e.g. ``[B, H, N, D]``"
                found.append(Violation("shapes", module.path, node.lineno, what))
    return found
