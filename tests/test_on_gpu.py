"""Tests that need a GPU: `make test-gpu`. Elsewhere they are skipped, with the reason.

`DIFFTUNE_GPU_TESTS_ON_CPU=1 make test-gpu` runs on a CPU what a CPU can, to see that the tests themselves work.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from tiny import quiet_trainer, tiny_dit, tiny_pictures
from torch import nn

from lightning_difftune import DiTDiffTuningModule, MemoryBank, MemoryBankDataModule
from lightning_difftune.callbacks import EMA, FID, RegionalCompile
from lightning_difftune.data.building import largest_batch
from lightning_difftune.draws import Draws
from lightning_difftune.sampling import Sampler, sample, scheduler_named

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
ACCELERATORS = ("cpu", "gpu" if HAS_GPU else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not HAS_GPU and os.environ.get("DIFFTUNE_GPU_TESTS_ON_CPU") != "1",
        reason="needs a GPU: torch.cuda.is_available() is False",
    ),
]
cuda_only = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: a CPU has neither its memory nor pinned memory")
FUSED = partial(torch.optim.AdamW, lr=1e-3, fused=True)


def module_of(**settings):
    settings = {"optimizer": FUSED, "sampler": Sampler(num_inference_steps=4)} | settings
    return DiTDiffTuningModule(tiny_dit(depth=2, num_classes=3), **settings)


def data_of(folder, **settings):
    settings = {"bank": folder / "bank", "bank_size": 20, "val_target": tiny_pictures(12), "batch_size": 10} | settings
    return MemoryBankDataModule(tiny_pictures(60), 3, 8, 1, **settings)


def trainer_of(folder, steps, *callbacks, **settings):
    settings = {"accelerator": ACCELERATORS[1], "precision": "bf16-mixed"} | settings
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
    for accelerator in ACCELERATORS:
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
            assert all(average.device.type == DEVICE for average in ema._averages.values())

    module = module_of()
    start = module._given[0].final_layer.linear.weight.detach().clone().to(DEVICE)
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
    for accelerator in ACCELERATORS:
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
    found = sample(
        copy.deepcopy(model).to(DEVICE), noise.to(DEVICE), scheduler, 10, labels.to(DEVICE), null.to(DEVICE), 1.5
    ).cpu()
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_draws_reach_every_timestep_in_bf16():
    """Float32 whatever the default type: bfloat16 has 256 numbers in [0.5, 1)."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        uniform = Draws(0, 0, DEVICE).uniform(100_000)
    finally:
        torch.set_default_dtype(torch.float32)
    assert uniform.dtype == torch.float32
    assert len((uniform * 1000).long().unique()) == 1000


def test_compiled_blocks_with_a_fused_step_and_clipped_gradients_learn_the_same(bank):
    runs = []
    for callbacks in ([], [RegionalCompile(devices=[DEVICE], backend="inductor" if HAS_GPU else "aot_eager")]):
        losses = Losses()
        trainer = trainer_of(bank, 8, losses, EMA(), *callbacks, gradient_clip_val=1.0)
        trainer.fit(module_of(), data_of(bank))
        runs.append(losses.values)
    np.testing.assert_allclose(runs[1], runs[0], rtol=2e-2)


@cuda_only
def test_the_largest_batch_fills_the_memory_and_no_more():
    free = torch.cuda.mem_get_info()[0]
    share = free // 40  # of a sample

    def run(count):
        torch.empty(count * share, dtype=torch.uint8, device="cuda")

    found = largest_batch(run, 4096)
    assert 16 <= found <= 40
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] >= 0.9 * free, "and gives it back"


@cuda_only
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


def fit_of_one_process(folder, rank, world_size):
    """A fit of one of the processes that share one card; two nodes of one device each are two processes on it."""
    strategy = DDPStrategy(process_group_backend="gloo") if world_size > 1 else "auto"
    losses = Losses()
    module = module_of(optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=True))
    data = data_of(folder, batch_size=10 // world_size, val_target=None)
    trainer = trainer_of(folder, 6, losses, EMA(0.9), num_nodes=world_size, strategy=strategy)
    trainer.fit(module, data)
    if rank == 0:
        weights = {name: weight.cpu() for name, weight in module.state_dict().items()}
        torch.save(
            {"weights": weights, "logged": trainer.callback_metrics["train/loss"].cpu()}, folder / f"{world_size}.pt"
        )
    (folder / f"{world_size}-{rank}.json").write_text(json.dumps(losses.values))


def test_two_processes_that_share_a_card_train_what_one_does(bank):
    """DDP over gloo, in bf16-mixed: gradients of weights that are cast together are averaged as others are."""
    fit_of_one_process(bank, 0, 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, bank, str(rank), "2"],
            env={**os.environ, **places, "NODE_RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=150) for process in running] == [0, 0]
    one, two = (torch.load(bank / f"{count}.pt") for count in (1, 2))
    torch.testing.assert_close(two["logged"], one["logged"], rtol=2e-2, atol=0)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=5e-3, msg=name)
    shares = [json.loads((bank / f"2-{rank}.json").read_text()) for rank in range(2)]
    assert shares[0] != shares[1], "each process has its own share"


def test_the_quickstart_runs_here(tmp_path):
    steps = "100" if HAS_GPU else "4"
    command = [sys.executable, "-m", "lightning_difftune", "quickstart", "--steps", steps, "--output", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=170 if HAS_GPU else 900)
    assert run.returncode == 0, run.stderr[-3000:]
    assert list(Path(tmp_path).rglob("*.png")), run.stdout[-2000:]


if __name__ == "__main__":
    fit_of_one_process(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
