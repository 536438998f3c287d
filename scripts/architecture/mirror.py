"""Tests mirror sources: the stem of a test is the stem of what it tests."""

from pathlib import Path

from architecture.imports import imports_of
from architecture.tree import Module, Tree, Violation


def _package_folder(module: Module) -> Path | None:
    """``packages/<name>`` for files of a package, else ``None``."""
    return Path(*module.path.parts[:2]) if module.path.parts[0] == "packages" else None


def _topics(module: Module) -> set[str]:
    """Stems under which a source may be tested: its own, its folder's, and both joined."""
    parts = module.name.split(".")[1:]
    return set(parts) | {"_".join(parts[start:]) for start in range(len(parts))}


def _tests(tree: Tree) -> list[Module]:
    return [one for one in tree.others if "tests" in one.path.parts and one.path.name.startswith("test_")]


def tests_have_sources(tree: Tree) -> list[Violation]:
    """``packages/p/tests/**/test_x.py`` tests a module or folder ``x`` of package ``p``."""
    found = []
    for test in _tests(tree):
        folder = _package_folder(test)
        if folder is None:
            continue
        topics = {topic for module in tree.sources if _package_folder(module) == folder for topic in _topics(module)}
        # Tests of the package as such: what it exports, what importing it loads, how it is written, that its README is
        # true, that its kernels compile, that it runs on a GPU.
        topics |= {
            "import",
            "readme",
            "source",
            "compile",
            "gpu",
            *(module.package for module in tree.sources if _package_folder(module) == folder),
        }
        stem = test.path.stem.removeprefix("test_")
        if not any(stem == topic or stem.startswith(f"{topic}_") for topic in topics):
            found.append(Violation("mirror", test.path, 1, f"no module or folder {stem!r} in {folder.as_posix()}/src"))
    return found


def _is_named(module: Module, stems: set[str]) -> bool:
    return any(stem == topic or stem.startswith(f"{topic}_") for stem in stems for topic in _topics(module))


def sources_have_tests(tree: Tree) -> list[Violation]:
    """Every module has a test: one named after it or its folder, one that imports it, or one of a neighbour using it.

    Neighbours are modules of the same folder: the parts of a page are tested through the page. Tests of the package
    count, and those of the whole workspace.
    """
    modules = tree.by_name()
    stems: dict[Path | None, set[str]] = {None: set()}
    uses: dict[Path | None, set[str]] = {None: set()}
    for test in _tests(tree):
        folder = _package_folder(test)
        stems.setdefault(folder, set()).add(test.path.stem.removeprefix("test_"))
        uses.setdefault(folder, set()).update(one.target for one in imports_of(test, modules))
    tested: set[str] = set()
    for module in tree.sources:
        folder = _package_folder(module)
        imported = module.name in uses.get(folder, ()) or module.name in uses[None]
        if imported or _is_named(module, stems.get(folder, set()) | stems[None]):
            tested.add(module.name)
    reached = list(tested)
    while reached:
        module = modules[reached.pop()]
        for one in imports_of(module, modules):
            neighbour = modules.get(one.target)
            if neighbour is not None and neighbour.path.parent == module.path.parent and one.target not in tested:
                tested.add(one.target)
                reached.append(one.target)
    return [
        Violation("tested", module.path, 1, f"no test of {'/'.join(module.path.parts[:2])} or tests/ reaches it")
        for module in tree.sources
        if not module.is_package and not module.path.stem.startswith("__") and module.name not in tested
    ]
