"""The one denoising loop: any diffusers scheduler, classifier-free guidance on three or on all channels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_difftune.errors import ConfigError
from lightning_difftune.protocols import Denoiser


class NoiseScheduler(Protocol):
    """What the loop asks of a diffusers scheduler."""

    config: Any
    timesteps: Tensor
    init_noise_sigma: float

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Choose the grid of timesteps, noisiest first."""
        ...

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """Scale the network's input."""
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


@torch.inference_mode()
def sample(
    denoise: Denoiser,
    noise: Tensor,
    scheduler: NoiseScheduler,
    num_inference_steps: int = 50,
    condition: Any = None,
    null_condition: Any = None,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Run the reverse process from noise to a clean sample.

    Guidance is eps = eps_null + scale * (eps_cond - eps_null) on the first ``guidance_channels`` channels; the other
    channels follow the condition. At a scale of 1 the unconditional pass is skipped, since it would cancel out.

    Args:
        denoise: The network, ``denoise(x_t, t, condition)``. A learned variance in its output is left out.
        noise: Start noise x_T (B, C, H, W).
        scheduler: Any diffusers scheduler; it is copied, not changed.
        num_inference_steps: Number of reverse steps.
        condition: Condition of the B samples: a tensor whose first dimension is B, or nested dicts of such tensors.
        null_condition: The unconditional counterpart, of the same structure; needed when ``guidance_scale`` is not 1.
        guidance_scale: Strength of classifier-free guidance; 1 is none.
        guidance_channels: How many leading channels are guided; all by default, 3 in the authors' DiT code.
        on_step: Called as ``on_step(number of finished steps, x)`` after every step.

    Returns:
        Clean samples (B, C, H, W).

    Raises:
        ConfigError: If guidance is asked for without a ``null_condition``.
    """
    guided = guidance_scale != 1.0
    if guided and null_condition is None:
        raise ConfigError(f"guidance_scale is {guidance_scale}, which needs a null_condition to guide away from.")
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    batch, channels = noise.shape[:2]
    both = concatenate(condition, null_condition) if guided else condition
    x = noise * scheduler.init_noise_sigma
    for done, timestep in enumerate(scheduler.timesteps, start=1):
        model_input = scheduler.scale_model_input(x, timestep)
        t = timestep.to(torch.int64).expand(batch)
        if guided:
            output = denoise(torch.cat([model_input, model_input]), torch.cat([t, t]), both)[:, :channels]
            eps, eps_null = output.float().chunk(2)
            k = channels if guidance_channels is None else guidance_channels
            eps = torch.cat([eps_null[:, :k] + guidance_scale * (eps[:, :k] - eps_null[:, :k]), eps[:, k:]], dim=1)
        else:
            eps = denoise(model_input, t, both)[:, :channels].float()
        x = scheduler.step(eps, timestep, x).prev_sample
        if on_step is not None:
            on_step(done, x)
    return x


def concatenate(first: Any, second: Any) -> Any:
    """Join two conditions of the same structure (tensors or nested dicts of them) along the batch."""
    if isinstance(first, dict):
        return {key: concatenate(value, second[key]) for key, value in first.items()}
    return torch.cat([first, second])


@dataclass
class Sampler:
    """Settings of :func:`sample`, kept together; the defaults are the authors' evaluation protocol.

    Args:
        scheduler: Any diffusers scheduler; DDIM with "leading" spacing by default.
        num_inference_steps: Number of reverse steps.
        guidance_scale: Strength of classifier-free guidance.
        guidance_channels: Guided leading channels; ``null`` guides all (the paper-literal preset).
    """

    scheduler: Any = None
    num_inference_steps: int = 50
    guidance_scale: float = 1.5
    guidance_channels: int | None = 3

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ConfigError(f"num_inference_steps must be at least 1, got {self.num_inference_steps}.")
        if self.scheduler is None:
            self.scheduler = ddim()

    def __call__(
        self,
        denoise: Denoiser,
        noise: Tensor,
        condition: Any,
        null_condition: Any,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Noise (B, C, H, W) => clean samples (B, C, H, W)."""
        return sample(
            denoise,
            noise,
            self.scheduler,
            self.num_inference_steps,
            condition,
            null_condition,
            self.guidance_scale,
            self.guidance_channels,
            on_step,
        )

    def spec(self) -> dict[str, Any]:
        """The settings as plain values, for a memory bank's manifest."""
        config = {key: plain(value) for key, value in self.scheduler.config.items() if not key.startswith("_")}
        return {
            "scheduler": type(self.scheduler).__name__,
            "scheduler_config": config,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "guidance_channels": self.guidance_channels,
        }


def to_uint8(pixel_values: Tensor) -> Tensor:
    """Pixel values in [-1, 1], clamped there => pictures uint8 of the same shape."""
    return ((pixel_values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def plain(value: Any) -> Any:
    """The value if JSON can hold it, else its representation; DPM-Solver's settings have an infinity."""
    is_plain = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if is_plain else repr(value)
