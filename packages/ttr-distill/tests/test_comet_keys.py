import re
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
from ttr_distill.comet_keys import display_name, generate_experiment_key, git_hash, normalize_experiment_key

NOW = datetime(2026, 3, 4, 5, 6, 7, 890123)


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("abc", "abc" + 29 * "X"),
        ("my run_01!", "myrun01" + 25 * "X"),
        ("a" * 60, "a" * 50),
        ("a" * 40, "a" * 40),
        ("é" + "b" * 32, "b" * 32),
    ],
)
def test_keys_are_letters_and_digits_of_lawful_length(value: str, key: str) -> None:
    assert normalize_experiment_key(value) == key
    assert normalize_experiment_key(key) == key


def test_an_empty_key_is_random_or_stays_empty() -> None:
    assert normalize_experiment_key("-- ", allow_empty=True) == ""
    first, second = normalize_experiment_key(""), normalize_experiment_key("")
    assert re.fullmatch(r"exp[0-9a-f]{32}", first)
    assert first != second


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=trunk"]
    result = subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True)
    return result.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "r"
    (folder / "deep").mkdir(parents=True)
    git(folder, "init")
    git(folder, "commit", "--allow-empty", "-m", "one")
    return folder


def test_the_commit_is_what_git_says(repository: Path, tmp_path: Path) -> None:
    full = git(repository, "rev-parse", "HEAD")
    assert git_hash(repository / "deep", 7) == full[:7]
    git(repository, "pack-refs", "--all")
    assert git_hash(repository, 7) == full[:7]
    git(repository, "worktree", "add", "-b", "other", str(tmp_path / "tree"))
    git(tmp_path / "tree", "commit", "--allow-empty", "-m", "two")
    assert git_hash(tmp_path / "tree", 7) == git(tmp_path / "tree", "rev-parse", "HEAD")[:7] != full[:7]
    git(repository, "checkout", "--detach")
    assert git_hash(repository, 7) == full[:7]


def test_without_a_commit_it_says_so(tmp_path: Path) -> None:
    git(tmp_path, "init")
    assert git_hash(tmp_path, 7) == "nogit"
    (tmp_path / ".git" / "HEAD").write_text("nonsense")
    assert git_hash(tmp_path, 7) == "nogit"


def test_names_carry_time_and_commit(repository: Path) -> None:
    short = git(repository, "rev-parse", "HEAD")
    assert display_name(repository, NOW) == f"2026-03-04-050607-{short[:6]}"
    key = generate_experiment_key(repository, NOW)
    assert re.fullmatch(rf"{short[:7]}20260304050607890123\d{{5}}", key)
    assert len(key) == 32
