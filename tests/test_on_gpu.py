"""What means something on a GPU only: `make test-gpu`. Elsewhere these tests are skipped, with the reason."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny import quiet_trainer, tiny_dit, tiny_pictures
from torch import nn

from lightning_difftune import DiTDiffTuningModule, MemoryBank, MemoryBankDataModule
from lightning_difftune.callbacks import EMA, FID, RegionalCompile
from lightning_difftune.data.building import largest_batch
from lightning_difftune.draws import Draws
from lightning_difftune.sampling import Sampler, sample, scheduler_named

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"),
]
FUSED = partial(torch.optim.AdamW, lr=1e-3, fused=True)


def module_of(**settings):
    settings = {"optimizer": FUSED, "sampler": Sampler(num_inference_steps=4)} | settings
    return DiTDiffTuningModule(tiny_dit(depth=2, num_classes=3), **settings)


def data_of(folder, **settings):
    settings = {"bank": folder / "bank", "bank_size": 20, "val_target": tiny_pictures(12)} | settings
    return MemoryBankDataModule(tiny_pictures(60), 3, 8, 1, batch_size=10, **settings)


def trainer_of(folder, steps, *callbacks, **settings):
    settings = {"accelerator": "gpu", "precision": "bf16-mixed"} | settings
    return quiet_trainer(folder, steps, *callbacks, **settings)


class Losses(Callback):
    """The loss of each step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


@pytest.fixture
def bank(tmp_path):
    """A bank on disk, so that all fits of a test replay the same samples."""
    module = module_of()
    module.configure_model()
    MemoryBank.build(tmp_path / "bank", module.bank_generator(), 20)
    return tmp_path


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_losses_are_those_of_the_cpu(bank, precision):
    """Batches and bank are the same; timesteps and noise are drawn by another generator, so a long mean is compared."""
    means = []
    for accelerator in ("cpu", "gpu"):
        losses = Losses()
        module = module_of(optimizer=partial(torch.optim.AdamW, lr=0.0))
        trainer_of(bank, 200, losses, accelerator=accelerator, precision=precision).fit(module, data_of(bank))
        means.append(np.mean(losses.values))
    assert means[1] == pytest.approx(means[0], rel=0.05)


def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(bank):
    checkpoint = ModelCheckpoint(bank / "checkpoints", every_n_train_steps=5, save_top_k=-1)
    undisturbed = trainer_of(bank, 12, EMA(0.9), checkpoint, deterministic="warn")
    undisturbed.fit(module_of(), data_of(bank))
    resumed = trainer_of(bank, 12, EMA(0.9), deterministic="warn")
    first = next((bank / "checkpoints").glob("*step=5*"))
    resumed.fit(module_of(), data_of(bank), ckpt_path=first)
    for name, expected in undisturbed.lightning_module.state_dict().items():
        assert torch.equal(resumed.lightning_module.state_dict()[name], expected), name
    averages = (t.callbacks[0].state_dict()["averages"] for t in (undisturbed, resumed))
    assert all(torch.equal(a, b) for a, b in zip(*(group.values() for group in averages), strict=True))


def test_the_averages_live_on_the_device_and_follow_the_formula(bank):
    ema, seen = EMA(0.5), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(module.dit.final_layer.linear.weight.detach().clone())
            assert all(average.is_cuda for average in ema._averages.values())

    module = module_of()
    start = module._given[0].final_layer.linear.weight.detach().clone().cuda()
    trainer_of(bank, 4, ema, Watch()).fit(module, data_of(bank))
    expected = start
    for weight in seen:
        expected = expected.lerp(weight, 0.5)
    found = ema.state_dict()["averages"]["dit.final_layer.linear.weight"]
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-6, atol=1e-7)


class Pixels(nn.Module):
    """Features that are the pixels, for a distance without downloads."""

    def forward(self, pictures):
        return pictures.flatten(1).float() / 255

    name = "pixels"
    num_features = 64


def test_fid_is_that_of_the_cpu(bank):
    distances = []
    for accelerator in ("cpu", "gpu"):
        fid = FID(num_samples=48, feature_extractor=Pixels(), batch_size=16)
        trainer = trainer_of(bank, 1, fid, accelerator=accelerator, precision="32-true")
        trainer.validate(module_of(), data_of(bank), verbose=False)
        distances.append(fid.last_value)
    assert distances[1] == pytest.approx(distances[0], rel=1e-3)


@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "HeunDiscrete"])
def test_samplers_draw_what_they_draw_on_the_cpu(name):
    scheduler = scheduler_named(name, {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"})
    model = tiny_dit(depth=2).eval()
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, null = torch.arange(4), torch.full((4,), model.null_class)
    expected = sample(model, noise, scheduler, 10, labels, null, 1.5)
    found = sample(copy.deepcopy(model).cuda(), noise.cuda(), scheduler, 10, labels.cuda(), null.cuda(), 1.5).cpu()
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_draws_reach_every_timestep_in_bf16():
    """Float32 whatever the default type: bfloat16 has 256 numbers in [0.5, 1)."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        uniform = Draws(0, 0, "cuda").uniform(100_000)
    finally:
        torch.set_default_dtype(torch.float32)
    assert uniform.dtype == torch.float32
    assert len((uniform * 1000).long().unique()) == 1000


def test_compiled_blocks_with_a_fused_step_and_clipped_gradients_learn_the_same(bank):
    runs = []
    for callbacks in ([], [RegionalCompile()]):
        losses = Losses()
        trainer = trainer_of(bank, 8, losses, EMA(), *callbacks, gradient_clip_val=1.0)
        trainer.fit(module_of(), data_of(bank))
        runs.append(losses.values)
    np.testing.assert_allclose(runs[1], runs[0], rtol=2e-2)


def test_the_largest_batch_fills_the_memory_and_no_more():
    free = torch.cuda.mem_get_info()[0]
    share = free // 40  # of a sample

    def run(count):
        torch.empty(count * share, dtype=torch.uint8, device="cuda")

    found = largest_batch(run, 4096)
    assert 16 <= found <= 40
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] >= 0.9 * free, "and gives it back"


def test_batches_wait_in_pinned_memory(bank):
    batch = next(iter(data_of(bank).train_dataloader()))
    assert batch["target"]["pixel_values"].is_pinned()


def test_the_bank_is_drawn_on_the_device_and_kept_on_the_host(tmp_path):
    module = module_of()
    trainer_of(tmp_path, 1).fit(module, data_of(tmp_path))
    bank = MemoryBank(tmp_path / "bank")
    latents = bank.read(torch.arange(20))["latents"]
    assert latents.device.type == "cpu"
    assert latents.isfinite().all()
