"""Shared by the tests of controlled generation: a tiny model, held-out pictures and a report of each process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_difftune.callbacks import ControlSimilarity

SIZE = 12


def scenes(indices: Sequence[int]) -> Tensor:
    """Pictures (B, 3, 12, 12) uint8, each from its own index alone."""
    pictures = [
        torch.randint(0, 256, (3, SIZE, SIZE), generator=torch.Generator().manual_seed(index)) for index in indices
    ]
    return torch.stack(pictures).byte()


class Examples:
    """Held-out pictures; counts the calls."""

    def __init__(self, count: int = 10) -> None:
        self.count = count
        self.asked: list[list[int]] = []

    @property
    def num_control_examples(self) -> int:
        return self.count

    def control_examples(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        self.asked.append(list(indices))
        return scenes(indices), [f"scene {index}" for index in indices]


class ControlData(L.LightningDataModule):
    def __init__(self, count: int = 10) -> None:
        super().__init__()
        self.examples = Examples(count)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(RandomDataset(32, 64))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(RandomDataset(32, 2))

    @property
    def num_control_examples(self) -> int:
        return self.examples.num_control_examples

    def control_examples(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        return self.examples.control_examples(indices)


class Sampler:
    num_inference_steps = 20


class ControlledModel(BoringModel):
    """Draws its control darker or brighter, by its weights; the annotator is the red channel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(32, 2)
        self.sampler = Sampler()
        self.asked: list[tuple[list[int], list[str]]] = []
        self.shifts: list[float] = []
        self.annotations = 0

    def shift(self) -> float:
        return float(self.layer.weight.detach().double().abs().mean() * 300)

    def annotate(self, pictures: Tensor) -> Tensor:
        self.annotations += len(pictures)
        return pictures[:, :1].clone()

    def generate_controlled(self, indices: Tensor, conditioning: Tensor, captions: Sequence[str]) -> Tensor:
        assert not self.training
        self.asked.append((indices.tolist(), list(captions)))
        self.shifts.append(self.shift())
        noise = scenes([1000 + index for index in indices.tolist()]).float()
        drawn = conditioning.float().expand(-1, 3, -1, -1) * 0.5 + noise * 0.3 + self.shift()
        return drawn.clamp(0, 255).byte()


class Report(Callback):
    """Each process writes its state after a run."""

    def __init__(self, folder: Path, callback: ControlSimilarity) -> None:
        self.folder = folder
        self.callback = callback

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        report = {
            "history": self.callback.history,
            "logged": trainer.callback_metrics[self.callback.monitor].item(),
            "asked": [indices for indices, _ in pl_module.asked],
        }
        (self.folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(report))
