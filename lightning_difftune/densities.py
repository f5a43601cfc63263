"""Timestep densities: the noise levels that a family is trained at, before psi and xi weight them per stream."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_difftune.errors import ConfigError


@runtime_checkable
class TimestepDensity(Protocol):
    """A family's own training density p0 as a function of s in (0, 1): s near 0 is data, s = 1 is noise.

    The target's timesteps are drawn from q(s) ~ p0(s) psi(s) and the bank's from q(s) ~ p0(s) xi(s), so that tau = 0
    is the family's own recipe. Only the shape of p0 matters.
    """

    def density(self, s: Tensor) -> Tensor:
        """Non-negative values, same shape as s."""


class Uniform:
    """A uniform u in (0, 1), shifted towards noise as in flow-matching samplers: s = shift u / (1 + (shift - 1) u).

    Then p0(s) = shift / (shift - (shift - 1) s)^2. A larger ``shift`` means more noise, which large pictures need: 3
    in Stable Diffusion 3, exp(1.15) = 3.16 in FLUX.1 at 1024 px.

    Args:
        shift: Above 0; 1 moves nothing.

    Raises:
        ConfigError: If the shift is not positive.

    Example:
        >>> Uniform(shift=3.0).density(torch.tensor([0.0, 0.75, 1.0]))
        tensor([0.3333, 1.3333, 3.0000])
    """

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = positive("shift", shift)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shift={self.shift:g})"

    def density(self, s: Tensor) -> Tensor:
        """Shift / (shift - (shift - 1) s)^2, same shape as s."""
        return self.shift / (self.shift - (self.shift - 1) * s).square()


class LogitNormal:
    """logit(u) ~ N(mean, std^2), then shifted as in :class:`Uniform` (Esser et al., 2024, Section 3.1).

    Then logit(s) ~ N(mean + log shift, std^2). A larger ``mean`` means more noise. diffusers' scripts count from noise
    to data: their ``logit_mean`` has the opposite sign.

    Args:
        mean: Mean of the logits.
        std: Standard deviation of the logits, above 0.
        shift: Above 0; 1 shifts nothing, 3 is that of the script for Stable Diffusion 3.

    Raises:
        ConfigError: If ``std`` or ``shift`` is not positive.

    Example:
        >>> LogitNormal().density(torch.tensor([0.5]))
        tensor([1.5958])
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> None:
        self.mean, self.std, self.shift = float(mean), positive("std", std), positive("shift", shift)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mean={self.mean:g}, std={self.std:g}, shift={self.shift:g})"

    def density(self, s: Tensor) -> Tensor:
        """Same shape as s; 0 at both ends."""
        z = (s.logit() - self.mean - math.log(self.shift)) / self.std
        inside = (-0.5 * z.square()).exp() / (self.std * math.sqrt(2 * math.pi) * s * (1 - s))
        return torch.where((s > 0) & (s < 1), inside, 0)


def positive(name: str, value: float) -> float:
    """The value, if it is a finite number above 0."""
    if not 0 < value < math.inf:
        raise ConfigError(f"A timestep density's {name} must be a finite number above 0, got {value}.")
    return float(value)


def masses(density: TimestepDensity, steps: int) -> Tensor:
    """Mass (T,) float64 of each of T noise levels, with mean 1; level t covers s from t / T to (t + 1) / T.

    Raises:
        ConfigError: If the density is negative or not finite somewhere, or 0 everywhere.
    """
    middles = (torch.arange(steps, dtype=torch.float64, device="cpu") + 0.5) / steps
    values = density.density(middles)
    if values.shape != middles.shape or not values.isfinite().all() or (values < 0).any() or not values.any():
        raise ConfigError(
            f"{density!r} must give finite values >= 0 of s's shape, and not 0 everywhere; got shape "
            f"{tuple(values.shape)}, range {values.min():.3g} to {values.max():.3g}."
        )
    return values / values.mean()


def cdf(weights: Tensor) -> Tensor:
    """The cumulative distribution (T,) of weights (T,), at least 0 and not all 0."""
    return (weights / weights.sum()).cumsum(0)


def describe_missing_half(density: TimestepDensity, psi: Tensor, xi: Tensor) -> str | None:
    """A warning about a density that gives a stream too little of the noise levels that it needs, if any.

    The target needs the noisiest tenth and the bank the cleanest 30 %. The warning names a stream that gets less than
    a quarter of its share under a uniform density.

    Args:
        density: p0.
        psi: Weights of the target at the T levels (T,).
        xi: Weights of the bank (T,).
    """
    p0, steps = masses(density, len(psi)), len(psi)
    ends = {"the target its noisiest tenth": (psi, slice(steps * 9 // 10, None))}
    if xi.any():
        ends["the bank its cleanest 30 %"] = (xi, slice(0, steps * 3 // 10))
    found = []
    for name, (weights, end) in ends.items():
        plain = float(weights[end].sum() / weights.sum())
        share = float((p0 * weights)[end].sum() / (p0 * weights).sum())
        if share < plain / 4:
            found.append(f"{name} in {share:.1%} of its draws, where a uniform density has {plain:.0%}")
    if not found:
        return None
    return (
        f"{density!r} shows {' and '.join(found)}. Diff-Tuning learns and retains just there: take Uniform with the "
        "family's shift, unless this is the recipe that you compare with."
    )
