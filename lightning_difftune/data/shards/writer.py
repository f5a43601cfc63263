"""Builds a folder of shards, on any number of processes and over any number of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from lightning_difftune.data.shards.folder import BuildFolder
from lightning_difftune.data.shards.format import (
    DTYPES,
    MANIFEST,
    TAG,
    BuildPlan,
    Manifest,
    ShardHeader,
    ShardRecord,
    TensorLayout,
    misfit,
    shard_name,
    shard_tag,
)
from lightning_difftune.errors import ConfigError, StoreError
from lightning_difftune.files import discard_temporaries, file_digest

FLOATS = {"float32": torch.float32, "float16": torch.float16}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def as_stored(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Tensors on the CPU, floating-point ones in a type of :data:`FLOATS`."""
    kinds = {name: FLOATS[dtype] if x.is_floating_point() else x.dtype for name, x in tensors.items()}
    return {name: x.detach().cpu().to(kinds[name]) for name, x in tensors.items()}


class ShardBatch(NamedTuple):
    """Samples to generate together, all of one shard."""

    shard: int
    indices: Tensor  # (B,) int64, consecutive


class ShardWriter:
    """Builds a folder of shards, or resumes an unfinished build.

    Every rank of a job opens its own writer on the same folder. A folder of another build is not changed. A finished
    folder with fewer of the same samples is extended; the first samples of a larger one are used.

    Args:
        path: The folder; created if missing.
        kind: Kind of contents, such as ``"memory-bank"``.
        spec: What determines the contents, as plain JSON values. A folder with another spec is refused.
        num_samples: Samples in the whole folder.
        shard_size: Samples per shard.
        replaces: Whether the contents of another plan may be replaced; ``None`` is never. They are moved to
            ``folder.previous`` until this build is finished. A folder without shards is always replaced.

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
        self.folder = BuildFolder(self.path, self.plan, replaces)
        self._layout: dict[str, TensorLayout] | None = None

    def indices(self, shard: int) -> Tensor:
        """The sample indices of a shard, int64."""
        samples = self.plan.shard_range(shard)
        return torch.arange(samples.start, samples.stop)

    def work(self, batch_size: int, rank: int = 0, world_size: int = 1) -> list[ShardBatch]:
        """The remaining work of one rank, in batches that never cross a shard's boundary."""
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1 to fill {self.path}, got {batch_size}.")
        return [
            ShardBatch(shard, indices)
            for shard in self.folder.missing_shards(rank, world_size)
            for indices in self.indices(shard)[self.folder.samples_in(shard) :].split(batch_size)
        ]

    def check(self, shard: int, tensors: dict[str, Tensor]) -> None:
        """Check that a shard's tensors, (samples, ...) each, may be written.

        Raises:
            StoreError: The tensors do not match the other shards or are not finite, or the folder is finished.
        """
        path, samples = self.path / shard_name(shard), self.plan.shard_range(shard)
        if self.folder.complete:
            raise StoreError(f"{path} is part of a finished {self.plan.kind} and is not written again.")
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
        self._layout = layout

    def write(self, shard: int, tensors: dict[str, Tensor]) -> None:
        """Write a shard atomically, after :meth:`check` accepted its tensors."""
        path = self.path / shard_name(shard)
        discard_temporaries(self.path, path.name)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self.folder.save(path, serialize(contiguous, metadata={TAG: shard_tag(self.plan.digest, shard)}))

    def finish(self) -> None:
        """Hash every shard and write the manifest; for one process, after all have written their shards."""
        if not self.folder.complete:
            self.folder.save(self.path / MANIFEST, self._manifest().to_bytes())
        self.folder.tidy()

    def _manifest(self) -> Manifest:
        if missing := self.folder.missing_shards():
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

    def _written_layout(self) -> dict[str, TensorLayout] | None:
        missing = set(self.folder.missing_shards())
        first = next((shard for shard in range(self.plan.num_shards) if shard not in missing), None)
        return None if first is None else ShardHeader.load(self.path / shard_name(first)).tensors


def build(
    writer: ShardWriter,
    generate: Callable[[list[Tensor]], Iterator[dict[str, Tensor]]],
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Generate the missing samples of a folder on every rank, and finish it; one job at a time.

    A killed run loses at most two shards per rank: the one being written and the one being generated.

    Args:
        writer: The folder.
        generate: Batches of sample indices, (B,) int64 each => tensors (B, ...) on the CPU, batch by batch; sample i
            must depend only on i.
        batch_size: Largest number of samples generated together.
        rank: Rank of this process.
        world_size: Number of processes; all must call this function.
        barrier: Waits for all processes.
        progress: Called with this rank's number of finished samples, and its total.

    Raises:
        StoreError: Another job builds here, the folder cannot be written to, or the generated tensors have the wrong
            shape or are not finite.
    """
    if rank == 0:
        writer.folder.lock(waits=world_size == 1)
    writing: Future[None] | None = None
    try:
        barrier()
        work = writer.work(batch_size, rank, world_size)
        total = sum(len(writer.plan.shard_range(shard)) for shard in range(rank, writer.plan.num_shards, world_size))
        done = total - sum(len(batch.indices) for batch in work)
        results = generate([batch.indices for batch in work])
        parts: list[dict[str, Tensor]] = []
        with ThreadPoolExecutor(max_workers=1) as thread:  # writes a shard while the next one is generated
            for number, (batch, made) in enumerate(zip(work, results, strict=False)):
                path = writer.path / shard_name(batch.shard)
                if not parts and writer.folder.samples_in(batch.shard):  # written by a shorter build
                    parts = [load_file(path)]
                for name, tensor in made.items():
                    if tensor.shape[:1] != batch.indices.shape:
                        raise StoreError(
                            f"{len(batch.indices)} samples were asked for, but {name} has shape {tuple(tensor.shape)}."
                        )
                parts.append(made)
                if number + 1 == len(work) or work[number + 1].shard != batch.shard:
                    if any(part.keys() != made.keys() for part in parts):
                        raise StoreError(f"{path}: its batches do not all hold {sorted(made)}.")
                    samples, parts = {name: torch.cat([part[name] for part in parts]) for name in made}, []
                    if writing is not None:
                        writing.result()
                    writer.check(batch.shard, samples)
                    writing = thread.submit(writer.write, batch.shard, samples)
                done += len(batch.indices)
                if progress is not None:
                    progress(done, total)
        if writing is not None:
            writing.result()
        barrier()
        if rank == 0:
            writer.finish()
        barrier()
    finally:
        writer.folder.unlock()
