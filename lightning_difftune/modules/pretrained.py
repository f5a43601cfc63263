"""A module's pre-trained network as the source of a memory bank."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from lightning_difftune.protocols import Denoiser, RetentionBatch

if TYPE_CHECKING:
    from lightning_difftune.modules.base import DiffTuningModule


class PretrainedSamples:
    """Samples of a module's pre-trained network, in the space it denoises: the source of a memory bank.

    The network is loaded when the first sample is asked for, and lives as long as this object.
    """

    def __init__(self, module: DiffTuningModule) -> None:
        self.module = module

    @cached_property
    def denoise(self) -> Denoiser:
        """The pre-trained copy."""
        return self.module.pretrained()

    def bank_spec(self) -> dict[str, Any]:
        """Everything that decides the samples."""
        module = self.module
        return {
            "model": module.base_identity["fingerprint"],
            "sampler": module.bank_sampler.spec(),
            "latent_shape": list(module.sample_shape),
            "seed": module.seed,
            **module.bank_spec(),
            **(target.bank_spec(module.objective) if (target := module.objective.retention_target) else {}),
        }

    def generate_bank(self, indices: Tensor) -> dict[str, Tensor]:
        """Indices (B,) => latents (B, c, h, w) float32, the family's columns and the objective's, on the CPU."""
        module, target = self.module, self.module.objective.retention_target
        conditions = module.source_conditions(indices)
        latents = module.draw_latents(self.denoise, module.bank_sampler, indices, conditions).float()
        columns = {"latents": latents, **module.bank_columns(indices, latents)}
        if target is not None:
            condition = module.retention_condition(cast("RetentionBatch", columns))
            columns |= target.bank_columns(module.objective, indices, latents, condition, self.teacher)
        return {name: column.cpu() for name, column in columns.items()}

    def teacher(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Like :meth:`DiffTuningModule.teacher`, of this copy."""
        return self.denoise(x_t, t, self.module.source_condition(condition))
