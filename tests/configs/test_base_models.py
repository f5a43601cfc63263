"""The configs of SDXL, FLUX.1 and Stable Diffusion 3.5 on a small captioned folder and tiny pipelines."""

from __future__ import annotations

from pathlib import Path

import pipelines
import pytest
import torch
from config_files import arguments, composition, files_of, smaller_callbacks
from tiny_data import make_captioned_folder

from lightning_difftune import MemoryBank, TextToImageDiffTuningModule
from lightning_difftune.cli.lightning import run_lightning
from lightning_difftune.tuners import LoRA

FILES = files_of("base_models")
WHOLE = "configs/text_to_image/whole_unet.yaml"


@pytest.fixture(scope="module", autouse=True)
def ingredients(workplace: Path) -> None:
    make_captioned_folder(workplace / "data")
    for family in pipelines.FAMILIES:
        getattr(pipelines, family)(workplace / family)


def tiny(file: str) -> list[str]:
    return [f"--model.init_args.model={Path(file).parent.name}", "--trainer.accelerator=cpu"]


@pytest.mark.parametrize("file", FILES)
def test_every_file_is_instantiated_by_its_own_command(file: str) -> None:
    cli = run_lightning([*composition(file), *tiny(file)], run=False)
    data, module = cli.datamodule, cli.model
    assert isinstance(module, TextToImageDiffTuningModule)
    assert module.image_size == data.target.image_size == 1024
    assert data.bank_size == cli.trainer.max_steps * data.retention_batch_size, "each sample of the bank is read once"
    assert cli.trainer.max_steps % cli.trainer.val_check_interval == 0, "the last step is validated"
    assert isinstance(module.tuner, LoRA)
    assert module.frozen_dtype == torch.bfloat16
    assert module.default_bank_sampler().guidance_scale == 1
    whole = run_lightning([*composition(file), "--config", WHOLE, *tiny(file)], run=False).model
    assert (whole.tuner, whole.bank_prompts) == (None, module.bank_prompts)


@pytest.mark.parametrize("overlays", [[], ["--config", WHOLE]], ids=["lora", "whole"])
@pytest.mark.parametrize("file", FILES)
def test_two_steps_of_training(file: str, overlays: list[str], tmp_path: Path) -> None:
    smaller = smaller_callbacks(
        file, tmp_path, SampleGrid={"num_samples": 4}, ModelCheckpoint={"every_n_train_steps": 2}
    )
    few = f"""
        --config {smaller} --trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.num_sanity_val_steps 0
        --trainer.default_root_dir {tmp_path} --trainer.log_every_n_steps 1 --trainer.enable_progress_bar false
        --data.init_args.image_size 32 --data.init_args.num_workers 0 --model.init_args.image_size 32
        --data.init_args.bank_size 4 --data.init_args.build_batch_size 4 --data.init_args.bank {tmp_path / "bank"}
        --data.init_args.latent_cache {tmp_path / "cache"}
        --model.init_args.sampler.num_inference_steps 2
    """
    if not overlays:
        few += "--model.init_args.tuner.init_args.rank 4"  # the tiny layers are 8 wide
    cli = run_lightning([*arguments(file), *overlays, *tiny(file), *few.split()])
    assert cli.trainer.global_step == 2
    logged = cli.trainer.callback_metrics
    assert {"train/loss", "train/retention", "val/loss"} <= logged.keys()
    assert all(value.isfinite() for value in logged.values())
    assert len(MemoryBank(tmp_path / "bank")) == 4
    assert list(tmp_path.rglob("samples/step-0000002.png"))
