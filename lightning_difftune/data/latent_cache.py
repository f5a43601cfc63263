"""The target set as the frozen networks of a model see it, encoded once: latents, embeddings, control maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_difftune.data.images import ImageTargets, as_batch, mirror
from lightning_difftune.data.shards import ShardReader, ShardWork, ShardWriter, build
from lightning_difftune.data.shards.format import shard_name
from lightning_difftune.errors import ConfigError, DataError, StoreError
from lightning_difftune.protocols import TargetBatch

Encode = Callable[[TargetBatch], TargetBatch]

_KIND = "latent-cache"
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class LatentCache:
    """The posterior of every target picture's latents, in a folder of shards, memory-mapped.

    Mean and standard deviation are stored, so that each epoch draws new latents; and, where training mirrors pictures,
    those of the mirror image too, since an autoencoder does not commute with mirroring. Sample 2i of the shards is then
    picture i and sample 2i + 1 its mirror image, so that a batch reads from the disk only what it uses. Each has what
    the model's ``encode`` makes of it, ``latent_mean`` and ``latent_std`` (c, h, w) among them, and ``source_index``,
    int64: the picture that was encoded, which is another than i where a damaged file was skipped. A folder gets its
    manifest last and cannot be opened without, so a cache has every picture or is refused.

    Args:
        path: A finished cache.

    Raises:
        StoreError: The folder is missing, unfinished, no latent cache, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._reader = ShardReader(path, kind=_KIND)
        self._ways = 2 if self._reader.spec.get("mirrored") else 1

    @classmethod
    def build(
        cls,
        path: str | Path,
        targets: ImageTargets,
        encode: Encode,
        spec: dict[str, Any],
        *,
        mirrored: bool = True,
        batch_size: int = 64,
        dtype: Literal["float16", "float32"] = "float16",
        shard_size: int = 1024,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] = lambda: None,
        progress: Callable[[int, int], None] | None = None,
    ) -> LatentCache:
        """Open the cache of these pictures and this autoencoder; encode first what it lacks.

        A run that is stopped goes on at the shard where it was. All ranks must call this function.

        Args:
            path: The folder.
            targets: The pictures.
            encode: A batch as read, on the CPU => tensors to store, on any device: mean and standard deviation of the
                scaled latents, (B, c, h, w) each, and whatever else is trained on.
            spec: What decides the result, as plain JSON values: the autoencoder's fingerprint and scale.
            mirrored: Whether mirror images are stored, too.
            batch_size: Pictures in one call of ``encode``.
            dtype: How floating-point tensors are stored. float16 halves the size and rounds by 2**-11 at
                most, about 5e-4 for latents of unit variance; the first of 1000 diffusion steps adds noise of 1e-2.
            shard_size: Pictures in a shard. A killed run loses at most two shards on each rank: the one that is
                written and the one that is made.
            num_workers: Worker processes that read pictures ahead, so that the autoencoder does not wait for them.
            rank: This process.
            world_size: Number of processes.
            barrier: Waits for all processes.
            progress: Called with the pictures that this rank has done, and has to do in all.

        Raises:
            StoreError: The folder holds another cache, is damaged, the disk is full, or damaged pictures were skipped
                to make it and ``targets`` refuses those.
            DataError: A picture cannot be read.
            ConfigError: ``encode`` does not return latents.
        """
        full_spec = {
            "autoencoder": spec,
            "dtype": dtype,
            "mirrored": mirrored,
            "targets": {
                "channels": targets.channels,
                "identity": targets.identity(),
                "image_size": targets.image_size,
            },
        }
        ways = 2 if mirrored else 1
        writer = ShardWriter(
            path, kind=_KIND, spec=full_spec, num_samples=ways * len(targets), shard_size=ways * shard_size
        )

        def work() -> ShardWork:  # dealt out when the first batch is asked for, since other jobs may come before
            return writer.work(ways * batch_size, rank, world_size)

        pictures = _read_ahead(targets, work, ways, num_workers)

        def generate(indices: Tensor) -> dict[str, Tensor]:
            batch, source_index = next(pictures)  # of the same work, in the same order
            encoded = _encode(encode, [batch, mirror(batch)][:ways])
            stored = {name: t.to(_DTYPES[dtype]) if t.is_floating_point() else t for name, t in encoded.items()}
            return {**stored, "source_index": source_index.repeat_interleave(ways)}

        def report(done: int, total: int) -> None:
            if progress is not None:
                progress(done // ways, total // ways)

        build(writer, generate, ways * batch_size, rank=rank, world_size=world_size, barrier=barrier, progress=report)
        cache = cls(path)
        cache._report_replaced(targets)
        return cache

    @property
    def spec(self) -> dict[str, Any]:
        """What decided the contents: the autoencoder, the pictures, the dtype."""
        return self._reader.spec

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(c, h, w) of one latent."""
        return self._reader.shapes["latent_mean"]

    def __len__(self) -> int:
        return len(self._reader) // self._ways

    def read(self, indices: Sequence[int], flips: Sequence[bool]) -> TargetBatch:
        """A training batch.

        Args:
            indices: B positions in the target set.
            flips: B times whether to take the mirror image's latents.

        Returns:
            What was stored, floating-point tensors as float32: ``latent_mean`` and ``latent_std`` (B, c, h, w), and
            ``class_labels`` (B,) int64 or ``prompt_embeds`` (B, L, D).

        Raises:
            ConfigError: A mirror image is asked for, and the cache was made without.
        """
        pictures, mirrored = (torch.as_tensor(values, dtype=torch.int64) for values in (indices, flips))
        if self._ways == 1 and mirrored.any():
            raise ConfigError(f"{self.path} was made without mirror images; build it with mirrored=True.")
        samples = self._reader.read(self._ways * pictures + mirrored)
        del samples["source_index"]
        return cast("TargetBatch", {n: t.float() if t.is_floating_point() else t for n, t in samples.items()})

    def replaced(self) -> dict[int, int]:
        """The damaged pictures that were skipped, and the picture that stands in for each, by index."""
        replaced: dict[int, int] = {}
        for shard in range(self._reader.plan.num_shards):
            with safe_open(self.path / shard_name(shard), framework="pt") as file:  # one column, not the latents
                encoded = file.get_tensor("source_index").tolist()
            samples = self._reader.plan.shard_range(shard)
            ways = self._ways
            replaced |= {i // ways: j for i, j in zip(samples, encoded, strict=True) if i // ways != j}
        return replaced

    def verify(self) -> None:
        """Read every byte and compare the hashes.

        Raises:
            StoreError: A shard was altered.
        """
        self._reader.verify()

    def _report_replaced(self, targets: ImageTargets) -> None:
        replaced = self.replaced()
        if not replaced:
            return
        first = targets.describe(min(replaced))
        if targets.on_corrupt == "error":
            raise StoreError(
                f"{self.path} was made with on_corrupt='skip' and replaced {len(replaced)} damaged pictures, the first "
                f"one {first}. Allow that again with on_corrupt='skip', or mend them, delete {self.path} and run again."
            )
        rank_zero_warn(
            f"{self.path}: {len(replaced)} of {len(self)} pictures are damaged, the first one {first}; the next "
            "readable ones take their places."
        )


class _PicturesOfWork(Dataset[tuple[TargetBatch, Tensor] | DataError]):
    """Item k is the pictures of the k-th batch of work, and which ones were read, (B,) int64."""

    def __init__(self, targets: ImageTargets, work: ShardWork, ways: int) -> None:
        self.targets, self.work, self.ways = targets, work, ways

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, position: int) -> tuple[TargetBatch, Tensor] | DataError:
        try:
            pictures = self.work[position]["indices"][:: self.ways] // self.ways
            items = [self.targets.read(index) for index in pictures.tolist()]
            return as_batch(items, [False] * len(items)), torch.tensor([item.source_index for item in items])
        except DataError as error:  # raised in a worker, its message would arrive inside a printed traceback
            return error


def _read_ahead(
    targets: ImageTargets, work: Callable[[], ShardWork], ways: int, num_workers: int
) -> Iterator[tuple[TargetBatch, Tensor]]:
    loader = DataLoader(_PicturesOfWork(targets, work(), ways), batch_size=None, num_workers=num_workers)
    for pictures in loader:
        if isinstance(pictures, DataError):
            raise pictures
        yield pictures


@torch.no_grad()
def _encode(encode: Encode, batches: Sequence[TargetBatch]) -> dict[str, Tensor]:
    """What is stored of pictures, each followed by its mirror image if ``batches`` has that too, on the CPU."""
    encoded = [cast("dict[str, Tensor]", encode(batch)) for batch in batches]
    for tensors, batch in zip(encoded, batches, strict=True):
        count = len(batch["pixel_values"])
        mean, std = (tensors.get(name, torch.empty(0)) for name in ("latent_mean", "latent_std"))
        if mean.ndim != 4 or mean.shape != std.shape or any(len(tensor) != count for tensor in tensors.values()):
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ConfigError(
                f"encode returned {shapes} for {count} pictures; expected latent_mean and latent_std, (B, c, h, w) "
                "each, and tensors of B entries beside them."
            )
    return {name: torch.stack([t[name] for t in encoded], dim=1).flatten(0, 1).cpu() for name in encoded[0]}
