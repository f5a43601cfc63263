"""Hugging Face ``datasets`` as an image source: local, from the hub, or the first part of a stream."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch.utils.data import Dataset

from lightning_difftune.data.digests import stat_digest
from lightning_difftune.data.folders import shorten
from lightning_difftune.data.source_facts import CAPTION_KEYS, CONTROL_KEYS
from lightning_difftune.errors import ConfigError, DataError
from lightning_difftune.files import array_digest, atomic_path, bytes_digest

_KEPT = "kept.json"  # in the folder of a kept stream: which stream it is


class _Columns(NamedTuple):
    """The names of columns."""

    image: str | None
    label: str | None
    caption: str | None
    control: str | None


class HubImages(Dataset[tuple[Any, ...]]):
    """A data set of Hugging Face's ``datasets`` with a column of pictures and one of labels or captions.

    Columns that are not named are found by their features: control maps by type ``Image`` and the name
    ``conditioning_image``, ``conditioning``, ``control_image`` or ``control``; pictures are the first other column of
    type ``Image``; then the first ``ClassLabel``, whose names become the classes', or a column ``text``, ``caption`` or
    ``prompt``. Others that might have been meant are named by a warning. Labels that are strings are numbered in the
    order of their sorted values. Pictures and control maps are decoded when they are read, one at a time.

    **Streams.** A run reads samples by index, so that it can be repeated, resumed and spread over more processes; a
    stream has no indices. So ``keep`` writes the first ``limit`` examples of the stream, still encoded, to a folder
    once and reads that folder afterwards. Nothing else is downloaded, and a latent cache or a second run does not use
    the network again.

    Args:
        path: Folder written by ``save_to_disk``, a folder or name that ``load_dataset`` opens, such as
            ``"owner/flowers"``, or a ``datasets.Dataset``.
        split: Name of the split.
        image_column: Column of the pictures; found by type by default.
        label_column: Column of the labels.
        caption_column: Column of the captions, in place of labels.
        name: Configuration of a data set that has several.
        revision: Branch, tag or commit of a data set on the hub.
        keep: Folder for the first ``limit`` examples, which are then streamed instead of downloaded whole.
        limit: Number of examples for ``keep``.
        control_column: Column of the control maps; an item is then ``(image, caption or label, control map)``.

    Raises:
        ConfigError: ``datasets`` is not installed, or the arguments exclude each other.
        DataError: The data set cannot be opened, a column is missing or of another type, or only some examples have a
            control map.
    """

    def __init__(
        self,
        path: str | Path | Any,
        split: str = "train",
        image_column: str | None = None,
        label_column: str | None = None,
        caption_column: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        keep: str | Path | None = None,
        limit: int | None = None,
        control_column: str | None = None,
    ) -> None:
        if (keep is None) != (limit is None) or (limit is not None and limit < 1):
            raise ConfigError(
                f"keep and limit go together: a folder, and how many examples to keep; got limit={limit}."
            )
        if label_column is not None and caption_column is not None:
            raise ConfigError("HubImages has labels or captions: set label_column or caption_column, not both.")
        if control_column is not None and control_column == image_column:
            raise ConfigError(f"image_column and control_column are both {image_column!r}: name two columns.")
        self.path = str(path) if isinstance(path, str | Path) else "the data set"
        if keep is not None and limit is not None:
            dataset = _kept_stream(str(path), split, name, revision, Path(keep).expanduser(), limit)
        else:
            dataset = _open(path, split, name, revision) if isinstance(path, str | Path) else path
        named = _Columns(image_column, label_column, caption_column, control_column)
        image, label, caption, control = _find_columns(dataset, named, self.path)
        if control is not None:
            _refuse_missing(_missing(dataset, control), dataset, control, self.path)
        self._columns = [name for name in (image, control) if name is not None]
        self._dataset = dataset.select_columns(self._columns)
        for name in self._columns:
            self._dataset = self._dataset.cast_column(name, _library().Image(decode=False))
        self.class_names: list[str] | None = None
        self._read_subjects(dataset, label or caption, caption is not None)

    def _read_subjects(self, dataset: Any, target: str | None, are_captions: bool) -> None:
        """Set the captions, or labels and names of the classes, from a column; all are of class 0 without one."""
        column: Any = dataset.with_format(None)[target][:] if target is not None else [0] * len(dataset)
        if are_captions:
            if (odd := next((entry for entry in column if not isinstance(entry, str | None)), None)) is not None:
                raise DataError(
                    f"{self.path}: a caption in {target!r} is a {type(odd).__name__}, {odd!r:.60}; expected a text. "
                    "Make a column with one text for each picture, by the data set's map()."
                )
            self.captions = [text or "" for text in column]
            return
        if target is not None:
            _refuse_missing([i for i, value in enumerate(column) if value is None], dataset, target, self.path)
            self.class_names = getattr(dataset.features[target], "names", None)
        if column and isinstance(column[0], str):
            self.class_names = sorted(set(column))
            numbers = {value: number for number, value in enumerate(self.class_names)}
            column = [numbers[value] for value in column]
        labels = np.asarray(column)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(
                f"{self.path}: the column {target!r} has labels of type {labels.dtype}; expected integers or strings."
            )
        self.labels = labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self._dataset)

    def content_digest(self) -> str:
        """A hash of the data set's fingerprint, and of the names, sizes and times of files that it refers to."""
        chunks = [chunk for column in self._columns for chunk in _stored(self._dataset, column)]
        named = [paths.filter(encoded.is_null()) for encoded, paths in chunks]
        files = sorted({path for paths in named for path in paths.to_pylist() if path is not None})
        return array_digest(self._dataset._fingerprint, *([stat_digest(files)] if files else []))

    def picture_digests(self) -> list[str]:
        """The SHA-256 of every encoded picture and its control map; for one in a file, of its name, size and time."""
        return ["".join(_digest_of(example[column]) for column in self._columns) for example in self._dataset]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        example = self._dataset[index]
        image, *control = (_decoded(example[column], column) for column in self._columns)
        return image, self.captions[index] if hasattr(self, "captions") else int(self.labels[index]), *control

    def describe(self, index: int) -> str:
        """The location of picture ``index``, for messages."""
        return f"example {index} of {self.path}"


def _open(path: str | Path, split: str, name: str | None = None, revision: str | None = None) -> Any:
    """An indexable split of a data set."""
    datasets = _library()
    saved = Path(path).expanduser()
    try:
        if any((saved / file).exists() for file in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(str(saved))
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(str(path), name, split=split, revision=revision)
    except Exception as error:  # the builders, the hub and its HTTP library raise many types
        raise DataError(f"{path} cannot be opened as a data set, split {split!r}: {_reason(error)}") from error


def _kept_stream(path: str, split: str, name: str | None, revision: str | None, folder: Path, limit: int) -> Any:
    """The first examples of a stream, written to a folder if it does not have them yet."""
    datasets = _library()
    stream_of = {"path": path, "split": split, "name": name, "revision": revision, "limit": limit}
    if not folder.exists():
        from datasets.table import embed_table_storage

        try:
            stream = datasets.load_dataset(path, name, split=split, revision=revision, streaming=True)
            features = stream.features or stream._resolve_features().features
            for column, feature in features.items():
                if isinstance(feature, datasets.Image):
                    stream = stream.cast_column(column, datasets.Image(decode=False))
            with atomic_path(folder, replace=False) as draft:
                examples = datasets.Dataset.from_list(list(stream.take(limit))).cast(features)
                # A linked picture is downloaded and stored, as push_to_hub does.
                whole = examples.with_format("arrow").map(embed_table_storage, batched=True, batch_size=100)
                whole.with_format(None).save_to_disk(draft)
                (draft / _KEPT).write_text(json.dumps(stream_of), encoding="utf-8")
        except Exception as error:  # as above
            raise DataError(f"{path} cannot be streamed, split {split!r}: {_reason(error)}") from error
    kept = _open(folder, split)
    try:
        was = json.loads((folder / _KEPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a folder of somebody else's
        was = stream_of if len(kept) <= limit else stream_of | {"limit": len(kept)}
    if changed := [f"{key} was {was.get(key)}, is {now}" for key, now in stream_of.items() if was.get(key) != now]:
        raise DataError(
            f"{folder} keeps the first examples of another stream: {', '.join(changed)}. Choose another folder for "
            "keep, or delete this one."
        )
    return kept


def _find_columns(dataset: Any, named: _Columns, path: str) -> _Columns:
    """The columns to read: those that are named, and the others by their types and names."""
    datasets = _library()
    features: dict[str, Any] = dict(dataset.features)
    for column in named:
        if column is not None and column not in features:
            raise DataError(f"{path} has no column {column!r}; found {', '.join(features)}.")
    image, label, caption, control = named
    pictures = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    if control is None and len(pictures) > 1:
        other = (key for key in CONTROL_KEYS if key in pictures and key != image)
        control = next((key for key in other if len(_missing(dataset, key)) < len(dataset)), None)
    if image is None:
        image = next((key for key in pictures if key != control), None)
    if image not in pictures or control not in (None, *pictures):
        types = {key: type(kind).__name__ for key, kind in features.items()}
        raise DataError(f"{path} has no column of pictures (type Image); found {types}. Cast it to datasets.Image().")
    # Those that were not named, and that someone may miss.
    unread = [] if None not in (named.image, named.control) else [k for k in pictures if k not in (image, control)]
    if label is None and caption is None:
        labels = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        captions = [key for key in CAPTION_KEYS if key in features]
        label = next(iter(labels), None)
        caption = next(iter(captions), None) if label is None else None
        others = features if label is caption else labels + captions
        unread += [key for key in others if key not in (*pictures, label, caption)]
    if unread:
        read = ", ".join(key for key in (image, label, caption, control) if key is not None)
        rank_zero_warn(
            f"{path}: columns that are read: {read}; that are not: {shorten(unread)}"
            f"{', so all pictures are of class 0' if label is caption else ''}. Name others as image_column, "
            "label_column or caption_column, and control_column."
        )
    return _Columns(image, label, caption, control)


def _stored(dataset: Any, column: str) -> list[tuple[Any, Any]]:
    """The bytes and the paths of encoded pictures before any selection, as arrays of Arrow."""
    chunks = dataset.data.column(column).chunks
    return [(chunk.storage if hasattr(chunk, "storage") else chunk).flatten() for chunk in chunks]


def _missing(dataset: Any, column: str) -> list[int]:
    """The examples that have no picture in a column."""
    empty = [np.asarray(encoded.is_null()) & np.asarray(paths.is_null()) for encoded, paths in _stored(dataset, column)]
    rows = np.concatenate([np.zeros(0, bool), *empty])
    selected = rows if dataset._indices is None else rows[np.asarray(dataset._indices.column(0))]
    return [int(index) for index in np.flatnonzero(selected)]


def _refuse_missing(missing: list[int], dataset: Any, column: str, path: str) -> None:
    if missing:
        raise DataError(
            f"{path}: {column!r} has no value in {len(missing)} of {len(dataset)} examples, the first of which is "
            f"example {missing[0]}. Filter them out, or name another column."
        )


def _decoded(entry: dict[str, Any] | None, column: str) -> Image.Image:
    if entry is None:
        raise ValueError(f"there is no picture in {column!r}")
    return Image.open(io.BytesIO(entry["bytes"]) if entry["bytes"] is not None else entry["path"])


def _digest_of(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "missing"
    return stat_digest([entry["path"]]) if entry["bytes"] is None else bytes_digest(entry["bytes"])


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "Data sets of Hugging Face need the package `datasets`, which is not installed. Run `pip install datasets`."
        ) from error
    return datasets
