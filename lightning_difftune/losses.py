"""Per-sample denoising losses. Each takes the raw network output and returns one number per sample, (B,).

A loss belongs to what the network predicts, as diffusers names it: ``eps_mse_loss`` and ``hybrid_loss`` are for
``epsilon``, ``v_mse_loss`` for ``v_prediction``, ``x0_mse_loss`` for ``sample``, and ``velocity_mse_loss`` is for
``flow_prediction``. Each has the attribute ``prediction_type``, which a loss of your own may also have.
They all take the same arguments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from lightning_difftune.diffusion import ForwardProcess, GaussianDiffusion, PredictionType, RectifiedFlow, at
from lightning_difftune.errors import ConfigError
from lightning_difftune.weightings import LossWeighting

Loss = Callable[..., Tensor]
L = TypeVar("L", bound=Loss)


def _for(prediction_type: PredictionType) -> Callable[[L], L]:
    def mark(loss: L) -> L:
        setattr(loss, "prediction_type", prediction_type)  # noqa: B010
        return loss

    return mark


def prediction_type_of(loss: Loss) -> PredictionType | None:
    """The prediction type of a loss; ``None`` for a function without one.

    Example:
        >>> prediction_type_of(v_mse_loss), prediction_type_of(lambda *args: args[0])
        ('v_prediction', None)
    """
    while isinstance(loss, functools.partial):
        loss = loss.func
    return getattr(loss, "prediction_type", None)


def loss_for(prediction_type: PredictionType, learned_variance: bool = False) -> Loss:
    """The loss for a prediction type; the hybrid one if the network also predicts the variance."""
    if prediction_type == "epsilon":
        return hybrid_loss if learned_variance else eps_mse_loss
    return {"v_prediction": v_mse_loss, "sample": x0_mse_loss, "flow_prediction": velocity_mse_loss}[prediction_type]


@_for("epsilon")
def eps_mse_loss(
    output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    diffusion: ForwardProcess,
    weighting: LossWeighting | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """The simple loss of Eq. 1, || eps - f(x_t, t) ||^2 averaged over a sample's entries.

    Args:
        output: Network output (B, C or 2C, H, W); channels beyond C (a learned variance) are not used.
        x0: Clean samples (B, C, H, W).
        x_t: Noisy samples (B, C, H, W).
        noise: The noise eps in them (B, C, H, W).
        t: Timesteps (B,) int64.
        diffusion: The forward process.
        weighting: Weights of the noise levels; all count equally by default.
        target: Replaces the noise (here), v or x0 (below) that the output is compared with, (B, C, H, W): the
            prediction of another network of the same kind.

    Returns:
        (B,) float32.
    """
    error = squared_error(output, noise if target is None else target)
    return error if weighting is None else error * weighting.weights(diffusion.snr(t))


@_for("v_prediction")
def v_mse_loss(
    output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    diffusion: ForwardProcess,
    weighting: LossWeighting | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """|| v - f(x_t, t) ||^2 averaged over a sample's entries, for networks that predict v (Salimans & Ho, 2022).

    Here v = sqrt(abar) eps - sqrt(1 - abar) x0. Same arguments as :func:`eps_mse_loss`. It is (SNR + 1) / SNR times the
    loss of the noise that v implies.

    Raises:
        ConfigError: If the forward process is not a Gaussian diffusion.
    """
    if not isinstance(diffusion, GaussianDiffusion):
        raise ConfigError(
            f"v_mse_loss needs a GaussianDiffusion, found {type(diffusion).__name__}. Its loss is velocity_mse_loss."
        )
    a, b = diffusion.coefficients(t, x0)
    error = squared_error(output, a * noise - b * x0 if target is None else target)
    snr = diffusion.snr(t)
    return error if weighting is None else error * weighting.weights(snr) * snr / (snr + 1)


@_for("sample")
def x0_mse_loss(
    output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    diffusion: ForwardProcess,
    weighting: LossWeighting | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """|| x0 - f(x_t, t) ||^2 averaged over a sample's entries, for networks that predict the clean sample.

    Same arguments as :func:`eps_mse_loss`. It is 1 / SNR times the loss of the noise that x0 implies.
    """
    error = squared_error(output, x0 if target is None else target)
    snr = diffusion.snr(t)
    return error if weighting is None else error * weighting.weights(snr) * snr


@_for("flow_prediction")
def velocity_mse_loss(
    output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    diffusion: ForwardProcess,
    weighting: LossWeighting | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Flow matching: || (eps - x0) - f(x_t, t) ||^2 averaged over a sample's entries, for :class:`RectifiedFlow`.

    Same arguments as :func:`eps_mse_loss`; the output's leading C channels are a velocity. It is 1 / (1 - s)^2 times
    the loss of the noise that the velocity implies, eps = x_t + (1 - s) velocity.

    Returns:
        (B,) float32.

    Raises:
        ConfigError: If the forward process is another one, whose velocity is not eps - x0.
    """
    if not isinstance(diffusion, RectifiedFlow):
        raise ConfigError(
            f"velocity_mse_loss needs the straight path of RectifiedFlow, found {type(diffusion).__name__}. Set the "
            "objective's `diffusion` to lightning_difftune.diffusion.RectifiedFlow."
        )
    error = squared_error(output, noise - x0 if target is None else target)
    return error if weighting is None else error * weighting.weights(diffusion.snr(t)) * (1 - diffusion.s[t]).square()


@_for("epsilon")
def hybrid_loss(
    output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    diffusion: ForwardProcess,
    weighting: LossWeighting | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Eps-MSE plus the variational term of a learned variance, as in DiT's training (Nichol & Dhariwal, 2021).

    Same arguments as :func:`eps_mse_loss`; the output must have 2C channels. The variational term is in bits per
    dimension, is not scaled down, and trains only the variance: the mean in it is detached.

    ``weighting`` and ``target`` apply only to the eps-MSE. The variational term always measures the variance against
    x0, that is against the errors of the mean on samples. Another network's prediction does not contain them:
    where both agree, a variance fitted to it would shrink to its lower bound.

    Returns:
        (B,) float32.

    Raises:
        ConfigError: If the output has no second half of channels, or the forward process is not a Gaussian diffusion.
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
    mse = eps_mse_loss(output, x0, x_t, noise, t, diffusion, weighting, target)
    return mse + variational_loss(output, x0, x_t, t, diffusion)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference (B,) float32 of an output (B, C or 2C, H, W) from a target (B, C, H, W)."""
    return (output[:, : target.shape[1]].float() - target).square().flatten(1).mean(1)


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
