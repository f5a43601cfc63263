"""Weight files: finding them in a folder, and reading them without running code."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_difftune.errors import CheckpointError

STATE_KEYS = ("ema", "ema_state_dict", "model", "module", "state_dict")  # averages first
DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # diffusers' names
TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")
VARIANTS = ("", "bf16", "fp16")  # full precision first

# -- which files -----------------------------------------------------------------------------------------------------


class WeightFiles(NamedTuple):
    """The files of one model's weights."""

    tensors: list[str]  # the files that hold tensors, in order
    index_name: str | None = None  # file that maps tensors to shards, if there are shards
    variant: str | None = None  # such as "fp16"; None for full precision

    @property
    def names(self) -> list[str]:
        """All required files."""
        return self.tensors + ([self.index_name] if self.index_name is not None else [])

    @property
    def is_safe(self) -> bool:
        """Whether they are safetensors."""
        return self.tensors[0].endswith(".safetensors")


def find_weights(names: Collection[str]) -> WeightFiles | None:
    """The weights among the names of a folder's files; ``None`` if there are none or shards are missing.

    Full precision is preferred to bfloat16 and float16, safetensors to pickles.

    Example:
        >>> find_weights(["config.json", "diffusion_pytorch_model.fp16.safetensors"])
        WeightFiles(tensors=['diffusion_pytorch_model.fp16.safetensors'], index_name=None, variant='fp16')
        >>> shards = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
        >>> find_weights([*shards, "model.safetensors.index.json"]).tensors == shards
        True
        >>> find_weights([shards[0], "model.safetensors.index.json"])
    """
    return next(_candidates(names), None)


def missing_shards(names: Collection[str]) -> list[str]:
    """Missing shards of the first model that a folder has only some shards of.

    Example:
        >>> missing_shards(["model-00001-of-00002.safetensors"])
        ['model-00002-of-00002.safetensors']
    """
    for name in sorted(names):
        if match := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})(.+)", name):
            start, _, total, end = match.groups()
            return [file for i in range(int(total)) if (file := f"{start}-{i + 1:05}-of-{total}{end}") not in names]
    return []


def _candidates(names: Collection[str]) -> Iterator[WeightFiles]:
    for variant in VARIANTS:
        dotted = f".{variant}" if variant else ""
        for name in DIFFUSERS + TRANSFORMERS:
            stem, _, ending = name.rpartition(".")
            if f"{stem}{dotted}.{ending}" in names:
                yield WeightFiles([f"{stem}{dotted}.{ending}"], None, variant or None)
            index = f"{stem}.{ending}.index{dotted}.json"
            if index not in names:
                continue
            # Older releases of diffusers put the variant after the number.
            for pattern in (rf"{stem}{dotted}-\d+-of-(\d+)\.{ending}", rf"{stem}-\d+-of-(\d+){dotted}\.{ending}"):
                shards = {found: int(m[1]) for found in sorted(names) if (m := re.fullmatch(pattern, found))}
                if shards and len(shards) == min(shards.values()):
                    yield WeightFiles(list(shards), index, variant or None)


# -- reading them ----------------------------------------------------------------------------------------------------


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, found {type(content).__name__}.")
    return content


def check_records(file: Path) -> None:
    """Compare the records of a ``torch.save`` file with their CRC-32, which ``torch.load`` does not."""
    try:
        if not zipfile.is_zipfile(file):  # older than PyTorch 1.6, or truncated, which loading detects
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
    """Map a ``torch.save`` file into memory => its EMA weights if it has any, else its weights.

    Trainers put them under ``"ema"``, ``"model"``, ``"state_dict"`` or ``"module"``, nested, or at the top level.
    """
    try:
        with file.open("rb") as opened:
            zipped = opened.read(2) == b"PK"  # files older than PyTorch 1.6 are not, and cannot be mapped
        check_records(file)
        # The authors' training script also saves its arguments.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise CheckpointError(f"{file} is not a readable PyTorch file. Download it again.") from error
        found = str(error).partition("GLOBAL ")[2].split(maxsplit=1)[0]
        raise CheckpointError(
            f"{file} holds more than tensors ({found}), and opening that could run code. If you trust it, save its "
            "state dict alone: torch.save(torch.load(file, weights_only=False)['model'], new_file)."
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # torch raises a dozen types of errors on damaged bytes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{file} is truncated or not a PyTorch file ({reason}). Download it again.") from error
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
