"""The configs that made the bundled models, and the quickstart's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from config_files import composition, files_of
from tiny_data import Pictures, accept_flowers, make_flowers, make_omniglot, make_tiny_imagenet

from lightning_difftune import DiTDiffTuningModule, MemoryBankDataModule, TextToImageDiffTuningModule
from lightning_difftune.callbacks import EMA
from lightning_difftune.cli.lightning import run_lightning
from lightning_difftune.data.source_facts import labels_of

FLOWERS = "pretraining/flowers.yaml"


@pytest.fixture(scope="module", autouse=True)
def ingredients(workplace: Path) -> Iterator[None]:
    make_omniglot(workplace / "data")
    make_tiny_imagenet(workplace / "data")
    make_flowers(workplace / "data", Pictures())
    with pytest.MonkeyPatch.context() as patch:
        accept_flowers(workplace / "data", patch)
        yield


@pytest.mark.parametrize("file", files_of("pretrain"))
def test_every_file_is_instantiated_by_its_own_command(file: str) -> None:
    cli = run_lightning(composition(file), run=False)
    assert isinstance(cli.model, TextToImageDiffTuningModule if file == FLOWERS else DiTDiffTuningModule)
    assert isinstance(cli.datamodule, MemoryBankDataModule)
    assert cli.model.seed == cli.datamodule.seed == 0
    assert any(isinstance(callback, EMA) for callback in cli.trainer.callbacks)
    if file == FLOWERS:
        assert cli.datamodule.target.captioned([0])[1][0].startswith("a ")
    else:
        assert cli.model._num_classes == cli.datamodule.num_classes
        assert labels_of(cli.datamodule.target.source) is not None, "labels are checked before the run starts"
    if file.startswith("pretraining/"):
        assert not cli.model.uses_retention, "nothing is there to be retained"
