"""What a run of a study notes down while it trains."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class RunRecord(Callback):
    """Every scalar at every validation, and the seconds of training; both continue when a run is resumed.

    A value that is measured in between, as by ``EWC(every_n_steps=...)``, is noted as it was last measured. The seconds
    count from the first batch, so that building a memory bank, which several runs share, is not counted; those after
    the last checkpoint of an interrupted run are not counted either.
    """

    def __init__(self) -> None:
        self.history: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self._seconds = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training, validation included."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._seconds, self._since = self.seconds, None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note what has been measured so far, but for the loss of the last training batch."""
        if trainer.sanity_checking:
            return
        for name, value in trainer.callback_metrics.items():
            if not name.startswith("train/"):
                self.history[name].append((trainer.global_step, float(value)))

    def state_dict(self) -> dict[str, Any]:
        """The history and the seconds."""
        return {"history": dict(self.history), "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.history = defaultdict(list, {name: list(values) for name, values in state_dict["history"].items()})
        self._seconds, self._since = state_dict["seconds"], None
