"""A model family of one's own: the README's example under a trainer, with the callbacks, and by the command line."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from diffusers import UNet2DModel
from PIL import Image
from tiny import quiet_trainer
from torch import nn

from lightning_difftune import DiffTuningModule, DiffTuningObjective, MemoryBank, MemoryBankDataModule
from lightning_difftune.callbacks import EMA, FID, SampleGrid
from lightning_difftune.cli import main
from lightning_difftune.data import ArrayImages
from lightning_difftune.diffusion import GaussianDiffusion
from lightning_difftune.draws import Draws, noise_of
from lightning_difftune.errors import CheckpointError
from lightning_difftune.losses import eps_mse_loss
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.sampling import Sampler
from lightning_difftune.source import SourceFacts

# -- the README's example ---------------------------------------------------------------------------------------------


# --8<-- [start:module]
class UNetDiffTuningModule(DiffTuningModule):
    """An unconditional diffusers UNet in pixel space."""

    def __init__(self, unet: str, objective: DiffTuningObjective, sampler: Sampler, seed: int = 0) -> None:
        super().__init__(objective=objective, sampler=sampler, seed=seed)
        self.folder = unet

    def build(self):
        self.unet = UNet2DModel.from_pretrained(self.folder)
        return SourceFacts(self.folder, fingerprint(self.unet), GaussianDiffusion(), "epsilon")

    def trainable_modules(self):
        return [self.unet]

    def denoise(self, x_t, t, condition):
        return self.unet(x_t, t).sample

    def decode(self, latents):
        return latents.clamp(-1, 1)

    @property
    def sample_shape(self):
        config = self.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    def pretrained(self):
        unet = UNet2DModel.from_pretrained(self.folder).to(self.device)
        return lambda x_t, t, condition: unet(x_t, t).sample


# --8<-- [end:module]
# -- its tests --------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        dropout=0.5,
    )
    unet.save_pretrained(tmp_path / "unet")
    return str(tmp_path / "unet")


def module_of(weights):
    return UNetDiffTuningModule(weights, DiffTuningObjective(), Sampler(num_inference_steps=2, guidance_scale=1.0))


def data_of(bank):
    pictures = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    target, held_out = (ArrayImages(part, np.zeros(10, dtype=np.int64)) for part in (pictures[:10], pictures[10:]))
    return MemoryBankDataModule(
        target, 1, image_size=8, channels=1, val_target=held_out, bank=bank, bank_size=6, batch_size=5
    )


def trainer_of(tmp_path, steps, *callbacks):
    return quiet_trainer(tmp_path, steps, *callbacks, val_check_interval=2, check_val_every_n_epoch=None)


class Quadrants(nn.Module):
    """The mean of each quarter of a picture, in place of Inception."""

    name = "FD-quadrants"
    num_features = 4

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float().mean(1), 2).flatten(1)


class TrainingModes(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert all(module.training for module in pl_module.modules())


def test_it_trains_with_the_bank_and_the_callbacks(tmp_path, weights):
    module = module_of(weights)
    module.configure_model()
    before = copy.deepcopy(module.state_dict())
    fid = FID(num_samples=12, batch_size=5, feature_extractor=Quadrants())
    grid = SampleGrid(num_samples=4, columns=2)
    trainer = trainer_of(tmp_path, 4, EMA(decay=0.5), fid, grid, TrainingModes())
    trainer.fit(module, data_of(tmp_path / "bank"))

    assert {"train/loss", "train/retention", "val/loss", "fd_quadrants"} <= trainer.callback_metrics.keys()
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    assert all(not torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert [step for step, _ in fid.history] == [2, 4]
    assert Image.open(tmp_path / "samples" / "step-0000004.png").size[0] > 16
    bank = MemoryBank(tmp_path / "bank")
    assert (len(bank), bank.latent_shape) == (6, (1, 8, 8))


def test_the_bank_is_of_the_network_before_tuning(tmp_path, weights):
    module = module_of(weights)
    trainer_of(tmp_path, 2).fit(module, data_of(None))
    trainer_of(tmp_path, 2).fit(module, data_of(tmp_path / "bank"))
    untouched = module_of(weights)
    untouched.configure_model()
    untouched.eval()
    noise = noise_of(0, torch.arange(6), (1, 8, 8))
    expected = untouched.sampler(untouched.denoise, noise, None, None)
    assert torch.equal(MemoryBank(tmp_path / "bank").read(torch.arange(6))["latents"], expected)
    assert not torch.equal(module.eval().generate(torch.arange(6)), untouched.generate(torch.arange(6)))


def test_pictures_are_drawn_without_dropout_in_any_mode(weights):
    module = module_of(weights)
    module.configure_model()
    module.train()
    module.unet.conv_in.eval()
    pictures = module.generate(torch.arange(2))
    swapped = module.generate_swapped(torch.arange(2), [0.0, 1.0])
    assert module.training
    assert module.unet.mid_block.training
    assert not module.unet.conv_in.training
    assert torch.equal(pictures, module.eval().generate(torch.arange(2)))
    assert torch.equal(swapped[0], pictures)


def test_its_checkpoint_is_refused_where_a_tensor_is_missing(tmp_path, weights):
    trainer = trainer_of(tmp_path, 2)
    module = module_of(weights)
    trainer.fit(module, data_of(None))
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    again = module_of(weights)
    trainer_of(tmp_path, 2).validate(again, data_of(None), ckpt_path=tmp_path / "whole.ckpt", verbose=False)
    assert fingerprint(again.unet) == fingerprint(module.unet)

    checkpoint = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    del checkpoint["state_dict"]["unet.conv_in.weight"]
    torch.save(checkpoint, tmp_path / "part.ckpt")
    with pytest.raises(CheckpointError, match=r"part\.ckpt .*1 missing \(unet\.conv_in\.weight\)"):
        trainer_of(tmp_path, 2).validate(module_of(weights), data_of(None), ckpt_path=tmp_path / "part.ckpt")


def test_the_command_line_runs_it(tmp_path, weights):
    for number in range(8):
        path = tmp_path / "pictures" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 30 * number).save(path)
    config = {
        "model": {
            "class_path": f"{__name__}.UNetDiffTuningModule",
            "init_args": {
                "unet": weights,
                "objective": {},
                "sampler": {"num_inference_steps": 2, "guidance_scale": 1.0},
            },
        },
        "data": {
            "class_path": "lightning_difftune.MemoryBankDataModule",
            "init_args": {
                "target": {
                    "class_path": "lightning_difftune.data.ImageFolder",
                    "init_args": {"root": str(tmp_path / "pictures")},
                },
                "num_classes": 1,
                "image_size": 8,
                "channels": 1,
                "bank": str(tmp_path / "bank"),
                "bank_size": 6,
                "batch_size": 5,
            },
        },
        "trainer": {"max_steps": 2, "accelerator": "cpu", "default_root_dir": str(tmp_path), "logger": False},
    }
    Path(tmp_path / "unet.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "unet.yaml")]) == 0
    assert len(MemoryBank(tmp_path / "bank")) == 6


# -- a conditional one, of latents -------------------------------------------------------------------------------------


class Doubled(UNetDiffTuningModule):
    """A conditional family of latents: a nested condition whose words are dropped, and sizes that stay."""

    condition_dropout = 0.5

    def encode_pixels(self, pixel_values):
        return 2 * pixel_values, torch.full_like(pixel_values, 0.25)

    def target_condition(self, target):
        return {
            "text": {"words": target["class_labels"].float()},
            "size": torch.full((len(target["class_labels"]),), 8),
        }

    def null_condition(self, condition):
        return {**condition, "text": {"words": torch.full_like(condition["text"]["words"], -1)}}

    def retention_condition(self, retention):
        return {
            "text": {"words": retention["class_labels"].float()},
            "size": torch.full((len(retention["latents"]),), 4),
        }


def test_prepare_encodes_draws_drops_and_joins_once_for_all_families(weights):
    module = Doubled(weights, DiffTuningObjective(), Sampler())
    module.configure_model()
    pixels = torch.rand(400, 1, 8, 8) * 2 - 1
    target = {"pixel_values": pixels, "class_labels": torch.arange(400)}
    retention = {"latents": torch.full((3, 1, 8, 8), 9.0), "class_labels": torch.tensor([7, 8, 9])}
    x0, condition, is_retention = module.train().prepare({"target": target, "retention": retention}, Draws(0, 0))
    draws = Draws(0, 0)
    expected = 2 * pixels + 0.25 * draws.normal(400, 1, 8, 8)
    dropped = draws.uniform(400) < 0.5
    assert torch.equal(x0, torch.cat([expected, retention["latents"]]))
    words = torch.where(dropped, -1, torch.arange(400)).float()
    assert torch.equal(condition["text"]["words"], torch.cat([words, torch.tensor([7.0, 8, 9])]))
    assert condition["size"].tolist() == [8] * 400 + [4] * 3
    assert is_retention.tolist() == [False] * 400 + [True] * 3
    _, condition, _ = module.eval().prepare({"target": target}, Draws(0, 0))
    assert torch.equal(condition["text"]["words"], torch.arange(400).float()), "validation drops nothing"


def test_a_dict_is_enough_of_an_identity(weights):
    class Plain(UNetDiffTuningModule):
        def build(self):
            facts = super().build()
            return {"name": facts.name, "fingerprint": facts.fingerprint, "classes": 3}

    module = Plain(weights, DiffTuningObjective(loss=eps_mse_loss), Sampler())
    module.configure_model()
    assert module.base_identity["classes"] == 3
    assert module.source_facts.prediction_type == "epsilon"
