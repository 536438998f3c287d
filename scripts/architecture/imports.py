"""Who may import whom, between the packages and within them."""

import ast
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType

from architecture.tree import Module, Tree, Violation

FLOORS: MappingProxyType[str, tuple[str, ...]] = MappingProxyType(
    {
        "attn_kernels": (),
        "value_utils": (),
        "attn_dispatch": ("attn_kernels",),
        "ttr_distill": ("attn_dispatch", "attn_kernels"),
        "ttr_controller": ("ttr_distill", "attn_dispatch", "attn_kernels"),
        "comfy_nodes": ("ttr_controller", "ttr_distill", "attn_dispatch", "attn_kernels", "value_utils"),
    }
)
"""The packages of the workspace, and which of the others each may import."""

HOSTS = ("comfy", "comfy_api", "comfy_execution", "diffusers", "folder_paths")
HOST_PLACES = ("*.adapters", "comfy_nodes", "ttr_distill.tiny")
"""Modules that may know a host. The embedded teacher is one: a diffusers model with its weights."""


@dataclass(frozen=True)
class Law:
    """Modules matching ``inside`` must not import modules matching ``forbidden``, except those matching ``allowed``.

    A pattern is a dotted name with ``*``; it covers the module and everything below it.
    """

    inside: tuple[str, ...]
    forbidden: tuple[str, ...]
    why: str
    allowed: tuple[str, ...] = ()


_CONTROLLER_PARTS = tuple(f"ttr_controller.{part}" for part in ("policy", "rollout", "reinforce", "reward", "quality"))

LAWS: tuple[Law, ...] = (
    Law(("*.fused", "*.fused_*"), ("*.reference",), "the fast form stands beside its specification, not on it"),
    Law(("*.reference",), ("*.fused", "*.blocked", "*.api"), "the specification knows no other form"),
    Law(("*.blocked",), ("*.fused", "*.api"), "an implementation is picked by api.py alone"),
    Law(
        ("attn_dispatch.call", "attn_dispatch.masks"),
        ("attn_dispatch",),
        "call and masks are the ground of the seam",
        allowed=("attn_dispatch.call", "attn_dispatch.masks"),
    ),
    Law(
        ("attn_dispatch.router", "attn_dispatch.guards", "attn_dispatch.report"),
        ("attn_dispatch.backends", "attn_dispatch.native", "attn_dispatch.adapters"),
        "the router knows no backend and no host",
    ),
    Law(
        ("attn_dispatch.adapters", "ttr_distill.adapters"),
        ("attn_dispatch.router",),
        "an adapter knows a handler, not a router",
    ),
    Law(("attn_dispatch.native",), ("attn_dispatch.adapters",), "native kernels know no host"),
    Law(
        ("ttr_distill.student",),
        ("ttr_distill.training", "ttr_distill.adapters", "ttr_distill.tiny"),
        "a student knows nothing of training or hosts",
    ),
    Law(("ttr_distill.training",), ("ttr_distill.adapters", "ttr_distill.tiny"), "training knows no host"),
    *(
        Law(
            (part,),
            tuple(other for other in _CONTROLLER_PARTS if other != part),
            "parts of the controller meet in its trainer",
            # Pure formulas: sampling and scoring use one Bernoulli.
            allowed=("ttr_controller.reinforce",) if part == "ttr_controller.rollout" else (),
        )
        for part in _CONTROLLER_PARTS
    ),
)


@dataclass(frozen=True)
class Import:
    """One imported module, with re-exports followed to the module that defines the name."""

    target: str
    line: int
    names: tuple[str, ...] = ()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    """Dotted name of the module that ``node`` imports from."""
    if node.level == 0:
        return node.module or ""
    parts = module.name.split(".")
    keep = len(parts) - node.level + (1 if module.is_package else 0)
    return ".".join([*parts[:keep], *([node.module] if node.module else [])])


def _origin(target: str, name: str, modules: dict[str, Module], depth: int = 0) -> str:
    """Module that defines ``name`` of ``target``: a submodule, or where ``target`` itself imports the name from."""
    if f"{target}.{name}" in modules:
        return f"{target}.{name}"
    holder = modules.get(target)
    if holder is None or not holder.is_package or depth > 4:
        return target
    for node in holder.syntax.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _origin(_absolute(holder, node), alias.name, modules, depth + 1)
    return target


def imports_of(module: Module, modules: dict[str, Module]) -> list[Import]:
    """Every import of ``module``, those inside functions and under ``TYPE_CHECKING`` included."""
    found: list[Import] = []
    for node in ast.walk(module.syntax):
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            target = _absolute(module, node)
            for alias in node.names:
                found.append(Import(_origin(target, alias.name, modules), node.lineno, (alias.name,)))
    return found


def floors(tree: Tree) -> list[Violation]:
    """A package imports only packages of lower floors."""
    modules = tree.by_name()
    found = []
    for module in tree.sources:
        allowed = (module.package, *FLOORS.get(module.package, ()))
        for one in imports_of(module, modules):
            top = one.target.partition(".")[0]
            if top in FLOORS and top not in allowed:
                found.append(
                    Violation("floors", module.path, one.line, f"{module.package} must not import {one.target}")
                )
    return found


def hosts(tree: Tree) -> list[Violation]:
    """Hosts are known to adapters, the node pack and the embedded teacher only."""
    modules = tree.by_name()
    found = []
    for module in tree.sources:
        if _matches(module.name, HOST_PLACES):
            continue
        for one in imports_of(module, modules):
            if one.target.partition(".")[0] in HOSTS:
                found.append(Violation("hosts", module.path, one.line, f"{one.target} belongs into adapters/"))
    return found


def triton(tree: Tree) -> list[Violation]:
    """Triton is imported in ``fused*.py`` only."""
    modules = tree.by_name()
    return [
        Violation("triton", module.path, one.line, "triton belongs into fused.py")
        for module in tree.sources
        if not module.path.stem.startswith("fused")
        for one in imports_of(module, modules)
        if one.target.partition(".")[0] == "triton"
    ]


def laws(tree: Tree) -> list[Violation]:
    """The laws within packages hold."""
    modules = tree.by_name()
    found = []
    for module in tree.sources:
        mine = [law for law in LAWS if _matches(module.name, law.inside)]
        for one in imports_of(module, modules) if mine else ():
            for law in mine:
                names = (one.target, *(f"{one.target}.{name}" for name in one.names))
                if any(_matches(name, law.forbidden) and not _matches(name, law.allowed) for name in names):
                    found.append(Violation("laws", module.path, one.line, f"imports {one.target}: {law.why}"))
    return found


def private(tree: Tree) -> list[Violation]:
    """No package reaches for another's underscore names."""
    modules = tree.by_name()
    found = []
    for module in tree.sources:
        for one in imports_of(module, modules):
            top = one.target.partition(".")[0]
            parts = (*one.target.split("."), *one.names)
            if top in FLOORS and top != module.package and any(part.startswith("_") for part in parts):
                found.append(Violation("private", module.path, one.line, f"{'.'.join(parts)} is private to {top}"))
    return found


def any_type(tree: Tree) -> list[Violation]:
    """``typing.Any`` is for adapters and the node pack, where a host's objects have no type."""
    found = []
    for module in tree.sources:
        if _matches(module.name, ("*.adapters", "comfy_nodes")):
            continue
        for node in ast.walk(module.syntax):
            imported = (
                isinstance(node, ast.ImportFrom)
                and node.module == "typing"
                and "Any" in [one.name for one in node.names]
            )
            if imported or (isinstance(node, ast.Attribute) and ast.unparse(node) == "typing.Any"):
                found.append(Violation("any", module.path, node.lineno, "name the type, or a Protocol, instead of Any"))
    return found
