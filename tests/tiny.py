"""Small models, pictures and trainers that many tests start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn

from lightning_difftune.data import ArrayImages
from lightning_difftune.models import DiT, export_dit


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


def noise_pixels(count: int, *shape: int) -> np.ndarray:
    """Pictures (count, *shape) uint8 of noise, the same ones each time."""
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def tiny_pictures(count: int = 12, classes: int = 3, shape: tuple[int, ...] = (8, 8)) -> ArrayImages:
    """Pictures of noise whose classes take turns."""
    return ArrayImages(noise_pixels(count, *shape), np.arange(count) % classes)


def write_pictures(root: Path, count: int = 12, names: tuple[str, ...] = ("ant", "bee", "cat"), size: int = 8) -> Path:
    """A folder of PNG files of noise, in one folder per class; the classes take turns."""
    for number, pixels in enumerate(noise_pixels(count, size, size)):
        path = root / names[number % len(names)] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


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
