"""The transfers of the bundled photo model, each on one picture per class, with and without Diff-Tuning."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_files import arguments, composition, files_of
from tiny_data import make_small_photos

from lightning_difftune import DiTDiffTuningModule, MemoryBank
from lightning_difftune.cli.lightning import run_lightning

TARGETS = {"configs/photos/flowers.yaml": 102, "configs/photos/caltech101.yaml": 101}


@pytest.fixture(scope="module", autouse=True)
def photos(workplace: Path) -> None:
    (workplace / "data").mkdir()
    make_small_photos(workplace / "data")


@pytest.mark.parametrize("file", files_of("photos"))
def test_every_file_is_instantiated_by_its_own_command(file: str) -> None:
    cli = run_lightning(composition(file), run=False)
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    assert isinstance(module, DiTDiffTuningModule)
    module.configure_model()
    assert module.num_classes == data.num_classes == TARGETS.get(file, 102)
    assert module.sample_shape == module.autoencoder.latent_shape(data.target.image_size) == (4, 16, 16)
    assert module.sampler.spec() == module.bank_sampler.spec()
    assert (data.batch_size, data.retention_batch_size) == (64, 12)
    assert trainer.max_steps == trainer.val_check_interval == 2500, "one validation, at the end"
    assert module.lr_scheduler.keywords["total_steps"] == module.lr_scheduler.keywords["max_lr"] == -1, "as the run"


@pytest.mark.parametrize("overlay", ["official", "full"])
def test_two_steps_of_training(overlay: str, tmp_path: Path) -> None:
    few = f"""
        --config configs/presets/{overlay}.yaml --trainer.max_steps 2 --trainer.val_check_interval 2
        --trainer.default_root_dir {tmp_path} --trainer.enable_progress_bar false --trainer.accelerator cpu
        --data.init_args.bank_size 12 --data.init_args.latent_cache {tmp_path / "latents"}
        --model.init_args.sampler.num_inference_steps 2 --model.init_args.bank_sampler.num_inference_steps 2
    """
    bank = [] if overlay == "full" else ["--data.init_args.bank", str(tmp_path / "bank")]
    cli = run_lightning([*arguments("configs/photos/flowers.yaml"), *few.split(), *bank])
    assert cli.trainer.global_step == 2
    assert all(value.isfinite() for value in cli.trainer.callback_metrics.values())
    assert len(list(tmp_path.rglob("step-*.png"))) == 2, "of the base model, and at the end"
    if overlay == "full":
        assert "train/retention" not in cli.trainer.callback_metrics
    else:
        assert len(MemoryBank(tmp_path / "bank")) == 12
