"""A lock that admits one job at a time to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from lightning_difftune.errors import StoreError

LOCK = ".lock"


class FolderLock:
    """A lock for the job that writes into a folder; the operating system releases it when the job is killed.

    ``with FolderLock(folder).acquire(waits=True):`` releases it at the end of the block.

    Args:
        folder: The folder; the lock is a file in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / LOCK, thread_local=False)

    def __enter__(self) -> Self:
        """The lock, which is held already."""
        return self

    def __exit__(self, *error: object) -> None:
        """Release it."""
        self.release()

    def acquire(self, waits: bool) -> Self:
        """Take the lock, and return it.

        Args:
            waits: Log and wait while another job holds it; otherwise refuse to start.

        Raises:
            StoreError: Another job holds it and ``waits`` is not set, or the folder cannot be written to.
        """
        if self.try_acquire():
            return self
        if not waits:
            raise StoreError(f"Another job is working in {self.folder}. Wait until it is done, or name another folder.")
        from lightning.fabric.utilities.rank_zero import rank_zero_info  # the method needs torch alone

        rank_zero_info(f"Another job is working in {self.folder}; waiting for it.")
        self._lock.acquire(poll_interval=0.5)
        return self

    def try_acquire(self) -> bool:
        """Take the lock if no other job holds it, and return whether it was taken.

        Raises:
            StoreError: The folder cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as error:
            raise StoreError(
                f"{self.folder} cannot be written to ({error}). Make it writable or name another."
            ) from error
        return True

    def release(self) -> None:
        """Release the lock, if it is held."""
        self._lock.release()

    def discard(self) -> None:
        """Delete the lock file of a finished folder."""
        (self.folder / LOCK).unlink(missing_ok=True)
