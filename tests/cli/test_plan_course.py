"""``difftune plan``'s steps and validations, compared with those of the run itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import Namespace
from tiny import quiet_trainer, tiny_dit, tiny_pictures

from lightning_difftune import DiTDiffTuningModule, MemoryBankDataModule
from lightning_difftune.callbacks import ChainOfForgetting
from lightning_difftune.callbacks.bases import GenerationCallback
from lightning_difftune.cli.plan.course import Course, held_out_seen
from lightning_difftune.cli.plan.phases import forward_passes, num_devices
from lightning_difftune.sampling import Sampler, scheduler_named
from lightning_difftune.sampling.schedulers import ddim

TARGETS, HELD_OUT, BATCH = 30, 7, 5  # six batches in a pass
BY_STEPS: dict[str, Any] = {"check_val_every_n_epoch": None}


class Watch(GenerationCallback):
    """Counts what it is asked to do and what a validation reads."""

    def __init__(self, every_n_steps: int | None) -> None:
        super().__init__(1, 1, every_n_steps)
        self.validations: list[int] = []
        self.evaluated = self.read = 0

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        self.evaluated += 1

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validations.append(trainer.global_step)

    def on_validation_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.read += len(batch["target"]["class_labels"])


@pytest.mark.parametrize(
    ("settings", "every"),
    [
        (BY_STEPS | {"max_steps": 9, "val_check_interval": 4}, 5),
        (BY_STEPS | {"max_steps": 9, "val_check_interval": 3}, 4),
        (BY_STEPS | {"max_steps": 9, "val_check_interval": 8, "accumulate_grad_batches": 4}, None),  # batches
        (BY_STEPS | {"max_steps": 5, "val_check_interval": 6, "accumulate_grad_batches": 4}, 2),  # within windows
        (BY_STEPS | {"max_steps": 3, "val_check_interval": 50}, 2),
        ({"max_epochs": 3}, 7),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, None),  # two windows, the second one a batch longer
        ({"max_epochs": 5, "check_val_every_n_epoch": 2, "val_check_interval": 0.5}, None),
        ({"max_epochs": 2, "max_steps": 100, "limit_train_batches": 4, "val_check_interval": 3}, None),
        ({"max_epochs": 4, "max_steps": 9, "limit_train_batches": 0.5, "limit_val_batches": 2}, None),
        ({"max_steps": 8, "limit_val_batches": 0.5}, None),
        ({"max_steps": 4, "limit_val_batches": 0}, None),
    ],
)
def test_a_run_steps_and_validates_as_planned(tmp_path: Path, settings: dict[str, Any], every: int | None) -> None:
    data = MemoryBankDataModule(
        tiny_pictures(TARGETS),
        num_classes=3,
        image_size=8,
        channels=1,
        batch_size=BATCH,
        val_target=tiny_pictures(HELD_OUT),
    )
    watch = Watch(every)
    trainer = quiet_trainer(tmp_path, settings.get("max_steps", -1), watch, **_without_steps(settings))
    trainer.fit(DiTDiffTuningModule(tiny_dit(), num_classes=3), datamodule=data)

    names = ("max_steps", "max_epochs", "accumulate_grad_batches", "val_check_interval", "limit_val_batches")
    defaults = {**dict.fromkeys(names), "limit_train_batches": None, "check_val_every_n_epoch": 1}
    course = Course.of(Namespace({**defaults, **settings}), BATCH, TARGETS, has_held_out=True)
    assert course.steps == trainer.global_step
    assert course.validations == tuple(watch.validations)
    assert course.times_due(every) == watch.evaluated
    seen = held_out_seen(HELD_OUT, 64, settings.get("limit_val_batches"), 1)
    assert len(watch.validations) * seen == watch.read


def _without_steps(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "max_steps"}


def test_what_cannot_be_known_is_not_guessed() -> None:
    names = ("max_steps", "max_epochs", "accumulate_grad_batches", "val_check_interval", "limit_val_batches")
    trainer = Namespace({**dict.fromkeys(names), "limit_train_batches": None, "check_val_every_n_epoch": 1})
    assert Course.of(trainer, BATCH, None, True) == Course(1, 0, ())
    trainer.max_steps = 20
    assert Course.of(trainer, BATCH, None, True) == Course(1, 20, None), "an epoch of unknown length"
    trainer.val_check_interval = "00:10:00"
    assert Course.of(trainer, BATCH, TARGETS, True) == Course(1, 20, None), "by the clock"
    assert Course.of(trainer, BATCH, TARGETS, False) == Course(1, 20, ()), "no held-out pictures, no validation"


def test_held_out_pictures_on_several_devices() -> None:
    assert held_out_seen(1000, 64, 2, devices=4) == 2 * 4 * 15  # batches of 1000 // 64
    assert held_out_seen(1000, 64, 0.5, devices=4) == 8 * 4 * 15  # half of 17 batches, rounded down
    assert held_out_seen(1000, 64, 500, devices=4) == held_out_seen(1000, 64, 1.0, devices=4) == 1000


@pytest.mark.parametrize(
    ("devices", "count"), [("auto", 1), (-1, 1), (2, 2), ("2", 2), ([0, 1], 2), ("0,1", 2), ("1,", 1)]
)
def test_devices_are_counted_as_lightning_reads_them(devices: Any, count: int) -> None:
    assert num_devices(Namespace(devices=devices, num_nodes=1)) == count


@pytest.mark.parametrize("solver", ["DDIM", "HeunDiscrete", "PNDM"])
def test_forward_passes_are_those_that_the_solver_takes(solver: str) -> None:
    sampler = Sampler(scheduler_named(solver, ddim().config), 5, 2.0, None)
    calls = []
    denoise = lambda x, t, condition: calls.append(len(x)) or torch.zeros_like(x)  # noqa: E731
    sampler(denoise, torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.ones(1))
    assert forward_passes(sampler, (1, 8, 8)) == sum(calls)


def test_swaps_share_their_beginnings() -> None:
    assert ChainOfForgetting.trajectories({"percents": range(0, 101, 10)}) == 6.5
    assert ChainOfForgetting.trajectories({"percents": (20, 100, 100)}) == pytest.approx(0.8 + 0.2 + 1)
