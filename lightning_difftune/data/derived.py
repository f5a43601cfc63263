"""Image sources made from others: random parts, captions from classes, classes matched by name, control examples."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, Subset

from lightning_difftune.data.digests import Relabelled
from lightning_difftune.data.folders import shorten
from lightning_difftune.data.images import ImageTargets
from lightning_difftune.data.source_facts import class_names_of, labels_of, location_of, paths_of
from lightning_difftune.draws import choice_of
from lightning_difftune.errors import ConfigError, DataError, check_lists
from lightning_difftune.files import own_number

IntArray = npt.NDArray[np.intp]


class Partition(Subset[Any]):
    """One part of a random partition, for data sets without a split.

    The paper's SUN397 is ``Partition(SUN397(root), {"train": 76128, "val": 10875, "test": 21750}, "train")``, and five
    pictures of each flower are ``Partition(Flowers102(root), {"train": 5}, "train", per_class=True)``. The parts are
    disjoint and depend only on the seed: if file names are known, pictures are first sorted by name, since some data
    sets list their files in the order of the file system, which differs between machines.

    Args:
        source: A map-style data set of ``(image, label)``.
        sizes: All parts by name, as numbers of pictures, or as shares that sum to at most 1.
        part: Name of the part to use.
        seed: Seed of the permutation.
        per_class: Whether the sizes are per class: counts give a few-shot target, shares a stratified partition.

    Raises:
        ConfigError: The sizes are neither counts nor shares, exceed the source or one of its classes, or have no such
            part; or ``per_class`` is set and the source's labels are unknown without reading its pictures.
    """

    def __init__(
        self, source: Dataset, sizes: Mapping[str, int | float], part: str, seed: int = 0, per_class: bool = False
    ) -> None:
        count = len(source)  # type: ignore[arg-type]
        if part not in sizes:
            raise ConfigError(f"no part {part!r} in the partition; found {', '.join(map(repr, sizes))}.")
        position = list(sizes).index(part)
        paths = paths_of(source)
        by_name = np.arange(count) if paths is None else np.asarray(sorted(range(count), key=paths.__getitem__))
        # RandomState's streams never change; Generator's may change with NumPy's version.
        order = np.random.RandomState(seed).permutation(count)
        chosen = []
        for whole, members in _classes(source, by_name, order) if per_class else [("the source", order)]:
            bounds = _bounds(sizes, whole, len(members))
            chosen.append(members[bounds[position] : bounds[position + 1]])
        indices = by_name[np.sort(np.concatenate(chosen))].tolist()
        if not indices:
            raise ConfigError(f"the part {part!r} of {count} pictures is empty with the sizes {dict(sizes)}.")
        super().__init__(source, indices)


def _classes(source: Dataset, by_name: IntArray, order: IntArray) -> Iterator[tuple[str, IntArray]]:
    """Every class of the source, by its name for messages, and its entries in ``order``."""
    known = labels_of(source)
    if known is None:
        raise ConfigError("per_class needs a source that knows its labels without reading its pictures.")
    labels = known.numpy()[by_name[order]]
    for label in np.unique(labels):
        yield f"class {label}", order[labels == label]


def _bounds(sizes: Mapping[str, int | float], whole: str, count: int) -> list[int]:
    values = [own_number(size) for size in sizes.values()]
    ends = np.cumsum([0, *values])
    if any(value <= 0 for value in values):
        raise ConfigError(f"the sizes {dict(sizes)} of a partition must be above 0.")
    if all(isinstance(value, int) for value in values):
        if ends[-1] > count:
            raise ConfigError(f"the sizes {dict(sizes)} need {ends[-1]} pictures, but {whole} has {count}.")
        return [int(end) for end in ends]
    if all(isinstance(value, float) for value in values) and ends[-1] <= 1 + 1e-9:
        return [round(float(end) * count) for end in ends]
    raise ConfigError(f"the sizes {dict(sizes)} of a partition; expected counts, or shares that sum to at most 1.")


class ClassCaptions(Relabelled):
    """Pictures of a labelled source with captions made from their classes' names.

    Underscores in names become spaces. The template of a picture depends only on (seed, its index). Control maps of
    the source are kept.

    Args:
        source: A map-style data set of ``(image, label)`` that knows its labels without reading its pictures, such as
            those of :mod:`~lightning_difftune.data.image_files` and most of torchvision's.
        templates: Texts with ``{}`` for the name; some may omit it, as a default prompt does.
        class_names: Names in the order of the labels; by default the source's.
        seed: Seed of the choice among templates.

    Raises:
        ConfigError: If there is no template, or none has a ``{}``.
        DataError: If labels or names are unknown, or a label has no name.

    Example:
        >>> import numpy as np
        >>> from lightning_difftune.data import ArrayImages
        >>> flowers = ArrayImages(np.zeros((2, 8, 8), np.uint8), [1, 0], class_names=["rose", "oxeye_daisy"])
        >>> ClassCaptions(flowers, templates=["a photo of a {}"]).captions
        ['a photo of a oxeye daisy', 'a photo of a rose']
    """

    def __init__(
        self,
        source: Dataset,
        templates: Sequence[str] = ("a photo of a {}",),
        class_names: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(templates, str) or not any("{}" in template for template in templates):
            raise ConfigError(
                f"templates of ClassCaptions are a list of texts with {{}} for the name, found {templates!r}. "
                'Write, for instance, ["a photo of a {}", "a drawing of a {}"].'
            )
        super().__init__(source)
        check_lists(type(self).__name__, class_names=class_names)
        labels, names = labels_of(source), class_names_of(source) if class_names is None else list(class_names)
        if labels is None or names is None:
            what = "labels" if labels is None else "names of the classes"
            fix = "Use a source that knows them" if labels is None else "Pass `class_names`"
            raise DataError(f"the {what} of {type(source).__name__} are unknown without reading its pictures. {fix}.")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
            raise DataError(
                f"the labels of {type(source).__name__} are {int(labels.min())}..{int(labels.max())}, but there are "
                f"{len(names)} class names. Give one name for each label from 0."
            )
        spoken = [name.replace("_", " ") for name in names]
        self.captions = [
            templates[choice_of(seed, index, len(templates))].replace("{}", spoken[label])
            for index, label in enumerate(labels.tolist())
        ]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, _, *control = self.source[index]
        return image, self.captions[index], *control

    def describe(self, index: int) -> str:
        """The location of picture ``index``, for messages; its caption if unknown."""
        return location_of(self.source, index) or repr(self.captions[index])

    def _label_facts(self) -> list[str]:
        return self.captions


class ControlExamples:
    """Pictures of a captioned source at the model's training size, with their captions.

    Args:
        source: A map-style data set of ``(image, caption, ..)`` such as those of
            :mod:`~lightning_difftune.data.captioned_files` or :class:`~lightning_difftune.data.ClassCaptions`.
        image_size: Height and width of the pictures.
        on_corrupt: ``"error"``, or ``"skip"`` to replace a damaged picture by the next readable one.

    Raises:
        ConfigError: A setting out of range.
        DataError: The source is empty, or has no captions.

    Example:
        >>> import numpy as np
        >>> from lightning_difftune.data import ArrayImages, ClassCaptions
        >>> roses = ArrayImages(np.zeros((5, 12, 8), np.uint8), class_names=["rose"])
        >>> examples = ControlExamples(ClassCaptions(roses), image_size=8)
        >>> pictures, captions = examples.control_examples([3, 4])
        >>> examples.num_control_examples, pictures.shape, captions
        (5, torch.Size([2, 3, 8, 8]), ['a photo of a rose', 'a photo of a rose'])
    """

    def __init__(self, source: Dataset, image_size: int, on_corrupt: Literal["error", "skip"] = "error") -> None:
        self.targets = ImageTargets(source, image_size, on_corrupt=on_corrupt)
        self.targets.captioned([0])

    @property
    def num_control_examples(self) -> int:
        """How many pictures there are."""
        return len(self.targets)

    def control_examples(self, indices: Sequence[int]) -> tuple[Any, ...]:
        """Positions => pictures (B, 3, image_size, image_size) uint8, their captions and the source's control maps."""
        return self.targets.captioned(indices)


def joined_by_name(source: Any, names: Sequence[str] | None) -> Any:
    """Held-out pictures renumbered to the target's classes, whose names are ``names`` in order.

    The source is returned unchanged if one of the two has no names, or the names are the same.

    Raises:
        DataError: If it has pictures of a class that is not among ``names``, or two of ``names`` are the same.

    Example:
        >>> from lightning_difftune.data import ArrayImages
        >>> held_out = ArrayImages(np.zeros((2, 8, 8), np.uint8), [0, 1], class_names=["daisy", "tulip"])
        >>> joined_by_name(held_out, ["daisy", "rose", "tulip"]).labels
        array([0, 2])
    """
    own = class_names_of(source)
    if own is None or names is None or _normalised(own) == _normalised(names):
        return source
    numbers = {name: number for number, name in enumerate(_normalised(names))}
    if len(numbers) < len(names):
        twice = sorted({name for name in names if _normalised(names).count(_normalised([name])[0]) > 1})
        raise DataError(
            f"val_target cannot be joined by class names: the target has {shorten(twice)} twice. Rename one."
        )
    labels = labels_of(source)
    used = range(len(own)) if labels is None else sorted(set(labels.tolist()))
    unknown = [own[label] for label in used if 0 <= label < len(own) and _normalised([own[label]])[0] not in numbers]
    if unknown:
        raise DataError(
            f"val_target has classes that the target does not have: {shorten(unknown)}. The target's are "
            f"{shorten(list(names))}. Take their pictures out, or rename the class if it is another spelling."
        )
    return _Renumbered(source, np.asarray([numbers.get(name, -1) for name in _normalised(own)]), list(names))


def _normalised(names: Sequence[str]) -> list[str]:
    """Names for comparison: one Unicode form, without surrounding spaces."""
    return [unicodedata.normalize("NFC", name).strip() for name in names]


class _Renumbered(Relabelled):
    """A source with renumbered classes."""

    def __init__(self, source: Any, numbers: npt.NDArray[np.int64], class_names: list[str]) -> None:
        super().__init__(source)
        self.numbers, self.class_names = numbers, class_names
        known = labels_of(source)
        if known is not None:
            self.labels = np.asarray([self._number(label) for label in known.tolist()], dtype=np.int64)

    def _number(self, label: int) -> int:
        return int(self.numbers[label]) if 0 <= label < len(self.numbers) else label  # others are refused later

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, label, *rest = self.source[index]
        return image, self._number(int(label)), *rest

    def _label_facts(self) -> list[npt.NDArray[np.int64]]:
        return [self.numbers]
