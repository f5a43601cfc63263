"""The reverse process: from noise to samples with a guided network, or with another one for the last steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lightning_difftune.conditions import concatenate, equal
from lightning_difftune.draws import float32_by_default
from lightning_difftune.errors import ConfigError
from lightning_difftune.protocols import Denoiser
from lightning_difftune.sampling.schedulers import (
    NoiseScheduler,
    check_reverses,
    learns_variance,
    network_timesteps,
    set_grid,
)


class Guided:
    """A network with its condition and guidance: everything that a step of the reverse process needs.

    The prediction is eps = eps_null + scale * (eps_cond - eps_null) on the first ``channels`` channels; the other
    channels follow the condition. Velocities are guided in the same way. At a scale of 1, or if the
    condition is the null condition itself, the unconditional pass is skipped, since it would cancel out.

    With ``null_denoise``, eps_null comes from that network: Domain Guidance (arXiv 2504.01521) uses the frozen
    pre-trained one, which models the unconditional distribution better than its fine-tuned copy.

    Args:
        denoise: The network, ``denoise(x_t, t, condition)``.
        condition: Condition of the B samples: a tensor whose first dimension is B, or nested dicts of such tensors.
        null_condition: The unconditional counterpart, in the form that the network of this branch takes.
        scale: Strength of the guidance; 1 is none.
        channels: Number of guided leading channels; all by default, 3 in the authors' DiT code.
        null_denoise: The network of the unconditional branch; by default ``denoise``, in one doubled batch.

    Raises:
        ConfigError: If there is guidance without a ``null_condition``.
    """

    def __init__(
        self,
        denoise: Denoiser,
        condition: Any = None,
        null_condition: Any = None,
        scale: float = 1.0,
        channels: int | None = None,
        null_denoise: Denoiser | None = None,
    ) -> None:
        if scale != 1.0 and null_condition is None and null_denoise is None:
            raise ConfigError(f"guidance_scale is {scale}, which needs a null_condition to guide away from.")
        self.denoise, self.null_denoise = denoise, null_denoise
        self.condition, self.null_condition = condition, null_condition
        self.scale, self.channels = scale, channels
        self.is_guided = scale != 1.0 and (null_denoise is not None or not equal(condition, null_condition))
        self._both = concatenate(condition, null_condition) if self.is_guided and null_denoise is None else None

    def __call__(self, x: Tensor, t: Tensor, with_variance: bool = False) -> Tensor:
        """Network input x (B, C, H, W) at timesteps t (B,), fractions included => prediction (B, C, H, W) float32.

        Args:
            x: The sample, scaled by the scheduler.
            t: Its timesteps.
            with_variance: Append the learned variance of the conditional branch: (B, 2C, H, W).

        Raises:
            ConfigError: If a variance is needed and the network predicts none.
        """
        channels = x.shape[1] * (2 if with_variance else 1)
        if not self.is_guided:
            return self._checked(self.denoise(x, t, self.condition), channels)
        if self.null_denoise is None:
            output = self._checked(self.denoise(torch.cat([x, x]), torch.cat([t, t]), self._both), channels)
            eps, eps_null = output.chunk(2)
        else:
            eps = self._checked(self.denoise(x, t, self.condition), channels)
            eps_null = self.null_denoise(x, t, self.null_condition)[:, :channels].float()  # it may predict a variance
        k = x.shape[1] if self.channels is None else self.channels
        return torch.cat([eps_null[:, :k] + self.scale * (eps[:, :k] - eps_null[:, :k]), eps[:, k:]], dim=1)

    @staticmethod
    def _checked(output: Tensor, channels: int) -> Tensor:
        if output.shape[1] < channels:
            raise ConfigError(
                f"The sampler's scheduler takes a learned variance, {channels} channels, but the network predicts "
                f"{output.shape[1]}. Set the scheduler's variance_type to fixed_small."
            )
        return output[:, :channels].float()


class Reverse:
    """The state of a reverse process: the current samples and the scheduler's memory.

    Args:
        noise: Start noise x_T (B, C, H, W).
        scheduler: Any diffusers scheduler; it is copied, not changed. One with ``variance_type="learned_range"`` also
            gets the network's variance.
        num_inference_steps: Number of reverse steps.

    Raises:
        ConfigError: If the scheduler does not reverse a process of T timesteps.
    """

    def __init__(self, noise: Tensor, scheduler: NoiseScheduler, num_inference_steps: int) -> None:
        check_reverses(scheduler)
        self.scheduler = solver = cast("Any", copy.deepcopy(scheduler))
        # On the host, which reads its numbers in each step and would wait for the device.
        set_grid(self.scheduler, num_inference_steps, noise.shape[1:], "cpu")
        self.with_variance = learns_variance(self.scheduler)
        if not self.with_variance and self.scheduler.config.get("variance_type") in ("learned", "learned_range"):
            # A solver that cuts off a variance after three channels: it gets only the mean, which has any number.
            solver.register_to_config(variance_type=None)
        self.x = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        self.done = 0
        self._network_timesteps = network_timesteps(self.scheduler).to(noise.device)

    def __len__(self) -> int:
        """Total number of steps."""
        return len(self.scheduler.timesteps)

    def step(self, model: Guided) -> None:
        """Take one step with a network's prediction."""
        timestep = self.scheduler.timesteps[self.done]
        t = self._network_timesteps[self.done].expand(len(self.x))
        is_scaled = hasattr(self.scheduler, "scale_model_input")
        model_input = self.scheduler.scale_model_input(self.x, timestep) if is_scaled else self.x
        prediction = model(model_input, t, self.with_variance)
        self.x = self.scheduler.step(prediction, timestep, self.x).prev_sample
        self.done += 1

    def branch(self) -> Reverse:
        """A copy that continues independently, including a multistep solver's memory."""
        return copy.deepcopy(self)


@float32_by_default()
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
    null_denoise: Denoiser | None = None,
) -> Tensor:
    """Run the reverse process from noise to a clean sample.

    Args:
        denoise: The network, ``denoise(x_t, t, condition)``. A learned variance in its output is ignored.
        noise: Start noise x_T (B, C, H, W).
        scheduler: Any diffusers scheduler; it is copied, not changed. A flow-matching scheduler takes the network's
            output as a velocity.
        num_inference_steps: Number of reverse steps.
        condition: Condition of the B samples: a tensor whose first dimension is B, or nested dicts of such tensors.
        null_condition: The unconditional counterpart; needed when ``guidance_scale`` is not 1.
        guidance_scale: Strength of the guidance, see :class:`Guided`; 1 is none.
        guidance_channels: Number of guided leading channels; all by default, 3 in the authors' DiT code.
        on_step: Called as ``on_step(number of finished steps, x)`` after every step.
        null_denoise: The frozen pre-trained network for Domain Guidance, which then gets ``null_condition``.

    Returns:
        Clean samples (B, C, H, W).

    Raises:
        ConfigError: If there is guidance without a ``null_condition``.
    """
    model = Guided(denoise, condition, null_condition, guidance_scale, guidance_channels, null_denoise)
    process = Reverse(noise, scheduler, num_inference_steps)
    while process.done < len(process):
        process.step(model)
        if on_step is not None:
            on_step(process.done, process.x)
    return process.x


@float32_by_default()
@torch.inference_mode()
def swap(
    model: Guided,
    tail: Guided,
    noise: Tensor,
    scheduler: NoiseScheduler,
    fractions: Sequence[float],
    num_inference_steps: int = 50,
) -> Tensor:
    """Run the reverse process with one network, and its last steps with another (Fig. 1 of the paper).

    A fraction p of N steps is round(p N) of them, those nearest to the data: 0 is only ``model`` and 1 only ``tail``.
    All fractions share the trajectory of ``model`` until they leave it, so the eleven fractions 0, 0.1, .., 1 take
    6.5 N steps instead of 11 N. Every result equals that of a separate process to the bit if the scheduler adds no
    noise.

    Args:
        model: The network of the first steps with its condition, usually the tuned one.
        tail: The network of the last steps with its condition, usually the pre-trained one.
        noise: Start noise x_T (B, C, H, W).
        scheduler: Any diffusers scheduler; it is copied, not changed.
        fractions: P numbers in [0, 1], in any order.
        num_inference_steps: Number N of reverse steps.

    Returns:
        Clean samples (P, B, C, H, W), in the order of ``fractions``.

    Raises:
        ConfigError: If a fraction is outside [0, 1] or there is none.
    """
    if not fractions or not all(0 <= p <= 1 for p in fractions):
        raise ConfigError(f"The fractions of steps to swap must be numbers in [0, 1], got {list(fractions)}.")
    process = Reverse(noise, scheduler, num_inference_steps)
    leaves_at = [len(process) - round(p * len(process)) for p in fractions]
    finished: dict[int, Tensor] = {}
    for start in sorted(set(leaves_at)):
        while process.done < start:
            process.step(model)
        branch = process.branch()
        while branch.done < len(branch):
            branch.step(tail)
        finished[start] = branch.x
    return torch.stack([finished[start] for start in leaves_at])
