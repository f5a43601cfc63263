"""Theorem 1: the optimal denoiser of a finite data set, in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_difftune.diffusion import ForwardProcess, GaussianDiffusion
from lightning_difftune.errors import DataError
from lightning_difftune.protocols import Denoiser


def ideal_denoiser(
    x_t: Tensor,
    t: Tensor,
    data: Tensor | Iterable[Tensor],
    diffusion: ForwardProcess | None = None,
    chunk_size: int = 4096,
) -> Tensor:
    r"""The minimiser of the denoising loss over N samples: their mean under the posterior of Theorem 1.

    With x_t = a_t x_0 + b_t eps and x_0 drawn from the samples :math:`x^{(i)}`,

    .. math:: E[x_0 | x_t] = \sum_i w_i x^{(i)}, \quad w = \mathrm{softmax}_i(-\|x_t - a_t x^{(i)}\|^2 / 2 b_t^2).

    It tends to the nearest sample as t -> 0 and to the mean of all samples as t -> T. The logarithms of the weights
    reach minus millions near t = 0; they are shifted by their running maximum, and distances come from differences
    instead of products, so float32 is enough. The data pass by once, with B x ``chunk_size`` distances in memory.

    Args:
        x_t: Noisy samples (B, C, H, W).
        t: Their timesteps (B,) int64.
        data: The samples (N, C, H, W), or batches of them, such as a data loader's; they are brought to the device of
            ``x_t``.
        diffusion: The forward process; :class:`~lightning_difftune.diffusion.GaussianDiffusion` by default.
        chunk_size: Samples compared at a time; it changes the result by rounding only.

    Returns:
        The expected clean samples (B, C, H, W) float32.

    Raises:
        DataError: If there are no samples, or they have another shape than ``x_t``.

    Example:
        >>> data = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
        >>> x_t = torch.full((2, 1, 1, 1), 0.9)
        >>> ideal_denoiser(x_t, torch.tensor([0, 999]), data).flatten().round(decimals=2)
        tensor([1.0000, 0.0100])
    """
    diffusion = GaussianDiffusion().to(x_t.device) if diffusion is None else diffusion
    x_t = x_t.float()
    a, b = (coefficient.view(-1, 1) for coefficient in diffusion.coefficients(t, x_t))
    a = a.clamp(min=1e-6)  # 0 at a flow's pure noise, where all samples have the same weight
    points = (x_t.flatten(1) / a).contiguous()
    largest = torch.full_like(a, -torch.inf)  # logarithm of the largest weight so far, (B, 1)
    total = torch.zeros_like(a)  # sum of the weights, over the largest one
    weighted = torch.zeros_like(points)  # sum of the weighted samples, over the largest weight
    for samples in [data] if isinstance(data, Tensor) else data:
        if samples.shape[1:] != x_t.shape[1:]:
            raise DataError(
                f"The ideal denoiser of samples {tuple(samples.shape[1:])} cannot denoise {tuple(x_t.shape[1:])}. Give "
                "the data in the space of x_t."
            )
        for chunk in samples.split(chunk_size) if len(samples) else ():
            clean = chunk.to(points).flatten(1)
            distances = torch.cdist(points, clean, compute_mode="donot_use_mm_for_euclid_dist")
            logits = -0.5 * (distances * a / b).square()  # (B, chunk)
            new_largest = torch.maximum(largest, logits.amax(1, keepdim=True))
            weights = (logits - new_largest).exp()
            shrink = (largest - new_largest).exp()
            total = total * shrink + weights.sum(1, keepdim=True)
            with torch.autocast(points.device.type, enabled=False):
                weighted = weighted * shrink + weights @ clean
            largest = new_largest
    if not total.all():
        raise DataError("The ideal denoiser needs one sample at least; the data are empty.")
    return (weighted / total).view_as(x_t)


@torch.no_grad()
def distance_to_ideal(
    denoise: Denoiser,
    x0: Tensor,
    condition: Any,
    data: Tensor,
    timesteps: Sequence[int],
    diffusion: ForwardProcess | None = None,
    seed: int = 0,
    chunk_size: int = 4096,
) -> list[tuple[int, float]]:
    """Distance of a network from the ideal denoiser of a data set, per noise level.

    Args:
        denoise: The network.
        x0: Clean samples (B, C, H, W) to add noise to, not necessarily from the data set.
        condition: Their condition, as the network takes it.
        data: The samples (N, C, H, W) whose ideal denoiser it is.
        timesteps: Timesteps to measure at.
        diffusion: The forward process; :class:`~lightning_difftune.diffusion.GaussianDiffusion` by default.
        seed: Seed of the noise, which is the same at all timesteps.
        chunk_size: Samples compared at a time.

    Returns:
        For each timestep, (t, root mean squared difference of the two estimates of x0).
    """
    diffusion = GaussianDiffusion().to(x0.device) if diffusion is None else diffusion
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0)
    distances = []
    for step in timesteps:
        t = torch.full((len(x0),), step, device=x0.device)
        x_t = diffusion.add_noise(x0, noise, t)
        estimate = diffusion.predict_x0(x_t, denoise(x_t, t, condition)[:, : x0.shape[1]].float(), t)
        ideal = ideal_denoiser(x_t, t, data, diffusion, chunk_size)
        distances.append((step, (estimate - ideal).square().mean().sqrt().item()))
    return distances
