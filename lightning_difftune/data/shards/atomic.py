"""Files that are there whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes its place when the ``with`` block ends, and never does if that fails.

    Raises:
        OSError: The disk is full or refuses; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever kills the process.

    Raises:
        OSError: The disk is full or refuses; nothing is left behind.
    """
    with atomic_file(path) as file:
        file.write(data)


def discard_temporaries(folder: Path, name: str = "*") -> None:
    """Delete what killed runs left of the file ``name``, or of any file, on the way to the disk."""
    for leftover in folder.glob(f".{name}.*-*.tmp"):
        leftover.unlink(missing_ok=True)
