"""Building a folder of shards, on any number of processes and in as many runs as it takes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from lightning_difftune.data.shards.format import (
    BUILDING,
    DTYPES,
    MANIFEST,
    TAG,
    BuildPlan,
    Manifest,
    ShardHeader,
    ShardRecord,
    TensorLayout,
    another_build,
    differences,
    dump_json,
    misfit,
    shard_name,
    shard_tag,
)
from lightning_difftune.data.shards.work import ShardBatch, ShardWork
from lightning_difftune.errors import ConfigError, StoreError
from lightning_difftune.files import FolderLock, atomic_write, discard_temporaries, file_digest

_CODES = {dtype: code for code, dtype in DTYPES.items()}


class ShardWriter:
    """Builds a folder of shards, or goes on where an earlier run was stopped.

    Every rank of a job opens its own writer on the same folder. The folder stays unchanged if it holds another build.

    Args:
        path: The folder; made if it is missing.
        kind: What it holds, such as ``"memory-bank"``.
        spec: What decides the contents, as plain JSON values. A folder of another spec is refused.
        num_samples: Samples in the whole folder.
        shard_size: Samples in a shard. A killed run loses at most two shards on each rank: the one that is
            written and the one that is made.

    Raises:
        StoreError: The folder belongs to another build, is unreadable, or cannot be written to.
        ConfigError: A size below 1, or a spec that JSON cannot hold.
    """

    def __init__(self, path: str | Path, *, kind: str, spec: dict[str, Any], num_samples: int, shard_size: int) -> None:
        self.path = Path(path)
        try:
            self.plan = BuildPlan(kind, spec, num_samples, shard_size)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"Cannot plan a {kind} in {self.path}: {error}.") from error
        self._lock = FolderLock(self.path)
        self._thread = ThreadPoolExecutor(max_workers=1)  # writes a shard while the samples of the next are made
        self._writing: Future[None] | None = None
        self._layout: dict[str, TensorLayout] | None = None
        self._pending: list[dict[str, Tensor]] = []
        self._pending_shard: int | None = None
        self._pending_samples = 0
        self._open()

    def _open(self) -> None:
        building = self.path / BUILDING
        if self.complete:
            found, source = Manifest.load(self.path / MANIFEST).plan, self.path / MANIFEST
        elif building.exists():
            found, source = BuildPlan.load(building), building
        else:
            self._save(building, dump_json(self.plan.to_json()))
            return
        if found.digest != self.plan.digest:
            changed = differences(found.to_json(), self.plan.to_json())
            raise StoreError(another_build(source, found.kind, changed))

    @property
    def complete(self) -> bool:
        """Whether the build is finished."""
        return (self.path / MANIFEST).exists()

    def lock(self, waits: bool = True) -> None:
        """Keep other jobs from building here until :meth:`unlock`; for one process of this one.

        Args:
            waits: Wait for another job that builds here. Where several processes would wait for the one that does, it
                is better to refuse: they give up after half an hour.

        Raises:
            StoreError: Another job builds here, and nobody waits.
        """
        if not self.complete:
            self._lock.acquire(waits)

    def unlock(self) -> None:
        """Let other jobs build here, if this one is at it."""
        if self._writing is not None:
            wait([self._writing])
        self._lock.release()

    def missing_shards(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """The unfinished shards of one rank; shard k belongs to rank ``k % world_size``.

        Raises:
            StoreError: A shard of another build lies in the folder.
        """
        if self.complete:
            return []
        # Listing the folder, unlike asking for each file, sees on a network file system what other nodes just wrote.
        present = set(os.listdir(self.path)) if self.path.is_dir() else set()
        shards = range(rank, self.plan.num_shards, world_size)
        return [shard for shard in shards if shard_name(shard) not in present or self._header(shard) is None]

    def indices(self, shard: int) -> Tensor:
        """The sample indices of a shard, int64."""
        samples = self.plan.shard_range(shard)
        return torch.arange(samples.start, samples.stop)

    def work(self, batch_size: int, rank: int = 0, world_size: int = 1) -> ShardWork:
        """Deal out what is left for one rank to do, in batches that never cross a shard's boundary.

        Args:
            batch_size: Most samples in a batch.
            rank: This process.
            world_size: Number of processes.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1 to fill {self.path}, got {batch_size}.")
        self._pending_shard = None  # what an interrupted run left of a shard is generated again
        missing = self.missing_shards(rank, world_size)
        batches = [
            ShardBatch(shard=shard, indices=indices)
            for shard in missing
            for indices in self.indices(shard).split(batch_size)
        ]
        finished = set(range(rank, self.plan.num_shards, world_size)) - set(missing)
        return ShardWork(batches, sum(len(self.plan.shard_range(shard)) for shard in finished))

    def add(self, batch: ShardBatch, tensors: dict[str, Tensor]) -> None:
        """Take the samples of a batch of :meth:`work`; when they are a shard's last, write it behind the next ones.

        Args:
            batch: The batch, which must follow the one before it.
            tensors: Its samples, (B, ...) each, on the CPU.

        Raises:
            StoreError: The batches do not follow each other, the tensors do not fit the other shards or are not
                finite, or the shard before cannot be written.
        """
        shard, indices = batch["shard"], batch["indices"].cpu()
        if shard != self._pending_shard:
            self._pending, self._pending_shard, self._pending_samples = [], shard, 0
        expected = self.indices(shard)[self._pending_samples :]
        if not torch.equal(indices, expected[: len(indices)]):
            raise StoreError(
                f"{self.path / shard_name(shard)}: sample {int(expected[0])} comes next, but a batch of {len(indices)} "
                f"came that begins with {int(indices[0])}. Feed the batches of `work` in order and unsampled; a "
                "Trainer with a DataLoader over them needs use_distributed_sampler=False."
            )
        if wrong := [name for name, tensor in tensors.items() if tensor.shape[:1] != indices.shape]:
            raise StoreError(
                f"{len(indices)} samples were asked for, but {wrong[0]} has shape {tuple(tensors[wrong[0]].shape)}."
            )
        self._pending.append(tensors)
        self._pending_samples += len(indices)
        if len(indices) == len(expected):
            parts, self._pending, self._pending_shard = self._pending, [], None
            if any(part.keys() != tensors.keys() for part in parts):
                raise StoreError(f"{self.path / shard_name(shard)}: its batches do not all hold {sorted(tensors)}.")
            self.flush()
            samples = {name: torch.cat([part[name] for part in parts]) for name in tensors}
            self._accept(shard, samples)
            self._writing = self._thread.submit(self._put, shard, samples)

    def flush(self) -> None:
        """Wait until every shard that was taken is on the disk.

        Raises:
            StoreError: The disk is full or refuses.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def write(self, shard: int, tensors: dict[str, Tensor]) -> None:
        """Write one whole shard, so that it is there complete or not at all.

        Args:
            shard: Its number.
            tensors: The samples, each tensor (samples of the shard, ...), float32, float16, uint8 or int64.

        Raises:
            StoreError: The tensors do not fit the other shards or are not finite, or the disk is full or refuses.
        """
        self.flush()
        self._accept(shard, tensors)
        self._put(shard, tensors)

    def finish(self) -> None:
        """Hash every shard and write the manifest; for one process, when all have written theirs.

        Raises:
            StoreError: Shards are missing, do not fit together, or the disk is full.
        """
        self.flush()
        if not self.complete:
            self._save(self.path / MANIFEST, self._manifest().to_bytes())
        if (building := self.path / BUILDING).exists():
            building.unlink()
        discard_temporaries(self.path)
        self._lock.discard()

    def _accept(self, shard: int, tensors: dict[str, Tensor]) -> None:
        if self.complete:
            path = self.path / shard_name(shard)
            raise StoreError(f"{path} is part of a finished {self.plan.kind} and is not written again.")
        self._layout = self._check(shard, tensors)

    def _put(self, shard: int, tensors: dict[str, Tensor]) -> None:
        path = self.path / shard_name(shard)
        discard_temporaries(self.path, path.name)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._save(path, serialize(contiguous, metadata={TAG: shard_tag(self.plan.digest, shard)}))

    def _manifest(self) -> Manifest:
        if missing := self.missing_shards():
            raise StoreError(
                f"{self.path} lacks {len(missing)} of {self.plan.num_shards} shards, the first one "
                f"{shard_name(missing[0])}. Build again: finished shards are kept."
            )
        tensors = ShardHeader.load(self.path / shard_name(0)).tensors
        records = []
        for shard in range(self.plan.num_shards):
            path = self.path / shard_name(shard)
            if (found := ShardHeader.load(path).tensors) != tensors:
                raise StoreError(misfit(path, found, tensors) + " Delete the wrong one and build again.")
            records.append(ShardRecord(path.stat().st_size, file_digest(path)))
        return Manifest(self.plan, tensors, tuple(records))

    def _header(self, shard: int) -> ShardHeader | None:
        """A finished shard's header; ``None`` for a damaged file, which the build makes anew."""
        path = self.path / shard_name(shard)
        try:
            header = ShardHeader.load(path)
        except StoreError:
            return None
        if header.tag != shard_tag(self.plan.digest, shard):
            raise StoreError(
                f"{path} was not made by this build of {self.plan.kind}. Move it away and build again, or name another "
                "folder."
            )
        return header if header.num_samples == len(self.plan.shard_range(shard)) else None

    def _check(self, shard: int, tensors: dict[str, Tensor]) -> dict[str, TensorLayout]:
        path, samples = self.path / shard_name(shard), self.plan.shard_range(shard)
        if not tensors:
            raise StoreError(f"{path}: no tensors to write.")
        for name, tensor in tensors.items():
            if tensor.dtype not in _CODES:
                raise StoreError(f"{path}: {name} is {tensor.dtype}; write one of {', '.join(map(str, _CODES))}.")
            if tensor.shape[:1] != (len(samples),):
                raise StoreError(
                    f"{path}: {name} has shape {tuple(tensor.shape)}, but the shard holds {len(samples)} samples."
                )
            bad = ~tensor.isfinite().flatten(1).all(1) if tensor.ndim > 1 else ~tensor.isfinite()
            if bad.any():
                raise StoreError(
                    f"{path}: {name} is not finite in {int(bad.sum())} of {len(samples)} samples, the first one sample "
                    f"{samples[int(bad.nonzero()[0])]}. Check the weights and the precision that made it."
                )
        try:
            layout = {name: TensorLayout(_CODES[x.dtype], tuple(x.shape[1:])) for name, x in tensors.items()}
        except ValueError as error:
            raise StoreError(f"{path}: {error}.") from error
        known = self._layout or self._written_layout()
        if known is not None and layout != known:
            raise StoreError(misfit(path, layout, known) + f" Delete {self.path} if those are the wrong ones.")
        return layout

    def _written_layout(self) -> dict[str, TensorLayout] | None:
        missing = set(self.missing_shards())
        first = next((shard for shard in range(self.plan.num_shards) if shard not in missing), None)
        return None if first is None else ShardHeader.load(self.path / shard_name(first)).tensors

    def _save(self, path: Path, data: bytes) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            atomic_write(path, data)
        except FileNotFoundError as error:
            raise StoreError(
                f"{path} vanished while it was written: another job builds in {self.path}. Stop one and run again; "
                "finished shards are kept."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(f"{path} cannot be written ({error}). Make it writable or name another.") from error
            done = self.plan.num_shards - len(self.missing_shards())
            raise StoreError(
                f"No space left on the disk for {path} ({len(data) / 1e6:.1f} MB). {done} of {self.plan.num_shards} "
                "shards are finished and kept: free some space and run again."
            ) from error


def build(
    writer: ShardWriter,
    generate: Callable[[Tensor], dict[str, Tensor]],
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Generate what a folder still lacks, on every rank, and finish it; one job does so at a time.

    Args:
        writer: The folder.
        generate: Sample indices (B,) int64 => tensors (B, ...) on the CPU; sample i must depend on i alone.
        batch_size: Most samples generated together.
        rank: This process.
        world_size: Number of processes; all must call this function.
        barrier: Waits for all processes.
        progress: Called with the samples that this rank has done, and has to do in all.

    Raises:
        StoreError: See :meth:`ShardWriter.add`, :meth:`ShardWriter.finish` and :meth:`ShardWriter.lock`.
    """
    if rank == 0:
        writer.lock(waits=world_size == 1)
    try:
        barrier()
        work = writer.work(batch_size, rank, world_size)
        done = work.num_done
        total = done + sum(len(batch["indices"]) for batch in work)
        for batch in work:
            writer.add(batch, generate(batch["indices"]))
            done += len(batch["indices"])
            if progress is not None:
                progress(done, total)
        writer.flush()
        barrier()
        if rank == 0:
            writer.finish()
        barrier()
    finally:
        writer.unlock()
