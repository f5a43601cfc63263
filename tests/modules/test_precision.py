"""bf16-true and 64-true work for every family: bank, training, pictures and FID, on draws that are the same numbers."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from tiny import noise_pixels, quiet_trainer, tiny_autoencoder, tiny_dit, tiny_pictures
from torch import nn

from lightning_difftune import (
    ControlNetDiffTuningModule,
    DiffTuningModule,
    DiffTuningObjective,
    DiTDiffTuningModule,
    MemoryBank,
    MemoryBankDataModule,
    TextToImageDiffTuningModule,
)
from lightning_difftune.callbacks import EMA, FID, RegionalCompile, SampleGrid
from lightning_difftune.data import ArrayImages
from lightning_difftune.data.annotators import Canny
from lightning_difftune.models import FrozenAutoencoder
from lightning_difftune.retention_targets import OnlineTeacher
from lightning_difftune.sampling import Sampler
from lightning_difftune.tuners import LoRA

FAMILIES = ["pixels", "latents", "cached latents", "text-to-image", "ControlNet", "sdxl", "flux", "sd3"]


class Watch(Callback):
    """The types of what is drawn and computed."""

    def __init__(self):
        self.seen = {}

    def on_train_start(self, trainer, module):
        objective, seen = module.objective, self.seen
        at = objective.at

        def watched(denoise, x0, condition, is_retention, t, noise, *others):
            output = at(denoise, x0, condition, is_retention, t, noise, *others)
            seen.update(x0=x0.dtype, noise=noise.dtype, t=t.dtype, loss=output.loss.dtype)
            seen["finite"] = bool(output.loss.isfinite())
            return output

        objective.at = watched


class Features(nn.Module):
    """Features for a distance without downloads."""

    name, num_features = "means", 3

    def forward(self, pictures):
        return pictures.float().mean((2, 3)).expand(-1, 3) + pictures.float().flatten(1)[:, :3]


def of_family(family, folder, pipeline_folder, folder_of=None):
    """Module and data."""
    settings = {"bank": folder / "bank", "bank_size": 6, "batch_size": 5, "num_workers": 0}
    if family == "pixels":
        module = DiTDiffTuningModule(tiny_dit(num_classes=3), sampler=Sampler(num_inference_steps=2))
        return module, MemoryBankDataModule(tiny_pictures(8), 3, 8, 1, val_target=tiny_pictures(8), **settings)
    pictures = noise_pixels(8, 16, 16, 3)
    if folder_of is not None and family in ("sdxl", "flux", "sd3"):
        prompts = ["a cat", "red"]
        module = TextToImageDiffTuningModule(
            folder_of(family), image_size=32, prompts=prompts, bank_prompts=prompts, sampler=Sampler(None, 2)
        )
        source = [(picture, "a cat") for picture in noise_pixels(8, 32, 32, 3)]
        return module, MemoryBankDataModule(source, image_size=32, val_target=source, **settings)
    if "latents" in family:
        dit = tiny_dit(num_classes=3, in_channels=4)
        module = DiTDiffTuningModule(
            dit, autoencoder=FrozenAutoencoder(tiny_autoencoder(8, 8)), sampler=Sampler(num_inference_steps=2)
        )
        source = ArrayImages(pictures, np.arange(8) % 3)
        cache = {"latent_cache": folder / "latents"} if family == "cached latents" else {}
        return module, MemoryBankDataModule(source, 3, 16, val_target=source, **cache, **settings)
    if family == "text-to-image":
        module = TextToImageDiffTuningModule(pipeline_folder, sampler=Sampler(None, 2, 3.0, None))
        source = [(picture, "a photo of a cat") for picture in pictures]
    else:
        canny = Canny()
        module = ControlNetDiffTuningModule(canny, pipeline_folder, sampler=Sampler(None, 2, 3.0, None))
        maps = canny(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        source = [(p, "a photo of a cat", m[0].numpy()) for p, m in zip(pictures, maps, strict=True)]
    return module, MemoryBankDataModule(source, image_size=16, val_target=source, **settings)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_draws(family, precision, tmp_path, pipeline_folder, folder_of):
    module, data = of_family(family, tmp_path, pipeline_folder, folder_of)
    module.optimizer = partial(torch.optim.AdamW, lr=1e-3)
    fid = FID(num_samples=5, feature_extractor=Features(), batch_size=5)
    watch = Watch()
    trainer = quiet_trainer(
        tmp_path, 2, watch, EMA(), fid, SampleGrid(num_samples=2), logger=CSVLogger(tmp_path), precision=precision
    )
    trainer.fit(module, data)
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float64
    assert {p.dtype for p in module.trainable_parameters()} == {expected}
    assert watch.seen == {
        "x0": torch.float32,
        "noise": torch.float32,
        "t": torch.int64,
        "loss": torch.float32,
        "finite": True,
    }
    assert np.isfinite(fid.last_value)
    assert MemoryBank(tmp_path / "bank").read(torch.arange(6))["latents"].isfinite().all()
    assert torch.get_default_dtype() == torch.float32


class Batches(Callback):
    """The batches and clean samples that a run trains on."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, module):
        at = module.objective.at

        def watched(denoise, x0, condition, *others):
            self.seen.append((x0.clone(), condition))
            return at(denoise, x0, condition, *others)

        module.objective.at = watched

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append(batch)


def floats_of(value):
    """All float tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in floats_of(part)]


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("family", ["pixels", "cached latents"])
def test_what_is_trained_on_is_the_same_to_the_bit_at_any_precision(family, precision, tmp_path):
    """Lightning rounds a batch to the weights' type: pictures, cached latents, the bank's latents and columns."""
    runs = []
    for each in ("32-true", precision):
        module, data = of_family(family, tmp_path / "stores", None)
        watch = Batches()
        quiet_trainer(tmp_path, 2, watch, precision=each).fit(module, data)
        runs.append(floats_of(watch.seen))
    assert len(runs[0]) == len(runs[1]) > 0
    for ours, theirs in zip(*runs, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["pixels", "text-to-image"])
def test_a_model_is_the_same_one_at_any_precision(family, tmp_path, pipeline_folder):
    """Its fingerprint is that of the weights as published, so that checkpoints and banks know their model."""
    found = []
    for precision in ("32-true", "bf16-true", "64-true"):
        module, data = of_family(family, tmp_path / precision, pipeline_folder)
        quiet_trainer(tmp_path, 1, precision=precision).fit(module, data)
        found.append(module.base_identity["fingerprint"])
        assert {table.dtype for table in module.objective.buffers()} == {torch.float32}
    assert len(set(found)) == 1


def test_banks_of_fit_and_predict_are_the_same_to_the_bit_at_the_trainers_precision(tmp_path):
    banks = []
    for road in ("fit", "predict", "float32"):
        module, data = of_family("pixels", tmp_path / road, None)
        precision = "32-true" if road == "float32" else "bf16-mixed"
        trainer = quiet_trainer(tmp_path, 1, precision=precision)
        if road == "predict":
            trainer.predict(module, data, return_predictions=False)
        else:
            trainer.fit(module, data)
        banks.append(MemoryBank(tmp_path / road / "bank").read(torch.arange(6))["latents"])
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[0], banks[2])
    torch.testing.assert_close(banks[0], banks[2], atol=0.3, rtol=0)


@pytest.mark.parametrize("road", ["fit", "predict"])
@pytest.mark.parametrize("asked", [None, "highest"])
def test_gpus_multiply_in_tf32_from_python_too(road, asked, tmp_path, monkeypatch):
    """As the command line does; a module that asks for full float32 gets that."""
    module, data = of_family("pixels", tmp_path, None)
    build = module.configure_model

    def on_a_gpu():
        with monkeypatch.context() as there:
            there.setattr(torch.cuda, "is_available", lambda: True)
            build()

    module.configure_model = on_a_gpu
    if asked is not None:
        module.float32_matmul_precision = asked
    found = []
    for name in ("draw_latents", "training_step"):
        called = getattr(module, name)
        watched = partial(
            lambda called, *args: found.append(torch.get_float32_matmul_precision()) or called(*args), called
        )
        monkeypatch.setattr(module, name, watched)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if asked is None else "high")
    try:
        trainer = quiet_trainer(tmp_path, 1)
        trainer.fit(module, data) if road == "fit" else trainer.predict(module, data, return_predictions=False)
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(found) == {asked or "high"}
    assert len(found) >= (2 if road == "fit" else 1), "the bank is drawn, and a step is trained"


# -- weights that are cast together -----------------------------------------------------------------------------------


def without_casts(monkeypatch):
    monkeypatch.setattr(DiffTuningModule, "weights_cast", lambda self, denoise: nullcontext())


@pytest.mark.parametrize("family", ["pixels", "ControlNet", "flux"])
def test_a_run_is_the_same_to_the_bit(family, tmp_path, pipeline_folder, monkeypatch):
    runs = []
    for folder in ("cast", "plain"):
        torch.manual_seed(0)
        module, data = of_family(family, tmp_path / folder, pipeline_folder)
        module.optimizer = partial(torch.optim.AdamW, lr=1e-3)
        quiet_trainer(tmp_path, 3, precision="bf16-mixed", accumulate_grad_batches=2).fit(module, data)
        pictures = module.generate(torch.arange(2))
        runs.append([*module.state_dict().values(), pictures])
        without_casts(monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("how", ["LoRA", "teacher", "compiled"])
def test_frozen_weights_teachers_and_compiled_blocks_too(how, tmp_path, monkeypatch):
    runs = []
    for folder in ("cast", "plain"):
        module, data = of_family("pixels", tmp_path / folder, None)
        module.tuner = LoRA(rank=2) if how == "LoRA" else None
        module.objective = DiffTuningObjective(retention_target=OnlineTeacher() if how == "teacher" else None)
        callbacks = [RegionalCompile(["DiTBlock"], ["cpu"], "aot_eager")] if how == "compiled" else []
        torch.manual_seed(0)
        quiet_trainer(tmp_path, 3, EMA(0.5), *callbacks, precision="bf16-mixed").fit(module, data)
        runs.append(list(module.state_dict().values()))
        without_casts(monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("family", ["text-to-image", "ControlNet"])
def test_the_trained_network_teaches_without_its_updates(family, tmp_path, pipeline_folder, monkeypatch):
    """Teacher and trained network share weights, so that their casts are within each other."""
    runs = []
    for folder in ("cast", "plain"):
        module, data = of_family(family, tmp_path / folder, pipeline_folder)
        module.tuner = LoRA(rank=2)
        module.optimizer = partial(torch.optim.AdamW, lr=1e-2)
        module.objective = DiffTuningObjective(retention_target=OnlineTeacher())
        torch.manual_seed(0)
        quiet_trainer(tmp_path, 4, precision="bf16-mixed").fit(module, data)
        runs.append([*module.state_dict().values(), module.generate(torch.arange(2))])
        without_casts(monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
