"""The overlays for many GPUs compose with every DiT config, and create the named strategies."""

from __future__ import annotations

import lightning as L
import pytest
import yaml
from config_files import composition, files_of
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy

from lightning_difftune.callbacks import EMA, FID, SampleGrid
from lightning_difftune.cli.lightning import ConfigReader
from lightning_difftune.models.dit import DiTBlock


@pytest.fixture(scope="module")
def reader():
    return ConfigReader()


@pytest.mark.parametrize("file", files_of("strategy"))
@pytest.mark.parametrize(
    "more", [[], ["--config", "configs/tuners/lora.yaml"], ["--config", "configs/presets/paper.yaml"]]
)
def test_every_file_composes(reader, file, more):
    settings = yaml.safe_load(reader.compose([*composition(file), *more]))
    trainer, data = settings["trainer"], settings["data"]["init_args"]
    assert (trainer["devices"], trainer["precision"]) == (8, "bf16-mixed")
    retained = int(data["retention_share"] * data["batch_size"])
    assert retained >= 1, "every process has samples of the bank"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=str | Strategy)
    strategy = parser.instantiate_classes(parser.parse_object({"strategy": trainer["strategy"]})).strategy
    names = [callback["class_path"] for callback in trainer["callbacks"]]
    if "fsdp" in file:
        assert isinstance(strategy, FSDPStrategy)
        assert DiTBlock in strategy.kwargs["auto_wrap_policy"]._module_classes
        assert not any(name.endswith(kind.__name__) for name in names for kind in (EMA, FID, SampleGrid))
    else:
        made = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, barebones=False).strategy
        assert isinstance(made, DDPStrategy)
        searches = made._ddp_kwargs.get("find_unused_parameters", False)
        assert searches
