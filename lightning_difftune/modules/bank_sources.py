"""Sources of a memory bank: samples of a module's pre-trained network, or pictures."""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from lightning_difftune import draws
from lightning_difftune.errors import ConfigError
from lightning_difftune.modules.diffusion_model import DiffusionModel
from lightning_difftune.objective import DiffTuningObjective
from lightning_difftune.protocols import BankPictures, Denoiser, RetentionBatch


class PretrainedSamples:
    """Samples of a module's pre-trained network, in the space that it denoises.

    The network is loaded at the first sample and is kept as long as this object.
    """

    def __init__(self, module: DiffusionModel, objective: DiffTuningObjective) -> None:
        self.module, self.objective = module, objective

    @cached_property
    def denoise(self) -> Denoiser:
        """The pre-trained copy."""
        with draws.float32_by_default():
            return self.module.pretrained()

    def bank_spec(self) -> dict[str, Any]:
        """Everything that determines the samples."""
        module, target = self.module, self.objective.retention_target
        return {
            "model": module.base_identity["fingerprint"],
            **self.latents_spec(),
            "latent_shape": list(module.sample_shape),
            "seed": module.seed,
            "draws": draws.VERSION,
            **module.bank_spec(),
            **({} if target is None else target.bank_spec(self.objective)),
        }

    def latents_spec(self) -> dict[str, Any]:
        """What determines the latents in addition to the weights and the seed."""
        return {"sampler": self.module.bank_sampler.spec()}

    def generate_bank(self, indices: Tensor) -> dict[str, Tensor]:
        """Indices (B,) => latents (B, c, h, w) float32, the family's columns and the objective's, on the CPU."""
        columns = self.with_columns(indices, self.latents(indices).float())
        return {name: column.cpu() for name, column in columns.items()}

    def with_columns(self, indices: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """The latents (B, c, h, w) of the samples ``indices`` (B,), and all that the bank stores with them."""
        target, columns = self.objective.retention_target, {"latents": latents, **self.columns(indices, latents)}
        if target is not None:
            condition = self.module.retention_condition(cast("RetentionBatch", columns))
            columns |= target.bank_columns(self.objective, indices, latents, condition, self.teacher)
        return columns

    def latents(self, indices: Tensor) -> Tensor:
        """Indices (B,) => the replayed samples (B, c, h, w)."""
        module = self.module
        return module.draw_latents(self.denoise, module.bank_sampler, indices, module.source_conditions(indices))

    def columns(self, indices: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """The family's columns of these samples."""
        return self.module.bank_columns(indices, latents)

    def teacher(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Like :meth:`DiffTuningModule.teacher`, with this copy."""
        return self.denoise(x_t, t, self.module.source_condition(condition))


class EncodedPictures(PretrainedSamples):
    """Pictures in the space that a module's network denoises, such as photos that it was pre-trained on.

    Sample i is the latents' mean of the i-th picture in a random order that depends only on the module's seed.
    """

    def __init__(self, module: DiffusionModel, objective: DiffTuningObjective, pictures: BankPictures) -> None:
        super().__init__(module, objective)
        if getattr(module, "retention_labels", "null") == "source":
            raise ConfigError(
                "retention_labels: source needs the classes that samples were drawn for, and the pictures of "
                "bank_source have none. Set retention_labels: null."
            )
        self.pictures = pictures

    @cached_property
    def order(self) -> Tensor:
        """The pictures' indices, (N,) int64."""
        return torch.randperm(len(self.pictures), generator=torch.Generator().manual_seed(self.module.seed))

    def latents_spec(self) -> dict[str, Any]:
        """The pictures and what encodes them."""
        return {"pictures": self.pictures.identity(), "encoder": self.module.encoder_identity()}

    def latents(self, indices: Tensor) -> Tensor:
        """Indices (B,) => the pictures' latents, (B, c, h, w)."""
        batch = self.pictures.pixels(self.order[indices].tolist(), [False] * len(indices))
        return self.module.posterior(batch["pixel_values"])[0]

    def columns(self, indices: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """The family's columns of pictures."""
        return self.module.picture_columns(latents)
