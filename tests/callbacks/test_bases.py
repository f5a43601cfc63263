"""When callbacks of another's project are due: the last step of any kind of run, and steps of several optimizers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from tiny import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_difftune.callbacks import EMA, EWC, ForgettingMeter
from lightning_difftune.callbacks.bases import GenerationCallback
from lightning_difftune.errors import ConfigError


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.two(self.one(batch[0])).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("score", self.one(batch[0]).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class TwoOptimizers(Plain):
    """Steps twice per batch, as GANs do."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for optimizer, part in zip(optimizers, (self.one, self.two), strict=True):
            optimizer.zero_grad()
            self.manual_backward(part(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.one, self.two)]


class Evaluated(GenerationCallback):
    def __init__(self, every_n_steps: int) -> None:
        super().__init__(1, 1, every_n_steps)
        self.steps: list[int] = []

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        self.steps.append(step)


class Measured(EWC):
    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps)
        self.steps: list[int] = []

    def measure(self, module: Any) -> dict[str, Tensor]:
        self.steps.append(module.global_step)
        return super().measure(module)


def batches(count: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(count, 2)))


class Waits(GenerationCallback):
    """Generates on some processes only, as a grid does."""

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        raise AssertionError


@pytest.mark.parametrize("callback", [Waits(1, 1, None), ForgettingMeter()])
def test_what_not_all_processes_do_equally_often_is_refused_for_sharded_parameters(callback: Any) -> None:
    sharded = SimpleNamespace(strategy=FSDPStrategy(), log_dir=None, default_root_dir="runs")
    name = type(callback).__name__
    with pytest.raises(ConfigError, match=rf"^{name} \w.* whole parameters, but FSDPStrategy shards them\. Use"):
        callback.setup(sharded, Plain(), "fit")


@pytest.mark.parametrize(
    ("module", "settings", "evaluated", "measured", "updates"),
    [
        (Plain, {"max_steps": 7, "val_check_interval": 7}, [7], [3, 6, 7], 3),
        (Plain, {"max_epochs": 2}, [7, 14], [3, 6, 9, 12, 14], 7),
        (Plain, {"max_epochs": 2, "limit_train_batches": 3}, [3, 6], [3, 6], 3),
        (Plain, {"max_epochs": 2, "accumulate_grad_batches": 2}, [4, 8], [3, 6, 8], 4),
        (TwoOptimizers, {"max_steps": 11, "val_check_interval": 2}, [4, 12], [4, 6, 10, 12], 6),
    ],
)
def test_the_last_step_is_due_and_none_is_stepped_over(
    tmp_path: Path,
    module: type[Plain],
    settings: dict[str, Any],
    evaluated: list[int],
    measured: list[int],
    updates: int,
) -> None:
    grid, distance, average = Evaluated(5), Measured(3), EMA(0.5, every_n_steps=2)
    steps = settings.pop("max_steps", -1)
    trainer = quiet_trainer(tmp_path, steps, grid, distance, average, **settings)
    trainer.fit(module(), batches(7), batches(2))
    assert (grid.steps, distance.steps, average.num_updates) == (evaluated, measured, updates)
