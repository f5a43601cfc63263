"""The target set encoded once by a model's frozen networks: latents, embeddings, control maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_difftune.data.building import read_ahead
from lightning_difftune.data.caption_store import CaptionStore
from lightning_difftune.data.images import ImageTargets
from lightning_difftune.data.items import as_batch, mirror
from lightning_difftune.data.shards import FLOATS, ShardReader, ShardWriter, as_stored, build
from lightning_difftune.data.shards.format import MANIFEST, BuildPlan, Manifest, shard_name
from lightning_difftune.errors import ConfigError, StoreError, check_choice
from lightning_difftune.files import json_digest
from lightning_difftune.protocols import TargetBatch

Encode = Callable[[TargetBatch], TargetBatch]

_KIND = "latent-cache"
_MIRRORED = "mirrored."  # before the name of a column
_FACTS = ("source_index", "picture")
_CAPTION, _CAPTIONS = "caption", "captions"  # a column of keys, and the folder of what they stand for


class LatentCache(ShardReader):
    """The latents' posterior of every target picture, in a memory-mapped folder of shards.

    Mean and standard deviation are stored, so that each epoch draws new latents; and, if training mirrors pictures,
    those of the mirror image too, since an autoencoder does not commute with mirroring. Each sample has the outputs of
    the model's ``encode``, including ``latent_mean`` and ``latent_std`` (c, h, w); those of its mirror image under
    ``mirrored.`` names; ``source_index``, int64: the encoded picture, which is not i if a damaged file was skipped; and
    ``picture``, int64: a digest of its file or array, 0 if unknown.

    Args:
        path: A finished cache.

    Raises:
        StoreError: The folder is missing, unfinished, damaged, or not a latent cache.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, kind=_KIND)
        self._captions = _caption_store(self.path, self.spec)
        self._names = [n for n in self.shapes if not n.startswith(_MIRRORED) and n not in _FACTS]

    @classmethod
    def build(
        cls,
        path: str | Path,
        targets: ImageTargets,
        encode: Encode,
        spec: dict[str, Any],
        *,
        mirrored: bool = True,
        of_caption: Sequence[str] = (),
        batch_size: int = 64,
        dtype: Literal["float16", "float32"] = "float16",
        shard_size: int = 1024,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] = lambda: None,
        progress: Callable[[int, int], None] | None = None,
    ) -> LatentCache:
        """Open the cache of these pictures and this autoencoder, after encoding what is missing.

        An interrupted build resumes at its shard. From a cache of other pictures, unchanged pictures are kept and the
        others are encoded. All ranks must call this function.

        Args:
            path: The folder.
            targets: The pictures.
            encode: A batch as read, on the CPU => tensors to store, on any device: mean and standard deviation of the
                scaled latents, (B, c, h, w) each, and other training data.
            spec: What determines the result, as plain JSON values: the autoencoder's fingerprint and scale.
            mirrored: Whether to store mirror images as well.
            of_caption: Columns of ``encode`` that depend only on the caption. They are stored once per distinct
                caption, as bfloat16, and read back with each picture.
            batch_size: Pictures in one call of ``encode``.
            dtype: Type of stored floating-point tensors. float16 halves the size with a relative error of at most
                2**-11, about 5e-4 for latents of unit variance; the first of 1000 diffusion steps adds noise of 1e-2.
            shard_size: Pictures per shard; a killed run loses at most two shards per rank.
            num_workers: Worker processes that read pictures ahead, so that the autoencoder does not wait for them.
            rank: Rank of this process.
            world_size: Number of processes.
            barrier: Waits for all processes.
            progress: Called with this rank's number of finished pictures, and its total.

        Raises:
            StoreError: The folder holds another cache or is damaged, the disk is full, or the cache skipped damaged
                pictures and ``targets`` refuses those.
            DataError: A picture cannot be read.
            ConfigError: ``encode`` does not return latents, or the ``dtype`` is unknown.
        """
        check_choice("LatentCache", "dtype", dtype, *FLOATS)
        full_spec = {
            "autoencoder": spec,
            **({"of_caption": list(of_caption)} if of_caption else {}),
            "dtype": dtype,
            "mirrored": mirrored,
            "targets": {
                "channels": targets.channels,
                "identity": targets.identity(),
                "image_size": targets.image_size,
                "pictures": len(targets),
            },
        }
        if not mirrored and (Path(path) / MANIFEST).exists():  # a cache with mirror images has all that is needed
            full_spec["mirrored"] = mirrored = Manifest.load(Path(path) / MANIFEST).plan.spec == full_spec | {
                "mirrored": True
            }
        digests = cache(targets.picture_digests)  # needed only if something is encoded

        def replaces(other: BuildPlan) -> bool:
            pictures = {"identity": targets.identity(), "pictures": len(targets)}
            changed = {**other.spec, "targets": {**other.spec["targets"], **pictures}}
            return changed == full_spec and bool(_encoded([Path(path)], digests()))

        writer = ShardWriter(
            path, kind=_KIND, spec=full_spec, num_samples=len(targets), shard_size=shard_size, replaces=replaces
        )
        captions = _caption_store(Path(path), full_spec)

        def generate(batches: list[Tensor]) -> Iterator[dict[str, Tensor]]:
            kept = _encoded(writer.folder.previous, digests())
            work = [[i for i in indices.tolist() if i not in kept] for indices in batches]
            pictures = read_ahead(partial(_pictures_at, targets, work), len(work), num_workers)
            for indices, new, found in zip(batches, work, pictures, strict=True):
                old = [i for i in indices.tolist() if i in kept]
                parts = [{**_row(*kept[i]), "source_index": torch.tensor([i])} for i in old]
                if found is not None:
                    batch, source_index = found
                    encoded = _encode(encode, batch, mirrored)
                    if of_caption:
                        keys = CaptionStore.keys(batch["captions"])
                        captions.add(keys, {name: encoded[name] for name in of_caption})
                        prefixes = ("", _MIRRORED) if mirrored else ("",)
                        encoded = {n: x for n, x in encoded.items() if n.removeprefix(_MIRRORED) not in of_caption}
                        encoded |= {prefix + _CAPTION: keys for prefix in prefixes}
                    known = digests()
                    own = source_index == torch.tensor(new)
                    picture = torch.zeros_like(source_index) if known is None else known[new] * own
                    parts.append({**as_stored(encoded, dtype), "source_index": source_index, "picture": picture})
                back = torch.tensor(old + new).argsort()
                yield {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

        build(writer, generate, batch_size, rank=rank, world_size=world_size, barrier=barrier, progress=progress)
        finished = cls(path)
        finished._report_replaced(targets)
        return finished

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(c, h, w) of one latent."""
        return self.shapes["latent_mean"]

    def read(self, indices: Sequence[int], flips: Sequence[bool]) -> TargetBatch:
        """A training batch of the pictures at B indices, or of the mirror images of those with a flip.

        Returns:
            The stored tensors, floating-point ones as float32: ``latent_mean`` and ``latent_std`` (B, c, h, w), and
            ``class_labels`` (B,) int64 or ``prompt_embeds`` (B, L, D).

        Raises:
            ConfigError: A mirror image is requested, but the cache has none.
        """
        pictures, mirrored = torch.as_tensor(indices), torch.as_tensor(flips, dtype=torch.bool)
        if mirrored.any() and not self.spec.get("mirrored"):
            raise ConfigError(f"{self.path} was made without mirror images; build it with mirrored=True.")
        plain = self.rows(pictures[~mirrored], self._names)
        flipped = self.rows(pictures[mirrored], [_MIRRORED + name for name in self._names if mirrored.any()])
        samples = {}
        for name, tensor in plain.items():
            samples[name] = tensor.new_empty((len(pictures), *tensor.shape[1:]))
            samples[name][~mirrored] = tensor
            if flipped:
                samples[name][mirrored] = flipped[_MIRRORED + name]
        if _CAPTION in samples:
            samples |= self._captions.read(samples.pop(_CAPTION))
        return cast("TargetBatch", {n: t.float() if t.is_floating_point() else t for n, t in samples.items()})

    def replaced(self) -> dict[int, int]:
        """Indices of the damaged pictures that were skipped => indices of their replacements."""
        replaced: dict[int, int] = {}
        for shard in range(self.plan.num_shards):
            with safe_open(self.path / shard_name(shard), framework="pt") as file:  # one column, not the latents
                encoded = file.get_tensor("source_index").tolist()
            samples = self.plan.shard_range(shard)
            replaced |= {i: j for i, j in zip(samples, encoded, strict=False) if i != j}
        return replaced

    def _report_replaced(self, targets: ImageTargets) -> None:
        if not (replaced := self.replaced()):
            return
        first = targets.describe(min(replaced))
        if targets.on_corrupt == "error":
            raise StoreError(
                f"{self.path} was made with on_corrupt='skip' and replaced {len(replaced)} damaged pictures, the first "
                f"one {first}. Allow that again with on_corrupt='skip', or repair them, delete {self.path} and "
                "run again."
            )
        rank_zero_warn(
            f"{self.path}: {len(replaced)} of {len(self)} pictures are damaged, the first one {first}; the next "
            "readable ones take their places."
        )


_Pictures = tuple[TargetBatch, Tensor] | None


def _pictures_at(targets: ImageTargets, work: list[list[int]], position: int) -> _Pictures:
    """Pictures at a list of indices, and the indices that were read, (B,) int64; ``None`` for an empty list."""
    items = [targets.read(index) for index in work[position]]
    if not items:
        return None
    return as_batch(items, [False] * len(items)), torch.tensor([item.source_index for item in items])


def _caption_store(path: Path, spec: dict[str, Any]) -> CaptionStore:
    """The store of this encoder's captions; the folder may hold an unfinished cache of another encoder."""
    return CaptionStore(path / f"{_CAPTIONS}-{json_digest(spec['autoencoder'])[:12]}")


def _encoded(folders: Sequence[Path], digests: Tensor | None) -> dict[int, tuple[Path, int]]:
    """The file and row of each picture, by index, in earlier shards."""
    rows: dict[int, tuple[Path, int]] = {}
    for folder in folders if digests is not None else []:
        for shard in sorted(folder.glob("shard-*.safetensors")):
            with suppress(OSError, SafetensorError), safe_open(shard, framework="pt") as file:
                rows |= {digest: (shard, row) for row, digest in enumerate(file.get_tensor("picture").tolist())}
    return {} if digests is None else {i: rows[d] for i, d in enumerate(digests.tolist()) if d and d in rows}


def _row(shard: Path, row: int) -> dict[str, Tensor]:
    with safe_open(shard, framework="pt") as file:
        return {name: file.get_slice(name)[row : row + 1] for name in file.keys()}  # noqa: SIM118 - not a dict


@torch.no_grad()
def _encode(encode: Encode, batch: TargetBatch, mirrored: bool) -> dict[str, Tensor]:
    """The tensors to store for pictures and, if ``mirrored``, their mirror images, on the CPU."""
    columns: dict[str, Tensor] = {}
    count = len(batch["pixel_values"])
    for prefix, pictures in {"": batch, **({_MIRRORED: mirror(batch)} if mirrored else {})}.items():
        tensors = cast("dict[str, Tensor]", encode(pictures))
        mean, std = (tensors.get(name, torch.empty(0)) for name in ("latent_mean", "latent_std"))
        if mean.ndim != 4 or mean.shape != std.shape or any(len(tensor) != count for tensor in tensors.values()):
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ConfigError(
                f"encode returned {shapes} for {count} pictures; expected latent_mean and latent_std, (B, c, h, w) "
                "each, and tensors of B entries in addition to them."
            )
        columns |= {prefix + name: tensor.cpu() for name, tensor in tensors.items()}
    return columns
