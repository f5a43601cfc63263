"""A picture of samples at each validation, on disk and in the logger."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor

from lightning_difftune.callbacks.generation import GenerationCallback


class SampleGrid(GenerationCallback):
    """Generate the same samples at the end of every validation and save them as one picture.

    The grid is written to ``samples/step-0001000.png`` and given to every logger that takes images (TensorBoard,
    Weights & Biases). Only the first process generates, and nothing here waits for the others.

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
        self.dirpath = dirpath
        self._folder = Path()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder while all processes are here, since ``trainer.log_dir`` is a broadcast."""
        super().setup(trainer, pl_module, stage)
        log_dir = trainer.log_dir
        self._folder = Path(self.dirpath) if self.dirpath else Path(log_dir or trainer.default_root_dir) / "samples"

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Generate, save and log the grid on the first process."""
        if not trainer.is_global_zero:
            return
        from torchvision.utils import make_grid

        samples = torch.cat([self.pictures(trainer, pl_module, batch).cpu() for batch in self.batches()])
        grid = make_grid(samples, nrow=self.columns)  # (3, height, width) uint8
        picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
        self._save(picture, self._folder / f"step-{step:07d}.png")
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(key="samples", images=[picture], step=step)
            elif add_image := getattr(getattr(logger, "experiment", None), "add_image", None):
                add_image("samples", grid, global_step=step)

    @staticmethod
    def _save(picture: Image.Image, path: Path) -> None:
        """Write in one piece. A full disk costs the picture, not the training."""
        partial = path.with_suffix(".png.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(partial, format="PNG")
            os.replace(partial, path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            rank_zero_warn(f"The samples could not be saved to {path}: {error}. Training goes on.")
