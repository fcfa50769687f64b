"""written: a file that appears at its place whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file for the contents of `path`; what was there stays until all of them are on the disk.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with written(Path(folder) / "a") as file:
    ...         _ = file.write(b"all of it")
    ...     (Path(folder) / "a").read_text()
    'all of it'
    """
    require_place(path)
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe: written to, never replaced
        with path.open("wb") as file:
            yield file
        return
    aside = None
    try:
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or after a crash the name may be there before the contents
        mask = os.umask(0)
        os.umask(mask)
        Path(aside).chmod(0o666 & ~mask)  # mkstemp's 0600 is for secrets
        Path(aside).replace(path)
    except BaseException as error:
        if aside is not None:
            Path(aside).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # of the file that was asked for
            error.filename, error.filename2 = str(path), None
        raise


def require_place(path: Path) -> None:
    """Raise where no file can be: to be asked before what takes long."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}; wanted a file in a folder that exists")
    if path.is_dir():
        raise IsADirectoryError(f"path={str(path)!r} is a folder; wanted a file")
