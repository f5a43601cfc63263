"""A pre-trained diffusion model: what a family supplies, and how pictures are drawn with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_difftune.draws import float32_by_default, noise_of
from lightning_difftune.errors import ConfigError
from lightning_difftune.models import FrozenAutoencoder, export_network
from lightning_difftune.models.diffusers_folder import open_network
from lightning_difftune.models.frozen import takes_its_own_type
from lightning_difftune.models.usage import usage_of_network
from lightning_difftune.models.weight_casts import WeightCasts, weight_casts_of
from lightning_difftune.modules.subjects import Subject, refuse
from lightning_difftune.pictures import to_uint8
from lightning_difftune.protocols import (
    Denoiser,
    RetentionBatch,
    TargetBatch,
)
from lightning_difftune.sampling import Guided, NoiseScheduler, Sampler, ddim_for, scheduler_named
from lightning_difftune.source import SourceFacts, check_scheduler

Model = TypeVar("Model", bound=nn.Module)


class DiffusionModel(L.LightningModule, ABC):
    """A pre-trained diffusion model: what a family says of its own, and how pictures are drawn with it.

    A family supplies :meth:`build`, :meth:`trainable_modules`, :meth:`denoise`, :attr:`sample_shape` and
    :meth:`pretrained`; one of latents sets :attr:`autoencoder`, or has :meth:`encode_pixels`, :meth:`decode` and
    :meth:`encoder_identity` of its own; and a conditional one :meth:`target_condition`, :meth:`null_condition`,
    :meth:`retention_condition`, :meth:`conditions`, :meth:`source_conditions` and :meth:`source_condition`.
    :class:`~lightning_difftune.modules.DiffTuningModule` adds the training.

    Args:
        sampler: How pictures are generated for FID and grids; what it leaves out is as :meth:`default_sampler` has it,
            and the scheduler is made for the model.
        bank_sampler: How the memory bank is generated; what it leaves out is as ``sampler`` has it.
        seed: Seed of training draws, of generated pictures and of the bank.

    Attributes:
        source_facts: What the pre-trained model is, once it is built.
        autoencoder: Turns pictures into latents and back; ``None`` for a model of pixels.
    """

    source_facts: SourceFacts
    _weight_casts: WeightCasts
    autoencoder: FrozenAutoencoder | None

    def __init__(self, sampler: Sampler | None = None, bank_sampler: Sampler | None = None, seed: int = 0) -> None:
        super().__init__()
        self.autoencoder = None
        self.sampler = sampler if sampler is not None else Sampler()
        self.bank_sampler = bank_sampler if bank_sampler is not None else Sampler()
        self.seed = seed
        # In a tuple, where nn.Module does not register it: it is not a part of the model.
        self._frozen: tuple[torch.device, Denoiser] | None = None

    # -- what a model family supplies ----------------------------------------------------------------------------

    float32_matmul_precision = "high"
    """How GPUs multiply float32 matrices, for torch.set_float32_matmul_precision: TF32, as in the authors' code."""
    resize_hint = "Set image_size and channels of the data to fit it."
    """What to do where pictures do not fit the model."""

    @abstractmethod
    def build(self) -> SourceFacts | dict[str, Any]:
        """Create the networks with their pre-trained weights and return the facts of the pre-trained model.

        Called once, before the tuner is applied. Checkpoints carry the facts, and a checkpoint of another model is
        refused. A dict with ``name`` and ``fingerprint`` stands for facts that state nothing else.
        """

    @abstractmethod
    def denoise(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Raw network output (B, c or 2c, h, w) for x_t (B, c, h, w) at t (B,) int64."""

    @abstractmethod
    def trainable_modules(self) -> list[nn.Module]:
        """The networks that are trained, or that the tuner is applied to."""

    def denoising_modules(self) -> list[nn.Module]:
        """The networks that :meth:`denoise` calls; the trained ones by default."""
        return self.trainable_modules()

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """(c, h, w) of what is denoised."""

    @abstractmethod
    def pretrained(self) -> Denoiser:
        """A frozen copy of the network as it was before tuning, on this module's device.

        It takes the conditions that it was pre-trained with, which may not be this module's; see
        :meth:`source_condition`.
        """

    def encode_pixels(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pictures (B, C, H, W) in [-1, 1] => mean and deviation of their latents; themselves and none without any."""
        return (
            (pixel_values, None) if self.autoencoder is None else self.autoencoder.encode(pixel_values.to(self.device))
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) => pixel values (B, C, H, W) in [-1, 1]; a model of pixels clamps."""
        return latents.clamp(-1, 1) if self.autoencoder is None else self.autoencoder.decode(latents)

    def encoder_identity(self) -> str | None:
        """What decides the result of :meth:`encode`; ``None`` for a model of pixels, which has nothing to cache."""
        return None if self.autoencoder is None else self.autoencoder.identity()

    @property
    def condition_dropout(self) -> float:
        """Probability that a target sample is trained under :meth:`null_condition`; 0 by default."""
        return 0.0

    def target_condition(self, target: TargetBatch) -> Any:
        """The condition of an encoded target batch: ``None``, a tensor of B rows, or (nested) dicts of such tensors."""
        return None

    def null_condition(self, condition: Any) -> Any:
        """The same condition with that dropped which guidance drops, such as the null class or the empty prompt."""
        return None

    def conditions(self, indices: Tensor) -> tuple[Any, Any]:
        """Condition and null condition of the generated pictures ``indices`` (B,); ``None`` twice if there are none."""
        return None, None

    def names_of(self, indices: Sequence[int]) -> list[str] | None:
        """What the generated pictures ``indices`` show, in words; ``None`` without a condition."""
        return None

    def source_conditions(self, indices: Tensor) -> tuple[Any, Any]:
        """Condition and null condition of the bank's samples ``indices`` (B,), for the pre-trained network."""
        return None, None

    def source_condition(self, condition: Any) -> Any:
        """What the pre-trained network understands of a condition of this module; all of it by default."""
        return condition

    def retention_condition(self, retention: RetentionBatch) -> Any:
        """The condition that retained samples are trained under, as :meth:`prepare` gives it; none by default."""
        return None

    def bank_columns(self, indices: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """What the bank keeps of the samples ``indices`` (B,) in addition to their latents (B, c, h, w)."""
        return {}

    def bank_spec(self) -> dict[str, Any]:
        """What decides :meth:`source_conditions` and :meth:`bank_columns`, as plain JSON values."""
        return {}

    # -- what people ask a family for, and how its network is handed on --------------------------------------------

    pipeline_tag: ClassVar[str] = "unconditional-image-generation"
    """The hub's word for what it does, on model cards."""
    card_tags: ClassVar[tuple[str, ...]] = ()
    """Its further tags there."""

    def subjects(
        self,
        classes: Sequence[str] | None = None,
        prompts: Sequence[str] | None = None,
        controls: Sequence[str] | None = None,
    ) -> list[Subject]:
        """The rows of pictures that people ask for; what a family can be asked for is what it does not refuse.

        Args:
            classes: Names or numbers of classes.
            prompts: Texts.
            controls: Files of pictures that control maps are taken from.

        Raises:
            ConfigError: If something is asked for that the model does not take.
            DataError: If a picture cannot be read.
        """
        asked = (("--classes", classes), ("--prompts", prompts), ("--controls", controls))
        refuse(asked, "its pictures have no condition.")
        return [Subject("samples")]

    def conditions_for(self, subjects: Sequence[Subject]) -> tuple[Any, Any]:
        """Condition and null condition of one picture of each subject, for :meth:`generate`."""
        return self.conditions(torch.arange(len(subjects)))

    @property
    def lacks_class_names(self) -> bool:
        """Whether its classes could have names and have none."""
        return False

    def name_classes(self, names: Sequence[str]) -> None:
        """Name the first classes."""

    def write_export(self, network: Any, path: Path) -> nn.Module:
        """Write its plain network for others to open, and return what is read back; by default a network of diffusers.

        Args:
            network: The trained network, with a tuner's layers merged.
            path: A file ending in ``.safetensors``, or a folder.

        Raises:
            ConfigError: If nothing says how the network is written.
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
        """The section of a model card that says how an export is opened, as Markdown.

        Args:
            network: What was exported.
            path: Where.
            base: Name of the pre-trained model.
        """
        return usage_of_network(network, base)

    # -- the model and its samplers --------------------------------------------------------------------------------

    @property
    def base_identity(self) -> dict[str, Any]:
        """Name, fingerprint and what else identifies the pre-trained model, as flat plain values."""
        return self.source_facts.base_identity if hasattr(self, "source_facts") else {}

    def default_scheduler(self) -> NoiseScheduler:
        """The scheduler of a sampler that has none, for :attr:`source_facts`: DDIM, or Euler steps in a flow."""
        return ddim_for(self.source_facts)

    def default_sampler(self) -> Sampler:
        """What :attr:`sampler` has where it says nothing, without a scheduler: here 50 steps without guidance."""
        return Sampler(None, 50, 1.0, None)

    def default_bank_sampler(self) -> Sampler:
        """What :attr:`bank_sampler` has where it says nothing: here what :attr:`sampler` has."""
        return self.sampler

    def fitted(self, sampler: Sampler, role: str = "the sampler") -> Sampler:
        """A sampler for the pre-trained model: completed as its family has it, and its scheduler made or compared.

        Raises:
            ConfigError: If its scheduler reverses another process, takes another prediction, or clips latents.
        """
        sampler = sampler.completed(self.default_sampler())
        if sampler.scheduler is None:
            return replace(sampler, scheduler=self.default_scheduler())
        if isinstance(sampler.scheduler, str):
            named = scheduler_named(sampler.scheduler, self.default_scheduler().config)
            sampler = replace(sampler, scheduler=named)
        check_scheduler(sampler.scheduler, self.source_facts, role)
        return sampler

    @property
    def sampler(self) -> Sampler:
        """How pictures are generated: as it was given and, once the model is built, complete and made for it."""
        return self._sampler

    @sampler.setter
    def sampler(self, sampler: Sampler) -> None:
        self._sampler = self.fitted(sampler, "the sampler") if hasattr(self, "source_facts") else sampler

    @property
    def bank_sampler(self) -> Sampler:
        """How the memory bank is generated, likewise."""
        return self._bank_sampler

    @bank_sampler.setter
    def bank_sampler(self, sampler: Sampler) -> None:
        # The bank is of the pre-trained model, whose Domain Guidance by itself would be plain guidance.
        sampler = replace(sampler, domain_guidance=False, pretrained_tail=0.0)
        if hasattr(self, "source_facts"):
            own = replace(self.default_bank_sampler(), domain_guidance=False, pretrained_tail=0.0)
            sampler = self.fitted(sampler.completed(own), "the bank_sampler")
        self._bank_sampler = sampler

    def completed_settings(self) -> dict[str, dict[str, Any]]:
        """Arguments of this module that were filled in when it was built, for the config of its run."""
        names = ("num_inference_steps", "guidance_scale", "guidance_channels", "domain_guidance", "pretrained_tail")
        samplers = {"sampler": self.sampler, "bank_sampler": self.bank_sampler}
        return {role: {name: getattr(sampler, name) for name in names} for role, sampler in samplers.items()}

    def posterior(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`encode_pixels`, checked: mean and standard deviation (B, c, h, w), if any, of what is denoised.

        Raises:
            ConfigError: If the model denoises another shape.
        """
        mean, std = self.encode_pixels(pixel_values)
        if tuple(mean.shape[1:]) != self.sample_shape:
            raise ConfigError(
                f"Pictures of shape {tuple(pixel_values.shape[1:])} become samples of shape {tuple(mean.shape[1:])}, "
                f"but the model denoises {self.sample_shape}. {self.resize_hint}"
            )
        return mean, std

    def encode(self, batch: TargetBatch) -> TargetBatch:
        """Pictures (B, C, H, W) => ``latent_mean`` and, in latent models, ``latent_std`` (B, c, h, w).

        Other tensors, such as class labels, stay.

        Raises:
            ConfigError: If the model denoises another shape.
        """
        mean, std = self.posterior(batch["pixel_values"])
        others = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k != "pixel_values"}
        deviation = {} if std is None else {"latent_std": std}
        return cast("TargetBatch", {"latent_mean": mean, **deviation, **others})

    def frozen(self, network: Model) -> Model:
        """A network that stays as it is, on this module's device and at its precision, for :meth:`pretrained`."""
        network = takes_its_own_type(network).requires_grad_(False).eval().to(self.device)
        return network if self.dtype == torch.float32 else network.to(self.dtype)

    @float32_by_default()
    def frozen_denoiser(self) -> Denoiser:
        """The :meth:`pretrained` network, loaded once and kept until this module moves to another device."""
        if self._frozen is None or self._frozen[0] != self.device:
            self._frozen = (self.device, self.pretrained())
        return self._frozen[1]

    def teacher(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """The pre-trained network's raw output (B, c or 2c, h, w) under a condition of this module."""
        denoise = self.frozen_denoiser()
        with self.weights_cast(denoise):
            return denoise(x_t, t, self.source_condition(condition))

    def weights_cast(self, denoise: Denoiser) -> AbstractContextManager[None]:
        """Under autocast, the weights of a network are cast in few operations (:class:`WeightCasts`)."""
        if isinstance(denoise, nn.Module):
            return weight_casts_of(denoise).active()
        plugin = None if self._trainer is None else self._trainer.precision_plugin
        # Of one device and of DDP: strategies that shard weights have plugins of their own.
        return self._weight_casts.active() if isinstance(plugin, MixedPrecision) else nullcontext()

    # -- drawing ----------------------------------------------------------------------------------------------------

    def start_noise(self, indices: Tensor) -> Tensor:
        """Noise (B, c, h, w) on the device, from the seed and each of the indices (B,) alone."""
        return noise_of(self.seed, indices, self.sample_shape).to(self.device)

    def draw_latents(self, denoise: Denoiser, sampler: Sampler, indices: Tensor, conditions: tuple[Any, Any]) -> Tensor:
        """Samples (B, c, h, w) whose start noise depends on the seed and their index alone, for indices (B,)."""
        condition, null_condition = conditions
        null_condition, null_denoise = self.null_branch(sampler, null_condition)
        noise = self.start_noise(indices)
        with self.weights_cast(denoise):
            if sampler.pretrained_tail:
                tuned = sampler.guided(denoise, condition, null_condition, null_denoise)
                return sampler.swap(tuned, self.guided_source(conditions), noise, [sampler.pretrained_tail])[0]
            return sampler(denoise, noise, condition, null_condition, null_denoise=null_denoise)

    def guided_source(self, conditions: tuple[Any, Any]) -> Guided:
        """The pre-trained network under what it understands of a condition and a null condition of this module."""
        return self.sampler.guided(self.frozen_denoiser(), *map(self.source_condition, conditions))

    def generate(self, indices: Tensor, conditions: tuple[Any, Any] | None = None) -> Tensor:
        """Pictures (B, C, H, W) uint8; picture i depends on the seed and i alone.

        Args:
            indices: Sample indices (B,).
            conditions: Condition and null condition to use instead of :meth:`conditions`.
        """
        conditions = self.conditions(indices) if conditions is None else conditions
        return to_uint8(self.decode(self.draw_latents(self.denoise, self.sampler, indices, conditions)))

    def null_branch(self, sampler: Sampler, null_condition: Any) -> tuple[Any, Denoiser | None]:
        """Condition and network of the unconditional branch: with Domain Guidance, those of the pre-trained model."""
        if not sampler.domain_guidance:
            return null_condition, None
        return self.source_condition(null_condition), self.frozen_denoiser()

    def guided(self, indices: Tensor) -> Guided:
        """The network under its guidance, as :meth:`generate` uses it for the pictures ``indices`` (B,)."""
        condition, null_condition = self.conditions(indices)
        return self.sampler.guided(self.denoise, condition, *self.null_branch(self.sampler, null_condition))

    def generate_swapped(
        self, indices: Tensor, fractions: Sequence[float], tail: DiffusionModel | None = None
    ) -> Tensor:
        """Pictures whose last steps are done by another network (Fig. 1 of the paper).

        Args:
            indices: Sample indices (B,); at fraction 0, picture i is that of :meth:`generate`.
            fractions: P numbers in [0, 1], the parts of the reverse process that are swapped.
            tail: The module whose network does them; ``None`` is the pre-trained one.

        Returns:
            (P, B, C, H, W) uint8.

        Raises:
            ConfigError: If the other network makes other predictions, or knows other noise or latents.
        """
        if tail is None:
            last = self.guided_source(self.conditions(indices))
            fractions = [max(fraction, self.sampler.pretrained_tail) for fraction in fractions]
        else:
            changed = self.source_facts.differences(tail.source_facts.state())
            if changed:
                raise ConfigError(f"The tail has {' and '.join(changed)}: it cannot continue this model's samples.")
            last = tail.guided(indices)
        swapped = self.sampler.swap(self.guided(indices), last, self.start_noise(indices), fractions)
        return torch.stack([to_uint8(self.decode(latents)) for latents in swapped])
