"""A pre-trained diffusion model: its samplers, the preparation of batches, and sampling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from numbers import Integral
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_difftune.conditions import concatenate, where
from lightning_difftune.draws import Draws, float32_by_default, noise_of, seeded
from lightning_difftune.errors import ConfigError, DataError, check_kinds
from lightning_difftune.models.casts import WeightCasts, takes_its_own_type, weight_casts_of
from lightning_difftune.modules.data_checks import check_subjects, check_target
from lightning_difftune.modules.family import ModelFamily
from lightning_difftune.pictures import to_uint8
from lightning_difftune.protocols import Denoiser, DiffTuningBatch, TargetBatch
from lightning_difftune.sampling import Guided, NoiseScheduler, Sampler, ddim_for, scheduler_named
from lightning_difftune.sampling.sampler import check_scheduler, check_steps
from lightning_difftune.sampling.schedulers import describe_unfit
from lightning_difftune.source import SourceFacts
from lightning_difftune.trainers import evaluating

Model = TypeVar("Model", bound=nn.Module)

_SAMPLER = Sampler, "a Sampler, such as Sampler(num_inference_steps=50)"


class DiffusionModel(ModelFamily):
    """A pre-trained diffusion model that encodes and generates pictures.

    :class:`~lightning_difftune.modules.DiffTuningModule` adds the training.

    Args:
        sampler: How pictures are generated for FID and grids; by default with the model's scheduler.
        bank_sampler: How the memory bank is generated; like ``sampler`` by default.
        seed: Seed of the training draws, the generated pictures and the bank.

    Attributes:
        source_facts: What the pre-trained model is, once it is built.
    """

    source_facts: SourceFacts
    _weight_casts: WeightCasts

    def __init__(self, sampler: Sampler | None = None, bank_sampler: Sampler | None = None, seed: int = 0) -> None:
        super().__init__()
        check_kinds(type(self).__name__, seed=(seed, Integral, "a whole number"))
        self.sampler = sampler if sampler is not None else Sampler()
        self.bank_sampler = bank_sampler if bank_sampler is not None else Sampler()
        self.seed = seed
        self._checked: Counter[Any] = Counter()  # batches per stage that were looked at
        # In a tuple, so that nn.Module does not register it: it is not part of the model.
        self._frozen: tuple[torch.device, Denoiser] | None = None

    def setup(self, stage: str) -> None:
        """Begin anew to look at batches: another run may have other data."""
        self._checked.clear()

    # -- the model and its samplers --------------------------------------------------------------------------------

    @property
    def base_identity(self) -> dict[str, Any]:
        """Name, fingerprint and whatever else identifies the pre-trained model, as flat plain values."""
        return self.source_facts.base_identity if hasattr(self, "source_facts") else {}

    def default_scheduler(self) -> NoiseScheduler:
        """The default scheduler for :attr:`source_facts`: DDIM, or Euler for a flow."""
        return ddim_for(self.source_facts)

    def default_sampler(self) -> Sampler:
        """Defaults of :attr:`sampler` except for the scheduler: here 50 steps without guidance."""
        return Sampler(None, 50, 1.0, None)

    def default_bank_sampler(self) -> Sampler:
        """Defaults of :attr:`bank_sampler`: here those of :attr:`sampler`."""
        return self.sampler

    def fitted(self, sampler: Sampler, role: str = "the sampler") -> Sampler:
        """A sampler completed for the pre-trained model; its scheduler is created, or compared with the model.

        Raises:
            ConfigError: If its scheduler reverses another process, takes another prediction, or clips latents; or if
                its settings for the pre-trained network have no effect.
        """
        sampler, given = sampler.completed(self.default_sampler()), sampler.scheduler
        if given is None or isinstance(given, str):
            own = self.default_scheduler()
            sampler = replace(sampler, scheduler=own if given is None else scheduler_named(given, own.config))
        if given is not None:
            check_scheduler(sampler.scheduler, self.source_facts, role)
            unfit = describe_unfit(sampler.scheduler, cast("int", sampler.num_inference_steps), self.source_facts)
            if unfit is not None:
                rank_zero_warn(f"{role}: {unfit}")
        check_steps(sampler, role)
        return sampler

    @property
    def sampler(self) -> Sampler:
        """How pictures are generated; completed for the model once it is built."""
        return self._sampler

    @sampler.setter
    def sampler(self, sampler: Sampler) -> None:
        check_kinds(type(self).__name__, sampler=(sampler, *_SAMPLER))
        self._sampler = self.fitted(sampler, "the sampler") if hasattr(self, "source_facts") else sampler

    @property
    def bank_sampler(self) -> Sampler:
        """How the memory bank is generated; completed for the model once it is built."""
        return self._bank_sampler

    @bank_sampler.setter
    def bank_sampler(self, sampler: Sampler) -> None:
        check_kinds(type(self).__name__, bank_sampler=(sampler, *_SAMPLER))
        # The pre-trained model draws the bank, so Domain Guidance would be plain guidance.
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
        """:meth:`encode_pixels`, checked: mean and, if any, standard deviation (B, c, h, w) of the latents.

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

        Other tensors, such as class labels, are kept.

        Raises:
            ConfigError: If the model denoises another shape.
        """
        mean, std = self.posterior(batch["pixel_values"])
        others = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k != "pixel_values"}
        deviation = {} if std is None else {"latent_std": std}
        return cast("TargetBatch", {"latent_mean": mean, **deviation, **others})

    def prepare(self, batch: DiffTuningBatch, draws: Draws) -> tuple[Tensor, Any, Tensor]:
        """One batch of both streams: x0 (B, c, h, w), its condition, and (B,) bool, true for retained samples.

        A target sample is drawn from its latents' posterior and, in training, loses its condition with probability
        ``condition_dropout``. A retained sample comes from the bank unchanged, under :meth:`retention_condition`.
        """
        if not isinstance(batch, Mapping) or not isinstance(batch.get("target"), Mapping):
            found = f"the keys {sorted(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise DataError(
                'A batch is {"target": {"pixel_values": (B, C, H, W), "class_labels": (B,)}, "retention": ...}; found '
                f"{found}. Pass your data set to lightning_difftune.MemoryBankDataModule, which makes them, or return "
                "such dicts from the collate_fn of your loader."
            )
        stage = None if self._trainer is None else self._trainer.state.stage
        check_target(batch["target"], getattr(self, "num_classes", None), self._checked[stage])
        self._checked[stage] += 1
        target = batch["target"] if "latent_mean" in batch["target"] else self.encode(batch["target"])
        x0, std = target["latent_mean"].float(), target.get("latent_std")
        if std is not None:
            x0 = x0 + std.float() * draws.normal(*x0.shape)
        condition = self.target_condition(target)
        if self.training and condition is not None:
            dropped = draws.uniform(len(x0)) < self.condition_dropout
            condition = where(dropped, self.null_condition(condition), condition)
        retained = batch.get("retention")
        is_retention = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
        if retained is not None:
            latents = retained["latents"].to(x0)
            x0 = torch.cat([x0, latents])
            condition = concatenate(condition, self.retention_condition(retained))
            is_retention = torch.cat([is_retention, is_retention.new_ones(len(latents))])
        return x0, condition, is_retention

    def draws(self, step: int) -> Draws:
        """Random numbers of one step, for this process's share of the global batch."""
        return Draws(self.seed, step, self.device, *self._place)

    @property
    def _place(self) -> tuple[int, int]:
        """Rank of this process, and the world size."""
        place: Any = self.trainer if self._fabric is None else self._fabric
        return place.global_rank, place.world_size

    def frozen(self, network: Model) -> Model:
        """A network, frozen, on this module's device and at its precision, for :meth:`pretrained`."""
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
        """Cast the weights of a network in few operations under autocast (:class:`WeightCasts`)."""
        if not self.denoising_modules():
            return nullcontext()
        if isinstance(denoise, nn.Module):
            return weight_casts_of(denoise).active()
        plugin = None if self._trainer is None else self._trainer.precision_plugin
        # For one device and DDP: strategies that shard weights have plugins of their own.
        return self._weight_casts.active() if isinstance(plugin, MixedPrecision) else nullcontext()

    # -- drawing ----------------------------------------------------------------------------------------------------

    def start_noise(self, indices: Tensor) -> Tensor:
        """Noise (B, c, h, w) on the device; each row depends only on the seed and its index (B,)."""
        return noise_of(self.seed, indices, self.sample_shape).to(self.device)

    def draw_latents(self, denoise: Denoiser, sampler: Sampler, indices: Tensor, conditions: tuple[Any, Any]) -> Tensor:
        """Samples (B, c, h, w) whose start noise depends only on the seed and their index, for indices (B,)."""
        condition, null_condition = conditions
        null_condition, null_denoise = self.null_branch(sampler, null_condition)
        noise = self.start_noise(indices)
        with self.weights_cast(denoise), self._solver_noise(indices):
            if sampler.pretrained_tail:
                tuned = sampler.guided(denoise, condition, null_condition, null_denoise)
                return sampler.swap(tuned, self.guided_source(conditions), noise, [sampler.pretrained_tail])[0]
            return sampler(denoise, noise, condition, null_condition, null_denoise=null_denoise)

    def _solver_noise(self, indices: Tensor) -> AbstractContextManager[None]:
        """Noise of solvers that add some: it depends only on the seed and the batch of indices."""
        return seeded(self.device, "solver", self.seed, *indices.tolist())

    def guided_source(self, conditions: tuple[Any, Any]) -> Guided:
        """The pre-trained network under the part of this module's conditions that it understands."""
        return self.sampler.guided(self.frozen_denoiser(), *map(self.source_condition, conditions))

    def generate(self, indices: Tensor, conditions: tuple[Any, Any] | None = None) -> Tensor:
        """Pictures (B, C, H, W) uint8; picture i depends only on the seed and i, under a solver that adds no noise.

        Args:
            indices: Sample indices (B,).
            conditions: Condition and null condition to use instead of :meth:`conditions`.
        """
        self.configure_model()
        with evaluating(self):  # without dropout, also between the steps of a training
            conditions = self.conditions(indices) if conditions is None else conditions
            return to_uint8(self.decode(self.draw_latents(self.denoise, self.sampler, indices, conditions)))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Pictures (B, C, H, W) uint8 for sample indices (B,); on a data module, ``predict`` builds the memory bank."""
        return self.generate(batch)

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
        """Pictures whose last steps are denoised by another network (Fig. 1 of the paper).

        Args:
            indices: Sample indices (B,); at fraction 0, picture i is that of :meth:`generate`.
            fractions: P numbers in [0, 1], the parts of the reverse process that are swapped.
            tail: The module whose network takes these steps; ``None`` is the pre-trained one.

        Returns:
            (P, B, C, H, W) uint8.

        Raises:
            ConfigError: If the other network has another prediction type, noise process or latent scale, or its module
                has other classes or prompts.
        """
        self.configure_model()
        if tail is not None:
            tail.configure_model()
            changed = self.source_facts.differences(tail.source_facts.state())
            if tail.sample_shape != self.sample_shape:
                changed.append(f"samples of {tail.sample_shape} in place of {self.sample_shape}")
            if changed:
                raise ConfigError(f"The tail has {' and '.join(changed)}: it cannot continue this model's samples.")
        with evaluating(self), evaluating(tail or self), self._solver_noise(indices):
            if tail is None:
                last = self.guided_source(self.conditions(indices))
                fractions = [max(fraction, self.sampler.pretrained_tail) for fraction in fractions]
            else:
                last = tail.guided(indices)
                check_subjects(self, tail, indices.tolist())
            swapped = self.sampler.swap(self.guided(indices), last, self.start_noise(indices), fractions)
            return torch.stack([to_uint8(self.decode(latents)) for latents in swapped])
