"""Files that are there whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever kills the process.

    Raises:
        OSError: The disk is full or refuses; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
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


def discard_temporaries(folder: Path, name: str = "*") -> None:
    """Delete what killed runs left of the file ``name``, or of any file, on the way to the disk."""
    for leftover in folder.glob(f".{name}.*-*.tmp"):
        leftover.unlink(missing_ok=True)
