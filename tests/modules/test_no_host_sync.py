"""No step of training waits for the device: nothing turns a tensor into a number between two logs."""

from __future__ import annotations

import traceback
from collections import Counter
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny import tiny_dit
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_difftune import (
    ControlNetDiffTuningModule,
    DiTDiffTuningModule,
    MemoryBankDataModule,
    TextToImageDiffTuningModule,
)
from lightning_difftune.callbacks import EMA, EWC
from lightning_difftune.callbacks.progress_bar import StepProgressBar
from lightning_difftune.data.annotators import Canny
from lightning_difftune.models import DiT
from lightning_difftune.sampling import Sampler, sample, scheduler_named, swap
from lightning_difftune.sampling.loop import Guided

WAITING = {  # operations that need values: on a GPU, each waits until they are computed
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.nonzero.default,
}


class Watch(TorchDispatchMode):
    """Counts the places where tensors are read, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.is_watching, self.read = False, Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_watching and func in WAITING:
            place = next(
                f for f in reversed(traceback.extract_stack()) if "torch/" not in f.filename and f.name[0] != "_"
            )
            self.read[f"{place.filename}:{place.lineno}"] += 1
        return func(*args, **(kwargs or {}))


class Steps(L.Callback):
    """Watches the steps from 3 to 12, which are of one epoch and not logged."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.watch.is_watching = 3 <= trainer.global_step < 13

    def on_train_end(self, *_: Any) -> None:
        self.watch.is_watching = False


def module_of(family: str, folder: str) -> tuple[Any, list[Any], dict[str, Any]]:
    """Module, pictures and settings of the data of a family."""
    optimizer, sampler = partial(torch.optim.AdamW, lr=1e-3, fused=True), Sampler(num_inference_steps=2)
    if family == "DiT":
        pictures = [(np.full((8, 8), i, np.uint8), i % 3) for i in range(20 * 8)]
        module: Any = DiTDiffTuningModule(DiT(8, 4, 1, 16, 1, 2, num_classes=3), optimizer=optimizer, sampler=sampler)
        return module, pictures, {"num_classes": 3, "image_size": 8, "channels": 1}
    pixels = np.zeros((16, 16, 3), np.uint8)
    if family == "ControlNet":
        module = ControlNetDiffTuningModule(Canny(), folder, optimizer=optimizer, sampler=sampler)
        return module, [(pixels, "a cat", pixels[..., 0])] * 20 * 8, {"image_size": 16}
    module = TextToImageDiffTuningModule(folder, optimizer=optimizer, sampler=sampler)
    return module, [(pixels, "a cat")] * 20 * 8, {"image_size": 16}


@pytest.mark.parametrize("family", ["DiT", "text-to-image", "ControlNet"])
def test_ten_steps_read_nothing_back_but_the_bar_twice_a_second(family, tmp_path, monkeypatch, pipeline_folder) -> None:
    monkeypatch.setattr("lightning_difftune.callbacks.progress_bar.LOSSES_EVERY", 3600)
    module, pictures, settings = module_of(family, pipeline_folder)
    data = MemoryBankDataModule(pictures, bank=tmp_path / "bank", bank_size=10, batch_size=10, **settings)
    watch = Watch()
    trainer = L.Trainer(
        max_steps=16,
        callbacks=[Steps(watch), EMA(), *([EWC()] if family == "DiT" else []), StepProgressBar()],
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=100,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    with watch:
        trainer.fit(module, data)
        assert trainer.global_step == 16
        assert not watch.read, watch.read
        watch.is_watching = True
        trainer.callback_metrics["train/loss"].item()
    assert sum(watch.read.values()) == 1, "and it would have been seen"


SCHEDULERS = "DDIM DDPM DPMSolverMultistep DPMSolverSinglestep UniPCMultistep EulerDiscrete EulerAncestralDiscrete"
SCHEDULERS = [*SCHEDULERS.split(), "HeunDiscrete", "PNDM", "LCM", "FlowMatchEulerDiscrete"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_step_of_sampling_asks_the_device_for_a_number(name) -> None:
    """The device is the one without data, which cannot answer."""
    process = {"beta_start": 1e-4, "beta_end": 0.02} if "Flow" not in name else {}
    scheduler = scheduler_named(name, process)
    model = tiny_dit().to("meta")
    noise, labels = torch.zeros(2, 1, 8, 8, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    assert sample(model, noise, scheduler, 6, labels).shape == noise.shape
    assert sample(model, noise, scheduler, 6, labels, labels, 2.0, null_denoise=model).shape == noise.shape
    network = Guided(model, labels)
    assert swap(network, network, noise, scheduler, [0, 0.5], 6).shape == (2, *noise.shape)
