"""A picture of samples at each validation, on disk and in the logger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_difftune.callbacks.artifacts import PictureLog
from lightning_difftune.callbacks.bases import SampleCallback
from lightning_difftune.errors import ConfigError
from lightning_difftune.pictures import grid_of
from lightning_difftune.protocols import SupportsReferenceImages
from lightning_difftune.trainers import evaluating


class SampleGrid(SampleCallback):
    """Generate the same samples at the start and at the end of every validation and save them as one picture.

    The grid is written to ``samples/step-0001000.png`` and sent to every logger that takes images (TensorBoard,
    Weights & Biases, MLflow). ``step-0000000.png`` has samples of the base model, and ``real.png`` real pictures of
    the same classes or captions. Rows are named by class or prompt if the module has ``names_of(indices)``. Only the
    first process generates, without waiting for the others.

    Args:
        num_samples: Samples in the grid: indices 0 .. num_samples - 1.
        columns: Samples per row.
        every_n_steps: Least number of optimizer steps between two grids in ``fit``; ``None`` makes one each validation.
        batch_size: Samples generated at a time.
        generate: Maps sample indices (B,) int64 to pictures (B, 1 or 3, H, W) uint8; ``None`` uses the module's own
            ``generate``.
        dirpath: Folder of the pictures; ``None`` is ``samples`` in the logger's folder, or in the trainer's
            ``default_root_dir``. Its name is what loggers call the pictures.
        at_start: Whether to save the base model's and real pictures before the first step.

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
        at_start: bool = True,
    ) -> None:
        super().__init__(num_samples, batch_size, every_n_steps, generate)
        self.columns, self.at_start = columns, at_start
        self.picture_log = PictureLog("samples", dirpath)

    def claims(self) -> dict[str, str]:
        """The folder's name."""
        return self.picture_log.claims()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder, on all processes."""
        super().setup(trainer, pl_module, stage)
        self.picture_log.locate(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the first step, save samples of the base model and, for comparison, real pictures."""
        super().on_train_start(trainer, pl_module)
        begins = self.at_start and trainer.global_step == 0 and trainer.is_global_zero
        if not begins or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with isolate_rng(), evaluating(pl_module):
            self.evaluate(trainer, pl_module, 0)
        _, rows = arranged(self._names(pl_module), self.columns, self.num_samples)
        pictures, rows = real_pictures(getattr(trainer, "datamodule", None), rows, self.columns, self.num_samples)
        if len(pictures):
            self.picture_log.save("real", grid_of(pictures, self.columns, rows), rows=", ".join(rows))

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Generate, save and log the grid on the first process, one class or prompt per row if possible."""
        if not trainer.is_global_zero:
            return
        samples = torch.cat([self.pictures(trainer, pl_module, batch).cpu() for batch in self.batches()])
        order, rows = arranged(self._names(pl_module), self.columns, len(samples))
        texts = {} if rows is None else {"rows": ", ".join(rows)}
        self.picture_log.show(trainer, grid_of(samples[order], self.columns, rows), step, **texts)

    def _names(self, pl_module: L.LightningModule) -> list[str] | None:
        """Names of the samples, if the module has names and generates the samples itself."""
        if self.generate is not None or not hasattr(pl_module, "names_of"):
            return None
        return pl_module.names_of(range(self.num_samples))  # type: ignore[operator]


def arranged(names: Sequence[str] | None, columns: int, count: int) -> tuple[list[int], list[str] | None]:
    """The order of samples in a grid, and the names of its rows.

    If there are rows for all names, each row has the samples of one name, and the rest are left out. Otherwise samples
    stay in order, and a row is named by all of its samples.

    Example:
        >>> arranged(["rose", "lily"] * 4, 2, 8)
        ([0, 2, 4, 6, 1, 3, 5, 7], ['rose', 'rose', 'lily', 'lily'])
        >>> arranged(["a", "b", "c", "d"], 2, 4)
        ([0, 1, 2, 3], ['a, b', 'c, d'])
    """
    if names is None:
        return list(range(count)), None
    by_name: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        by_name.setdefault(name, []).append(index)
    if all(len(indices) >= columns for indices in by_name.values()):
        kept = {name: indices[: len(indices) // columns * columns] for name, indices in by_name.items()}
        rows = [name for name, indices in kept.items() for _ in range(len(indices) // columns)]
        return [index for indices in kept.values() for index in indices], rows
    starts = range(0, count, columns)
    return list(range(count)), [", ".join(dict.fromkeys(names[start : start + columns])) for start in starts]


@runtime_checkable
class SupportsExamples(Protocol):
    """A data module that finds real pictures of a class or caption."""

    def examples_of(self, subject: str, count: int, skip: int = 0) -> Tensor:
        """Pictures (at most ``count``, C, H, W) uint8 of ``subject``, after the first ``skip``."""
        ...


def real_pictures(data: Any, rows: list[str] | None, columns: int, count: int) -> tuple[Tensor, list[str]]:
    """Real pictures for a grid of samples, each of its row's subject, and the names of the rows.

    A row with fewer real pictures than columns ends in black. If no row has any, the first ``count`` reference pictures
    are used, or none if nothing is held out.
    """
    if rows is not None and isinstance(data, SupportsExamples):
        found = [data.examples_of(name, columns, columns * rows[:row].count(name)) for row, name in enumerate(rows)]
        if any(map(len, found)):
            filled = [torch.cat([own, own.new_zeros(columns - len(own), *own.shape[1:])]) for own in found]
            return torch.cat(filled), [f"real: {name}" for name in rows]
    if not isinstance(data, SupportsReferenceImages):
        return torch.empty(0), []
    try:
        pictures = torch.stack(list(islice(chain.from_iterable(data.reference_images()), count)))
    except ConfigError:  # nothing is held out
        return torch.empty(0), []
    return pictures, ["real pictures"] * -(-len(pictures) // columns)
