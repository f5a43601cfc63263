"""Reading the files that checkpoints consist of: tensors by name, never code."""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_difftune.errors import CheckpointError

STATE_KEYS = ("ema", "ema_state_dict", "model", "module", "state_dict")  # averages first


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is no readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, found {type(content).__name__}.")
    return content


def check_records(file: Path) -> None:
    """Compare the records of a ``torch.save`` file with their CRC-32, which ``torch.load`` does not.

    Raises:
        CheckpointError: If one was altered.
    """
    try:
        if not zipfile.is_zipfile(file):  # older than PyTorch 1.6, or truncated, which whoever loads it will find out
            return
        with zipfile.ZipFile(file) as archive:
            altered = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Restore it, or take another one.") from error
    if altered is not None:
        raise CheckpointError(
            f"{file} was altered: its record {altered} does not match its checksum. Restore it, or take another one."
        )


def read_torch(file: Path) -> dict[str, Tensor]:
    """Map a file of ``torch.save`` into memory => its EMA weights if it has them, else its weights.

    Trainers put them under ``"ema"``, ``"model"``, ``"state_dict"`` or ``"module"``, one in the other, or at the top.
    """
    try:
        with file.open("rb") as opened:
            zipped = opened.read(2) == b"PK"  # files older than PyTorch 1.6 are not, and cannot be mapped
        check_records(file)
        # The authors' training script saves its arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise CheckpointError(f"{file} is no readable PyTorch file. Download it again.") from error
        found = str(error).partition("GLOBAL ")[2].split(maxsplit=1)[0]
        raise CheckpointError(
            f"{file} holds more than tensors ({found}), and opening that could run code. If you trust it, save its "
            "state dict alone: torch.save(torch.load(file, weights_only=False)['model'], new_file)."
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # torch raises a dozen types on damaged bytes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{file} is truncated or no PyTorch file ({reason}). Download it again.") from error
    if isinstance(content, dict) and "base_identity" in content:
        raise CheckpointError(
            f"{file} is a Lightning checkpoint of this package, which leaves the frozen weights out. Resume from it "
            "with ckpt_path, or open the module that wrote it with load_from_checkpoint and export its model with "
            "export_dit."
        )
    for key in STATE_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        found = f"the keys {list(content)[:5]}" if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{file} holds no state dict, nor one under {', '.join(map(repr, STATE_KEYS))}; found {found}."
        )
    return dict(content)
