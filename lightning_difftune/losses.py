"""Per-sample denoising losses. Each takes the raw network output and returns one number a sample, (B,)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_difftune.diffusion import ForwardProcess, GaussianDiffusion, RectifiedFlow, at
from lightning_difftune.errors import ConfigError


def eps_mse_loss(
    output: Tensor, x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, diffusion: ForwardProcess
) -> Tensor:
    """The simple loss of Eq. 1, || eps - f(x_t, t) ||^2 averaged over a sample's entries.

    Args:
        output: Network output (B, C or 2C, H, W); channels beyond C (a learned variance) are not used.
        x0: Clean samples (B, C, H, W).
        x_t: Noisy samples (B, C, H, W).
        noise: The noise eps in them (B, C, H, W).
        t: Timesteps (B,) int64.
        diffusion: The forward process.

    Returns:
        (B,) float32.
    """
    eps = output[:, : noise.shape[1]].float()
    return (eps - noise).square().flatten(1).mean(1)


def velocity_mse_loss(
    output: Tensor, x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, diffusion: ForwardProcess
) -> Tensor:
    """Flow matching: || (eps - x0) - f(x_t, t) ||^2 averaged over a sample's entries, for :class:`RectifiedFlow`.

    Same arguments as :func:`eps_mse_loss`; the output's leading C channels are a velocity.

    Returns:
        (B,) float32.

    Raises:
        ConfigError: If the forward process is another one, of which eps - x0 is not the velocity.
    """
    if not isinstance(diffusion, RectifiedFlow):
        raise ConfigError(
            f"velocity_mse_loss needs the straight path of RectifiedFlow, found {type(diffusion).__name__}. Set the "
            "objective's `diffusion` to lightning_difftune.diffusion.RectifiedFlow."
        )
    velocity = output[:, : noise.shape[1]].float()
    return (velocity - (noise - x0)).square().flatten(1).mean(1)


def hybrid_loss(output: Tensor, x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, diffusion: ForwardProcess) -> Tensor:
    """Eps-MSE plus the variational term of a learned variance, as DiT was trained with (Nichol & Dhariwal, 2021).

    Same arguments as :func:`eps_mse_loss`; the output must have 2C channels. The variational term is in bits per
    dimension, is not scaled down, and reaches the variance only: the mean in it is detached.

    Returns:
        (B,) float32.

    Raises:
        ConfigError: If the output has no second half of channels, or the forward process is no Gaussian diffusion.
    """
    if not isinstance(diffusion, GaussianDiffusion):
        raise ConfigError(
            f"hybrid_loss needs a GaussianDiffusion, found {type(diffusion).__name__}. Its loss is velocity_mse_loss."
        )
    if output.shape[1] != 2 * x0.shape[1]:
        raise ConfigError(
            f"hybrid_loss needs a network with a learned variance, {2 * x0.shape[1]} output channels for "
            f"{x0.shape[1]}; this one has {output.shape[1]}. Use eps_mse_loss."
        )
    return eps_mse_loss(output, x0, x_t, noise, t, diffusion) + variational_loss(output, x0, x_t, t, diffusion)


def variational_loss(output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, diffusion: GaussianDiffusion) -> Tensor:
    """Bits per dimension (B,) of one reverse step: KL to the true posterior, and the decoder's likelihood at t = 0.

    The variance is interpolated in log space between its two bounds by the output's second half v in [-1, 1]
    (Eq. 15 of Nichol & Dhariwal, 2021).
    """
    eps, v = output.float().chunk(2, dim=1)
    fraction = (v + 1) / 2
    log_variance = fraction * at(diffusion.log_betas, t, v) + (1 - fraction) * at(
        diffusion.posterior_log_variance, t, v
    )
    mean = diffusion.posterior_mean(diffusion.predict_x0(x_t, eps.detach(), t), x_t, t)
    true_mean = diffusion.posterior_mean(x0, x_t, t)
    true_log_variance = at(diffusion.posterior_log_variance, t, v)

    kl = 0.5 * (
        log_variance
        - true_log_variance
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
        - 1
    )
    bits = torch.where(at(t == 0, torch.arange(len(t), device=t.device), v), decoder_nll(x0, mean, log_variance), kl)
    return bits.flatten(1).mean(1) / math.log(2)


def decoder_nll(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Negative log-likelihood in nats, entry by entry, of x0 on the grid of 8-bit values in [-1, 1].

    The mass of a Gaussian in the bin of width 2/255 around x0, with the open tails at -1 and 1. The normal CDF is the
    tanh approximation that the published DiT objective uses.
    """
    centred = x0 - mean
    inverse_std = (-0.5 * log_variance).exp()

    def cdf(x: Tensor) -> Tensor:
        return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())

    upper = cdf(inverse_std * (centred + 1 / 255))
    lower = cdf(inverse_std * (centred - 1 / 255))
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    return -mass.clamp(min=1e-12).log()
