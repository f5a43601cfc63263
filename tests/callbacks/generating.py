"""Shared by the tests of the generating callbacks: a tiny model, data module and extractor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from tiny import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_difftune.callbacks import FID


def noise_pictures(indices: Tensor, seed: int = 0, channels: int = 1) -> Tensor:
    """Pictures (B, channels, 4, 4) uint8, each from its own index alone."""
    pictures = []
    for index in indices.tolist():
        generator = torch.Generator().manual_seed(1000 * seed + index)
        pictures.append(torch.randint(0, 200, (channels, 4, 4), generator=generator))
    return torch.stack(pictures).byte()


class GeneratingModel(BoringModel):
    """Its pictures are noise, brightened by its weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(32, 2)
        self.asked: list[list[int]] = []
        self.brightness: list[float] = []

    def shift(self) -> float:
        return float(self.layer.weight.detach().double().abs().mean() * 300)

    def generate(self, indices: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.asked.append(indices.tolist())
        self.brightness.append(self.shift())
        return (noise_pictures(indices, seed=2).float() + self.shift()).clamp(0, 255).byte()


class ReferenceData(L.LightningDataModule):
    """Training noise, and real pictures to compare with."""

    def __init__(self, count: int = 50, seed: int = 1) -> None:
        super().__init__()
        self.images = noise_pictures(torch.arange(count), seed)
        self.seed = seed
        self.times_shown = 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(RandomDataset(32, 64))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(RandomDataset(32, 2))

    def reference_images(self) -> Iterator[Tensor]:
        self.times_shown += 1
        yield from self.images.split(8)

    def reference_identity(self) -> str:
        return f"noise {self.seed} {len(self.images)}"


class PixelFeatures(nn.Module):
    """A random projection of pixels; counts the pictures it has seen."""

    name = "FD-pixels"
    num_features = 6

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.projection = nn.Parameter(torch.randn(16, 6, generator=generator) / 100)
        self.looked_at = 0

    def forward(self, images: Tensor) -> Tensor:
        self.looked_at += len(images)
        return images.float().mean(1).flatten(1) @ self.projection


def expected_distance(real: Tensor, fake: Tensor, seed: int = 0) -> float:
    """The formula in plain numpy, float64, with the square root from eigenvalues."""
    projection = PixelFeatures(seed).projection.detach().double().numpy()
    a, b = (images.double().numpy().mean(1).reshape(len(images), -1) @ projection for images in (real, fake))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


def make_trainer(tmp_path: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    steps = options.pop("max_steps", 6)
    return quiet_trainer(tmp_path, steps, *callbacks, **{"val_check_interval": 2, "limit_val_batches": 1, **options})


class Report(Callback):
    """Each process writes its state after a run."""

    def __init__(self, folder: Path, fid: FID) -> None:
        self.folder = folder
        self.fid = fid

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        report = {
            "history": self.fid.history,
            "logged": trainer.callback_metrics["fd_pixels"].item(),
            "asked": pl_module.asked,
            "looked_at": self.fid.distance.feature_extractor.looked_at,
        }
        (self.folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(report))
