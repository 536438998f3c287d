"""Where nodes read and write files: folders of the host, never the pack's own."""

from pathlib import Path

FOLDER = "approximate_attention"
"""Folder of this pack among the host's models."""


def models_folder() -> Path:
    """Return the folder of this pack's checkpoints; it need not exist."""
    import folder_paths

    return Path(folder_paths.models_dir, FOLDER)


def output_folder() -> Path:
    """Return the host's folder for what nodes produce."""
    import folder_paths

    return Path(folder_paths.get_output_directory())


def model_file(text: str, default: str = "") -> Path:
    """Return the checkpoint that a user means.

    Args:
        text: An absolute path, or one within ``models_folder()``; blanks around it do not count.
        default: What an empty text means.

    Raises:
        ValueError: Nothing is named, or a relative path leads out of the folder.
    """
    named = text.strip() or default
    if not named:
        raise ValueError(f"the checkpoint path is empty; name a file, absolute or within {models_folder()}")
    path = Path(named).expanduser()
    if path.is_absolute():
        return path
    folder = models_folder()
    # Lexically: a link that a user made inside the folder may lead anywhere.
    parts: list[str] = []
    for part in path.parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            raise ValueError(f"the checkpoint path {named!r} leads out of {folder}; use an absolute path instead")
    if not parts:
        raise ValueError(f"the checkpoint path {named!r} names no file in {folder}")
    return folder.joinpath(*parts)


def file_fingerprint(path: Path) -> str:
    """Return what changes when a file does: time and size, or ``"missing"``; of a folder, those of all files in it."""
    try:
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        facts = [(one.name, one.stat()) for one in found]
    except OSError:
        return "missing"
    return ";".join(f"{name}:{stat.st_mtime_ns}:{stat.st_size}" for name, stat in facts)
