"""The transfers of the larger photo model, each on a few pictures of each class."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_files import arguments, composition, files_of
from tiny_data import make_small_photos, make_small_source

from lightning_difftune import DiTDiffTuningModule, MemoryBank
from lightning_difftune.cli.lightning import run_lightning

CLASSES = {"configs/photos32/caltech101.yaml": 101}
PHOTOS = {"configs/photos32/few.yaml": 510, "configs/photos32/caltech101.yaml": 2020}


@pytest.fixture(scope="module", autouse=True)
def photos(workplace: Path) -> None:
    (workplace / "data").mkdir()
    make_small_photos(workplace / "data", each=20)
    make_small_source(workplace)


@pytest.mark.parametrize("file", files_of("photos32"))
def test_every_file_is_instantiated_by_its_own_command(file: str) -> None:
    cli = run_lightning(composition(file), run=False)
    module, data = cli.model, cli.datamodule
    assert isinstance(module, DiTDiffTuningModule)
    module.configure_model()
    assert module.num_classes == data.num_classes == CLASSES.get(file, 102)
    assert len(data.target) == PHOTOS.get(file, 2040)
    assert module.sample_shape == (3, 32, 32)
    assert (data.batch_size, data.retention_batch_size) == (32, 6)


def test_two_steps_of_training(tmp_path: Path) -> None:
    few = f"""
        --trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.precision 32-true --trainer.accelerator cpu
        --trainer.default_root_dir {tmp_path} --trainer.enable_progress_bar false --trainer.logger false
        --data.init_args.bank_size 12 --data.init_args.bank {tmp_path / "bank"}
        --model.init_args.bank_sampler.num_inference_steps 2
    """
    cli = run_lightning([*arguments("configs/photos32/few.yaml"), *few.split()])
    assert cli.trainer.global_step == 2
    assert all(value.isfinite() for value in cli.trainer.callback_metrics.values())
    assert len(MemoryBank(tmp_path / "bank")) == 12
