"""A short run to report."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_difftune.cli import main
from lightning_difftune.models import DiT, export_dit


@pytest.fixture(scope="package")
def finished(tmp_path_factory):
    """The folder of a run of eight steps on 2 x 12 pictures, with three grids; its data and weights are next to it."""
    root = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    tiny = DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=6)
    export_dit(tiny, root / "tiny.safetensors")
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (15, 8, 8), dtype=np.uint8)):
        path = root / "pictures" / ("ant" if number < 12 else "b<ee>") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    folder = {
        "class_path": "lightning_difftune.data.ImageFolder",
        "init_args": {"root": str(root / "pictures")},
    }
    config = {
        "model": {
            "class_path": "lightning_difftune.DiTDiffTuningModule",
            "init_args": {"model": str(root / "tiny.safetensors"), "sampler": {"num_inference_steps": 2}},
        },
        "data": {
            "class_path": "lightning_difftune.MemoryBankDataModule",
            "init_args": {
                "target": folder,
                "val_target": folder,
                "num_classes": 2,
                "image_size": 8,
                "channels": 1,
                "bank": str(root / "bank"),
                "bank_size": 10,
                "batch_size": 5,
            },
        },
        "trainer": {
            "max_steps": 8,
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": str(root / "run"),
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "val_check_interval": 1,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(root / "run")},
            },
            "callbacks": [
                {
                    "class_path": "lightning_difftune.callbacks.SampleGrid",
                    "init_args": {"num_samples": 4, "every_n_steps": 3},
                },
                {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
            ],
        },
    }
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(root / "run.yaml")]) == 0
    return root / "run" / "lightning_logs" / "version_0"
