"""Hugging Face ``datasets`` as an image source: local, from the hub, or the first part of a stream."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch.utils.data import Dataset

from lightning_difftune.data.digests import stat_digest
from lightning_difftune.errors import ConfigError, DataError
from lightning_difftune.files import array_digest, atomic_path, bytes_digest

_CAPTION_COLUMNS = ("text", "caption", "prompt")
_KEPT = "kept.json"  # in the folder of a kept stream: which stream it is


class HubImages(Dataset[tuple[Any, ...]]):
    """A data set of Hugging Face's ``datasets`` with a column of pictures and one of labels or captions.

    Columns that are not named are found by their features: the first of type ``Image``; then the first
    ``ClassLabel``, whose names become the classes', or a column ``text``, ``caption`` or ``prompt``. Labels that are
    strings are numbered in the order of their sorted values. Pictures are decoded when they are read, one at a time.

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

    Raises:
        ConfigError: ``datasets`` is not installed, or the arguments exclude each other.
        DataError: The data set cannot be opened, or a column is missing or of another type.
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
    ) -> None:
        if (keep is None) != (limit is None) or (limit is not None and limit < 1):
            raise ConfigError(
                f"keep and limit go together: a folder, and how many examples to keep; got limit={limit}."
            )
        if label_column is not None and caption_column is not None:
            raise ConfigError("HubImages has labels or captions: set label_column or caption_column, not both.")
        self.path = str(path) if isinstance(path, str | Path) else "the data set"
        if keep is not None and limit is not None:
            dataset = _kept_stream(str(path), split, name, revision, Path(keep).expanduser(), limit)
        else:
            dataset = _open(path, split, name, revision) if isinstance(path, str | Path) else path
        self._image, target = _find_columns(dataset, image_column, label_column, caption_column, self.path)
        self._dataset = dataset.select_columns([self._image]).cast_column(self._image, _library().Image(decode=False))
        column: Any = dataset.with_format(None)[target][:] if target is not None else [0] * len(dataset)
        self.class_names: list[str] | None = None
        if target is not None and (target == caption_column or (label_column is None and target in _CAPTION_COLUMNS)):
            if (odd := next((entry for entry in column if not isinstance(entry, str | None)), None)) is not None:
                raise DataError(
                    f"{self.path}: a caption in {target!r} is a {type(odd).__name__}, {odd!r:.60}; expected a text. "
                    "Make a column with one text for each picture, by the data set's map()."
                )
            self.captions = [text or "" for text in column]
            return
        if missing := [index for index, value in enumerate(column) if value is None]:
            raise DataError(
                f"{self.path}: {target!r} has no value in {len(missing)} of {len(column)} examples, the first of "
                f"which is example {missing[0]}. Filter them out, or name another column."
            )
        if target is not None:
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
        stored = self._dataset.data.column(self._image).chunks  # the encoded pictures before any selection
        chunks = [chunk.storage if hasattr(chunk, "storage") else chunk for chunk in stored]
        named = [chunk.field("path").filter(chunk.field("bytes").is_null()) for chunk in chunks]
        files = sorted({path for paths in named for path in paths.to_pylist() if path is not None})
        return array_digest(self._dataset._fingerprint, *([stat_digest(files)] if files else []))

    def picture_digests(self) -> list[str]:
        """The SHA-256 of every encoded picture; for a picture in a file, of its name, size and time."""
        column = (example[self._image] for example in self._dataset)
        return [stat_digest([x["path"]]) if x["bytes"] is None else bytes_digest(x["bytes"]) for x in column]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        entry = self._dataset[index][self._image]
        source = io.BytesIO(entry["bytes"]) if entry["bytes"] is not None else entry["path"]
        return Image.open(source), self.captions[index] if hasattr(self, "captions") else int(self.labels[index])

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


def _find_columns(
    dataset: Any, image: str | None, label: str | None, caption: str | None, path: str
) -> tuple[str, str | None]:
    """The columns of the pictures, and of their labels or captions if there are any."""
    datasets = _library()
    features: dict[str, Any] = dict(dataset.features)
    for column in (image, label, caption):
        if column is not None and column not in features:
            raise DataError(f"{path} has no column {column!r}; found {', '.join(features)}.")
    found = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    if image is None and len(found) > 1:
        rank_zero_warn(
            f"{path} has several columns of pictures; {found[0]} is read, and {', '.join(found[1:])} is not, also not "
            "as a control map. Name another as image_column; pairs with control maps are read from a CaptionedFolder."
        )
    image = image or next(iter(found), None)
    if image is None or not isinstance(features[image], datasets.Image):
        types = {key: type(kind).__name__ for key, kind in features.items()}
        raise DataError(f"{path} has no column of pictures (type Image); found {types}. Cast it to datasets.Image().")
    if label is None and caption is None:
        label = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
        caption = next((key for key in _CAPTION_COLUMNS if key in features), None)
    return image, label or caption


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
