"""The text-to-image configs, with and without Diff-Tuning, on a small captioned folder and a tiny pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from config_files import arguments, composition, files_of, smaller_callbacks
from PIL import Image
from tiny_data import make_captioned_folder
from torch import nn

from lightning_difftune import MemoryBank, TextToImageDiffTuningModule
from lightning_difftune.callbacks import SampleGrid
from lightning_difftune.cli.lightning import run_lightning
from lightning_difftune.diffusion import GaussianDiffusion
from lightning_difftune.losses import eps_mse_loss
from lightning_difftune.tuners import LoRA

BASE = "configs/text_to_image/base.yaml"
WHOLE = "configs/text_to_image/whole_unet.yaml"
RUNS = {
    "lora": ("configs/text_to_image/folder.yaml", []),
    "plain-lora": (BASE, ["--config", "configs/presets/full.yaml"]),
    "whole": (WHOLE, []),
}
TINY = ["--model.init_args.model=pipeline", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module", autouse=True)
def ingredients(workplace: Path, pipeline_folder: str) -> None:
    make_captioned_folder(workplace / "data")
    (workplace / "pipeline").symlink_to(pipeline_folder)


@pytest.mark.parametrize("file", files_of("text_to_image"))
def test_every_file_is_instantiated_by_its_own_command(file: str) -> None:
    cli = run_lightning([*composition(file), *TINY], run=False)
    data, module = cli.datamodule, cli.model
    assert isinstance(module, TextToImageDiffTuningModule)
    assert module.image_size == data.target.image_size == 512
    assert (data.batch_size, data.retention_batch_size) == (4, 1)
    assert data.bank_size == cli.trainer.max_steps * data.retention_batch_size, "each sample of the bank is read once"
    assert module.bank_prompts == ("",)
    assert (module.sampler.guidance_scale, module.default_bank_sampler().guidance_scale) == (7.5, 1.0)
    assert cli.trainer.max_steps % cli.trainer.val_check_interval == 0, "the last step is validated"
    train, held_out = (set(part.source.indices) for part in (data.target, data.val_target))
    assert not train & held_out
    assert len(train | held_out) == 20
    (grid,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, SampleGrid)]
    assert grid.num_samples % len(module.prompts) == 0, "as many samples of each prompt"
    optimizer = module.optimizer([nn.Parameter(torch.zeros(1))])
    assert (type(optimizer), optimizer.defaults["weight_decay"]) == (torch.optim.AdamW, 0)
    if file == WHOLE:
        assert (module.tuner, optimizer.defaults["lr"]) == (None, 1e-5)
    else:
        assert isinstance(module.tuner, LoRA)
        assert (module.tuner.rank, optimizer.defaults["lr"]) == (16, 1e-4)


@pytest.mark.parametrize("run", RUNS)
def test_two_steps_of_training(run: str, tmp_path: Path) -> None:
    file, overlay = RUNS[run]
    smaller = smaller_callbacks(
        BASE, tmp_path, SampleGrid={"num_samples": 4}, ModelCheckpoint={"every_n_train_steps": 2}
    )
    few = f"""
        --config {smaller} --trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.num_sanity_val_steps 0
        --trainer.default_root_dir {tmp_path} --trainer.log_every_n_steps 1 --trainer.enable_progress_bar false
        --data.init_args.image_size 32 --data.init_args.num_workers 0
        --data.init_args.bank_size 4 --data.init_args.build_batch_size 4
        --model.init_args.sampler.num_inference_steps 2 --model.init_args.bank_sampler.num_inference_steps 2
    """
    if not overlay:
        few += f"--data.init_args.bank {tmp_path / 'bank'}"
    cli = run_lightning([*arguments(file), *overlay, *TINY, *few.split()])

    assert cli.trainer.global_step == 2
    logged = cli.trainer.callback_metrics
    assert {"train/loss", "val/loss"} <= logged.keys()
    assert ("train/retention" in logged) == (not overlay)
    assert all(value.isfinite() for value in logged.values())
    if not overlay:
        assert len(MemoryBank(tmp_path / "bank")) == 4
    objective = cli.model.objective
    assert objective.loss is eps_mse_loss, "an overlay keeps what it does not name"
    betas = GaussianDiffusion(1000, 0.00085, 0.012, "scaled_linear").sqrt_alphas_cumprod
    assert torch.equal(objective.diffusion.sqrt_alphas_cumprod.cpu(), betas)

    (folder,) = (tmp_path / "lightning_logs").iterdir()
    with Image.open(folder / "samples/step-0000002.png") as grid:
        assert grid.size == (130 + 4 * 98 + 2, 98 + 2)
    (checkpoint,) = folder.glob("checkpoints/epoch*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    if run == "whole":
        assert all(name.startswith("unet.") for name in state)
        assert "unet.conv_in.weight" in state
    else:
        assert all("lora_" in name for name in state), "what is trained, alone"
        assert any(".to_out.0." in name for name in state)
        assert any("lora_B" in name and tensor.any() for name, tensor in state.items()), "it has learned something"
