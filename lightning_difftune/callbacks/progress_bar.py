"""The progress bar of runs that are measured in steps."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


class StepProgressBar(RichProgressBar):
    """Lightning's rich progress bar, counting the steps of the whole run where the trainer has ``max_steps``.

    A target of a thousand pictures has epochs of a few seconds, and Lightning's bar starts over at each. This one
    shows how far the run is and how long it still takes, from the step that it was resumed at.

    Example:
        >>> trainer = L.Trainer(max_steps=24_000, callbacks=[StepProgressBar()], logger=False)
    """

    @property
    def total_train_batches(self) -> int | float:
        """Batches of the run, or of an epoch where ``max_steps`` is not set."""
        if self.trainer.max_steps < 0:
            return super().total_train_batches
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start a bar; for a run of ``max_steps`` with its first epoch only."""
        if trainer.max_steps < 0:
            super().on_train_epoch_start(trainer, pl_module)
        else:
            self._start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count on over the epochs of a run of ``max_steps``."""
        if trainer.max_steps < 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        else:
            self._start()  # a run that is resumed in the middle of an epoch does not start that epoch
            super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.fit_loop.total_batch_idx)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What the module logs for the bar, without the logger's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def _start(self) -> None:
        if self.progress is not None and self.train_progress_bar_id is None:
            name = "Training".ljust(len(self.validation_description))  # the bars below each other start at one place
            self.train_progress_bar_id = self.progress.add_task(name, total=self.total_train_batches)
