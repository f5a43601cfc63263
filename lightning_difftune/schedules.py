"""Forgetting schedules: how much to learn the target (psi) and to retain the source (xi) at every noise level."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_difftune.diffusion import ForwardProcess, GaussianDiffusion
from lightning_difftune.errors import ConfigError


@runtime_checkable
class ForgettingSchedule(Protocol):
    """The two coefficients of Eq. 5 as functions of s = (t + 1) / T in (0, 1]; s near 0 is data, s = 1 is noise.

    Any object with these two methods is a schedule. Both map a tensor of any shape to non-negative weights of that
    shape. Psi should not decrease in s and xi not increase; only their shape matters when timesteps are sampled from
    them.
    """

    def reconsolidation(self, s: Tensor) -> Tensor:
        """Psi(s), the weight of learning the target (Eq. 4)."""
        ...

    def retention(self, s: Tensor) -> Tensor:
        """Xi(s), the weight of replaying the memory bank (Eq. 3)."""
        ...


class PowerSchedule:
    """psi = s^tau and xi = 1 - psi, the paper's family (Section 3.2; tau in {0, 0.3, 0.5, 0.7, 1, 1.5} in Fig. 6c).

    tau = 0 is standard fine-tuning: psi = 1 and xi = 0 everywhere.

    Args:
        tau: Exponent, at least 0.

    Raises:
        ConfigError: If tau is negative or not finite.

    Example:
        >>> PowerSchedule(tau=1.0).retention(torch.tensor([0.25, 1.0]))
        tensor([0.7500, 0.0000])
    """

    def __init__(self, tau: float = 1.0) -> None:
        if not 0 <= tau < float("inf"):
            raise ConfigError(
                f"tau must be a finite number of at least 0, got {tau}. A negative tau would emphasise small noise for "
                "the target; tau = 0 is standard fine-tuning and 1 the paper's default."
            )
        self.tau = float(tau)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(tau={self.tau:g})"

    def reconsolidation(self, s: Tensor) -> Tensor:
        """s^tau, same shape as s."""
        return s**self.tau

    def retention(self, s: Tensor) -> Tensor:
        """1 - s^tau, same shape as s."""
        return 1 - self.reconsolidation(s)


class MirroredPowerSchedule(PowerSchedule):
    """psi = s^tau with its mirror image as xi, as in the authors' released code.

    The code draws the 0-based retention timestep k with a weight of (T - k)^tau. With s = (k + 1) / T that is
    xi(s) = (1 - s + 1/T)^tau up to a constant: the mirror of the T grid points, so the last step keeps a little weight.
    For tau = 1 it differs from :class:`PowerSchedule` by that 1/T only. tau = 0 is standard fine-tuning, so xi = 0.

    Args:
        tau: Exponent, at least 0.
        num_timesteps: T of the grid that is mirrored.
    """

    def __init__(self, tau: float = 1.0, num_timesteps: int = 1000) -> None:
        super().__init__(tau)
        self.num_timesteps = num_timesteps

    def retention(self, s: Tensor) -> Tensor:
        """(1 - s + 1/T)^tau, same shape as s; zeros for tau = 0."""
        if self.tau == 0:
            return torch.zeros_like(s)
        return (1 - s + 1 / self.num_timesteps) ** self.tau


class SNRSchedule:
    """psi = 1 / (k + SNR)^gamma and xi = 1 - psi / max(psi), the SNR-based ablation of Fig. 6c (after P2 weighting).

    Args:
        k: Keeps psi bounded at pure noise; at least 1 so that psi stays in [0, 1].
        gamma: Sharpness, at least 0; 0 is standard fine-tuning.
        diffusion: The forward process whose SNR it is, the objective's own; DiT's by default.

    Raises:
        ConfigError: If k < 1 or gamma < 0.
    """

    def __init__(self, k: float = 1.0, gamma: float = 1.0, diffusion: ForwardProcess | None = None) -> None:
        if k < 1 or gamma < 0:
            raise ConfigError(f"An SNR schedule needs k >= 1 and gamma >= 0, got k = {k}, gamma = {gamma}.")
        self.k, self.gamma = float(k), float(gamma)
        process = diffusion if diffusion is not None else GaussianDiffusion()
        self.snr = process.snr(torch.arange(process.num_timesteps, device="cpu"))  # (T,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(k={self.k:g}, gamma={self.gamma:g})"

    def reconsolidation(self, s: Tensor) -> Tensor:
        """1 / (k + SNR(s))^gamma, same shape as s."""
        t = (s.double() * len(self.snr)).round().long().clamp(1, len(self.snr)) - 1
        return ((self.k + self.snr.to(s.device)[t]).to(s.dtype)) ** -self.gamma

    def retention(self, s: Tensor) -> Tensor:
        """1 - psi(s) / psi(1), same shape as s."""
        return 1 - self.reconsolidation(s) / self.reconsolidation(torch.ones_like(s))
