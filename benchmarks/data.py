"""Reading time of a training batch: cached latents against PNGs, and the building of caches.

    python benchmarks/data.py

A batch of 32 cached latents of 256 px pictures (mean and standard deviation, half of them mirror images, the order and
the coins drawn from the seed) against the same pictures decoded and cropped from PNGs, in turns. Then the share of
network computation in the time of building the cache and a memory bank, and reading by size of the batch and the cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import now, parser_of, report
from torch import Tensor
from training_step import autoencoder_folder, write_pictures

from lightning_difftune import DiTDiffTuningModule, MemoryBank
from lightning_difftune.data import ImageFolder, LatentCache
from lightning_difftune.data.batches import ShuffledStream, TrainingBatches
from lightning_difftune.data.images import ImageTargets
from lightning_difftune.models import DiT, FrozenAutoencoder
from lightning_difftune.protocols import BankGenerator, TargetBatch
from lightning_difftune.sampling import Sampler


class TimedEncoder:
    """An encoder that adds up its seconds; latents of noise if there is no autoencoder."""

    def __init__(self, autoencoder: FrozenAutoencoder | None, side: int) -> None:
        self.autoencoder, self.side, self.seconds = autoencoder, side, 0.0

    def __call__(self, batch: TargetBatch) -> TargetBatch:
        """Encode."""
        start = now()
        pixels = batch["pixel_values"]
        if self.autoencoder is None:
            mean = torch.randn(len(pixels), 4, self.side, self.side)
            std = mean.abs()
        else:
            mean, std = self.autoencoder.encode(pixels)
        self.seconds += now() - start
        return {"latent_mean": mean, "latent_std": std, "class_labels": batch["class_labels"]}


class TimedGenerator:
    """A source of a memory bank that adds up its seconds."""

    def __init__(self, generator: BankGenerator) -> None:
        self.generator, self.seconds = generator, 0.0

    def bank_spec(self) -> dict[str, Any]:
        """The source's."""
        return self.generator.bank_spec()

    def generate_bank(self, indices: Tensor) -> dict[str, Tensor]:
        """The source's samples."""
        start = now()
        samples = self.generator.generate_bank(indices)
        self.seconds += now() - start
        return samples


def bank_share(folder: Path, side: int) -> float:
    """The share of sampling in the time of building a bank of several shards."""
    torch.manual_seed(0)
    module = DiTDiffTuningModule(
        DiT(side, 4, 4, 192, 4, 6), sampler=Sampler(num_inference_steps=10, guidance_scale=1.0)
    )
    module.configure_model()
    generator = TimedGenerator(module.bank_generator())
    start = now()
    MemoryBank.build(folder / "bank", generator, 500, batch_size=50, shard_size=100)
    return generator.seconds / (now() - start)


def batches_of(read: Callable[..., Any], count: int, batch_size: int) -> TrainingBatches:
    """Shuffled, mirrored batches, as the data module makes them."""
    return TrainingBatches(read, ShuffledStream(count, batch_size, 0), horizontal_flip=True)


def milliseconds(batches: dict[str, TrainingBatches], turns: int) -> dict[str, float]:
    """Median seconds of reading one batch, in turns."""
    times: dict[str, list[float]] = {name: [] for name in batches}
    for turn in range(turns + 1):
        for name, source in batches.items():
            repeats = 1 if name == "PNG" else 20
            start = now()
            for k in range(repeats):
                source[turn * repeats + k]
            times[name].append((now() - start) / repeats)
    return {name: 1e3 * statistics.median(values[1:]) for name, values in times.items()}


def main(options: argparse.Namespace) -> None:
    """Read, then build, then read in other sizes."""
    side = options.image_size // 8
    results: dict[str, Any] = {}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = ImageFolder(write_pictures(folder, options.pictures, options.image_size))
        targets = ImageTargets(pictures, options.image_size, 3)
        autoencoder = FrozenAutoencoder(str(autoencoder_folder(folder)))
        for workers in (0, options.workers):
            encoder = TimedEncoder(autoencoder, side)
            start = now()
            cache = LatentCache.build(
                folder / f"latents{workers}", targets, encoder, {}, batch_size=16, num_workers=workers
            )
            share = encoder.seconds / (now() - start)
            results[f"building, {workers} workers"] = share
            rows.append((f"building the cache, {workers} workers", f"{share:.1%} of the time encodes"))
        of_cache = {
            "cached": batches_of(cache.read, len(cache), 32),
            "PNG": batches_of(targets.pixels, len(targets), 32),
        }
        times = milliseconds(of_cache, options.turns)
        results["batch of 32"] = {**times, "ratio": times["PNG"] / times["cached"]}
        rows.append(("batch of 32 cached latents", f"{times['cached']:.3f} ms"))
        rows.append(("batch of 32 PNGs", f"{times['PNG']:.1f} ms, {times['PNG'] / times['cached']:.0f} times"))
        for batch_size in (8, 128):
            time = milliseconds({"": batches_of(cache.read, len(cache), batch_size)}, options.turns)[""]
            results[f"batch of {batch_size}"] = time
            rows.append((f"batch of {batch_size} cached latents", f"{time:.3f} ms"))
        results["building a bank"] = share = bank_share(folder, side)
        rows.append(("building a memory bank", f"{share:.1%} of the time draws"))
    with tempfile.TemporaryDirectory() as name:
        same: Any = [(torch.zeros(3, 8, 8, dtype=torch.uint8), 0)] * options.many
        many = ImageTargets(same, 8, 3)
        cache = LatentCache.build(Path(name) / "latents", many, TimedEncoder(None, side), {}, batch_size=256)
        time = milliseconds({"": batches_of(cache.read, len(cache), 32)}, options.turns)[""]
        results[f"batch of 32 of {options.many}"] = time
        rows.append((f"batch of 32 of {options.many:,} cached latents", f"{time:.3f} ms"))
    report(options, f"Reading, {options.image_size} px", ("what", "cost"), rows, results)


if __name__ == "__main__":
    parser = parser_of(__doc__, "data")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--many", type=int, default=20_000, help="pictures of a cache for the last line")
    parser.add_argument("--workers", type=int, default=1, help="processes that read ahead while the cache is built")
    parser.add_argument("--turns", type=int, default=20)
    main(parser.parse_args())
