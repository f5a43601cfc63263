"""WebDataset shards as an image source: tar files whose members are read by index, without unpacking."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch.utils.data import Dataset

from lightning_difftune.data.digests import stat_digest
from lightning_difftune.data.folders import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    SPLIT_FOLDERS,
    UNREAD_PICTURES,
    decode,
    describe_counts,
    is_system,
    shorten,
)
from lightning_difftune.errors import DataError, check_lists
from lightning_difftune.files import array_digest

# WebDataset's rule: the key of a sample is its path up to the first dot of the file's name.
_KEY = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]*)$")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class _Member(NamedTuple):
    """The position of a file in a shard."""

    shard: int
    offset: int
    size: int
    time: float


class WebDatasetShards(Dataset[tuple[Any, ...]]):
    """Pictures in WebDataset's layout: tar files with ``key.jpg`` and, for the same key, ``key.cls`` or ``key.txt``.

    The shards are read by position, not as a stream: their tables of contents are read once, which takes a few
    microseconds per picture; then every picture can be read by index. So a run can be repeated, resumed and spread
    over more processes, as with files. Shards must be local and uncompressed.

    Args:
        shards: A file, a folder of ``.tar`` files, a pattern such as ``"data/train-{000..011}.tar"`` or
            ``"data/train-*.tar"``, or a list of files.
        class_names: Names of the classes, in the order of the numbers in ``.cls``.
        label_extension: Extension of the files with class numbers.
        caption_extension: Extension of the files with captions, used if there are no class numbers.

    Raises:
        DataError: There are no shards, or no pictures in them; a shard is damaged or compressed; only some pictures
            have labels, or a label is not a number.
    """

    def __init__(
        self,
        shards: str | Sequence[str] | Path,
        class_names: Sequence[str] | None = None,
        label_extension: str = "cls",
        caption_extension: str = "txt",
    ) -> None:
        check_lists(type(self).__name__, class_names=class_names)
        self.shards = _find_shards(shards)
        self.class_names = None if class_names is None else list(class_names)
        self.names: list[str] = []
        self._pictures: list[_Member] = []
        self.left_out: Counter[str] = Counter()
        others: Counter[str] = Counter()
        texts: dict[str, list[_Member | None]] = {label_extension: [], caption_extension: []}
        accepted = {name: [f".{name.lower()}"] for name in texts}
        accepted[caption_extension] += CAPTION_EXTENSIONS
        for number, shard in enumerate(self.shards):
            for key, files in _read_contents(shard, number).items():
                if any(is_system(part) for part in key.split("/")):
                    self.left_out["hidden or system files"] += len(files)
                    continue
                spelled = {f".{name.lower()}": name for name in files}
                self.left_out.update(spelled.keys() & UNREAD_PICTURES)
                others.update(spelled.keys() - IMAGE_EXTENSIONS)
                picture = next((name for extension, name in spelled.items() if extension in IMAGE_EXTENSIONS), None)
                if picture is None:
                    continue
                self.names.append(f"{key}.{picture}")
                self._pictures.append(files[picture])
                for name, extensions in accepted.items():
                    texts[name].append(next((files[spelled[e]] for e in extensions if e in spelled), None))
        if not self._pictures:
            raise DataError(f"no pictures in {len(self.shards)} shards, the first is {self.shards[0]}.")
        self.labels = np.zeros(len(self), np.int64)
        extension = next((name for name, members in texts.items() if any(members)), None)
        if extension is None:
            if unread := others.keys() - UNREAD_PICTURES:
                rank_zero_warn(
                    f"{self.shards[0]}: pictures have no .{label_extension} and no .{caption_extension}, so all are of "
                    f"class 0; files that are not read: {describe_counts({e: others[e] for e in unread})}. Set "
                    "label_extension or caption_extension if one is a number or a text."
                )
            return
        bare = [name for name, member in zip(self.names, texts[extension], strict=True) if member is None]
        if bare:
            raise DataError(f"{len(bare)} of {len(self)} pictures have no .{extension}: {shorten(bare)}.")
        words = [
            decode(self._read(member), f"{name.rpartition('.')[0]}.{extension} in {self.shards[member.shard]}").strip()
            for name, member in zip(self.names, texts[extension], strict=True)
            if member is not None
        ]
        if extension == caption_extension:
            del self.labels
            self.captions = [" ".join(text.split()) for text in words]
            return
        wrong = next((i for i, word in enumerate(words) if not word.isdecimal()), None)
        if wrong is not None:
            raise DataError(f"{self.describe(wrong)}: its .{extension} says {words[wrong][:40]!r}, expected a number.")
        self.labels = np.asarray([int(word) for word in words], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image = Image.open(io.BytesIO(self._read(self._pictures[index])))
        return image, self.captions[index] if hasattr(self, "captions") else int(self.labels[index])

    def _read(self, member: _Member) -> bytes:
        with open(self.shards[member.shard], "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)

    def describe(self, index: int) -> str:
        """The location of picture ``index``, for messages."""
        return f"{self.names[index]} in {self.shards[self._pictures[index].shard]}"

    def content_digest(self) -> str:
        """A hash of the shards' names, sizes and modification times, and of the captions."""
        return array_digest(stat_digest(self.shards), *getattr(self, "captions", []))

    def picture_digests(self) -> list[str]:
        """The name, size and modification time of every picture in its shard.

        If all pictures of a shard have the same time, the time says nothing, so the shard's size and time are added.
        """
        times: dict[int, set[float]] = {}
        for picture in self._pictures:
            times.setdefault(picture.shard, set()).add(picture.time)
        shards = {n: "" if len(found) > 1 else stat_digest([self.shards[n]]) for n, found in times.items()}
        named = zip(self.names, self._pictures, strict=True)
        return [f"{name} {picture.size} {picture.time} {shards[picture.shard]}" for name, picture in named]


def _find_shards(shards: str | Sequence[str] | Path) -> list[str]:
    """The files of a path, pattern or list."""
    if isinstance(shards, str | Path) and str(shards).startswith("~"):
        shards = os.path.expanduser(shards)
    if not isinstance(shards, str | Path):
        files = [str(shard) for shard in shards]
    elif "://" in str(shards) or str(shards).startswith("pipe:"):
        raise DataError(f"{shards} is not a local file. Shards are read by position: download them first.")
    elif Path(shards).is_dir():
        files = sorted(map(str, Path(shards).glob("*.tar")))
        splits = {found[0].lower() for file in files if (found := re.match("[A-Za-z]*", Path(file).name))}
        if len(splits) > 1 and SPLIT_FOLDERS.issuperset(splits):
            raise DataError(
                f"{shards} has shards of the splits {', '.join(sorted(splits))}: one would be trained on with the "
                f"others. Name those of one by a pattern, such as {Path(shards, 'train-*.tar')}."
            )
    elif "*" in str(shards):
        pattern = Path(shards)
        files = sorted(map(str, Path(pattern.anchor or ".").glob(str(pattern.relative_to(pattern.anchor)))))
    else:
        files = _expand(str(shards))
    if not files:
        raise DataError(f"there are no .tar files at {shards}.")
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise DataError(f"the shards {shorten(missing)} do not exist.")
    return files


def _expand(pattern: str) -> list[str]:
    """Expand a range in braces: ``a-{08..10}.tar`` is ``a-08.tar``, ``a-09.tar`` and ``a-10.tar``."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [name for number in numbers for name in _expand(pattern[: found.start()] + number + pattern[found.end() :])]


def _read_contents(shard: str, number: int) -> dict[str, dict[str, _Member]]:
    """Files of a shard by key and extension."""
    contents: dict[str, dict[str, _Member]] = {}
    size = Path(shard).stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                found = _KEY.match(entry.name)
                if not entry.isfile() or found is None:
                    continue
                if entry.offset_data + entry.size > size:
                    raise tarfile.ReadError(f"{entry.name} is cut off")
                key, extension = found.groups()
                contents.setdefault(key, {})[extension] = _Member(number, entry.offset_data, entry.size, entry.mtime)
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{shard} is not a whole, uncompressed tar file ({error}); download it again, or unpack a compressed one "
            "with gunzip."
        ) from error
    return contents
