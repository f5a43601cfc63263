"""One job at a time in a folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.fabric.utilities.rank_zero import rank_zero_info

from lightning_difftune.errors import StoreError

NAME = ".lock"


class Taken(StoreError):
    """Another job holds the lock of a folder."""


class FolderLock:
    """Held by the job that writes into a folder; the operating system takes it back from a job that is killed.

    Args:
        folder: The folder; the lock is a file in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / NAME, thread_local=False)

    def acquire(self, waits: bool) -> None:
        """Take the lock.

        Args:
            waits: Wait for a job that holds it, and say so; else refuse to begin.

        Raises:
            Taken: Another job holds it and nobody waits.
            StoreError: The folder cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            if not waits:
                raise Taken(
                    f"Another job is at work in {self.folder}. Wait until it is done, or name another folder."
                ) from error
            rank_zero_info(f"Another job is at work in {self.folder}; waiting for it.")
            self._lock.acquire(poll_interval=0.5)
        except OSError as error:
            raise StoreError(
                f"{self.folder} cannot be written to ({error}). Make it writable or name another."
            ) from error

    def try_acquire(self) -> bool:
        """Take the lock if no other job holds it; whether it is held now.

        Raises:
            StoreError: The folder cannot be written to.
        """
        with suppress(Taken):
            self.acquire(waits=False)
        return self._lock.is_locked

    def release(self) -> None:
        """Give the lock back, if it is held."""
        self._lock.release()

    def discard(self) -> None:
        """Delete the file: the folder is done, and nobody needs to take turns any more."""
        (self.folder / NAME).unlink(missing_ok=True)
