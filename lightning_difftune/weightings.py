"""Loss weightings: how much the error of each noise level counts, in addition to psi and xi."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_difftune.errors import ConfigError


@runtime_checkable
class LossWeighting(Protocol):
    """A weight for each noise level, as a function of its signal-to-noise ratio.

    It weights the squared error of the *noise*, || eps - eps_hat ||^2, for any prediction type: the losses convert it
    to theirs, so that a weighting means the same objective for all. From x_t = a x0 + b eps and
    SNR = (a / b)^2 it follows that || eps - eps_hat ||^2 = SNR || x0 - x0_hat ||^2, and in a Gaussian diffusion, where
    a^2 + b^2 = 1, that it is SNR / (SNR + 1) || v - v_hat ||^2. The weights of x0 and v are those factors times eps's.
    """

    def weights(self, snr: Tensor) -> Tensor:
        """SNR (B,), at least 0 => weights (B,), at least 0."""


class MinSNRWeighting:
    """min(SNR, gamma) on the error of x0 (Hang et al., 2023, "Efficient Diffusion Training via Min-SNR Weighting").

    That is min(SNR, gamma) / SNR on the error of eps and min(SNR, gamma) / (SNR + 1) on that of v (their Section 3.4).

    Args:
        gamma: The SNR above which the weight on the error of x0 stops growing; 5 in their paper.

    Raises:
        ConfigError: If gamma is not positive.

    Example:
        >>> import torch
        >>> MinSNRWeighting(gamma=5).weights(torch.tensor([0.5, 5.0, 50.0]))
        tensor([1.0000, 1.0000, 0.1000])
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if not gamma > 0:
            raise ConfigError(f"MinSNRWeighting needs a positive gamma, got {gamma}; its paper has 5.")
        self.gamma = float(gamma)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(gamma={self.gamma:g})"

    def weights(self, snr: Tensor) -> Tensor:
        """min(SNR, gamma) / SNR, same shape as ``snr``."""
        return (self.gamma / snr).clamp(max=1)


class P2Weighting:
    """1 / (k + SNR)^gamma on the error of eps (Choi et al., 2022, "Perception Prioritized Training", Eq. 8).

    Their loss is of eps; for v and x0 it is converted (see :class:`LossWeighting`). This weights the losses of target
    and bank alike, while :class:`~lightning_difftune.schedules.SNRSchedule` uses the same function as psi.

    Args:
        k: Keeps the weight bounded at pure noise; 1 in their paper.
        gamma: Sharpness; 1 in their paper, 0 weights nothing.

    Raises:
        ConfigError: If k is not positive or gamma is negative.

    Example:
        >>> import torch
        >>> P2Weighting().weights(torch.tensor([1.0, 3.0]))
        tensor([0.5000, 0.2500])
    """

    def __init__(self, k: float = 1.0, gamma: float = 1.0) -> None:
        if not (k > 0 and gamma >= 0):
            raise ConfigError(f"P2Weighting needs k > 0 and gamma >= 0, got k = {k}, gamma = {gamma}.")
        self.k, self.gamma = float(k), float(gamma)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(k={self.k:g}, gamma={self.gamma:g})"

    def weights(self, snr: Tensor) -> Tensor:
        """1 / (k + SNR)^gamma, same shape as ``snr``."""
        return (self.k + snr) ** -self.gamma
