"""Helpers for building stores: the largest batch, reading ahead, ranks and a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, Dataset

from lightning_difftune.data.shards.format import MANIFEST
from lightning_difftune.errors import DataError

T = TypeVar("T")

BATCH_SIZE = 64  # if nothing needs to be built
LARGEST = 512  # trial batches are discarded, so this also bounds the waste


def build_batch(size: int | None, folder: Path, run: Callable[[int], object]) -> int:
    """The batch size that a folder is built with: the given one or, for ``None``, the largest that fits.

    Nothing is tried if the folder is finished; ``run`` is that of :func:`largest_batch`.
    """
    if size is not None:
        return size
    return BATCH_SIZE if (folder / MANIFEST).exists() else largest_batch(run, LARGEST)


def largest_batch(run: Callable[[int], object], limit: int) -> int:
    """Double a batch until the device's memory is full, or the limit is reached => the largest that was computed.

    Args:
        run: Computes a given number of samples; raises torch's ``OutOfMemoryError`` if the memory is full, as
            accelerators do. A CPU never does, so it computes ``limit``.
        limit: Largest batch to try. The first has 16 samples, halved while they are too many, down to one.
    """
    size, fits = min(16, limit), 0
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


class _Reads(Dataset[Any]):
    """Item i is ``read(i)``, or the :class:`DataError` that it raised."""

    def __init__(self, read: Callable[[int], Any], count: int) -> None:
        self.read, self.count = read, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        try:
            return self.read(index)
        except DataError as error:  # if a worker raised it, its message would be inside a printed traceback
            return error


def read_ahead(read: Callable[[int], T], count: int, num_workers: int) -> Iterator[T]:
    """``read(0)`` to ``read(count - 1)``, read ahead by worker processes, or in this one if there are none.

    ``read`` must be picklable; its :class:`DataError` is raised here.
    """
    for found in DataLoader(_Reads(read, count), batch_size=None, num_workers=num_workers):
        if isinstance(found, DataError):
            raise found
        yield found


def rank_of(trainer: Any) -> tuple[int, int]:
    """Rank of this process and world size; (0, 1) outside a trainer."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


class BuildOptions(TypedDict):
    """Arguments of all store builders; see :func:`lightning_difftune.data.shards.build`."""

    batch_size: int
    rank: int
    world_size: int
    barrier: Callable[[], None]
    progress: Callable[[int, int], None]


@contextmanager
def building(
    what: str, folder: Path, trainer: Any, size: int | None, run: Callable[[int], object]
) -> Iterator[BuildOptions]:
    """Build on all processes of a trainer, with a bar that appears at the first report of unfinished work.

    After a SIGTERM, the next report raises ``SIGTERMException``; finished shards are kept. The batch size is that of
    :func:`build_batch`.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    batch_size = build_batch(size, folder, run)
    rank, world_size = rank_of(trainer)
    barrier = (lambda: None) if trainer is None else trainer.strategy.barrier
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=rank != 0) as bar:
        task = bar.add_task(what, total=None, visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)
            if trainer is not None and trainer.received_sigterm:
                raise SIGTERMException

        yield BuildOptions(batch_size=batch_size, rank=rank, world_size=world_size, barrier=barrier, progress=progress)
