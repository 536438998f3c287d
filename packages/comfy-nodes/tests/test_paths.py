from pathlib import Path
from typing import Any

import pytest


def test_a_name_lives_in_the_hosts_models(host: Any) -> None:
    from comfy_nodes.paths import model_file, models_folder, output_folder

    folder = Path(host.models_folder, "approximate_attention")
    assert models_folder() == folder
    assert output_folder() == Path(host.output_folder)
    assert model_file(" mine ", "other") == folder / "mine"
    assert model_file("", "other") == folder / "other"
    assert model_file("sub/../mine.pt") == folder / "mine.pt"


def test_an_absolute_path_is_taken_as_it_is(host: Any, tmp_path: Path) -> None:
    from comfy_nodes.paths import model_file

    assert model_file(str(tmp_path / "x.pt")) == tmp_path / "x.pt"
    assert model_file("~/x.pt") == Path.home() / "x.pt"


@pytest.mark.parametrize("text", ["../x.pt", "a/../../x.pt", "../approximate_attention/x.pt"])
def test_a_name_stays_in_the_folder(host: Any, text: str) -> None:
    from comfy_nodes.paths import model_file

    with pytest.raises(ValueError, match=r"leads out of .*approximate_attention; use an absolute path"):
        model_file(text)


def test_nothing_named(host: Any) -> None:
    from comfy_nodes.paths import model_file

    with pytest.raises(ValueError, match="the checkpoint path is empty; name a file"):
        model_file("  ")
    with pytest.raises(ValueError, match="names no file"):
        model_file(".")


def test_a_changed_file_has_another_fingerprint(host: Any, tmp_path: Path) -> None:
    from comfy_nodes.paths import file_fingerprint

    file = tmp_path / "run" / "weights"
    assert file_fingerprint(file) == file_fingerprint(file.parent) == "missing"
    file.parent.mkdir()
    file.write_text("1", encoding="utf-8")
    one, folder = file_fingerprint(file), file_fingerprint(file.parent)
    file.write_text("22", encoding="utf-8")
    assert file_fingerprint(file) != one
    assert file_fingerprint(file.parent) != folder
