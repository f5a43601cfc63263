"""Reading a finished folder of shards."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_difftune.data.shards.format import (
    BUILDING,
    DTYPES,
    MANIFEST,
    Manifest,
    ShardHeader,
    misfit,
    rebuild_shard,
    shard_name,
    shard_tag,
)
from lightning_difftune.errors import StoreError
from lightning_difftune.files import file_digest


class ShardReader:
    """A finished folder of shards, read-only and memory-mapped.

    Opening it checks the manifest and each shard's size and header; :meth:`verify` reads every byte. It can be
    pickled: a worker process maps the shards itself on first use.

    Args:
        path: The folder.
        kind: The expected kind.

    Attributes:
        plan: The plan of the build.
        spec: What determined the contents, as plain JSON values.
        shapes: The shape of one sample of each tensor.
        dtypes: The dtype of each tensor.

    Raises:
        StoreError: The folder is missing, unfinished, of another kind, or damaged.
    """

    def __init__(self, path: str | Path, *, kind: str) -> None:
        self.path = Path(path)
        self._maps: dict[int, dict[str, NDArray[Any]]] = {}
        manifest = self.path / MANIFEST
        if not manifest.exists():
            state = "is unfinished" if (self.path / BUILDING).exists() else f"holds no {kind}"
            raise StoreError(f"{self.path} {state}: there is no {manifest}. Build it; finished shards are kept.")
        self._manifest = Manifest.load(manifest)
        self.plan, layouts = self._manifest.plan, self._manifest.tensors
        self.spec = self.plan.spec
        self.shapes = {name: layout.shape for name, layout in layouts.items()}
        self.dtypes = {name: DTYPES[layout.dtype] for name, layout in layouts.items()}
        if self.plan.kind != kind:
            raise StoreError(f"{manifest} is that of a {self.plan.kind}, not of a {kind}. Name another folder.")
        for shard in range(self.plan.num_shards):
            self._check(shard)

    def _check(self, shard: int) -> None:
        path = self.path / shard_name(shard)
        expected = self._manifest.shards[shard].bytes
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise StoreError(f"{path} is missing. {rebuild_shard(path)}")
        if found != expected:
            raise StoreError(f"{path} has {found} bytes, but the manifest says {expected}. {rebuild_shard(path)}")
        header = ShardHeader.load(path)
        if header.tag != shard_tag(self.plan.digest, shard) or header.num_samples < len(self.plan.shard_range(shard)):
            raise StoreError(
                f"{path} does not belong to {self.path / MANIFEST}: one of them is another build's or was altered. "
                "Restore it, or move both away and build again."
            )
        if header.tensors != self._manifest.tensors:
            raise StoreError(f"{misfit(path, header.tensors, self._manifest.tensors)} {rebuild_shard(path)}")

    def __len__(self) -> int:
        return self.plan.num_samples

    def rows(self, indices: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Copy samples out of the shards.

        Args:
            indices: (B,) integers in [0, len(self)), in any order and with repeats.
            names: Names of the tensors to read; ``None`` is all of them.

        Returns:
            Each tensor as (B, ...), in the order of ``indices``.

        Raises:
            IndexError: An index is outside the folder.
            StoreError: A shard was damaged after it was opened.
        """
        where = indices.numpy()
        if where.size and not 0 <= where.min() <= where.max() < len(self):
            raise IndexError(
                f"{self.path} holds samples 0 to {len(self) - 1}; asked for {where.min()} to {where.max()}."
            )
        shards, rows = np.divmod(where, self.plan.shard_size)
        order = np.argsort(shards, kind="stable")
        cuts = np.flatnonzero(np.diff(shards[order])) + 1
        kept = self.dtypes if names is None else {name: self.dtypes[name] for name in names}
        result = {name: torch.empty((len(where), *self.shapes[name]), dtype=d) for name, d in kept.items()}
        views = {name: tensor.numpy() for name, tensor in result.items()}
        for start, stop in pairwise([0, *cuts.tolist(), len(where)] if where.size else ()):
            # A plain index copies a single row several times faster than an array of length one.
            target = order[start:stop] if stop - start > 1 else order[start]
            source = self._map(int(shards[order[start]]))
            for name, view in views.items():
                view[target] = source[name][rows[target]]
        return result

    def verify(self) -> None:
        """Read every byte and compare the hashes; a :class:`StoreError` if a shard was altered."""
        for shard, record in enumerate(self._manifest.shards):
            path = self.path / shard_name(shard)
            self._check(shard)
            if (found := file_digest(path)) != record.sha256:
                raise StoreError(
                    f"{path} was altered: its sha256 is {found[:12]}..., but the manifest says {record.sha256[:12]}... "
                    f"{rebuild_shard(path)}"
                )

    def _map(self, shard: int) -> dict[str, NDArray[Any]]:
        if shard not in self._maps:
            path = self.path / shard_name(shard)
            try:
                self._maps[shard] = {name: tensor.numpy() for name, tensor in load_file(path).items()}
            except (OSError, SafetensorError) as error:
                raise StoreError(f"{path} cannot be read ({error}). {rebuild_shard(path)}") from error
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}
