"""Latents of the target set, encoded once by the frozen autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_difftune.data.images import ImageTargets
from lightning_difftune.data.pixels import to_pixel_values
from lightning_difftune.data.shards import ShardReader, ShardWork, ShardWriter, build
from lightning_difftune.data.shards.format import shard_name
from lightning_difftune.errors import ConfigError, DataError, StoreError
from lightning_difftune.protocols import TargetBatch

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]

_KIND = "latent-cache"
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class LatentCache:
    """The posterior of every target picture's latents, in a folder of shards, memory-mapped.

    Mean and standard deviation are stored, so that each epoch draws new latents; and those of the mirror image too,
    since an autoencoder does not commute with mirroring. Sample 2i of the shards is picture i and sample 2i + 1 its
    mirror image, so that a batch reads from the disk only what it uses. Each has ``mean`` and ``std`` (c, h, w), its
    ``class_labels`` entry, int64, and ``source_index``, int64: the picture that was encoded, which is another than i
    where a damaged file was skipped. A folder gets its manifest last and cannot be opened without, so a cache has two
    samples for each of its pictures or is refused.

    Args:
        path: A finished cache.

    Raises:
        StoreError: The folder is missing, unfinished, no latent cache, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._reader = ShardReader(path, kind=_KIND)

    @classmethod
    def build(
        cls,
        path: str | Path,
        targets: ImageTargets,
        encode: Encode,
        spec: dict[str, Any],
        *,
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
            encode: ``pixel_values`` (B, C, H, W) float32 on the CPU => mean and standard deviation of the scaled
                latents, (B, c, h, w) each, on any device.
            spec: What decides the latents, as plain JSON values: the autoencoder's fingerprint and scale.
            batch_size: Pictures in one call of ``encode``; twice as many latents are made.
            dtype: How latents are stored. float16 halves the size and rounds by 2**-11 at most, about 5e-4 for
                latents of unit variance; the first of 1000 diffusion steps adds noise of 1e-2.
            shard_size: Pictures in a shard; what a killed run loses at most, on each rank.
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
            "targets": {
                "channels": targets.channels,
                "identity": targets.identity(),
                "image_size": targets.image_size,
            },
        }
        writer = ShardWriter(path, kind=_KIND, spec=full_spec, num_samples=2 * len(targets), shard_size=2 * shard_size)
        pictures = _read_ahead(targets, writer.work(2 * batch_size, rank, world_size), num_workers)

        def generate(indices: Tensor) -> dict[str, Tensor]:
            batch = next(pictures)  # of the same work, in the same order
            mean, std = _encode_both_ways(encode, to_pixel_values(batch.pixels))
            return {
                "mean": mean.to(_DTYPES[dtype]),
                "std": std.to(_DTYPES[dtype]),
                "class_labels": batch.class_labels.repeat_interleave(2),
                "source_index": batch.source_index.repeat_interleave(2),
            }

        def report(done: int, total: int) -> None:
            if progress is not None:
                progress(done // 2, total // 2)

        build(writer, generate, 2 * batch_size, rank=rank, world_size=world_size, barrier=barrier, progress=report)
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
        return self._reader.shapes["mean"]

    def __len__(self) -> int:
        return len(self._reader) // 2

    def read(self, indices: Sequence[int], flips: Sequence[bool]) -> TargetBatch:
        """A training batch.

        Args:
            indices: B positions in the target set.
            flips: B times whether to take the mirror image's latents.

        Returns:
            ``latent_mean`` and ``latent_std`` (B, c, h, w) float32, ``class_labels`` (B,) int64.
        """
        pictures, mirrored = (torch.as_tensor(values, dtype=torch.int64) for values in (indices, flips))
        samples = self._reader.read(2 * pictures + mirrored)
        return {
            "latent_mean": samples["mean"].float(),
            "latent_std": samples["std"].float(),
            "class_labels": samples["class_labels"],
        }

    def replaced(self) -> dict[int, int]:
        """The damaged pictures that were skipped, and the picture that stands in for each, by index."""
        replaced: dict[int, int] = {}
        for shard in range(self._reader.plan.num_shards):
            with safe_open(self.path / shard_name(shard), framework="pt") as file:  # one column, not the latents
                encoded = file.get_tensor("source_index").tolist()
            samples = self._reader.plan.shard_range(shard)
            replaced |= {i // 2: j for i, j in zip(samples, encoded, strict=True) if i // 2 != j}
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


class _Pictures(NamedTuple):
    pixels: Tensor  # (B, C, H, W) uint8
    class_labels: Tensor  # (B,) int64
    source_index: Tensor  # (B,) int64


class _PicturesOfWork(Dataset[_Pictures | DataError]):
    """Item k is the pictures of the k-th batch of work."""

    def __init__(self, targets: ImageTargets, work: ShardWork) -> None:
        self.targets, self.work = targets, work

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, position: int) -> _Pictures | DataError:
        try:
            pictures = self.work[position]["indices"][::2] // 2
            items = [self.targets.read(index) for index in pictures.tolist()]
        except DataError as error:  # raised in a worker, its message would arrive inside a printed traceback
            return error
        labels, source_index = (torch.tensor(column) for column in zip(*[item[1:] for item in items], strict=True))
        return _Pictures(torch.stack([item.pixels for item in items]), labels, source_index)


def _read_ahead(targets: ImageTargets, work: ShardWork, num_workers: int) -> Iterator[_Pictures]:
    loader = DataLoader(_PicturesOfWork(targets, work), batch_size=None, num_workers=num_workers)
    for pictures in loader:
        if isinstance(pictures, DataError):
            raise pictures
        yield pictures


@torch.no_grad()
def _encode_both_ways(encode: Encode, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (2B, c, h, w) on the CPU, each picture followed by its mirror image."""
    pairs = [encode(pixel_values), encode(pixel_values.flip(-1))]
    for mean, std in pairs:
        if mean.ndim != 4 or mean.shape != std.shape or len(mean) != len(pixel_values):
            raise ConfigError(
                f"encode returned a mean of shape {tuple(mean.shape)} and a standard deviation of shape "
                f"{tuple(std.shape)} for {len(pixel_values)} pictures; expected (B, c, h, w) twice."
            )
    means, stds = zip(*pairs, strict=True)
    return torch.stack(means, dim=1).flatten(0, 1).cpu(), torch.stack(stds, dim=1).flatten(0, 1).cpu()
