"""Tests mirror sources: the stem of a test is the stem of what it tests."""

from pathlib import Path

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
        # Tests of the package as such: what it exports, what importing it loads.
        topics |= {"import", *(module.package for module in tree.sources if _package_folder(module) == folder)}
        stem = test.path.stem.removeprefix("test_")
        if not any(stem == topic or stem.startswith(f"{topic}_") for topic in topics):
            found.append(Violation("mirror", test.path, 1, f"no module or folder {stem!r} in {folder.as_posix()}/src"))
    return found


def sources_have_tests(tree: Tree) -> list[Violation]:
    """Every module with code of its own has a test file named after it or after its folder."""
    found = []
    for module in tree.sources:
        folder = _package_folder(module)
        if module.is_package or module.path.stem.startswith("__"):
            continue
        stems = {test.path.stem.removeprefix("test_") for test in _tests(tree) if _package_folder(test) == folder}
        topics = _topics(module)
        if not any(stem == topic or stem.startswith(f"{topic}_") for stem in stems for topic in topics):
            found.append(Violation("tested", module.path, 1, f"no test_{module.path.stem}.py in {folder}/tests"))
    return found
