"""Callbacks in another's project: when they are due, what they cannot stand beside, and parts unfrozen later."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from generating import PixelFeatures
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from tiny import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_difftune.callbacks import (
    EMA,
    EWC,
    FID,
    ForgettingMeter,
    MeasuringCallback,
    SampleGrid,
    SuddenConvergence,
)
from lightning_difftune.callbacks.bases import GenerationCallback, check_takes
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
    grid, distance, average = Evaluated(5), Measured(3), EMA(0.5, every_n_steps=1 if module is TwoOptimizers else 2)
    steps = settings.pop("max_steps", -1)
    trainer = quiet_trainer(tmp_path, steps, grid, distance, average, **settings)
    trainer.fit(module(), batches(7), batches(2))
    assert (grid.steps, distance.steps, average.num_updates) == (evaluated, measured, updates)


def test_several_optimizers_and_averages_of_every_kth_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"EMA\(every_n_steps=2\) counts the steps of 2 optimizers"):
        quiet_trainer(tmp_path, 2, EMA(0.5, every_n_steps=2)).fit(TwoOptimizers(), batches(2))


# -- beside others ----------------------------------------------------------------------------------------------------


def distance(**settings: Any) -> FID:
    settings = {"num_samples": 2, "feature_extractor": PixelFeatures(), "reference": [], "generate": len} | settings
    return FID(**settings)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([EMAWeightAveraging(), EMA()], r"EMA and EMAWeightAveraging both put their averages .* Leave one out"),
        ([EMAWeightAveraging(), Waits(1, 1, None)], r"puts the trained weights back before Waits .* behind Waits"),
        (
            [distance(), distance(num_samples=3)],
            r"FID and another FID have the logged name 'fd_pixels' in common.*Leave",
        ),
        ([SampleGrid(generate=len), SampleGrid(9, generate=len)], r"key samples in common.*a dirpath of another name"),
        (
            [SampleGrid(generate=len, dirpath="a/many"), SampleGrid(9, generate=len, dirpath="b/many")],
            r"SampleGrid and another SampleGrid have the folder name and the logger's key many in common",
        ),
    ],
)
def test_what_would_be_mixed_with_others_is_refused(tmp_path: Path, callbacks: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quiet_trainer(tmp_path, 1, *callbacks).fit(Plain(), batches(1))


def test_what_stays_apart_stands_side_by_side(tmp_path: Path) -> None:
    callbacks = [Waits(1, 1, None), SampleGrid(generate=len), SampleGrid(9, generate=len, dirpath="others")]
    trainer = quiet_trainer(tmp_path, 1, *callbacks, EMAWeightAveraging())
    for callback in callbacks:
        callback.setup(trainer, Plain(), "fit")


def test_a_function_of_other_arguments_is_refused_before_an_hour() -> None:
    check_takes(lambda indices, scale=1.0: indices, "M.generate(indices)", "")
    for function in (lambda prompt, steps: prompt, lambda: None):
        with pytest.raises(ConfigError, match=r"by M.generate\(indices\), but that takes \(.*\): .* Pass"):
            check_takes(function, "M.generate(indices)", "Pass `generate=`.")


class Scored(MeasuringCallback, Evaluated):
    """Logs the step."""

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps)
        self.history = []

    def scores(self) -> dict[str, Any]:
        return {"steps": {}}

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        self.record(pl_module, "steps", step, step)


@pytest.mark.parametrize(
    "follower", [EarlyStopping("steps", patience=9), ModelCheckpoint(monitor="steps", save_top_k=3)]
)
def test_a_resumed_run_knows_the_value_that_is_monitored(tmp_path: Path, follower: Any) -> None:
    """It was measured before the checkpoint, and is not due for a while; it is no new value."""
    saving = ModelCheckpoint(tmp_path, "three", every_n_train_steps=3)
    settings = {"val_check_interval": 2}
    quiet_trainer(tmp_path, 3, Scored(4), saving, **settings).fit(Plain(), batches(9), batches(2))
    watching = SuddenConvergence("steps")
    trainer = quiet_trainer(tmp_path, 8, watching, Scored(4), follower, **settings)
    trainer.fit(Plain(), batches(9), batches(2), ckpt_path=tmp_path / "three.ckpt")
    assert watching.history == [(6, 6), (8, 8)]


# -- parts that are unfrozen later ------------------------------------------------------------------------------------


class Thaw(L.Callback):
    """Freezes a part, and unfreezes it after two steps."""

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        pl_module.one.requires_grad_(False)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= 2:
            pl_module.one.requires_grad_(True)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("resumed", [True, False])
def test_parts_that_are_unfrozen_later_count_from_then_on(tmp_path: Path, first: bool, resumed: bool) -> None:
    module, average, moved = Plain(), EMA(0.5), EWC(100)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    expected = dict(start)

    class Recurrence(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            for name, p in pl_module.named_parameters():
                expected[name] = expected[name] + 0.5 * (p.detach() - expected[name])

    def fit(steps: int, ckpt_path: Path | None = None) -> None:
        callbacks = [Thaw(), average, moved] if first else [average, moved, Thaw()]
        trainer = quiet_trainer(tmp_path, steps, *callbacks, Recurrence())
        trainer.fit(module, batches(7), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "run.ckpt")

    fit(4)
    if resumed:
        module, average, moved = Plain(), EMA(0.5), EWC(100)
        fit(6, tmp_path / "run.ckpt")
    averages = average.state_dict()["averages"]
    assert averages.keys() == expected.keys()
    assert all(torch.allclose(averages[name], expected[name]) for name in expected)
    distance = sum((p.detach() - start[name]).square().sum() for name, p in module.named_parameters())
    assert torch.allclose(moved.measure(module)["ewc/total"], distance)
    assert (module.one.weight != start["one.weight"]).any()
