"""Small models, pictures, trainers and jobs of several processes that many tests start from."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor, nn

from lightning_difftune.data import ArrayImages
from lightning_difftune.diffusion import ForwardProcess
from lightning_difftune.models import DiT, export_dit

Settings = dict[str, Any]


def randomised(network: nn.Module, std: float = 0.2) -> Any:
    """The network with random values in all that is trained: the published start is zero in places."""
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return network


def tiny_dit(seed: int = 0, **sizes: Any) -> DiT:
    """A DiT of one block for pictures of one channel and 8 px and six classes, with random weights."""
    defaults = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
    torch.manual_seed(seed)
    return randomised(DiT(**{**defaults, "num_classes": 6, **sizes}))


def tiny_weights(folder: Path, seed: int = 0, **sizes: Any) -> Path:
    """The file of a :func:`tiny_dit`, ``tiny.safetensors`` in a folder."""
    return export_dit(tiny_dit(seed, **sizes), folder / "tiny.safetensors")


def tiny_autoencoder(*widths: int, **settings: Any) -> Any:
    """Stable Diffusion's autoencoder with a level of each width, and with random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        **{"layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4, **settings},
    )


def implied_noise(process: ForwardProcess, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """The noise that x_t and a clean sample (B, ...) imply."""
    a, b = process.coefficients(t, x_t)
    return (x_t - a * x0) / b


def noise_pixels(count: int, *shape: int) -> np.ndarray:
    """Pictures (count, *shape) uint8 of noise, the same ones each time."""
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def tiny_pictures(count: int = 12, classes: int = 3, shape: tuple[int, ...] = (8, 8)) -> ArrayImages:
    """Pictures of noise whose classes take turns."""
    return ArrayImages(noise_pixels(count, *shape), np.arange(count) % classes)


def write_pictures(
    root: Path, count: int = 12, names: Sequence[str] = ("ant", "bee", "cat"), shape: tuple[int, int] = (8, 8)
) -> Path:
    """A folder of PNG files of noise, in one folder per class; the classes take turns."""
    for number, pixels in enumerate(noise_pixels(count, *shape)):
        path = root / names[number % len(names)] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def tiny_config(model: Settings, data: Settings, trainer: Settings, folder: Path = Path()) -> Settings:
    """A config that tunes ``tiny.safetensors`` on ``pictures``, three classes of 8 px; ``folder`` holds both.

    Args:
        model: Further arguments of the module.
        data: Of the data, which hold out the same pictures.
        trainer: Of a trainer on one CPU that shows nothing.
        folder: Where the files are; by default the working directory.
    """
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder / "run")}}
    pictures = {"class_path": "lightning_difftune.data.ImageFolder", "init_args": {"root": str(folder / "pictures")}}
    sizes = {"num_classes": 3, "image_size": 8, "channels": 1}
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
    return {
        "model": {
            "class_path": "lightning_difftune.DiTDiffTuningModule",
            "init_args": {"model": str(folder / "tiny.safetensors"), **model},
        },
        "data": {
            "class_path": "lightning_difftune.MemoryBankDataModule",
            "init_args": {"target": pictures, "val_target": pictures, **sizes, **data},
        },
        "trainer": {**quiet, "logger": logger, **trainer},
    }


def quiet_trainer(folder: Path, steps: int, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """A trainer of one CPU process that writes and prints nothing but what ``callbacks`` and ``settings`` ask for."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return L.Trainer(max_steps=steps, callbacks=list(callbacks), **{**quiet, **settings})


def start(script: str, world_size: int, *arguments: str | Path) -> list[subprocess.Popen[str]]:
    """A test file, as a job of several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join(sys.path)
    return [
        subprocess.Popen(
            [sys.executable, script, *map(str, arguments)],
            env={**os.environ, **shared, "LOCAL_RANK": str(rank), "RANK": str(rank), "NODE_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> None:
    """Wait for a job."""
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
