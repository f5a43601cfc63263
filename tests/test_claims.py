"""The defaults that the documentation claims, and behaviour that one changed line could alter unnoticed."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from tiny import quiet_trainer, tiny_dit, tiny_pictures, tiny_weights

from lightning_difftune import (
    ControlNetDiffTuningModule,
    DiffTuningObjective,
    DiTDiffTuningModule,
    MemoryBankDataModule,
    SNRSchedule,
)
from lightning_difftune.callbacks import EMA
from lightning_difftune.data import ImageTargets
from lightning_difftune.data.annotators import Canny
from lightning_difftune.diffusion import GaussianDiffusion
from lightning_difftune.draws import Draws
from lightning_difftune.modules.optimization import adamw
from lightning_difftune.modules.text_to_image import TextToImageDiffTuningModule
from lightning_difftune.sampling import AUTHORS, Sampler


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_weights(tmp_path_factory.mktemp("weights"))


def default(kind, name):
    return inspect.signature(kind).parameters[name].default


def test_the_defaults_are_those_of_the_authors():
    assert default(MemoryBankDataModule, "retention_share") == 0.2
    assert default(DiffTuningObjective, "retention_weight") == DiffTuningObjective().retention_weight == 0.1
    assert default(DiTDiffTuningModule, "label_dropout") == 0.1
    assert TextToImageDiffTuningModule().condition_dropout == 0.1
    assert ControlNetDiffTuningModule(Canny()).condition_dropout == 0.1
    assert default(EMA, "decay") == EMA().decay == 0.9999
    module = DiTDiffTuningModule(tiny_dit())
    module.configure_model()
    for sampler in (AUTHORS, module.sampler, module.bank_sampler):
        assert (sampler.num_inference_steps, sampler.guidance_scale, sampler.guidance_channels) == (50, 1.5, 3)
        assert type(sampler.reverse).__name__ == "DDIMScheduler"
        assert sampler.reverse.config.timestep_spacing == "leading"
    assert Sampler().spec() == AUTHORS.spec() == module.sampler.spec()


def test_the_default_optimizer_is_adamw_without_decay_at_a_constant_rate(weights, tmp_path):
    for kind in (DiTDiffTuningModule, TextToImageDiffTuningModule):
        assert (default(kind, "optimizer"), default(kind, "lr_scheduler")) == (adamw, None)
    module = DiTDiffTuningModule(str(weights), num_classes=3)
    module.configure_model()
    optimizer = module.configure_optimizers()
    (group,) = optimizer.param_groups
    assert (type(optimizer), group["lr"], group["weight_decay"]) == (torch.optim.AdamW, 1e-4, 0.0)
    assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)


# -- the bank ---------------------------------------------------------------------------------------------------------


def bank_of(weights, **samplers):
    module = DiTDiffTuningModule(str(weights), num_classes=3, seed=4, **samplers)
    module.configure_model()
    return module, module.bank_generator().generate_bank(torch.arange(8))


def test_the_bank_is_drawn_by_its_own_sampler(weights):
    short, long = (Sampler(num_inference_steps=steps, guidance_channels=None) for steps in (2, 5))
    expected = bank_of(weights, sampler=short)[1]["latents"]
    assert torch.equal(bank_of(weights, sampler=long, bank_sampler=short)[1]["latents"], expected)
    assert not torch.equal(bank_of(weights, sampler=long)[1]["latents"], expected)


def test_the_bank_is_of_the_classes_of_the_pretrained_model_not_of_the_target(weights):
    module, bank = bank_of(weights, sampler=Sampler(num_inference_steps=2))
    labels, null = module.source_conditions(torch.arange(400))
    assert labels.unique().tolist() == [0, 1, 2, 3, 4, 5], "the target has 3"
    assert null.unique().tolist() == [6]
    assert torch.equal(bank["class_labels"], labels[:8])
    assert bank["class_labels"].max() >= 3


# -- training ---------------------------------------------------------------------------------------------------------


def test_a_target_sample_is_drawn_from_its_posterior(pipeline_folder):
    module = TextToImageDiffTuningModule(pipeline_folder)
    module.configure_model()
    module.train()
    mean, std = torch.zeros(64, 4, 8, 8), torch.full((64, 4, 8, 8), 3.0)
    module.encode_pixels = lambda pixel_values: (mean, std)
    batch = {"target": {"pixel_values": torch.zeros(64, 3, 16, 16), "captions": ["a photo of a cat"] * 64}}
    x0 = module.prepare(batch, Draws(0, 0))[0]
    assert x0.std().item() == pytest.approx(3.0, rel=0.03)
    assert x0.mean().item() == pytest.approx(0.0, abs=0.1)


def test_a_scheduler_steps_each_training_step(weights, tmp_path):
    module = DiTDiffTuningModule(
        str(weights), num_classes=3, lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    )
    data = MemoryBankDataModule(tiny_pictures(), num_classes=3, image_size=8, channels=1, batch_size=4)
    trainer = quiet_trainer(tmp_path, 5, accumulate_grad_batches=2)
    trainer.fit(module, data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4 / 2**5)


def test_control_maps_are_mirrored_with_their_pictures():
    ramp = np.tile(np.arange(8, dtype=np.uint8) * 30, (8, 1))
    source = [(np.stack([ramp] * 3, -1), "a ramp", ramp)] * 2
    batch = ImageTargets(source, 8).pixels([0, 1], [False, True])
    for key in ("pixel_values", "conditioning_pixel_values"):
        plain, mirrored = batch[key]
        assert not torch.equal(plain, mirrored)
        assert torch.equal(plain, mirrored.flip(-1))


def test_snr_schedule_retains_nothing_at_pure_noise_and_is_scaled_by_its_own_maximum():
    schedule = SNRSchedule(k=3.0, gamma=0.7)
    process = GaussianDiffusion()
    schedule.bind(process)
    s = torch.arange(1, 1001, dtype=torch.float64) / 1000
    psi, xi = schedule.reconsolidation(s), schedule.retention(s)
    torch.testing.assert_close(xi, 1 - psi / psi.max())
    assert xi[-1].item() == 0
    assert psi.max() < 0.5, "so that 1 - psi is another curve"
