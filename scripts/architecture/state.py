"""State, errors and randomness: what a module must not do behind its caller's back."""

import ast
from collections.abc import Iterator

from architecture.tree import Module, Tree, Violation

_MUTABLE_CALLS = (
    "list",
    "dict",
    "set",
    "bytearray",
    "defaultdict",
    "deque",
    "Counter",
    "OrderedDict",
    "WeakKeyDictionary",
)
_MUTABLE_NODES = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
_DRAWS = (
    "rand",
    "randn",
    "randint",
    "randperm",
    "bernoulli",
    "multinomial",
    "normal",
    "rand_like",
    "randn_like",
    "randint_like",
)
_GRAD_MODULE = "ttr_distill.grad"
_DEFAULT_MODULE = "attn_dispatch.default"


def _last_name(node: ast.expr) -> str:
    """``c`` of ``a.b.c``, ``c`` of ``c``, else empty."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _calls(module: Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(module.syntax) if isinstance(node, ast.Call))


def _import_time_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported, those of classes and branches included."""
    for node in body:
        yield node
        for block in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _import_time_statements(getattr(node, block, []))


def _is_mutable(value: ast.expr | None) -> bool:
    return isinstance(value, _MUTABLE_NODES) or (
        isinstance(value, ast.Call) and _last_name(value.func) in _MUTABLE_CALLS
    )


def _is_context(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Call) and _last_name(value.func) == "ContextVar"


def _may_hold_context(module: Module, names: list[str]) -> bool:
    """The process default; or the private mark by which an adapter knows its own calls."""
    in_adapter = ".adapters." in module.name and all(name.startswith("_") for name in names)
    return module.name == _DEFAULT_MODULE or in_adapter


def module_state(tree: Tree) -> list[Violation]:
    """Nothing mutable lives in a module or class body, and importing changes nothing elsewhere."""
    found = []
    for module in tree.sources:
        for node in _import_time_statements(module.syntax.body):
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            names = [_last_name(target) for target in targets]
            if any(isinstance(target, ast.Attribute | ast.Subscript) for target in targets):
                found.append(
                    Violation("module-state", module.path, node.lineno, "importing this assigns into another object")
                )
            elif names != ["__all__"] and _is_mutable(value):
                what = f"{', '.join(names)} is mutable: use a tuple, a frozenset or MappingProxyType"
                found.append(Violation("module-state", module.path, node.lineno, what))
            elif _is_context(value) and not _may_hold_context(module, names):
                found.append(
                    Violation(
                        "module-state",
                        module.path,
                        node.lineno,
                        "the one process default lives in attn_dispatch.default",
                    )
                )
    return found


def global_statement(tree: Tree) -> list[Violation]:
    """No function rebinds a module's names."""
    return [
        Violation("global", module.path, node.lineno, f"global {', '.join(node.names)}: pass the object")
        for module in tree.sources
        for node in ast.walk(module.syntax)
        if isinstance(node, ast.Global)
    ]


def _is_broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = [_last_name(one) for one in types]
    # Tidying up and raising again swallows nothing, an interrupt included.
    last = handler.body[-1]
    raises_again = isinstance(last, ast.Raise) and last.exc is None
    return "Exception" in names or ("BaseException" in names and not raises_again)


def broad_except(tree: Tree) -> list[Violation]:
    """Only named errors are caught; ``BaseException`` only to tidy up and raise again."""
    return [
        Violation("broad-except", module.path, node.lineno, "catch the errors that are meant, by name")
        for module in tree.sources
        for node in ast.walk(module.syntax)
        if isinstance(node, ast.ExceptHandler) and _is_broad(node)
    ]


def print_call(tree: Tree) -> list[Violation]:
    """Libraries log or return; the command line may write to a stream that it names."""
    found = []
    for module in tree.sources:
        for node in _calls(module):
            named = ".cli" in module.name and any(keyword.arg == "file" for keyword in node.keywords)
            if isinstance(node.func, ast.Name) and node.func.id == "print" and not named:
                found.append(
                    Violation("print", module.path, node.lineno, "log, return, or write to the command's console")
                )
    return found


def _leaves_inference_mode(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Call) and _last_name(node.func) == "inference_mode"):
        return False
    modes = [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
    return any(isinstance(mode, ast.Constant) and mode.value is False for mode in modes)


def _is_memo(node: ast.AST) -> bool:
    """A memoised function: its tensors outlive the mode in which they were first asked for."""
    if not isinstance(node, ast.FunctionDef):
        return False
    decorators = [one.func if isinstance(one, ast.Call) else one for one in node.decorator_list]
    return any(_last_name(one) in ("cache", "lru_cache") for one in decorators)


def inference_mode(tree: Tree) -> list[Violation]:
    """Inference mode is left in ``ttr_distill.grad``, and where a floor below it memoises constant tensors."""
    found = []
    for module in tree.sources:
        if module.name == _GRAD_MODULE:
            continue
        memos = [node for node in ast.walk(module.syntax) if _is_memo(node)]
        lawful = {id(below) for memo in memos for below in ast.walk(memo)}
        for node in ast.walk(module.syntax):
            if isinstance(node, ast.Call) and _leaves_inference_mode(node) and id(node) not in lawful:
                found.append(
                    Violation("inference-mode", module.path, node.lineno, "use ttr_distill.grad.training_mode()")
                )
    return found


def generator(tree: Tree) -> list[Violation]:
    """Every random draw of torch names its generator."""
    found = []
    for module in tree.sources:
        for node in _calls(module):
            function = node.func
            of_torch = (
                isinstance(function, ast.Attribute)
                and isinstance(function.value, ast.Name)
                and function.value.id == "torch"
            )
            named = any(keyword.arg == "generator" for keyword in node.keywords)
            if of_torch and _last_name(function) in _DRAWS and not named:
                found.append(
                    Violation("generator", module.path, node.lineno, f"torch.{_last_name(function)} without generator=")
                )
    return found
