"""The report's plots as files of their own, for papers and slides. They need matplotlib, which nothing else needs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from . import comparison, frontier, pairs, sensitivity, speed, widths
from .axes import PAPER
from .given import Given

PLOTS = (widths, sensitivity, pairs, frontier, comparison, speed)


def wanted(folder: str | os.PathLike[str]) -> Path:
    """The folder, made where it is not there. Whatever stands against pictures in it is an error, before any work."""
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"pictures={folder!r}; wanted a folder's name or None")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib ({error}); wanted: pip install matplotlib") from error
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"pictures={str(path)!r} is a file; wanted a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"pictures={str(path)!r}; wanted a folder, or a new one in a folder that exists")
    try:
        path.mkdir(exist_ok=True)
        _aside(path).cleanup()
    except OSError as error:
        why = error.strerror or error
        raise PermissionError(f"pictures={str(path)!r} takes no files ({why}); wanted a folder that does") from error
    return path


def pictures(given: Given) -> dict[str, bytes]:
    """PNG files by name: that of a plot's section. What draws nothing has none."""
    from .png import png

    found = {part.__name__.rpartition(".")[2]: part.drawings(given, PAPER) for part in PLOTS}
    return {f"{name}.png": png(drawings) for name, drawings in found.items() if drawings}


def write(folder: Path, files: dict[str, bytes]) -> None:
    """All are there in full before the first one replaces what had its name."""
    with _aside(folder) as aside:
        for name, contents in files.items():
            (Path(aside) / name).write_bytes(contents)
        for name in files:
            (Path(aside) / name).replace(folder / name)


def _aside(folder: Path) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir=folder, prefix=".pictures-")
