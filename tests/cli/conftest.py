"""A finished run of a tiny DiT, for the commands that start from one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import tiny_weights

from lightning_difftune.cli import main

CLASSES = ("oxeye_daisy", "rose", "sunflower")


class TinyRun(NamedTuple):
    config: Path
    base: Path
    folder: Path
    checkpoint: Path


def tiny_config(folder: Path) -> dict:
    """A config of a run in a folder that holds the weights and the pictures."""
    pictures = {"class_path": "lightning_difftune.data.ImageFolder", "init_args": {"root": str(folder / "pictures")}}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder / "run")}}
    return {
        "model": {
            "class_path": "lightning_difftune.DiTDiffTuningModule",
            "init_args": {
                "model": str(folder / "tiny.safetensors"),
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
                "sampler": {"num_inference_steps": 4},
            },
        },
        "data": {
            "class_path": "lightning_difftune.MemoryBankDataModule",
            "init_args": {
                "target": pictures,
                "val_target": pictures,
                "num_classes": 3,
                "image_size": 8,
                "channels": 1,
                "batch_size": 4,
            },
        },
        "trainer": {
            "max_steps": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": logger,
            "callbacks": [
                {"class_path": "lightning_difftune.callbacks.EMA", "init_args": {"decay": 0.5}},
                {"class_path": "lightning_difftune.callbacks.SampleGrid", "init_args": {"num_samples": 6}},
            ],
        },
    }


def write_project(folder: Path) -> Path:
    """Write the weights, the pictures and the config."""
    tiny_weights(folder)
    rng = np.random.default_rng(0)
    for number in range(9):
        path = folder / "pictures" / CLASSES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    (folder / "run.yaml").write_text(yaml.safe_dump(tiny_config(folder)))
    return folder / "run.yaml"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A DiT of 6 classes, tuned to 3 named ones, with averages."""
    folder = tmp_path_factory.mktemp("project")
    config = write_project(folder)
    assert main(["fit", "--config", str(config)]) == 0
    version = folder / "run/lightning_logs/version_0"
    (checkpoint,) = version.glob("checkpoints/*.ckpt")
    return TinyRun(config, folder / "tiny.safetensors", version, checkpoint)
