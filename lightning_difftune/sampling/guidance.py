"""Classifier-free guidance, and Domain Guidance by the frozen pre-trained network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_difftune.conditions import concatenate, equal
from lightning_difftune.errors import ConfigError
from lightning_difftune.protocols import Denoiser


class Guided:
    """A network under a condition, guided away from another one: all that the reverse process asks at a step.

    The prediction is eps = eps_null + scale * (eps_cond - eps_null) on the first ``channels`` channels; the other
    channels follow the condition. A network that predicts velocities is guided alike. At a scale of 1, or if the
    condition is the null condition itself, the unconditional pass is skipped, since it would cancel out.

    With ``null_denoise``, eps_null comes from that network: Domain Guidance (arXiv 2504.01521) has the frozen
    pre-trained one there, which knows the unconditional distribution better than its fine-tuned copy.

    Args:
        denoise: The network, ``denoise(x_t, t, condition)``.
        condition: Condition of the B samples: a tensor whose first dimension is B, or nested dicts of such tensors.
        null_condition: The unconditional counterpart, in the terms of the network that sees it.
        scale: Strength of the guidance; 1 is none.
        channels: How many leading channels are guided; all by default, 3 in the authors' DiT code.
        null_denoise: The network of the unconditional branch; by default ``denoise``, in one doubled batch.

    Raises:
        ConfigError: If guidance is asked for without a ``null_condition``.
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
            x: What the scheduler makes of the sample.
            t: Its timesteps.
            with_variance: Append the learned variance, as the condition has it: (B, 2C, H, W).

        Raises:
            ConfigError: If a variance is asked for and the network predicts none.
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
