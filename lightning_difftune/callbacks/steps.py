"""Base of callbacks that act after optimizer steps, and which parameters those train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn


class OptimizerStepCallback(Callback, ABC):
    """Base of callbacks that act after an optimizer step, which with accumulated gradients is not every batch."""

    _latest_step = _previous_step = 0
    _measured_step = 0  # for a subclass that measures at the last step, however the run ends

    @abstractmethod
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Act on the weights after ``step`` optimizer steps."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the step that a resumed run continues from."""
        self._latest_step = self._previous_step = self._measured_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act, if the optimizer has stepped."""
        if trainer.global_step != self._latest_step:
            self._previous_step, self._latest_step = self._latest_step, trainer.global_step
            self.after_step(trainer, pl_module, trainer.global_step)

    def is_due(self, every: int) -> bool:
        """Whether the latest batch came to a multiple of ``every`` steps; several optimizers may step over it."""
        return self._latest_step // every > self._previous_step // every


def same_objects(ours: Mapping[str, nn.Parameter], theirs: Mapping[str, nn.Parameter]) -> bool:
    """Whether the same names have the same parameter objects."""
    return ours.keys() == theirs.keys() and all(p is theirs[name] for name, p in ours.items())


def newly_trained(frozen: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Take out of the frozen parameters those that have been unfrozen since."""
    found = {name: p for name, p in frozen.items() if p.requires_grad}
    for name in found:
        del frozen[name]
    return found
