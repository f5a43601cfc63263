"""Interfaces between the subpackages: structural types only, so that no inheritance is needed.

Convention everywhere: t = 0 is data, t = T is noise, T = 1000 discrete steps indexed 0..T-1, s = (t + 1) / T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NotRequired, Protocol, TypedDict, runtime_checkable

from torch import Tensor, nn

Split = Literal["train", "val"]  # pictures that are trained on, and those held out


class TargetBatch(TypedDict):
    """One batch of the target domain: pictures with labels or captions, or the encodings of both."""

    pixel_values: NotRequired[Tensor]  # (B, C, H, W) float32 in [-1, 1]
    latent_mean: NotRequired[Tensor]  # (B, c, h, w), scaled latents
    latent_std: NotRequired[Tensor]  # (B, c, h, w), same scale
    class_labels: NotRequired[Tensor]  # (B,) int64
    captions: NotRequired[list[str]]  # B captions
    prompt_embeds: NotRequired[Tensor]  # (B, L, D), the captions' embeddings
    conditioning_pixel_values: NotRequired[Tensor]  # (B, 1 or 3, H, W) uint8, control maps


class RetentionBatch(TypedDict):
    """One batch of the memory bank: samples of the pre-trained model, in the space it denoises."""

    latents: Tensor  # (B, c, h, w) float32
    class_labels: NotRequired[Tensor]  # (B,) int64, the source classes of the samples
    conditioning_pixel_values: NotRequired[Tensor]  # (B, 1 or 3, H, W) uint8, control maps of the samples themselves
    timesteps: NotRequired[Tensor]  # (B,) int64, the timestep of the stored prediction
    noise: NotRequired[Tensor]  # (B, c, h, w) float32, the noise of that prediction
    predictions: NotRequired[Tensor]  # (B, c, h, w) float32, the pre-trained network's output


class DiffTuningBatch(TypedDict):
    """A batch of :class:`MemoryBankDataModule`; ``retention`` is absent in plain fine-tuning."""

    target: TargetBatch
    retention: NotRequired[RetentionBatch]


class Denoiser(Protocol):
    """A network under any condition: noisy input, timesteps, condition => raw network output."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """x_t (B, c, h, w), t (B,) in [0, T), condition of B entries => (B, c or 2c, h, w).

        Timesteps are int64 in training; many schedulers sample at fractional ones, float32.
        """


@runtime_checkable
class SupportsGenerate(Protocol):
    """A model that turns sample indices into pictures; sample i depends only on its seed and i."""

    def generate(self, indices: Tensor) -> Tensor:
        """Indices (B,) int64 => pictures (B, 1 or 3, H, W) uint8."""


class GeneratesClasses(Protocol):
    """A model of K classes that generates samples of the requested ones."""

    @property
    def num_classes(self) -> int:
        """Classes K."""

    @property
    def trainer(self) -> Any:
        """The attached trainer, whose precision is used for sampling."""

    def class_conditions(self, class_labels: Tensor) -> tuple[Any, Any]:
        """Condition and null condition for classes (B,) int64."""

    def generate(self, indices: Tensor, conditions: tuple[Any, Any]) -> Tensor:
        """Sample indices (B,) and their conditions => pictures (B, 1 or 3, H, W) uint8."""


@runtime_checkable
class SupportsDenoisingLosses(Protocol):
    """A module whose denoising can be compared with that of its pre-trained network."""

    @property
    def num_timesteps(self) -> int:
        """T of the forward process."""

    def prepare(self, batch: Any, draws: Any) -> tuple[Tensor, Any, Tensor]:
        """Batch => x0 (B, c, h, w), condition, is_retention (B,) bool; eval mode drops no condition."""

    def denoise(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Output of the current network; see :class:`Denoiser`."""

    def pretrained(self) -> Denoiser:
        """The network as it was before tuning, frozen, on this module's device."""

    def source_condition(self, condition: Any) -> Any:
        """The part of this module's condition that the pre-trained network understands."""

    def denoising_losses(self, denoise: Denoiser, x0: Tensor, condition: Any, t: Tensor, noise: Tensor) -> Tensor:
        """Simple losses (B,) of a network on x0 (B, c, h, w) under noise of that shape at t (B,) int64."""


@runtime_checkable
class SupportsReferenceImages(Protocol):
    """A data module with real pictures that generated ones are compared with."""

    def reference_images(self) -> Iterator[Tensor]:
        """Batches (B, 1 or 3, H, W) uint8 in a fixed order."""

    def reference_identity(self) -> str:
        """A string that changes when the reference pictures do; the key of cached statistics."""


@runtime_checkable
class SupportsLabelledImages(Protocol):
    """A data module whose training and held-out pictures have classes."""

    def labelled_images(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of pictures (B, 1 or 3, H, W) uint8 and their classes (B,) int64, in a fixed order."""

    def images_identity(self, split: Split) -> str:
        """A string that changes when these pictures do; a key of caches."""


@runtime_checkable
class BankGenerator(Protocol):
    """The pre-trained model as the source of a memory bank."""

    def bank_spec(self) -> dict[str, Any]:
        """What determines a bank's bytes (weights' fingerprint, sampler, guidance, seed), as plain JSON values."""

    def generate_bank(self, indices: Tensor) -> dict[str, Tensor]:
        """Indices (B,) int64 => ``{"latents": (B, c, h, w) float32, ...}`` on the CPU, with any other columns."""


class BankPictures(Protocol):
    """Pictures that fill a memory bank in place of samples."""

    def __len__(self) -> int:
        """How many there are."""

    def identity(self) -> str:
        """Digest of everything that determines the pictures."""

    def pixels(self, indices: Sequence[int], flips: Sequence[bool]) -> TargetBatch:
        """B pictures at ``indices``, mirrored where ``flips``: ``pixel_values`` (B, C, H, W) in [-1, 1] and more."""


@runtime_checkable
class SupportsBankGeneration(Protocol):
    """A module whose pre-trained model can fill a memory bank."""

    @property
    def uses_retention(self) -> bool:
        """Whether training gives the bank any weight."""

    def bank_generator(self, pictures: BankPictures | None = None) -> BankGenerator:
        """The pre-trained model, unchanged by training, or pictures in place of its samples."""


@runtime_checkable
class SupportsEncode(Protocol):
    """A module whose frozen networks encode target samples, for example as latents."""

    def encode(self, batch: TargetBatch) -> TargetBatch:
        """A target batch as read => tensors for training, including ``latent_mean`` and ``latent_std``."""

    def encoder_identity(self) -> str | None:
        """What determines the result of :meth:`encode`; ``None`` for a pixel model."""


@runtime_checkable
class SupportsCaptions(Protocol):
    """A module whose target batches have columns that depend only on the caption."""

    @property
    def caption_columns(self) -> Sequence[str]:
        """Their names, such as ``prompt_embeds``; a latent cache stores them once for each distinct caption."""


@runtime_checkable
class Annotator(Protocol):
    """Turns pictures into the control maps that a ControlNet follows: edges, depth, segmentation."""

    channels: int  # of its control maps, 1 or 3

    # Any stands for Tensor: configuration files would take a callable that returns a Tensor for a factory of Tensors.
    def __call__(self, pictures: Tensor, /) -> Any:
        """Pictures (B, 3, H, W) uint8 => control maps, a Tensor (B, channels, H, W) uint8 on the same device.

        A picture's map depends only on that picture.
        """

    def identity(self) -> str:
        """What determines the maps: name, constants and, for networks, the weights' fingerprint; a key of stores."""


@runtime_checkable
class SupportsControlExamples(Protocol):
    """A data module, or another object, with held-out pictures to take controls from."""

    @property
    def num_control_examples(self) -> int:
        """How many there are."""

    def control_examples(self, indices: Sequence[int]) -> tuple[Any, ...]:
        """Positions below :attr:`num_control_examples` => pictures (B, 3, H, W) uint8 and their captions.

        Control maps (B, 1 or 3, H, W) uint8 may follow, in place of those of an annotator. The same on every process.
        """


@runtime_checkable
class Tuner(Protocol):
    """A parameter-efficient method: inserts layers into a network and selects what is trained."""

    def apply(self, model: nn.Module) -> None:
        """Insert the method's layers and set ``requires_grad``; the network's function stays the same."""


class Evaluator(Protocol):
    """A measurement at the end of a run, named in the study file of ``difftune compare``.

    One that is also a :class:`ChecksModule` says before the training what it could not measure after it.
    """

    def evaluate(self, module: Any) -> dict[str, float]:
        """Metrics by name, of the LightningModule ``module`` with its current weights."""


@runtime_checkable
class ChecksModule(Protocol):
    """An evaluator that can tell at the start of a run whether it can measure it at the end."""

    def check(self, module: Any) -> None:
        """Raise a :class:`~lightning_difftune.errors.DiffTuneError` if ``module``, with its trainer, does not do."""
