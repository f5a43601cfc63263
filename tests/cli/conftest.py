"""A finished run of a tiny DiT, for the commands that start from one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from tiny import tiny_config, tiny_weights, write_pictures

from lightning_difftune.cli import main

CLASSES = ("oxeye_daisy", "rose", "sunflower")


class TinyRun(NamedTuple):
    config: Path
    base: Path
    folder: Path
    checkpoint: Path


def write_project(folder: Path) -> Path:
    """Write the weights, the pictures and the config."""
    tiny_weights(folder)
    write_pictures(folder / "pictures", 9, CLASSES)
    callbacks = [
        {"class_path": "lightning_difftune.callbacks.EMA", "init_args": {"decay": 0.5}},
        {"class_path": "lightning_difftune.callbacks.SampleGrid", "init_args": {"num_samples": 6}},
    ]
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}}
    config = tiny_config(
        model={"optimizer": optimizer, "sampler": {"num_inference_steps": 4}},
        data={"batch_size": 4},
        trainer={"max_steps": 3, "callbacks": callbacks},
        folder=folder,
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
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
