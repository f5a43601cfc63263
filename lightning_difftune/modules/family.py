"""What a model family supplies: its networks, its conditions, and the requests that it answers."""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from lightning_difftune.errors import ConfigError, did_you_mean
from lightning_difftune.models import FrozenAutoencoder, export_network
from lightning_difftune.models.diffusers_layout import open_network
from lightning_difftune.models.usage import usage_of_network
from lightning_difftune.protocols import Denoiser, RetentionBatch, TargetBatch
from lightning_difftune.source import SourceFacts

FEW = 10  # classes shown by default


class Asked(NamedTuple):
    """What a user wants a model to show; ``None`` for what was not requested.

    Attributes:
        classes: Names or numbers of classes.
        prompts: Texts.
        controls: Files of pictures that control maps are taken from.
        maps: Files of control maps, in place of ``controls``.
    """

    classes: Sequence[str] | None = None
    prompts: Sequence[str] | None = None
    controls: Sequence[str] | None = None
    maps: Sequence[str] | None = None

    def refuse(self, *ways: str, because: str) -> None:
        """Refuse kinds of requests that a model does not support.

        Raises:
            ConfigError: If one of ``ways`` was requested; ``because`` says what the model takes instead.
        """
        for way in ways:
            if getattr(self, way) is not None:
                raise ConfigError(f"This model does not take --{way}: {because}")


class Subject(NamedTuple):
    """What one row of a grid of generated pictures shows.

    Attributes:
        name: Its label for the reader.
        asked: What becomes the condition: a class number, or a prompt.
        control: The control map (c, H, W) uint8 that the pictures follow, if any.
    """

    name: str
    asked: Any = None
    control: Tensor | None = None


class ModelFamily(L.LightningModule, ABC):
    """What is specific to a family of diffusion models, with defaults where possible.

    A family supplies :meth:`build`, :meth:`trainable_modules`, :meth:`denoise`, :attr:`sample_shape` and
    :meth:`pretrained`; a latent model sets :attr:`autoencoder`, or overrides :meth:`encode_pixels`, :meth:`decode`
    and :meth:`encoder_identity`; a conditional one overrides :meth:`target_condition`, :meth:`null_condition`,
    :meth:`retention_condition`, :meth:`conditions`, :meth:`source_conditions` and :meth:`source_condition`.

    Attributes:
        autoencoder: Turns pictures into latents and back; ``None`` for a pixel model.
    """

    autoencoder: FrozenAutoencoder | None

    def __init__(self) -> None:
        super().__init__()
        self.autoencoder = None

    float32_matmul_precision = "high"
    """How GPUs multiply float32 matrices, for torch.set_float32_matmul_precision: TF32, as in the authors' code."""
    resize_hint = "Set image_size and channels of the data to fit it."
    """What to do where pictures do not fit the model."""

    @abstractmethod
    def build(self) -> SourceFacts | dict[str, Any]:
        """Create the networks with their pre-trained weights and return the facts of the pre-trained model.

        Called once, before the tuner is applied. Checkpoints carry the facts, and a checkpoint of another model is
        refused. A dict with ``name`` and ``fingerprint`` is enough if nothing else is known.
        """

    @abstractmethod
    def denoise(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Raw network output (B, c or 2c, h, w) for x_t (B, c, h, w) at t (B,) int64."""

    @abstractmethod
    def trainable_modules(self) -> list[nn.Module]:
        """The networks that are trained, or that the tuner is applied to."""

    def denoising_modules(self) -> list[nn.Module]:
        """Networks called by :meth:`denoise` whose weights may be cast together under autocast; none by default.

        A network that switches autocast off for some of its layers does not belong here.
        """
        return []

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """Shape (c, h, w) of a denoised sample."""

    @abstractmethod
    def pretrained(self) -> Denoiser:
        """A frozen copy of the network as it was before tuning, on this module's device.

        It takes the conditions that it was pre-trained with, which may not be this module's; see
        :meth:`source_condition`.
        """

    def encode_pixels(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pictures (B, C, H, W) in [-1, 1] => latents' mean and std; pictures and ``None`` without an autoencoder."""
        return (
            (pixel_values, None) if self.autoencoder is None else self.autoencoder.encode(pixel_values.to(self.device))
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) => pixel values (B, C, H, W) in [-1, 1]; a pixel model clamps."""
        return latents.clamp(-1, 1) if self.autoencoder is None else self.autoencoder.decode(latents)

    def encoder_identity(self) -> str | None:
        """What determines the result of :meth:`encode`; ``None`` for a pixel model, which has nothing to cache."""
        return None if self.autoencoder is None else self.autoencoder.identity()

    @property
    def condition_dropout(self) -> float:
        """Probability that a target sample is trained under :meth:`null_condition`; 0 by default."""
        return 0.0

    def target_condition(self, target: TargetBatch) -> Any:
        """The condition of an encoded target batch: ``None``, a tensor of B rows, or (nested) dicts of such tensors."""
        return None

    def null_condition(self, condition: Any) -> Any:
        """The condition with the part that guidance drops replaced, such as by the null class or the empty prompt."""
        return None

    def conditions(self, indices: Tensor) -> tuple[Any, Any]:
        """Condition and null condition of the generated pictures ``indices`` (B,); two ``None`` if unconditional."""
        return None, None

    def names_of(self, indices: Sequence[int]) -> list[str] | None:
        """What the generated pictures ``indices`` show, in words; ``None`` without a condition."""
        return None

    def source_conditions(self, indices: Tensor) -> tuple[Any, Any]:
        """Condition and null condition of the bank's samples ``indices`` (B,), for the pre-trained network."""
        return None, None

    def source_condition(self, condition: Any) -> Any:
        """The part of this module's condition that the pre-trained network understands; all of it by default."""
        return condition

    def retention_condition(self, retention: RetentionBatch) -> Any:
        """The condition that retained samples are trained under, for :meth:`prepare`; none by default."""
        return None

    def bank_columns(self, indices: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """Columns that the bank stores for the samples ``indices`` (B,) in addition to their latents (B, c, h, w)."""
        return {}

    def picture_columns(self, latents: Tensor) -> dict[str, Tensor]:
        """As :meth:`bank_columns`, for pictures of a ``bank_source`` (latents (B, c, h, w)), drawn under nothing."""
        return {}

    def bank_spec(self) -> dict[str, Any]:
        """What determines :meth:`source_conditions` and :meth:`bank_columns`, as plain JSON values."""
        return {}

    # -- requests of users, and the export of the network ----------------------------------------------------------

    pipeline_tag: ClassVar[str] = "unconditional-image-generation"
    """The hub's word for what it does, on model cards."""
    card_tags: ClassVar[tuple[str, ...]] = ()
    """Its further tags there."""

    def subjects(self, asked: Asked) -> list[Subject]:
        """The rows of the requested grid; a family refuses what it does not support.

        Raises:
            ConfigError: If the model does not support a request.
            DataError: If a picture cannot be read.
        """
        asked.refuse("classes", "prompts", "controls", "maps", because="its pictures have no condition.")
        return [Subject("samples")]

    def conditions_for(self, subjects: Sequence[Subject]) -> tuple[Any, Any]:
        """Condition and null condition of one picture per subject, for :meth:`generate`."""
        return self.conditions(torch.arange(len(subjects)))

    @property
    def lacks_class_names(self) -> bool:
        """Whether the model has classes without names."""
        return False

    def name_classes(self, names: Sequence[str]) -> None:
        """Name the first classes."""

    def write_export(self, network: Any, path: Path) -> nn.Module:
        """Write the network for other programs, and return it as read back; in diffusers' format by default.

        Args:
            network: The trained network, with a tuner's layers merged.
            path: A file ending in ``.safetensors``, or a folder.

        Raises:
            ConfigError: If no format for the network is known.
            CheckpointError: If it cannot be written.
        """
        if not hasattr(network, "save_pretrained"):
            raise ConfigError(
                f"{type(self).__name__} does not say how its {type(network).__name__} is written. Give it a method "
                "write_export(network, path) that returns what it reads back."
            )
        if path.suffix == ".safetensors":
            raise ConfigError(f"A network of diffusers is a folder: give --output {path.stem} in place of {path.name}.")
        return open_network(type(network), export_network(network, path))

    def usage(self, network: Any, path: Path, base: str) -> str:
        """The section of a model card that shows how to open an export, as Markdown.

        Args:
            network: The exported network.
            path: The export.
            base: Name of the pre-trained model.
        """
        return usage_of_network(network, base)


def class_subjects(asked: Sequence[str] | None, names: Sequence[str] | None, count: int) -> list[Subject]:
    """One row per requested class, or per class of the first ``FEW``.

    Args:
        asked: Names or numbers.
        names: Names of the first classes, or of all.
        count: Number of classes.
    """
    first = range(min(FEW, count if names is None else len(names)))
    labels = first if asked is None else [class_number(name, names, count) for name in asked]
    known = dict(enumerate(names or ()))
    return [Subject(known.get(label, f"class {label}"), label) for label in labels]


def class_number(asked: str, names: Sequence[str] | None, count: int) -> int:
    """The number of a class, given by its exact name, a loose match, a number, or one of its comma-separated names.

    A loose match ignores case, underscores and hyphens. The first of the four that matches is used. Of classes that are
    all named by numbers, such as folders 1 to 102, the numbers are their names alone: 1 would also be the second one.

    Raises:
        ConfigError: If there is no such class, or the name fits several.

    Example:
        >>> class_number("white shark", ["tench, Tinca tinca", "great white shark, White_shark"], 2)
        1
        >>> class_number("1", None, 2), class_number("UPPER", ["upper", "UPPER"], 2)
        (1, 1)
    """
    names = names or ()
    loose = [_plain(name) for name in names]
    synonyms = [{_plain(part) for part in name.split(",")} for name in names]
    named = len(names) if all(name.isdecimal() for name in names) else 0  # the first classes, by numbers
    number = int(asked) if asked.isdecimal() and named <= int(asked) < count else None
    for fitting in (
        [label for label, name in enumerate(names) if name == asked],
        [label for label, name in enumerate(loose) if name == _plain(asked)],
        [] if number is None else [number],
        [label for label, parts in enumerate(synonyms) if _plain(asked) in parts],
    ):
        if len(fitting) > 1:
            found = ", ".join(f"{label} ({names[label]})" for label in fitting)
            raise ConfigError(f"{asked!r} is the name of {len(fitting)} classes. Select one by its number: {found}.")
        if fitting:
            return fitting[0]
    if not names:
        raise ConfigError(f"There is no class {asked!r}: this model has no names, and the numbers 0 to {count - 1}.")
    known = {part: name for name, parts in zip(names, synonyms, strict=True) for part in parts}
    if not (fix := did_you_mean(_plain(asked), known, known)):
        fix = f"Its classes are {', '.join(names[:FEW])}{', ...' if len(names) > FEW else '.'}"
    raise ConfigError(f"There is no class {asked!r} among the {len(names)}. {fix}")


def _plain(name: str) -> str:
    """Without the differences that a loose match ignores, those of accents as macOS writes them included."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name)).strip().lower()
