"""What the loop asks of a diffusers scheduler, and what a network is told of its grid."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class NoiseScheduler(Protocol):
    """What the loop asks of a diffusers scheduler.

    Those of variance-preserving processes also have ``init_noise_sigma`` and ``scale_model_input``; those of flow
    matching have ``sigmas`` instead.
    """

    config: Any
    timesteps: Tensor

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Choose the grid of timesteps, noisiest first."""
        ...

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
        """One reverse step; the result has ``prev_sample``."""
        ...


def ddim() -> NoiseScheduler:
    """The paper's sampler: DDIM (eta 0) over DiT's linear betas, "leading" grid {0, 20, ..., 980} at 50 steps."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="leading",
    )


def is_flow(scheduler: NoiseScheduler) -> bool:
    """Whether a scheduler integrates a velocity (flow matching) instead of denoising a variance-preserving process.

    Those made for flow matching alone, such as ``FlowMatchEulerDiscreteScheduler``, have no ``prediction_type``; the
    others can be set to ``flow_prediction``.

    Example:
        >>> is_flow(ddim())
        False
    """
    return scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction"


def network_timesteps(scheduler: NoiseScheduler) -> Tensor:
    """What the network is told at each step of the grid: (N,) int64 in [0, T).

    A flow scheduler's own timesteps are T sigma in (0, T], fractions included. Here index t has the noise level
    s = (t + 1) / T, so the nearest trained index is T sigma - 1, rounded: at most half a step of 1/T off.
    """
    if not is_flow(scheduler):
        return scheduler.timesteps.to(torch.int64)
    steps = scheduler.config.num_train_timesteps
    sigmas: Tensor = scheduler.sigmas[: len(scheduler.timesteps)]  # type: ignore[attr-defined]
    return (sigmas * steps).round().long().sub(1).clamp(0, steps - 1).to(scheduler.timesteps.device)
