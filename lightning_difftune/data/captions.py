"""Captions for pictures that only have labels, and captioned pictures as control similarity takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Dataset

from lightning_difftune.data.images import ImageTargets
from lightning_difftune.data.source_facts import Relabelled, class_names_of, labels_of, location_of
from lightning_difftune.draws import choice_of
from lightning_difftune.errors import ConfigError, DataError


class ClassCaptions(Relabelled):
    """Pictures of a labelled source with captions made from their classes' names.

    Underscores in names are written as spaces. Which template a picture gets depends only on (seed, its index).

    Args:
        source: A map-style data set of ``(image, label)`` that knows its labels without reading its pictures, such as
            those of :mod:`~lightning_difftune.data.image_files` and most of torchvision's.
        templates: Texts with ``{}`` where the name goes; some may omit it, as a default prompt does.
        class_names: Names in the order of the labels; ``None`` takes those of the source.
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

    def __getitem__(self, index: int) -> tuple[Any, str]:
        return self.source[index][0], self.captions[index]

    def describe(self, index: int) -> str:
        """Where picture ``index`` is, for messages; its caption if nothing else is known."""
        return location_of(self.source, index) or repr(self.captions[index])

    def _told(self) -> list[str]:
        return self.captions


class ControlExamples:
    """Pictures of a captioned source at the size the model is trained at, with their captions.

    Args:
        source: A map-style data set of ``(image, caption, ..)`` such as those of
            :mod:`~lightning_difftune.data.captioned_files` or :class:`~lightning_difftune.data.ClassCaptions`.
        image_size: Height and width of the pictures.
        on_corrupt: ``"error"``, or ``"skip"`` to put the next readable picture in the place of a damaged one.

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

    def control_examples(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Positions => pictures (B, 3, image_size, image_size) uint8 and their captions.

        Raises:
            DataError: A damaged picture, unless those are skipped.
        """
        return self.targets.captioned(indices)
