"""The architecture holds, and each of its rules finds a planted violation.

``ALLOWED`` is what a rule must accept, ``PLANTED`` what it must report; both are written into an empty workspace.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
from architecture import RULES, Tree, Violation, check, read_tree
from architecture.imports import FLOORS

ROOT = Path(__file__).resolve().parents[1]
KERNELS, DISPATCH = "packages/attn-kernels/src/attn_kernels", "packages/attn-dispatch/src/attn_dispatch"
DISTILL, CONTROLLER = "packages/ttr-distill/src/ttr_distill", "packages/ttr-controller/src/ttr_controller"
NODES, VALUES = "packages/comfy-nodes/src/comfy_nodes", "packages/value-utils/src/value_utils"
# Spelt in parts: the text rules read this file too.
OPEN_END = "TO" + "DO"
SHORT_FUNCTION = "def short():\n" + "    x = 1\n" * 59
LONG_FUNCTION = "def long():\n" + "    x = 1\n" * 60
DOCUMENTED_FUNCTION = 'def documented():\n    """First.\n' + "\n    More.\n" * 40 + '    """\n'
SHAPED = 'def f(q: Tensor | None) -> None:\n    """Do.\n\n    Args:\n        q: ``[B, H, N, D]``.\n    """\n'
UNSHAPED = 'def f(q: Tensor | None) -> None:\n    """Do.\n\n    Args:\n        q: The queries.\n    """\n'

PLANTED = [
    ("floors", f"{KERNELS}/a.py", "import attn_dispatch.call\n"),
    ("floors", f"{KERNELS}/a.py", "def f():\n    from value_utils import parse\n"),
    ("floors", f"{VALUES}/a.py", "from attn_kernels import Partial\n"),
    ("floors", f"{DISTILL}/a.py", "from ttr_controller.policy import RoutingPolicy\n"),
    ("hosts", f"{DISPATCH}/router.py", "import comfy.model_management\n"),
    ("hosts", f"{DISTILL}/student/attention.py", "def f():\n    from diffusers import FluxPipeline\n"),
    ("hosts", f"{CONTROLLER}/cli/main.py", "import folder_paths\n"),
    ("triton", f"{KERNELS}/near_far/api.py", "import triton.language as tl\n"),
    ("laws", f"{KERNELS}/near_far/fused.py", "from attn_kernels.near_far.reference import attend\n"),
    ("laws", f"{KERNELS}/near_far/fused.py", "from . import reference\n"),
    ("laws", f"{KERNELS}/near_far/reference.py", "from .blocked import attend\n"),
    ("laws", f"{DISPATCH}/call.py", "from attn_dispatch.router import Route\n"),
    ("laws", f"{DISPATCH}/router.py", "from attn_dispatch.backends.taylor import TaylorBackend\n"),
    ("laws", f"{DISPATCH}/adapters/sdpa.py", "from ..router import AttentionRouter\n"),
    ("laws", f"{DISPATCH}/native/catalog.py", "import attn_dispatch.adapters.comfyui\n"),
    ("laws", f"{DISTILL}/student/bank.py", "from ttr_distill.training.replay import ReplayBuffer\n"),
    ("laws", f"{DISTILL}/training/capture.py", "from ttr_distill.adapters.diffusers import DiffusersHost\n"),
    ("laws", f"{CONTROLLER}/policy.py", "from ttr_controller.reward import reward\n"),
    ("laws", f"{CONTROLLER}/quality/latent.py", "from ttr_controller.policy import RoutingPolicy\n"),
    ("laws", f"{CONTROLLER}/reinforce.py", "from ttr_controller.rollout import Trajectory\n"),
    ("private", f"{DISPATCH}/a.py", "from attn_kernels.near_far._order import order\n"),
    ("private", f"{DISPATCH}/a.py", "from attn_kernels.partial import _merge\n"),
    ("any", f"{DISPATCH}/router.py", "from typing import Any\n"),
    ("any", f"{DISPATCH}/router.py", "import typing\n\nx: typing.Any = 1\n"),
    ("file-length", f"{KERNELS}/a.py", "x = 1\n" * 401),
    ("file-length", "tests/test_a.py", "x = 1\n" * 401),
    ("function-length", f"{KERNELS}/a.py", LONG_FUNCTION),
    ("function-length", f"{NODES}/nodes/a.py", "class Node:\n    def execute(self):\n" + "        x = 1\n" * 25),
    ("file-name", f"{KERNELS}/utils.py", ""),
    ("file-name", f"{KERNELS}/common/a.py", ""),
    ("init", f"{KERNELS}/near_far/tiles.py", ""),
    ("module-state", f"{KERNELS}/a.py", "cache = {}\n"),
    ("module-state", f"{KERNELS}/a.py", "SIZES: list[int] = [1, 2]\n"),
    ("module-state", f"{KERNELS}/a.py", "import collections\n\nseen = collections.defaultdict(int)\n"),
    ("module-state", f"{KERNELS}/a.py", "class A:\n    shared = []\n"),
    ("module-state", f"{KERNELS}/a.py", "if True:\n    table = {n: n for n in range(3)}\n"),
    ("module-state", f"{KERNELS}/a.py", "import os\n\nos.environ['X'] = '1'\n"),
    ("module-state", f"{DISPATCH}/a.py", "from contextvars import ContextVar\n\nx = ContextVar('x')\n"),
    ("global", f"{KERNELS}/a.py", "def f():\n    global x\n    x = 1\n"),
    ("broad-except", f"{KERNELS}/a.py", "try:\n    pass\nexcept Exception:\n    raise\n"),
    ("broad-except", f"{KERNELS}/a.py", "try:\n    pass\nexcept (OSError, Exception) as e:\n    x = e\n"),
    ("broad-except", f"{KERNELS}/a.py", "try:\n    pass\nexcept:\n    raise\n"),
    ("broad-except", f"{KERNELS}/a.py", "try:\n    pass\nexcept BaseException:\n    x = 1\n"),
    ("print", f"{CONTROLLER}/cli/main.py", "def f():\n    print('x')\n"),
    ("print", f"{DISPATCH}/a.py", "def f():\n    print('x', file=sys.stderr)\n"),
    ("inference-mode", f"{DISTILL}/training/update.py", "with torch.inference_mode(False):\n    pass\n"),
    ("inference-mode", f"{DISTILL}/training/update.py", "with inference_mode(mode=False):\n    pass\n"),
    ("inference-mode", f"{KERNELS}/a.py", "def f():\n    with torch.inference_mode(False):\n        pass\n"),
    ("generator", f"{DISTILL}/a.py", "def f():\n    return torch.randn(3)\n"),
    ("docstring", f"{KERNELS}/a.py", "x = 1\n"),
    ("docstring", f"{KERNELS}/a.py", '"""A."""\n\ndef f():\n    pass\n'),
    ("docstring", f"{KERNELS}/a.py", '"""A."""\n\nclass A:\n    """A."""\n\n    def f(self):\n        pass\n'),
    ("shapes", f"{KERNELS}/a.py", UNSHAPED),
    ("shapes", f"{KERNELS}/a.py", 'class Pair(NamedTuple):\n    """Two."""\n\n    out: Tensor\n'),
    ("todo", f"{KERNELS}/a.py", f"# {OPEN_END}: finish\n"),
    ("todo", "docs/a.md", f"{OPEN_END} one day\n"),
    ("machine-path", f"{KERNELS}/a.py", "PATH = '/ro" + "ot/x'\n"),
    ("machine-path", "docs/a.md", "see `/wo" + "rk/shared`\n"),
    ("machine-path", ".ci/run", "cd /tm" + "p\n"),
    ("address", "docs/a.md", "see htt" + "ps://example.org/x\n"),
    ("address", "packages/a/pyproject.toml", "authors = ['me" + "@example.org']\n"),
    ("mirror", "packages/attn-kernels/tests/test_nowhere.py", ""),
    ("tested", f"{KERNELS}/lonely.py", ""),
]

ALLOWED = [
    ("floors", f"{CONTROLLER}/a.py", "from attn_kernels import Partial\nimport ttr_distill.grad\n"),
    ("hosts", f"{DISTILL}/adapters/diffusers.py", "import diffusers\n"),
    ("hosts", f"{DISTILL}/tiny/teacher.py", "def f():\n    import diffusers\n"),
    ("hosts", f"{CONTROLLER}/a.py", "import comfylike\nfrom ttr_distill.adapters.diffusers import DiffusersHost\n"),
    ("triton", f"{KERNELS}/near_far/fused.py", "import triton\n"),
    ("laws", f"{KERNELS}/near_far/api.py", "from attn_kernels.near_far import fused, reference\n"),
    ("laws", f"{DISPATCH}/call.py", "from attn_dispatch.masks import key_mask\n"),
    ("laws", f"{CONTROLLER}/rollout.py", "from ttr_controller.reinforce import bernoulli_log_prob\n"),
    ("laws", f"{CONTROLLER}/trainer.py", "from ttr_controller import policy, quality, reinforce, reward, rollout\n"),
    ("private", f"{KERNELS}/a.py", "from attn_kernels.partial import _merge\n"),
    ("any", f"{DISPATCH}/adapters/comfyui.py", "from typing import Any\n"),
    ("file-length", f"{KERNELS}/a.py", "x = 1\n" * 400),
    ("function-length", f"{KERNELS}/a.py", SHORT_FUNCTION),
    ("function-length", f"{KERNELS}/a.py", DOCUMENTED_FUNCTION),
    (
        "module-state",
        f"{KERNELS}/a.py",
        "__all__ = ['f']\nSIZES = (1, 2)\n\ndef f():\n    found = []\n    return found\n",
    ),
    ("module-state", f"{KERNELS}/a.py", "class A:\n    rows: list[int] = field(default_factory=list)\n"),
    ("module-state", f"{DISPATCH}/default.py", "backend = ContextVar('backend')\n"),
    ("module-state", f"{DISPATCH}/adapters/a.py", "_inside = ContextVar('inside')\n"),
    ("broad-except", f"{KERNELS}/a.py", "try:\n    pass\nexcept BaseException:\n    x = 1\n    raise\n"),
    ("broad-except", f"{KERNELS}/a.py", "try:\n    pass\nexcept (OSError, ValueError):\n    pass\n"),
    ("print", f"{CONTROLLER}/cli/main.py", "def f():\n    print('x', file=sys.stderr)\n"),
    ("print", f"{CONTROLLER}/cli/main.py", "def f(console):\n    console.print('x')\n"),
    ("inference-mode", f"{DISTILL}/grad.py", "with torch.inference_mode(False):\n    pass\n"),
    ("inference-mode", f"{DISTILL}/a.py", "with torch.inference_mode():\n    pass\n"),
    (
        "inference-mode",
        f"{KERNELS}/a.py",
        "@lru_cache(maxsize=8)\ndef f():\n    with torch.inference_mode(False):\n        pass\n",
    ),
    ("generator", f"{DISTILL}/a.py", "def f(g):\n    return torch.randn(3, generator=g)\n"),
    ("docstring", f"{KERNELS}/a.py", '"""A."""\n\ndef _f():\n    pass\n'),
    ("shapes", f"{KERNELS}/a.py", SHAPED),
    ("shapes", f"{KERNELS}/a.py", SHAPED.replace("``[B, H, N, D]``", "any shape")),
    ("function-length", "packages/attn-kernels/tests/test_a.py", LONG_FUNCTION),
    ("mirror", "packages/attn-kernels/tests/near_far/test_tiles_masked.py", ""),
    ("todo", f"{KERNELS}/a.py", f"# {OPEN_END}(#12): finish\n# {OPEN_END} (#12): finish\n"),
    ("machine-path", "docs/a.md", "a/wo" + "rk/b, net/wo" + "rk, ${HOME}/tm" + "p/x, /workspace\n"),
    ("address", "docs/a.svg.html", "xmlns='htt" + "p://www.w3.org/2000/svg', decorator @torch.no_grad, a@b\n"),
    ("tested", f"{KERNELS}/partial.py", ""),
]

# What a lawful file needs beside it.
BESIDE = {
    "mirror": {f"{KERNELS}/near_far/tiles.py": ""},
    "tested": {"packages/attn-kernels/tests/test_partial.py": ""},
}


def violations_of(rule: str, root: Path, files: Mapping[str, str]) -> list[Violation]:
    """Write the files and apply one rule."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return RULES[rule](read_tree(root))


@pytest.fixture(scope="module")
def workspace() -> Tree:
    return read_tree(ROOT)


@pytest.mark.parametrize("rule", RULES)
def test_the_workspace_keeps_the_rule(rule: str, workspace: Tree) -> None:
    found = RULES[rule](workspace)
    assert not found, "\n" + "\n".join(map(str, found))


def test_the_workspace_is_read(workspace: Tree) -> None:
    assert {module.package for module in workspace.sources} == set(FLOORS)
    assert Path("noxfile.py") in {module.path for module in workspace.others}
    assert Path("README.md") in {path for path, _ in workspace.texts}


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED)
def test_a_planted_violation_is_reported(rule: str, path: str, text: str, tmp_path: Path) -> None:
    found = violations_of(rule, tmp_path, {path: text})
    assert [(one.rule, one.path.as_posix()) for one in found] == [(rule, path)]


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_what_is_lawful_is_not_reported(rule: str, path: str, text: str, tmp_path: Path) -> None:
    beside = BESIDE.get(rule, {})
    assert violations_of(rule, tmp_path, {path: text, **beside}) == []


def test_every_rule_is_planted() -> None:
    assert {rule for rule, _, _ in PLANTED} == set(RULES)


def test_check_applies_all_rules(tmp_path: Path) -> None:
    (tmp_path / KERNELS).mkdir(parents=True)
    (tmp_path / KERNELS / "utils.py").write_text("cache = {}\nprint(cache)\n", encoding="utf-8")
    assert {one.rule for one in check(tmp_path)} == {
        "file-name",
        "init",
        "module-state",
        "print",
        "docstring",
        "tested",
    }


def test_a_law_is_not_evaded_through_a_re_export(tmp_path: Path) -> None:
    files = {
        f"{DISPATCH}/__init__.py": "from .router import AttentionRouter\nfrom attn_dispatch.call import LayerKey\n",
        f"{DISPATCH}/router.py": "class AttentionRouter: ...\n",
        f"{DISPATCH}/call.py": "class LayerKey: ...\n",
        f"{DISTILL}/adapters/diffusers.py": "from attn_dispatch import AttentionRouter, LayerKey\n",
    }
    found = violations_of("laws", tmp_path, files)
    assert [(one.line, "attn_dispatch.router" in one.what) for one in found] == [(1, True)]


def test_tests_of_a_folder_count_for_its_files(tmp_path: Path) -> None:
    files = {
        f"{KERNELS}/near_far/reference.py": "",
        f"{KERNELS}/near_far/tiles.py": "",
        "packages/attn-kernels/tests/test_near_far.py": "",
        "packages/attn-kernels/tests/test_near_far_gradient.py": "",
    }
    assert violations_of("tested", tmp_path, files) == []
    assert violations_of("mirror", tmp_path, files) == []


def test_an_import_in_a_test_counts(tmp_path: Path) -> None:
    files = {
        f"{KERNELS}/__init__.py": "from attn_kernels.partial import Partial\n",
        f"{KERNELS}/partial.py": "class Partial: ...\n",
        f"{KERNELS}/lonely.py": "",
        "packages/attn-kernels/tests/test_other.py": "from attn_kernels import Partial\n",
        "packages/attn-dispatch/tests/test_more.py": "from attn_kernels import lonely\n",
    }
    found = violations_of("tested", tmp_path, files)
    assert [one.path.stem for one in found] == ["lonely"]


def test_parts_are_tested_through_a_neighbour(tmp_path: Path) -> None:
    report = f"{CONTROLLER}/report"
    files = {
        f"{report}/__init__.py": "",
        f"{report}/page.py": "from ttr_controller.report.tables import rows\nfrom ttr_controller import elsewhere\n",
        f"{report}/tables.py": "from ttr_controller.report import units\n",
        f"{report}/units.py": "",
        f"{report}/orphan.py": "from ttr_controller.report import page\n",
        f"{CONTROLLER}/__init__.py": "",
        f"{CONTROLLER}/elsewhere.py": "",
        "packages/ttr-controller/tests/report/test_page.py": "",
    }
    found = violations_of("tested", tmp_path, files)
    assert {one.path.stem for one in found} == {"orphan", "elsewhere"}


def test_hidden_and_generated_folders_are_not_read(tmp_path: Path) -> None:
    bad = f"# {OPEN_END}\n"
    files = {f"packages/a/{folder}/x.py": bad for folder in (".cache", "__pycache__", "dist", "node_modules")}
    assert violations_of("todo", tmp_path, files) == []
