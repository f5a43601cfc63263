"""A loss that is not finite stops the run with an error that names it, and keeps the last checkpoint."""

from __future__ import annotations

import re

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import tiny_dit

from lightning_difftune import DiTDiffTuningModule, MemoryBankDataModule
from lightning_difftune.callbacks import EMA
from lightning_difftune.data import ArrayImages
from lightning_difftune.errors import NumericsError
from lightning_difftune.modules.step_losses import FiniteLoss
from lightning_difftune.objective import ObjectiveOutput
from lightning_difftune.sampling import Sampler


class Broken(DiTDiffTuningModule):
    """Its network returns ``value`` for one sample of a step."""

    at_step, value, stream = 5, float("nan"), "target"

    def denoise(self, x_t, t, condition):
        output = super().denoise(x_t, t, condition)
        if self.trainer.training and self.trainer.global_step == self.at_step:
            sample = 1 if self.stream == "target" else len(output) - 1
            self.broken_t = int(t[sample])
            output = torch.where(torch.arange(len(output)).view(-1, 1, 1, 1) == sample, self.value, output)
        return output


def module_of(kind=DiTDiffTuningModule, **options):
    model = tiny_dit()
    return kind(model, num_classes=3, sampler=Sampler(num_inference_steps=2), **options)


def fit(folder, module, log_every, steps=12, **options):
    pictures = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    data = MemoryBankDataModule(
        ArrayImages(pictures, np.arange(30) % 3), 3, 8, channels=1, bank=folder / "bank", bank_size=10, batch_size=5
    )
    saver = ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=0, every_n_train_steps=2)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[EMA(decay=0.5), saver],
        logger=False,
        log_every_n_steps=log_every,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data)


@pytest.mark.parametrize("log_every", [1, 3, 1000])
@pytest.mark.parametrize("stream", ["target", "retention"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_loss_that_is_not_finite_is_named(tmp_path, log_every, stream, value):
    module = module_of(Broken)
    module.stream, module.value = stream, value
    with pytest.raises(NumericsError) as raised:
        fit(tmp_path, module, log_every)
    low = module.broken_t // 100 * 100
    where = f"at step 5, in the {stream} stream at t = {module.broken_t}, of timesteps {low} to {low + 99}"
    assert where in str(raised.value)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


def test_no_checkpoint_of_broken_weights(tmp_path):
    module = module_of()

    class Spoil(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 6:  # the loss of this step was finite, a gradient was not
                pl_module.dit.blocks[0].attn.qkv.weight.data[0, 0] = float("inf")

    with pytest.raises(NumericsError, match=re.escape("1 of ") + r".*dit\.blocks\.0\.attn\.qkv\.weight; no checkpoint"):
        fit_with(tmp_path, module, Spoil())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def fit_with(folder, module, callback):
    original = L.Trainer.__init__

    def init(self, *args, callbacks, **options):
        original(self, *args, callbacks=[callback, *callbacks], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(L.Trainer, "__init__", init)
        fit(folder, module, 1000)


def test_the_end_of_a_run_is_looked_at(tmp_path):
    module = module_of(Broken)
    module.at_step = 6
    with pytest.raises(NumericsError, match="at step 6"):
        fit(tmp_path, module, 1000, steps=7)


@pytest.mark.parametrize("kept", [1, 4, 50])
def test_it_is_the_first_however_many_steps_wait_to_be_looked_at(monkeypatch, kept):
    monkeypatch.setattr("lightning_difftune.modules.step_losses.KEPT", kept)
    loss = FiniteLoss()
    for step in range(10):
        losses = torch.full((3,), float("nan") if step >= 6 else 1.0)
        loss.watch(
            step, ObjectiveOutput(losses.mean(), None, None, losses, torch.tensor([250, 1, 2])), torch.zeros(3) > 0
        )
    assert len(loss._steps) < kept
    with pytest.raises(NumericsError, match="at step 6, in the target stream at t = 250"):
        loss.check(module_of())


def test_an_overflow_of_the_sum_has_no_stream():
    loss = FiniteLoss()
    output = ObjectiveOutput(torch.tensor(float("inf")), None, None, torch.ones(3), torch.arange(3))
    loss.watch(9, output, torch.tensor([False, True, False]))
    with pytest.raises(NumericsError, match="at step 9, in the sum over the batch"):
        loss.check(module_of())


def test_a_run_in_half_precision_of_finite_losses_goes_through(tmp_path):
    fit(tmp_path, module_of(), 1, precision="bf16-mixed")
