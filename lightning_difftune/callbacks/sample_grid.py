"""A picture of samples at each validation, on disk and in the logger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from lightning_difftune.callbacks.artifacts import PictureLog
from lightning_difftune.callbacks.generation import SampleCallback
from lightning_difftune.pictures import grid_of


class SampleGrid(SampleCallback):
    """Generate the same samples at the end of every validation and save them as one picture.

    The grid is written to ``samples/step-0001000.png`` and given to every logger that takes images (TensorBoard,
    Weights & Biases, MLflow). Only the first process generates, and nothing here waits for the others.

    Args:
        num_samples: Samples in the grid: indices 0 .. num_samples - 1.
        columns: Samples in a row.
        every_n_steps: Optimizer steps that must lie between two grids in ``fit``; ``None`` makes one each validation.
        batch_size: Samples generated at a time.
        generate: Maps sample indices (B,) int64 to pictures (B, 1 or 3, H, W) uint8; ``None`` asks the module's own
            ``generate``.
        dirpath: Folder of the pictures; ``None`` is ``samples`` in the logger's folder, or in the trainer's
            ``default_root_dir``.

    Raises:
        ConfigError: If a number is not positive or, when the trainer starts, if nothing can generate pictures.

    Example:
        >>> from lightning_difftune.callbacks import EMA
        >>> trainer = L.Trainer(callbacks=[EMA(), SampleGrid(num_samples=100, columns=10)], logger=False)
    """

    def __init__(
        self,
        num_samples: int = 64,
        columns: int = 8,
        every_n_steps: int | None = None,
        batch_size: int = 64,
        generate: Callable[[Tensor], Tensor] | None = None,
        dirpath: str | Path | None = None,
    ) -> None:
        super().__init__(num_samples, batch_size, every_n_steps, generate)
        self.columns = columns
        self.picture_log = PictureLog("samples", dirpath)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder while all processes are here."""
        super().setup(trainer, pl_module, stage)
        self.picture_log.locate(trainer)

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Generate, save and log the grid on the first process."""
        if not trainer.is_global_zero:
            return
        samples = torch.cat([self.pictures(trainer, pl_module, batch).cpu() for batch in self.batches()])
        self.picture_log.show(trainer, grid_of(samples, self.columns), step)
