"""Building a folder of shards, on any number of processes and in as many runs as it takes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
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
from lightning_difftune.errors import ConfigError, StoreError
from lightning_difftune.files import FolderLock, atomic_write, discard_temporaries, file_digest

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PREVIOUS = "previous-"


class ShardBatch(NamedTuple):
    """Samples to generate together, all of one shard."""

    shard: int
    indices: Tensor  # (B,) int64, consecutive


class ShardWriter:
    """Builds a folder of shards, or resumes where an earlier run was stopped.

    Every rank of a job opens its own writer on the same folder. The folder stays unchanged if it holds another build.
    A finished folder of the same samples that has fewer grows; of one that has more, the first ones are used.

    Args:
        path: The folder; made if it is missing.
        kind: What it holds, such as ``"memory-bank"``.
        spec: What decides the contents, as plain JSON values. A folder of another spec is refused.
        num_samples: Samples in the whole folder.
        shard_size: Samples in a shard. A killed run loses at most two shards on each rank: the one that is
            written and the one that is made.
        replaces: Whether the contents of another plan may be replaced; ``None`` is never. They are moved to
            :attr:`previous` until the folder is finished. One that has no shard yet always is.

    Raises:
        StoreError: The folder belongs to another build, is unreadable, or cannot be written to.
        ConfigError: A size below 1, or a spec that JSON cannot hold.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        kind: str,
        spec: dict[str, Any],
        num_samples: int,
        shard_size: int,
        replaces: Callable[[BuildPlan], bool] | None = None,
    ) -> None:
        self.path = Path(path)
        try:
            self.plan = BuildPlan(kind, spec, num_samples, shard_size)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"Cannot plan a {kind} in {self.path}: {error}.") from error
        self._replaces = replaces
        self._lock = FolderLock(self.path)
        self._thread = ThreadPoolExecutor(max_workers=1)  # writes a shard while the samples of the next are made
        self._writing: Future[None] | None = None
        self._layout: dict[str, TensorLayout] | None = None
        self._pending: list[dict[str, Tensor]] = []
        self._pending_shard: int | None = None
        self._pending_samples = 0
        self._open()

    def _open(self) -> None:
        found = self._found()
        if found is None:
            self._save(self.path / BUILDING, dump_json(self.plan.to_json()))
        elif found[0].digest != self.plan.digest and not self._may_replace(*found):
            changed = differences(found[0].to_json(), {**self.plan.to_json(), "num_samples": found[0].num_samples})
            raise StoreError(another_build(found[1], found[0].kind, changed))

    def _found(self) -> tuple[BuildPlan, Path] | None:
        """The plan that the folder has now, and the file that says so."""
        manifest, building = self.path / MANIFEST, self.path / BUILDING
        for path in (
            manifest,
            building,
            manifest,
        ):  # another process may exchange the two between one look and the next
            try:
                if path.exists():
                    return (Manifest.load(path).plan if path == manifest else BuildPlan.load(path)), path
            except StoreError:
                if path.exists():
                    raise
        return None

    def _may_replace(self, plan: BuildPlan, source: Path) -> bool:
        """Whether what another plan has made so far may go: nothing yet, or what the writer's maker said."""
        if source.name == BUILDING and not self._shards():
            return True
        return self._replaces is not None and plan.kind == self.plan.kind and self._replaces(plan)

    def _shards(self) -> list[Path]:
        return sorted(self.path.glob("shard-*.safetensors"))

    @property
    def complete(self) -> bool:
        """Whether the build is finished."""
        found = self._found()
        if found is None or found[1].name != MANIFEST:
            return False
        return found[0].digest == self.plan.digest and found[0].num_samples >= self.plan.num_samples

    @property
    def previous(self) -> list[Path]:
        """Folders with shards of the builds that this one replaces; deleted when it is finished."""
        return sorted(self.path.glob(f"{_PREVIOUS}*"))

    def lock(self, waits: bool = True) -> None:
        """Keep other jobs from building here until :meth:`unlock`; for one process of this one.

        Args:
            waits: Wait for another job that builds here. Where several processes would wait for the one that does, it
                is better to refuse: they give up after half an hour.

        Raises:
            StoreError: Another job builds here, and nobody waits; or it has made something else of the folder.
        """
        if self.complete:
            return
        self._lock.acquire(waits)
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise

    def _begin(self) -> None:
        """Take the folder over from a shorter build of the same plan, or from one that is replaced."""
        self._open()  # again: another job may have finished it meanwhile
        found = self._found()
        if self.complete or found is None or found[0] == self.plan:
            return
        if found[0].digest != self.plan.digest:
            shards = self._shards()
            aside = self.path / f"{_PREVIOUS}{found[0].digest[:12]}"
            aside.mkdir(exist_ok=True)
            for shard in shards:
                os.replace(shard, aside / shard.name)
        self._save(self.path / BUILDING, dump_json(self.plan.to_json()))
        (self.path / MANIFEST).unlink(missing_ok=True)

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
        return [
            shard
            for shard in shards
            if shard_name(shard) not in present or self._samples_in(shard) < len(self.plan.shard_range(shard))
        ]

    def indices(self, shard: int) -> Tensor:
        """The sample indices of a shard, int64."""
        samples = self.plan.shard_range(shard)
        return torch.arange(samples.start, samples.stop)

    def work(self, batch_size: int, rank: int = 0, world_size: int = 1) -> list[ShardBatch]:
        """Deal out what is left for one rank to do, in batches that never cross a shard's boundary.

        Args:
            batch_size: Most samples in a batch.
            rank: This process.
            world_size: Number of processes.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1 to fill {self.path}, got {batch_size}.")
        self._pending_shard = None  # what an interrupted run left of a shard is generated again
        return [
            ShardBatch(shard, indices)
            for shard in self.missing_shards(rank, world_size)
            for indices in self.indices(shard)[self._samples_in(shard) :].split(batch_size)
        ]

    def add(self, batch: ShardBatch, tensors: dict[str, Tensor]) -> None:
        """Take the samples of a batch of :meth:`work`; when they are a shard's last, write it behind the next ones.

        Args:
            batch: The batch, which must follow the one before it.
            tensors: Its samples, (B, ...) each, on the CPU.

        Raises:
            StoreError: The batches do not follow each other, the tensors do not fit the other shards or are not
                finite, or the shard before cannot be written.
        """
        shard, indices = batch.shard, batch.indices.cpu()
        if shard != self._pending_shard:
            self._pending, self._pending_shard, self._pending_samples = [], shard, self._samples_in(shard)
            if self._pending_samples:  # of a shorter build
                self._pending.append(load_file(self.path / shard_name(shard)))
        expected = self.indices(shard)[self._pending_samples :]
        if not torch.equal(indices, expected[: len(indices)]):
            raise StoreError(
                f"{self.path / shard_name(shard)}: sample {int(expected[0])} comes next, but a batch of {len(indices)} "
                f"came that begins with {int(indices[0])}. Feed the batches of `work` in order."
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
        for folder in self.previous:
            shutil.rmtree(folder)
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

    def _samples_in(self, shard: int) -> int:
        """Samples in a shard's file; 0 if it is missing or damaged and the build makes it anew."""
        path = self.path / shard_name(shard)
        try:
            header = ShardHeader.load(path)
        except StoreError:
            return 0
        if header.tag != shard_tag(self.plan.digest, shard):
            raise StoreError(
                f"{path} was not made by this build of {self.plan.kind}. Move it away and build again, or name another "
                "folder."
            )
        return header.num_samples

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
        plan = writer.plan
        total = sum(len(plan.shard_range(shard)) for shard in range(rank, plan.num_shards, world_size))
        done = total - sum(len(batch.indices) for batch in work)
        for batch in work:
            writer.add(batch, generate(batch.indices))
            done += len(batch.indices)
            if progress is not None:
                progress(done, total)
        writer.flush()
        barrier()
        if rank == 0:
            writer.finish()
        barrier()
    finally:
        writer.unlock()
