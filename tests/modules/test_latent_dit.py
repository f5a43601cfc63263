"""DiTDiffTuningModule on the latents of a frozen autoencoder, encoded in the loop or read from a cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from tiny import quiet_trainer, tiny_autoencoder, tiny_weights

from lightning_difftune import DiTDiffTuningModule, MemoryBank, MemoryBankDataModule
from lightning_difftune.callbacks import EMA
from lightning_difftune.data import ArrayImages, LatentCache
from lightning_difftune.draws import Draws, noise_of
from lightning_difftune.errors import ConfigError, StoreError
from lightning_difftune.metrics.held_out import SupportsReconstruct
from lightning_difftune.models import DiT, FrozenAutoencoder, export_dit, load_dit
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.sampling import Sampler

SAMPLER = Sampler(num_inference_steps=2)
FLOAT16_ROUNDING = 2**-10  # of latents of unit size


@pytest.fixture
def vae(tmp_path):
    torch.manual_seed(0)
    tiny_autoencoder(8, 8, 8, sample_size=16).save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


@pytest.fixture
def weights(tmp_path):
    return str(tiny_weights(tmp_path, input_size=4, patch_size=2, in_channels=4, depth=2))


def module_of(weights, vae, **settings):
    return DiTDiffTuningModule(
        weights, num_classes=3, autoencoder=FrozenAutoencoder(vae, scaling_factor=1.0), sampler=SAMPLER, **settings
    )


def data_of(tmp_path, latent_cache=None, size=16, **settings):
    pictures = np.random.default_rng(0).integers(0, 256, (20, size, size, 3), dtype=np.uint8)
    train, val = (ArrayImages(part, np.arange(len(part)) % 3) for part in (pictures[:13], pictures[13:]))
    settings = {"bank": tmp_path / "bank", "bank_size": 6, "batch_size": 5, "horizontal_flip": True} | settings
    return MemoryBankDataModule(train, 3, size, val_target=val, latent_cache=latent_cache, **settings)


def one_epoch(trainer, module, data):
    """The batches of the first epoch, as the trainer would read them."""
    module.configure_model()
    trainer.strategy.connect(module)
    data.trainer = trainer
    return list(data.train_dataloader())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fit_builds_the_cache_and_trains_on_it(tmp_path, weights, vae, precision):
    module = module_of(weights, vae)
    trainer = quiet_trainer(tmp_path, 4, EMA(decay=0.5), precision=precision)
    trainer.fit(module, data_of(tmp_path, tmp_path / "latents"))
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    assert {"train/loss", "train/retention", "val/loss"} <= trainer.callback_metrics.keys()
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}

    cache = LatentCache(tmp_path / "latents")
    assert (len(cache), cache.latent_shape) == (13, (4, 4, 4))
    assert MemoryBank(tmp_path / "bank").latent_shape == (4, 4, 4)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.glob("latents/*")}
    quiet_trainer(tmp_path, 1).fit(module_of(weights, vae), data_of(tmp_path, tmp_path / "latents"))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("latents/*")} == written


def test_the_cache_holds_what_the_loop_would_encode(tmp_path, weights, vae):
    module = module_of(weights, vae)
    samples = []
    for latent_cache in (None, tmp_path / "latents"):
        batches = one_epoch(quiet_trainer(tmp_path, 1), module, data_of(tmp_path, latent_cache))
        assert len(batches) == 3
        assert ("latent_mean" in batches[0]["target"]) == (latent_cache is not None)
        samples.append([module.prepare(batch, Draws(0, step)) for step, batch in enumerate(batches)])
    for (x0, labels, is_retention), (x0_cached, labels_cached, is_retention_cached) in zip(*samples, strict=True):
        assert torch.equal(labels, labels_cached)
        assert torch.equal(is_retention, is_retention_cached)
        torch.testing.assert_close(x0_cached, x0, rtol=FLOAT16_ROUNDING, atol=4 * FLOAT16_ROUNDING)


def test_a_cached_posterior_gives_a_new_latent_at_each_step(tmp_path, weights, vae):
    module = module_of(weights, vae)
    batch, *_ = one_epoch(quiet_trainer(tmp_path, 1), module, data_of(tmp_path, tmp_path / "latents"))
    mean, std = batch["target"]["latent_mean"], batch["target"]["latent_std"]
    again, once = (module.prepare(batch, Draws(0, 7))[0] for _ in range(2))
    assert torch.equal(again, once)
    draws = torch.stack([module.prepare(batch, Draws(0, step))[0][: len(mean)] for step in range(400)])
    assert not torch.equal(draws[0], draws[1])
    standard = (draws - mean) / std
    assert abs(standard.mean()) < 0.01
    assert abs(standard.std() - 1) < 0.01
    assert standard.mean(0).abs().max() < 0.3  # every entry scatters about its own mean: 6 sigma


def test_pictures_are_the_decoded_samples_of_their_index(weights, vae):
    module = module_of(weights, vae)
    module.configure_model()
    module.eval()
    indices = torch.tensor([4, 1])
    pictures = module.generate(indices)
    assert (pictures.dtype, pictures.shape) == (torch.uint8, (2, 3, 16, 16))
    null = torch.full((2,), module.dit.null_class)
    latents = SAMPLER(module.dit, noise_of(0, indices, (4, 4, 4)), indices % 3, null)
    decoded = module.autoencoder.network.decode(latents).sample.clamp(-1, 1)
    torch.testing.assert_close(pictures.float(), (decoded + 1) * 127.5, rtol=0, atol=0.51)


def test_a_checkpoint_has_no_autoencoder_and_validates_as_before(tmp_path, weights, vae):
    module, data = module_of(weights, vae), data_of(tmp_path, tmp_path / "latents")
    before = module.autoencoder.fingerprint()
    trainer = quiet_trainer(tmp_path, 3)  # one epoch, which ends in a validation
    trainer.fit(module, data)
    assert module.autoencoder.fingerprint() == before
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == {f"dit.{name}" for name in module.dit.state_dict()} - {"dit.pos_embed"}

    (result,) = quiet_trainer(tmp_path, 3).validate(
        module_of(weights, vae), data_of(tmp_path), ckpt_path=tmp_path / "run.ckpt", verbose=False
    )
    assert result["val/loss"] == pytest.approx(trainer.callback_metrics["val/loss"].item(), rel=1e-6)


def test_the_tuned_model_goes_to_a_diffusers_folder_and_back(tmp_path, weights, vae):
    module = module_of(weights, vae)
    quiet_trainer(tmp_path, 4).fit(module, data_of(tmp_path))
    folder = export_dit(module.dit, tmp_path / "tuned", "diffusers", autoencoder=module.autoencoder)
    assert fingerprint(load_dit(folder)) == fingerprint(module.dit)
    autoencoder = FrozenAutoencoder(folder, scaling_factor=1.0, subfolder="vae")
    assert autoencoder.fingerprint() == module.autoencoder.fingerprint()

    again = DiTDiffTuningModule(folder, num_classes=3, autoencoder=autoencoder, sampler=SAMPLER)
    again.configure_model()
    indices = torch.arange(3)
    assert torch.equal(again.eval().generate(indices), module.eval().generate(indices))
    with pytest.raises(StoreError, match="model"):  # the bank of the model before tuning is not this one's
        quiet_trainer(tmp_path, 1).fit(again, data_of(tmp_path))
    quiet_trainer(tmp_path, 1).fit(again, data_of(tmp_path, bank=tmp_path / "second"))


def test_sizes_that_do_not_fit_are_refused_before_anything_is_built(tmp_path, weights, vae):
    with pytest.raises(ConfigError, match=r"shape \(4, 8, 8\), but the model denoises \(4, 4, 4\)"):
        quiet_trainer(tmp_path, 1).fit(module_of(weights, vae), data_of(tmp_path, tmp_path / "latents", size=32))
    assert not list(tmp_path.glob("latents/*.safetensors"))
    assert not (tmp_path / "bank").exists()
    with pytest.raises(ConfigError, match="no autoencoder"):
        quiet_trainer(tmp_path, 1).fit(DiTDiffTuningModule(weights, 3), data_of(tmp_path, tmp_path / "latents"))
    grey = DiT(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2)
    with pytest.raises(ConfigError, match="latents of 4 channels"):
        DiTDiffTuningModule(grey, autoencoder=FrozenAutoencoder(vae)).configure_model()


def test_a_reconstruction_is_what_diffusers_decodes_of_the_latents_mean(weights, vae):
    module = module_of(weights, vae)
    module.configure_model()
    assert isinstance(module, SupportsReconstruct)
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8))
    with torch.no_grad():
        autoencoder = AutoencoderKL.from_pretrained(vae)
        decoded = autoencoder.decode(autoencoder.encode(pictures / 127.5 - 1).latent_dist.mean).sample
        found = module.reconstruct(pictures)
    assert found.dtype == torch.uint8
    expected = ((decoded + 1) * 127.5).round().clamp(0, 255)
    assert (found.float() - expected).abs().max() <= 1


def test_a_pixel_model_reconstructs_every_picture_as_it_is():
    module = DiTDiffTuningModule(DiT(4, patch_size=2, in_channels=3, hidden_size=16, depth=1, num_heads=2))
    pictures = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    assert torch.equal(module.reconstruct(pictures), pictures)
