"""Targets of retained samples: their own noise (replay, Eq. 3), or the pre-trained network's predictions.

Replay is the objective's default and needs no object. The other two are knowledge distillation on the memory bank's
samples: the squared error to the pre-trained network's prediction, in the network's own parametrisation.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_difftune.diffusion import ForwardProcess
from lightning_difftune.draws import noise_of, uniform_of
from lightning_difftune.errors import ConfigError, StoreError
from lightning_difftune.protocols import Denoiser, RetentionBatch


class DrawsTimesteps(Protocol):
    """What a retention target needs of an objective: its forward process and its distribution of timesteps."""

    diffusion: ForwardProcess

    def timesteps(self, uniform: Tensor, is_retention: Tensor) -> Tensor:
        """Uniform numbers (B,) in [0, 1), and which of them are for retained samples => timesteps (B,) int64."""


@runtime_checkable
class RetentionTarget(Protocol):
    """Source of the retention term's target, for an objective and its bank."""

    def draws(self, retained: RetentionBatch, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps (K,) and noise (K, c, h, w) of K retained samples: those drawn for this step, or the bank's."""

    def predictions(
        self, retained: RetentionBatch, x_t: Tensor, t: Tensor, condition: Any, teacher: Denoiser | None
    ) -> Tensor:
        """The targets (K, c, h, w) of the network's outputs at x_t (K, c, h, w) and t (K,)."""

    def bank_columns(
        self, objective: DrawsTimesteps, indices: Tensor, latents: Tensor, condition: Any, teacher: Denoiser
    ) -> dict[str, Tensor]:
        """Columns that the bank stores for its samples ``indices`` (B,) in addition to their latents (B, c, h, w)."""

    def bank_spec(self, objective: DrawsTimesteps) -> dict[str, Any]:
        """What determines :meth:`bank_columns`, as plain JSON values."""


class OnlineTeacher:
    """The frozen pre-trained network's prediction at the same x_t, computed in every step.

    Costs a forward pass of the retained samples and the memory of the pre-trained weights. Works with any memory bank;
    the squared error is zero before the first step.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def draws(self, retained: RetentionBatch, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the step."""
        return t, noise

    @torch.no_grad()
    def predictions(
        self, retained: RetentionBatch, x_t: Tensor, t: Tensor, condition: Any, teacher: Denoiser | None
    ) -> Tensor:
        """The teacher's first c channels, float32, without a gradient.

        Raises:
            ConfigError: If there is no teacher.
        """
        if teacher is None:
            raise ConfigError("OnlineTeacher needs the pre-trained network: pass it to the objective as `teacher`.")
        return teacher(x_t, t, condition)[:, : x_t.shape[1]].float()

    def bank_columns(
        self, objective: DrawsTimesteps, indices: Tensor, latents: Tensor, condition: Any, teacher: Denoiser
    ) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def bank_spec(self, objective: DrawsTimesteps) -> dict[str, Any]:
        """Nothing: the bank is that of replay."""
        return {}


class StoredPredictions:
    """The pre-trained network's prediction at one timestep and noise per sample, computed once and kept in the bank.

    Costs nothing in training, but triples the bank's size on disk: in addition to the latents it holds ``timesteps``
    (drawn as in the objective's retention term), ``noise`` and ``predictions``. Sample i always has the same noise
    level. The noise is stored, not drawn again, since another release of PyTorch may draw other numbers.

    The bank belongs to the objective's schedule and forward process, and is refused if they differ.

    Args:
        seed: Seed of the timesteps and the noise; those of sample i depend only on (seed, i).
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seed={self.seed})"

    def draws(self, retained: RetentionBatch, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The bank's.

        Raises:
            StoreError: If the bank has none.
        """
        missing = {"timesteps", "noise", "predictions"} - retained.keys()
        if missing:
            raise StoreError(
                f"The memory bank holds no {', '.join(sorted(missing))}, so it was not built for StoredPredictions. "
                "Name another folder, and a new bank is built there."
            )
        return retained["timesteps"], retained["noise"]

    def predictions(
        self, retained: RetentionBatch, x_t: Tensor, t: Tensor, condition: Any, teacher: Denoiser | None
    ) -> Tensor:
        """The bank's."""
        return retained["predictions"]

    @torch.no_grad()
    def bank_columns(
        self, objective: DrawsTimesteps, indices: Tensor, latents: Tensor, condition: Any, teacher: Denoiser
    ) -> dict[str, Tensor]:
        """``timesteps`` (B,) int64, ``noise`` and ``predictions`` (B, c, h, w) float32."""
        uniform = uniform_of(self.seed, indices).to(latents.device)
        t = objective.timesteps(uniform, torch.ones_like(uniform, dtype=torch.bool))
        # A separate stream: the noise that a sample was generated from is not independent of it.
        noise = noise_of(self.seed, indices, tuple(latents.shape[1:]), "noise of predictions").to(latents.device)
        x_t = objective.diffusion.add_noise(latents, noise, t)
        predictions = teacher(x_t, t, condition)[:, : latents.shape[1]].float()
        return {"timesteps": t, "noise": noise, "predictions": predictions}

    def bank_spec(self, objective: DrawsTimesteps) -> dict[str, Any]:
        """The seed, deciles of the timesteps, and coefficients of the forward process."""
        device = next(objective.diffusion.buffers()).device
        deciles = torch.linspace(0.05, 0.95, 10, device=device)
        t = objective.timesteps(deciles, torch.ones_like(deciles, dtype=torch.bool))
        steps = objective.diffusion.num_timesteps
        grid = torch.arange(0, steps, max(1, steps // 5), device=device)
        signal, _ = objective.diffusion.coefficients(grid, grid)
        return {
            "stored_predictions": {
                "seed": self.seed,
                "timestep_deciles": t.tolist(),
                "signal": [round(coefficient, 5) for coefficient in signal.tolist()],
            }
        }


def retained_rows(is_retention: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions (count,) of the retained samples and (B - count,) of the others, in the order of the mask (B,).

    Their number is known from the batch, so nothing waits for the device.

    Raises:
        ConfigError: If the mask has another number of them; checked only on the CPU.
    """
    if is_retention.device.type == "cpu" and int(is_retention.sum()) != count:
        raise ConfigError(f"The mask has {int(is_retention.sum())} retained samples and the bank's batch {count}.")
    order = (~is_retention).to(torch.uint8).argsort(stable=True)
    return order[:count], order[count:]
