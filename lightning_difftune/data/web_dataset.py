"""WebDataset shards as an image source: tar files whose members are read by index, without unpacking."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from glob import glob
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
from lightning_difftune.data.source_facts import CAPTION_KEYS, CONTROL_KEYS
from lightning_difftune.errors import ConfigError, DataError, check_lists
from lightning_difftune.files import array_digest

# WebDataset's rule: the key of a sample is its path up to the first dot of the file's name.
_KEY = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]*)$")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CONTROL_EXTENSIONS = frozenset(f".{name}{extension}" for name in CONTROL_KEYS for extension in IMAGE_EXTENSIONS)


class _Member(NamedTuple):
    """The position of a file in a shard."""

    name: str
    shard: int
    offset: int
    size: int
    time: float


class WebDatasetShards(Dataset[tuple[Any, ...]]):
    """Pictures in WebDataset's layout: tar files with ``key.jpg`` and, for the same key, ``key.cls`` or ``key.txt``.

    A picture's control map is ``key.conditioning.png``, ``key.conditioning_image.png``, ``key.control.png`` or
    ``key.control_image.png``, or has the ``control_extension``. Other pictures of a key are named by a warning; two
    that could both be its picture are refused.

    The shards are read by position, not as a stream: their tables of contents are read once, which takes a few
    microseconds per picture; then every picture can be read by index. So a run can be repeated, resumed and spread
    over more processes, as with files. Shards must be local and uncompressed.

    Args:
        shards: A file, a folder of ``.tar`` files, a pattern such as ``"data/train-{000..011}.tar"`` or
            ``"data/train-*.tar"``, or a list of files.
        class_names: Names of the classes, in the order of the numbers in ``.cls``.
        label_extension: Extension of the files with class numbers; ``None`` if they are not to be read.
        caption_extension: Extension of the files with captions, used if there are no class numbers. From ``json``, the
            caption is what the file has under ``text``, ``caption`` or ``prompt``.
        control_extension: Extension of the control maps, after the first dot of the name: ``"depth.png"``. An item is
            then ``(image, caption or label, control map)``.
        image_extension: Extension of the pictures; by default that of any picture format, such as ``jpg``.

    Raises:
        ConfigError: Pictures and control maps have the same extension.
        DataError: There are no shards, or no pictures in them; a shard is damaged or compressed; a key has two
            pictures; only some pictures have labels, captions or control maps; a label is not a number.
    """

    def __init__(
        self,
        shards: str | Sequence[str] | Path,
        class_names: Sequence[str] | None = None,
        label_extension: str | None = "cls",
        caption_extension: str = "txt",
        control_extension: str | None = None,
        image_extension: str | None = None,
    ) -> None:
        check_lists(type(self).__name__, class_names=class_names)
        images = IMAGE_EXTENSIONS if image_extension is None else frozenset({_dotted(image_extension)})
        maps = _CONTROL_EXTENSIONS if control_extension is None else frozenset({_dotted(control_extension)})
        if images == maps:
            raise ConfigError(f"image_extension and control_extension are both {image_extension!r}; name two.")
        self.shards = _find_shards(shards)
        self.class_names = None if class_names is None else list(class_names)
        self._pictures: list[_Member] = []
        self.left_out: Counter[str] = Counter()
        others: Counter[str] = Counter()
        unread: Counter[str] = Counter()  # pictures
        controls: list[_Member | None] = []
        accepted = {} if label_extension is None else {label_extension: [_dotted(label_extension)]}
        accepted[caption_extension] = [_dotted(caption_extension), *CAPTION_EXTENSIONS]
        texts: dict[str, list[_Member | None]] = {name: [] for name in accepted}
        for number, shard in enumerate(self.shards):
            for key, files in _read_contents(shard, number).items():
                if any(is_system(part) for part in key.split("/")):
                    self.left_out["hidden or system files"] += len(files)
                    continue
                spelled = {_dotted(name): name for name in files}
                self.left_out.update(spelled.keys() & UNREAD_PICTURES)
                control = min(spelled.keys() & maps, default="")
                found = [name for name in files if _dotted(name) in images and _dotted(name) != control]
                if len(found) > 1:
                    raise DataError(
                        f"{key} in {shard} has several pictures: {', '.join(found)}. Set image_extension to that of "
                        "the pictures and, if the other is that of control maps, control_extension."
                    )
                read = {control, *map(_dotted, found)}
                unread.update(e for e in spelled.keys() - read if f".{e.rpartition('.')[2]}" in IMAGE_EXTENSIONS)
                others.update(spelled.keys() - read - unread.keys())
                if not found:
                    if not spelled.keys() & UNREAD_PICTURES:
                        self.left_out["samples without a picture"] += 1
                    continue
                self._pictures.append(files[found[0]])
                controls.append(files[spelled[control]] if control else None)
                for name, extensions in accepted.items():
                    texts[name].append(next((files[spelled[e]] for e in extensions if e in spelled), None))
        self.names = [picture.name for picture in self._pictures]
        if not self._pictures:
            found_too = f"; found {describe_counts(unread)}: set image_extension" if unread else ""
            raise DataError(f"no pictures in {len(self.shards)} shards, the first is {self.shards[0]}{found_too}.")
        if unread:
            rank_zero_warn(
                f"{self.shards[0]}: pictures that are not read: {describe_counts(unread)}. Set control_extension if "
                "these are control maps."
            )
        wants_control = control_extension is not None or any(controls)
        self._controls = (
            self._of_all(controls, f".{control_extension or 'conditioning.png'}") if wants_control else None
        )
        self._read_subjects(texts, caption_extension, others)

    def _read_subjects(
        self, texts: dict[str, list[_Member | None]], caption_extension: str, others: Counter[str]
    ) -> None:
        """Set the classes or captions: those of the first extension that a picture has a text with."""
        self.labels = np.zeros(len(self), np.int64)
        known = [name for name, members in texts.items() if any(members)]
        if not known:
            if says := others.keys() - UNREAD_PICTURES:
                wanted = " and no ".join(f".{name}" for name in texts)
                rank_zero_warn(
                    f"{self.shards[0]}: pictures have no {wanted}, so all are of class 0; files that are not read: "
                    f"{describe_counts({e: others[e] for e in says})}. Set label_extension or caption_extension if one "
                    "is a number or a text."
                )
            return
        if len(known) > 1:
            rank_zero_warn(
                f"{self.shards[0]}: the classes in .{known[0]} are read, and the captions in .{known[1]} are not. Set "
                "label_extension to null to read captions."
            )
        extension = known[0]
        words = [self._text(member) for member in self._of_all(texts[extension], f".{extension}")]
        if extension == caption_extension:
            del self.labels
            self.captions = [" ".join(text.split()) for text in words]
            return
        wrong = next((i for i, word in enumerate(words) if not word.isdecimal()), None)
        if wrong is not None:
            raise DataError(f"{self.describe(wrong)}: its .{extension} says {words[wrong][:40]!r}, expected a number.")
        self.labels = np.asarray([int(word) for word in words], dtype=np.int64)

    def _of_all(self, members: Sequence[_Member | None], what: str) -> list[_Member]:
        """The members, if every picture has one."""
        if bare := [name for name, member in zip(self.names, members, strict=True) if member is None]:
            raise DataError(f"{len(bare)} of {len(self)} pictures have no {what}: {shorten(bare)}.")
        return [member for member in members if member is not None]

    def _text(self, member: _Member) -> str:
        """The text of a file, or the caption in a JSON object."""
        where = f"{member.name} in {self.shards[member.shard]}"
        text = decode(self._read(member), where).strip()
        if not member.name.lower().endswith(".json"):
            return text
        try:
            entry = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where} is not JSON ({error}).") from error
        found = next((entry[key] for key in CAPTION_KEYS if key in entry), None) if isinstance(entry, dict) else None
        if not isinstance(found, str):
            raise DataError(f"{where} has no text under {', '.join(CAPTION_KEYS)}; found {text[:80]!r}.")
        return found

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, *control = (Image.open(io.BytesIO(self._read(member))) for member in self._members(index))
        return image, self.captions[index] if hasattr(self, "captions") else int(self.labels[index]), *control

    def _members(self, index: int) -> list[_Member]:
        """The picture and, if there are any, its control map."""
        return [self._pictures[index], *([] if self._controls is None else [self._controls[index]])]

    def _read(self, member: _Member) -> bytes:
        with open(self.shards[member.shard], "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)

    def describe(self, index: int) -> str:
        """The location of picture ``index``, for messages."""
        return f"{self.names[index]} in {self.shards[self._pictures[index].shard]}"

    def content_digest(self) -> str:
        """A hash of the shards' names, sizes and modification times, of what is read in them, and of the captions."""
        read = np.asarray([[(m.shard, m.offset) for m in self._members(index)] for index in range(len(self))])
        return array_digest(stat_digest(self.shards), read, *getattr(self, "captions", []))

    def picture_digests(self) -> list[str]:
        """The name, size and modification time of every picture, and of its control map, in its shard.

        If all pictures of a shard have the same time, the time says nothing, so the shard's size and time are added.
        """
        times: dict[int, set[float]] = {}
        for picture in self._pictures:
            times.setdefault(picture.shard, set()).add(picture.time)
        shards = {n: "" if len(found) > 1 else stat_digest([self.shards[n]]) for n, found in times.items()}
        stored = [" ".join(f"{m.name} {m.size} {m.time}" for m in self._members(i)) for i in range(len(self))]
        return [f"{told} {shards[picture.shard]}" for told, picture in zip(stored, self._pictures, strict=True)]


def _dotted(extension: str) -> str:
    return f".{extension.lower().removeprefix('.')}"


def _find_shards(shards: str | Sequence[str] | Path) -> list[str]:
    """The files of a path, pattern or list."""
    if isinstance(shards, str | Path) and str(shards).startswith("~"):
        shards = os.path.expanduser(shards)
    if not isinstance(shards, str | Path):
        files = [str(shard) for shard in shards]
    elif "://" in str(shards) or str(shards).startswith("pipe:"):
        raise DataError(f"{shards} is not a local file. Shards are read by position: download them first.")
    elif Path(shards).is_dir():
        files = sorted(str(Path(shards, name)) for name in glob("*.tar", root_dir=shards))  # without hidden ones
        splits = {found[0].lower() for file in files if (found := re.match("[A-Za-z]*", Path(file).name))}
        if len(splits) > 1 and SPLIT_FOLDERS.issuperset(splits):
            raise DataError(
                f"{shards} has shards of the splits {', '.join(sorted(splits))}: one would be trained on with the "
                f"others. Name those of one by a pattern, such as {Path(shards, 'train-*.tar')}."
            )
    elif "*" in str(shards):
        files = sorted(glob(str(shards), recursive=True))
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
                contents.setdefault(key, {})[extension] = _Member(
                    entry.name, number, entry.offset_data, entry.size, entry.mtime
                )
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{shard} is not a whole, uncompressed tar file ({error}); download it again, or unpack a compressed one "
            "with gunzip."
        ) from error
    return contents
