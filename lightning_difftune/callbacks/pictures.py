"""A picture a step, on disk and in the loggers that take images."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_difftune.callbacks.artifacts import artifact_folder, write_artifact

SIDE = 96  # pixels; smaller pictures are shown enlarged
GAP = 2  # pixels around each


def grid_of(pictures: Tensor, columns: int) -> Tensor:
    """Pictures (N, 1 or 3, H, W) uint8 in rows of ``columns``, small ones with larger pixels => (3, height, width)."""
    from torchvision.utils import make_grid

    factor = max(1, SIDE // pictures.shape[-1])
    enlarged = pictures.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    return make_grid(enlarged, nrow=columns, padding=GAP)


def pictures_of(grid: Path, rows: int, columns: int) -> Tensor:
    """The pictures (rows, columns, 3, H, W) uint8 of a saved :func:`grid_of`, as large as they are shown there."""
    with Image.open(grid) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[:, GAP:, GAP:]
    height, width = pixels.shape[1] // rows, pixels.shape[2] // columns
    cells = pixels.unfold(1, height, height).unfold(2, width, width)  # (3, rows, columns, height, width)
    return cells[..., :-GAP, :-GAP].permute(1, 2, 0, 3, 4)


class PictureLog:
    """Where a callback puts its pictures: ``key/step-0001000.png``, and every logger that takes images.

    Args:
        key: Name of the folder and in the loggers.
        dirpath: Another folder; ``None`` is ``key`` in the logger's folder, or in the trainer's ``default_root_dir``.
    """

    def __init__(self, key: str, dirpath: str | Path | None) -> None:
        self.key = key
        self.dirpath = dirpath
        self._folder = Path()

    def locate(self, trainer: L.Trainer) -> None:
        """Find the folder. Call it on all processes, since ``trainer.log_dir`` is a broadcast."""
        self._folder = artifact_folder(trainer, self.dirpath, self.key)

    def files(self) -> dict[int, Path]:
        """The pictures in the folder by their steps, in order."""
        return {int(file.stem.removeprefix("step-")): file for file in sorted(self._folder.glob("step-*.png"))}

    def show(self, trainer: L.Trainer, picture: Tensor, step: int) -> None:
        """Save and log a picture (3, H, W) uint8 of a step; call it on the first process."""
        image = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
        content = BytesIO()
        image.save(content, format="PNG")
        write_artifact(self._folder / f"step-{step:07d}.png", content.getvalue())
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(logger, "log_image"):  # Weights & Biases
                logger.log_image(key=self.key, images=[image], step=step)
            elif hasattr(experiment, "add_image"):  # TensorBoard
                experiment.add_image(self.key, picture, global_step=step)
            elif hasattr(experiment, "log_image") and hasattr(logger, "run_id"):  # MLflow
                experiment.log_image(logger.run_id, np.asarray(image), key=self.key, step=step)
