"""configs/loggers: the services get numbers and pictures, and the run keeps its own folder.

Stand-ins replace the services' packages, so that the tests do not need them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from config_files import CONFIGS, composition, files_of
from lightning.pytorch import loggers

from lightning_difftune.cli import main
from lightning_difftune.cli.lightning import ConfigReader
from lightning_difftune.models import DiT, export_dit


class Run:
    """A stand-in for a run of Weights & Biases."""

    def __init__(self) -> None:
        self.logged: list[dict] = []
        self.config = MagicMock()

    def log(self, content: dict) -> None:
        self.logged.append(content)

    def define_metric(self, *_, **__) -> None:
        pass


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run of three steps on a tiny model, with a sample grid and without a logger of its own."""
    monkeypatch.chdir(CONFIGS.parent)
    export_dit(DiT(8, 4, 1, hidden_size=16, depth=1, num_heads=2, num_classes=3), tmp_path / "tiny.safetensors")
    np.savez(tmp_path / "pictures.npz", images=np.zeros((6, 8, 8), np.uint8), labels=np.arange(6) % 3)
    pictures = {
        "class_path": "lightning_difftune.data.NpzImages",
        "init_args": {"path": str(tmp_path / "pictures.npz")},
    }
    model = {"model": str(tmp_path / "tiny.safetensors"), "sampler": {"num_inference_steps": 1}}
    data = {"target": pictures, "val_target": pictures, "num_classes": 3, "image_size": 8, "channels": 1}
    trainer = {
        "max_steps": 3,
        "accelerator": "cpu",
        "default_root_dir": str(tmp_path / "run"),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "lightning_difftune.callbacks.SampleGrid", "init_args": {"num_samples": 2}}],
    }
    parts = {
        "model": {"class_path": "lightning_difftune.DiTDiffTuningModule", "init_args": model},
        "data": {"class_path": "lightning_difftune.MemoryBankDataModule", "init_args": {**data, "batch_size": 2}},
        "trainer": trainer,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(parts))
    return str(tmp_path / "run.yaml")


def install(monkeypatch: pytest.MonkeyPatch, **modules: object) -> None:
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)


def run_folder(tmp_path: Path, number: int = 0) -> Path:
    folder = tmp_path / "run" / "lightning_logs" / f"version_{number}"
    assert {"config.yaml", "metrics.csv"} <= {file.name for file in folder.iterdir()}
    assert sorted(folder.glob("samples/*.png"))
    assert list(folder.glob("checkpoints/*.ckpt"))
    return folder


@pytest.mark.parametrize("file", files_of("loggers"))
def test_the_settings_are_the_loggers_own(file: str) -> None:
    composed = yaml.safe_load(ConfigReader().compose(composition(file)))
    logger = composed["trainer"]["logger"]
    assert hasattr(loggers, logger["class_path"].rpartition(".")[2])


def test_without_a_logger_there_is_a_table_and_tensorboard(config: str, tmp_path: Path) -> None:
    for number in range(2):
        assert main(["fit", "--config", config]) == 0
        folder = run_folder(tmp_path, number)
        assert "train/loss" in (folder / "metrics.csv").read_text()
        (events,) = folder.glob("events.out.tfevents.*")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(events)).Reload()
        assert "samples" in found.Tags()["images"]
        assert {"train/loss", "train/reconsolidation", "val/loss"} <= set(found.Tags()["scalars"])
    assert len(list((tmp_path / "run" / "lightning_logs").iterdir())) == 2


def test_without_tensorboard_installed_there_is_the_table(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_difftune.cli.lightning.find_spec", lambda name: None)
    assert main(["fit", "--config", config]) == 0
    assert (run_folder(tmp_path, 0) / "metrics.csv").exists()
    assert not list(run_folder(tmp_path, 0).glob("events.out.tfevents.*"))


def test_a_run_without_a_logger(config: str, tmp_path: Path) -> None:
    assert main(["fit", "--config", config, "--trainer.logger", "false"]) == 0
    assert not (tmp_path / "run" / "lightning_logs").exists()


def test_wandb_gets_numbers_and_pictures(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, wandb, lib, runs = Run(), MagicMock(), ModuleType("lib"), ModuleType("runs")
    wandb.run, wandb.init.return_value = None, run
    lib.RunDisabled, runs.Run = int, Run  # type: ignore[attr-defined]
    install(monkeypatch, wandb=wandb, wandb__sdk=MagicMock(), wandb__sdk__lib=lib, wandb__wandb_run=runs)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    assert main(["fit", "--config", config, "--config", "configs/loggers/wandb.yaml"]) == 0
    names = {name for content in run.logged for name in content}
    assert {"train/loss", "train/reconsolidation", "val/loss", "samples"} <= names
    assert wandb.init.call_args.kwargs["project"] == "difftune"
    run_folder(tmp_path)


def test_mlflow_gets_numbers_and_pictures(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("log_batch", "log_image", "get_experiment_by_name", "create_run", "get_run", "set_terminated")
    mlflow, client = MagicMock(), MagicMock(spec=asked)
    mlflow.tracking.MlflowClient.return_value = client
    mlflow.entities.Metric = lambda **values: values
    parts = {"mlflow": mlflow, "mlflow__tracking": mlflow.tracking, "mlflow__entities": mlflow.entities}
    install(monkeypatch, **parts, mlflow__tracking__context=mlflow.tracking.context, mlflow__utils=mlflow.utils)
    install(monkeypatch, mlflow__utils__mlflow_tags=mlflow.utils.mlflow_tags)
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", True)
    assert main(["fit", "--config", config, "--config", "configs/loggers/mlflow.yaml"]) == 0
    batches = [call.kwargs.get("metrics", []) for call in client.log_batch.call_args_list]
    names = {metric["key"] for batch in batches for metric in batch}
    assert {"train/loss", "train/reconsolidation", "val/loss"} <= names
    shown = client.log_image.call_args
    assert (shown.kwargs["key"], shown.kwargs["step"], shown.args[1].dtype) == ("samples", 3, np.uint8)
    run_folder(tmp_path)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
