"""A folder of shards under construction: its plan, its lock, and its finished shards."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_difftune.data.shards.format import (
    BUILDING,
    MANIFEST,
    BuildPlan,
    Manifest,
    ShardHeader,
    dump_json,
    shard_name,
    shard_tag,
)
from lightning_difftune.errors import StoreError
from lightning_difftune.files import atomic_write, discard_temporaries
from lightning_difftune.locks import FolderLock

_PREVIOUS = "previous-"


class BuildFolder:
    """A folder in which a plan is built, as for :class:`ShardWriter`; a folder of another build is not changed.

    Raises:
        StoreError: The folder belongs to another build, is unreadable, or cannot be written to.
    """

    def __init__(self, path: Path, plan: BuildPlan, replaces: Callable[[BuildPlan], bool] | None) -> None:
        self.path, self.plan = path, plan
        self._replaces = replaces
        self._lock = FolderLock(path)
        self._open()

    @property
    def complete(self) -> bool:
        """Whether the build is finished."""
        found = self._found()
        if found is None or found[1].name != MANIFEST:
            return False
        return found[0].digest == self.plan.digest and found[0].num_samples >= self.plan.num_samples

    @property
    def previous(self) -> list[Path]:
        """Folders with shards of the builds that this one replaces; deleted when it is finished."""
        return sorted(self.path.glob(f"{_PREVIOUS}*"))

    def lock(self, waits: bool = True) -> None:
        """Prevent other jobs from building here until :meth:`unlock`; for one process of this job.

        Another job that builds here is waited for only if ``waits``: other processes of this one would meanwhile wait
        at a barrier, which times out after half an hour.
        """
        if self.complete:
            return
        self._lock.acquire(waits)
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise

    def unlock(self) -> None:
        """Release the lock, if this job holds it."""
        self._lock.release()

    def tidy(self) -> None:
        """Delete files that only the build needed."""
        (self.path / BUILDING).unlink(missing_ok=True)
        discard_temporaries(self.path)
        for folder in self.previous:
            shutil.rmtree(folder)
        self._lock.discard()

    def missing_shards(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """The unfinished shards of one rank; shard k belongs to rank ``k % world_size``."""
        if self.complete:
            return []
        # On a network file system, listing the folder shows other nodes' new files; looking up each file may not.
        present = set(os.listdir(self.path)) if self.path.is_dir() else set()
        shards = range(rank, self.plan.num_shards, world_size)
        return [
            shard
            for shard in shards
            if shard_name(shard) not in present or self.samples_in(shard) < len(self.plan.shard_range(shard))
        ]

    def samples_in(self, shard: int) -> int:
        """Samples in a shard's file; 0 if it is missing or damaged, so that it is rebuilt.

        Raises:
            StoreError: The shard belongs to another build.
        """
        path = self.path / shard_name(shard)
        try:
            header = ShardHeader.load(path)
        except StoreError:
            return 0
        if header.tag != shard_tag(self.plan.digest, shard):
            raise StoreError(
                f"{path} was not made by this build of {self.plan.kind}. Move it away and build again, or name another "
                "folder."
            )
        return header.num_samples

    def save(self, path: Path, data: bytes) -> None:
        """Write a file of the folder atomically."""
        try:
            atomic_write(path, data)
        except FileNotFoundError as error:
            raise StoreError(
                f"{path} vanished while it was written: another job builds in {self.path}. Stop one and run again; "
                "finished shards are kept."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(f"{path} cannot be written ({error}). Make it writable or name another.") from error
            done = self.plan.num_shards - len(self.missing_shards())
            raise StoreError(
                f"No space left on the disk for {path} ({len(data) / 1e6:.1f} MB). {done} of {self.plan.num_shards} "
                "shards are finished and kept: free some space and run again."
            ) from error

    def _open(self) -> None:
        found = self._found()
        if found is None:
            self.save(self.path / BUILDING, dump_json(self.plan.to_json()))
        elif found[0].digest != self.plan.digest and not self._may_replace(*found):
            changed = _differences(found[0].to_json(), {**self.plan.to_json(), "num_samples": found[0].num_samples})
            raise StoreError(
                f"{found[1]} belongs to another {found[0].kind} ({'; '.join(changed)}). Use the settings it was made "
                f"with, name another folder, or delete {self.path} to build it again."
            )

    def _begin(self) -> None:
        """Take over the folder from a shorter build of the same plan, or replace another plan."""
        self._open()  # again, since another job may have finished it meanwhile
        found = self._found()
        if self.complete or found is None or found[0] == self.plan:
            return
        if found[0].digest != self.plan.digest:
            shards = self._shards()
            aside = self.path / f"{_PREVIOUS}{found[0].digest[:12]}"
            aside.mkdir(exist_ok=True)
            for shard in shards:
                os.replace(shard, aside / shard.name)
        self.save(self.path / BUILDING, dump_json(self.plan.to_json()))
        (self.path / MANIFEST).unlink(missing_ok=True)

    def _found(self) -> tuple[BuildPlan, Path] | None:
        """The folder's current plan, and the file that states it."""
        manifest, building = self.path / MANIFEST, self.path / BUILDING
        for path in (manifest, building, manifest):  # another process may replace one by the other meanwhile
            try:
                if path.exists():
                    return (Manifest.load(path).plan if path == manifest else BuildPlan.load(path)), path
            except StoreError:
                if path.exists():
                    raise
        return None

    def _may_replace(self, plan: BuildPlan, source: Path) -> bool:
        """Whether the shards of another plan may be replaced: if there are none, or ``replaces`` allows it."""
        if source.name == BUILDING and not self._shards():
            return True
        return self._replaces is not None and plan.kind == self.plan.kind and self._replaces(plan)

    def _shards(self) -> list[Path]:
        return sorted(self.path.glob("shard-*.safetensors"))


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys in which two JSON objects differ, nested ones joined by dots, as ``"steps: 50, now 20"``."""
    before, after = _flatten(old), _flatten(new)
    keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key, 'absent'):.100}, now {after.get(key, 'absent'):.100}" for key in keys]


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flat |= (
            _flatten(item, f"{name}.") if isinstance(item, dict) and item else {name: json.dumps(item, sort_keys=True)}
        )
    return flat
