"""What building a store takes: how many samples a device computes at once, and a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lightning_difftune.data.shards.format import MANIFEST

BATCH_SIZE = 64  # where nothing is to be built
LARGEST = 512  # what is tried out is computed for nothing, and is twice this at most


def build_batch(size: int | None, folder: Path, run: Callable[[int], object]) -> int:
    """The batch size that a folder is built with: the given one or, for ``None``, the largest that fits.

    Args:
        size: What was asked for.
        folder: What is built; nothing is tried out if it is finished.
        run: As for :func:`largest_batch`.
    """
    if size is not None:
        return size
    return BATCH_SIZE if (folder / MANIFEST).exists() else largest_batch(run, LARGEST)


def largest_batch(run: Callable[[int], object], limit: int, start: int = 16) -> int:
    """Double a batch until the device's memory is full, or the limit is reached.

    Args:
        run: Computes as many samples as it is told; its error where the memory is full is torch's
            ``OutOfMemoryError``, as accelerators raise it. A CPU has none, so it computes ``limit`` at most.
        limit: Largest batch that is tried.
        start: First batch that is tried; halved if even that is too large.

    Returns:
        The largest batch that was computed.

    Raises:
        OutOfMemoryError: If a single sample is too large.

    Example:
        >>> largest_batch(lambda count: None, limit=100)
        100
    """
    size, fits = min(start, limit), 0
    while True:
        try:
            run(size)
        except torch.OutOfMemoryError:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if fits:
                return fits
            if size == 1:
                raise
            size //= 2
            limit = size
        else:
            fits = size
            if size == limit:
                return fits
            size = min(2 * size, limit)


@contextmanager
def shard_progress(what: str, rank: int) -> Iterator[Callable[[int, int], None]]:
    """Yield ``progress(done, total)``; the bar appears at the first call that reports unfinished work."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=rank != 0) as bar:
        task = bar.add_task(what, total=None, visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        yield progress
