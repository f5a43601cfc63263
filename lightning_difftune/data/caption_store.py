"""Stores text embeddings of captions, each distinct caption once, in a folder of a latent cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from lightning_difftune.errors import CheckpointError, StoreError
from lightning_difftune.files import atomic_path, read_safetensors, text_digest, write_safetensors

_RECENT = 128  # captions that a process keeps open
_SMALL = 64  # numbers per row; smaller columns, such as sizes, keep their precision


class CaptionStore:
    """One file per distinct caption, named by its key; embeddings in bfloat16, the type of text encoders.

    FLUX.1's text takes 4 MB per caption in 16 bits, and captions repeat: for classes, mirror images, epochs. The folder
    is created with the first one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._recent = lru_cache(_RECENT)(self._open)

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        """Pickle without the open captions, for data loader workers."""
        return type(self), (self.folder,)

    @staticmethod
    def keys(captions: Sequence[str]) -> Tensor:
        """(B,) int64: 63 bits of each caption's SHA-256."""
        return torch.tensor([int(text_digest(caption)[:16], 16) >> 1 for caption in captions])

    def add(self, keys: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Store the rows of B captions whose keys (B,) are new."""
        for row, key in enumerate(keys.tolist()):
            file = self._file(key)
            if file.exists():
                continue
            tensors = {name: column[row].detach().cpu() for name, column in columns.items()}
            stored = {n: (x if x.numel() <= _SMALL else x.bfloat16()).contiguous() for n, x in tensors.items()}
            try:
                with atomic_path(file, replace=False) as draft:
                    write_safetensors(stored, draft, {})
            except (OSError, SafetensorError) as error:
                raise StoreError(f"{file} cannot be written ({error}). Is the disk full?") from error

    def read(self, keys: Tensor) -> dict[str, Tensor]:
        """Rows of the captions with the keys (B,), float32."""
        rows = [self._recent(key) for key in keys.tolist()]
        return {name: torch.stack([row[name] for row in rows]).float() for name in rows[0]} if rows else {}

    def _open(self, key: int) -> dict[str, Tensor]:
        try:
            return read_safetensors(self._file(key))[0]
        except CheckpointError as error:
            folder = self.folder.parent
            raise StoreError(f"A caption of {folder} cannot be read: {error} Delete {folder} and run again.") from error

    def _file(self, key: int) -> Path:
        return self.folder / f"{key:016x}.safetensors"
