"""Files that callbacks write next to the logs: pictures, tables, figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor

from lightning_difftune.files import atomic_write
from lightning_difftune.pictures import to_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def artifact_folder(trainer: L.Trainer, dirpath: str | Path | None, name: str) -> Path:
    """``dirpath`` or, by default, ``name`` in the logger's folder or the trainer's ``default_root_dir``."""
    log_dir = trainer.log_dir  # a broadcast, so all processes must call it
    return Path(dirpath) if dirpath else Path(log_dir or trainer.default_root_dir) / name


def write_artifact(path: Path, content: bytes) -> None:
    """Write a file atomically. A full disk is a warning and does not stop the training."""
    try:
        atomic_write(path, content)
    except OSError as error:
        rank_zero_warn(f"{path} could not be saved: {error}. Training continues.")


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows of numbers and words as CSV."""
    lines = [",".join(f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row) for row in rows]
    write_artifact(path, "\n".join([",".join(header), *lines, ""]).encode())


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as ``path`` with the suffixes .svg, for print, and .png."""
    for suffix in (".svg", ".png"):
        content = BytesIO()
        figure.savefig(content, format=suffix[1:], dpi=150)
        write_artifact(path.with_suffix(suffix), content.getvalue())


class PictureLog:
    """Saves a callback's pictures, as ``name/step-0001000.png`` or in another folder, and logs them as images.

    Loggers know them by the folder's name.
    """

    def __init__(self, name: str, dirpath: str | Path | None) -> None:
        self.key = Path(dirpath or name).name or name
        self.dirpath = dirpath
        self._folder = Path()

    def claims(self) -> dict[str, str]:
        """The folder's name, for ``claims`` of a callback."""
        return {f"the folder name and the logger's key {self.key}": "Give one of them a dirpath of another name."}

    def locate(self, trainer: L.Trainer) -> None:
        """Find the folder. Call it on all processes, since ``trainer.log_dir`` is a broadcast."""
        self._folder = artifact_folder(trainer, self.dirpath, self.key)

    def files(self) -> dict[int, Path]:
        """The pictures in the folder by step, in order."""
        return {int(file.stem.removeprefix("step-")): file for file in sorted(self._folder.glob("step-*.png"))}

    def save(self, name: str, picture: Tensor, **texts: str) -> None:
        """Save a picture (3, H, W) uint8 that belongs to no step, with text chunks; call it on the first process."""
        write_artifact(self._folder / f"{name}.png", to_png(picture, **texts))

    def show(self, trainer: L.Trainer, picture: Tensor, step: int, **texts: str) -> None:
        """Save and log a picture (3, H, W) uint8 of a step, with text chunks; call it on the first process."""
        image = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
        write_artifact(self._folder / f"step-{step:07d}.png", to_png(picture, **texts))
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(logger, "log_image"):  # Weights & Biases
                logger.log_image(key=self.key, images=[image], step=step)
            elif hasattr(experiment, "add_image"):  # TensorBoard
                experiment.add_image(self.key, picture, global_step=step)
            elif hasattr(experiment, "log_image") and hasattr(logger, "run_id"):  # MLflow
                experiment.log_image(logger.run_id, np.asarray(image), key=self.key, step=step)
