"""Forgetting schedules: how much to learn the target (psi) and to retain the source (xi) at every noise level."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from lightning_difftune.diffusion import ForwardProcess
from lightning_difftune.errors import ConfigError
from lightning_difftune.files import atomic_write


@runtime_checkable
class ForgettingSchedule(Protocol):
    """The two coefficients of Eq. 5 as functions of s = (t + 1) / T in (0, 1]; s near 0 is data, s = 1 is noise.

    Any object with these two methods is a schedule. Both map a tensor of any shape to non-negative weights of that
    shape. Psi should not decrease in s and xi not increase; only their shape matters when timesteps are sampled from
    them. A schedule that depends on the forward process also has ``bind(process)``, which the objective calls with its
    own before it asks for weights.
    """

    def reconsolidation(self, s: Tensor) -> Tensor:
        """Psi(s), the weight of learning the target (Eq. 4)."""

    def retention(self, s: Tensor) -> Tensor:
        """Xi(s), the weight of replaying the memory bank (Eq. 3)."""


class PowerSchedule:
    """psi = s^tau and xi = 1 - psi, the paper's family (Section 3.2; tau in {0, 0.3, 0.5, 0.7, 1, 1.5} in Fig. 6c).

    tau = 0 is standard fine-tuning: psi = 1 and xi = 0 everywhere.

    Args:
        tau: Exponent, at least 0.
        floor: Least psi: psi = max(floor, s^tau), so that the target is also learned at small noise. xi is unchanged.

    Raises:
        ConfigError: If tau is negative or not finite, or the floor is outside [0, 1].

    Example:
        >>> PowerSchedule(tau=1.0).retention(torch.tensor([0.25, 1.0]))
        tensor([0.7500, 0.0000])
    """

    def __init__(self, tau: float = 1.0, floor: float = 0.0) -> None:
        if not 0 <= tau < float("inf"):
            raise ConfigError(
                f"tau must be a finite number of at least 0, got {tau}. A negative tau would emphasise small noise for "
                "the target; tau = 0 is standard fine-tuning and 1 the paper's default."
            )
        if not 0 <= floor <= 1:
            raise ConfigError(f"floor is the least psi, a number in [0, 1]; got {floor}.")
        self.tau, self.floor = float(tau), float(floor)

    def __repr__(self) -> str:
        floor = f", floor={self.floor:g}" if self.floor else ""
        return f"{type(self).__name__}(tau={self.tau:g}{floor})"

    def reconsolidation(self, s: Tensor) -> Tensor:
        """max(floor, s^tau), same shape as s."""
        return (s**self.tau).clamp(min=self.floor)

    def retention(self, s: Tensor) -> Tensor:
        """1 - s^tau, same shape as s."""
        return 1 - s**self.tau


class MirroredPowerSchedule(PowerSchedule):
    """psi = s^tau with its mirror image as xi, as in the authors' released code.

    The code draws the 0-based retention timestep k with a weight of (T - k)^tau. With s = (k + 1) / T that is
    xi(s) = (1 - s + 1/T)^tau up to a constant: the mirror of the T grid points, so the last step keeps a little weight.
    For tau = 1 it differs from :class:`PowerSchedule` by that 1/T only. tau = 0 is standard fine-tuning, so xi = 0.

    Args:
        tau: Exponent, at least 0.
        floor: Least psi, as in :class:`PowerSchedule`.

    Example:
        >>> schedule = MirroredPowerSchedule()
        >>> from lightning_difftune.diffusion import GaussianDiffusion
        >>> schedule.bind(GaussianDiffusion(100))
        >>> schedule.retention(torch.tensor([0.01, 1.0]))
        tensor([1.0000, 0.0100])
    """

    num_timesteps: int | None = None

    def bind(self, process: ForwardProcess) -> None:
        """Take T from a forward process."""
        self.num_timesteps = process.num_timesteps

    def retention(self, s: Tensor) -> Tensor:
        """(1 - s + 1/T)^tau, same shape as s; zeros for tau = 0.

        Raises:
            ConfigError: If no process was bound.
        """
        if self.tau == 0:
            return torch.zeros_like(s)
        if self.num_timesteps is None:
            raise unbound(self)
        return (1 - s + 1 / self.num_timesteps) ** self.tau


class SNRSchedule:
    """psi = 1 / (k + SNR)^gamma and xi = 1 - psi / max(psi), the SNR-based ablation of Fig. 6c (after P2 weighting).

    Args:
        k: Keeps psi bounded at pure noise; at least 1 so that psi stays in [0, 1].
        gamma: Sharpness, at least 0; 0 is standard fine-tuning.

    Raises:
        ConfigError: If k < 1 or gamma < 0.
    """

    snr: Tensor | None = None

    def __init__(self, k: float = 1.0, gamma: float = 1.0) -> None:
        if k < 1 or gamma < 0:
            raise ConfigError(f"An SNR schedule needs k >= 1 and gamma >= 0, got k = {k}, gamma = {gamma}.")
        self.k, self.gamma = float(k), float(gamma)

    def bind(self, process: ForwardProcess) -> None:
        """Take the SNR from a forward process."""
        device = next(process.buffers()).device
        self.snr = process.snr(torch.arange(process.num_timesteps, device=device)).cpu()  # (T,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(k={self.k:g}, gamma={self.gamma:g})"

    def reconsolidation(self, s: Tensor) -> Tensor:
        """1 / (k + SNR(s))^gamma, same shape as s.

        Raises:
            ConfigError: If no process was bound.
        """
        if self.snr is None:
            raise unbound(self)
        t = (s.double() * len(self.snr)).round().long().clamp(1, len(self.snr)) - 1
        return ((self.k + self.snr.to(s.device)[t]).to(s.dtype)) ** -self.gamma

    def retention(self, s: Tensor) -> Tensor:
        """1 - psi(s) / psi(1), same shape as s."""
        return 1 - self.reconsolidation(s) / self.reconsolidation(torch.ones_like(s))


def unbound(schedule: ForgettingSchedule) -> ConfigError:
    """The error for a schedule that is used before it is bound to a process."""
    return ConfigError(
        f"{schedule!r} depends on the forward process and knows none. An objective binds its own; elsewhere call "
        "schedule.bind(process), such as GaussianDiffusion() for DiT."
    )


def tables_of(schedule: ForgettingSchedule, steps: int) -> tuple[Tensor, Tensor]:
    """Psi and xi at the T noise levels, (T,) float64 each.

    Raises:
        ConfigError: If they are negative or not finite somewhere, or psi is 0 everywhere.
    """
    s = torch.arange(1, steps + 1, dtype=torch.float64, device="cpu") / steps
    psi, xi = schedule.reconsolidation(s), schedule.retention(s)
    for name, weights in (("reconsolidation", psi), ("retention", xi)):
        if weights.shape != s.shape or not weights.isfinite().all() or (weights < 0).any():
            raise ConfigError(
                f"{name}(s) of {schedule!r} must give finite weights >= 0 of s's shape; "
                f"got shape {tuple(weights.shape)}, range {weights.min():.3g} to {weights.max():.3g}."
            )
    if not psi.any():
        raise ConfigError(f"{schedule!r} gives the target no weight at any timestep: psi is 0 everywhere.")
    return psi, xi


def describe_backwards(schedule: ForgettingSchedule, psi: Tensor, xi: Tensor) -> str | None:
    """A warning about a schedule that retains noise and learns details; ``None`` for one that runs as the paper's do.

    Args:
        schedule: The schedule.
        psi: Its psi at rising s, (T,).
        xi: Its xi at the same s, (T,).
    """
    falls, rises = bool((psi.diff() < -1e-6 * psi.max()).any()), bool((xi.diff() > 1e-6 * xi.max()).any())
    if not falls and not rises:
        return None
    found = " and ".join(["psi falls"] * falls + ["xi rises"] * rises)
    return (
        f"{schedule!r} runs backwards: {found} towards noise, where Diff-Tuning learns the target more and retains "
        "the source less. s = 0 is data and s = 1 is noise; exchange s for 1 - s unless this is meant."
    )


class MeasuredSchedule:
    """Psi from a file: how much tuning improved the denoising of target data at each noise level, and xi = 1 - psi.

    Where the pre-trained model denoises target data as well as a tuned one, there is nothing to adapt and everything to
    retain. :class:`~lightning_difftune.callbacks.ForgettingMeter` measures and writes such a file. Psi is linear
    between the measured levels and constant beyond them.

    Args:
        path: A JSON file written by :func:`fit_schedule`.

    Raises:
        ConfigError: If the file is missing or is not a schedule.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            content = json.loads(self.path.read_text())
            s, psi = (np.asarray(content[key], dtype=np.float64) for key in ("s", "psi"))
        except OSError as error:
            raise ConfigError(f"The schedule {path} cannot be read: {error}. Check its path.") from error
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{path} is not a measured schedule: it is not JSON with lists 's' and 'psi'.") from error
        if (
            s.ndim != 1
            or s.shape != psi.shape
            or len(s) < 2
            or not (np.diff(s) > 0).all()
            or not (s[0] > 0 and s[-1] <= 1)
            or not (np.diff(psi) >= 0).all()
            or not (psi[0] >= 0 and 0 < psi[-1] <= 1)
        ):
            raise ConfigError(
                f"{path} is not a measured schedule. It needs two levels 's' or more, rising in (0, 1], and as many "
                f"values 'psi', not falling, in [0, 1] and not all 0; found s = {s.tolist()}, psi = {psi.tolist()}."
            )
        self.s, self.psi = s, psi

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path.name})"

    def reconsolidation(self, s: Tensor) -> Tensor:
        """Psi between the measured levels, same shape as s."""
        return torch.from_numpy(np.interp(s.double().cpu().numpy(), self.s, self.psi)).to(s)

    def retention(self, s: Tensor) -> Tensor:
        """1 - psi(s), same shape as s."""
        return 1 - self.reconsolidation(s)


def fit_schedule(
    path: str | Path, s: Sequence[float], pretrained_loss: Sequence[float], tuned_loss: Sequence[float]
) -> MeasuredSchedule:
    """Fit a schedule to losses on target data, write it as JSON and open it.

    Psi is the fraction of the pre-trained model's loss that tuning removed, 1 - tuned / pretrained, at least 0; it is
    made non-decreasing in s by least squares (isotonic regression) and scaled to a maximum of 1.

    Args:
        path: The file.
        s: K noise levels, rising in (0, 1].
        pretrained_loss: The pre-trained model's losses on target data at these levels (K,).
        tuned_loss: The tuned model's (K,).

    Raises:
        ConfigError: If the losses are not positive numbers, or tuning improved nothing.
    """
    before, after = np.asarray(pretrained_loss, dtype=np.float64), np.asarray(tuned_loss, dtype=np.float64)
    if not (before.shape == after.shape == (len(s),) and (before > 0).all() and np.isfinite(after).all()):
        raise ConfigError(f"A schedule needs a positive loss of both models at each of the {len(s)} levels.")
    gain = np.maximum(0, 1 - after / before)
    psi = isotonic(gain)
    if psi[-1] <= 0:
        raise ConfigError(
            "The tuned model denoises target data nowhere better than the pre-trained one, so there is no schedule to "
            "fit. Train longer before measuring."
        )
    content = {
        "s": [float(level) for level in s],
        "psi": (psi / psi[-1]).round(6).tolist(),
        "pretrained_loss": before.tolist(),
        "tuned_loss": after.tolist(),
    }
    atomic_write(Path(path), (json.dumps(content, indent=2) + "\n").encode())
    return MeasuredSchedule(path)


def isotonic(values: np.ndarray) -> np.ndarray:
    """The non-decreasing sequence nearest to values (K,) in least squares, by its min-max formula.

    Example:
        >>> isotonic(np.array([0.0, 3.0, 1.0, 4.0])).tolist()
        [0.0, 2.0, 2.0, 4.0]
    """
    count = len(values)
    means = [[values[j : k + 1].mean() if j <= k else np.inf for k in range(count)] for j in range(count)]
    return np.array([max(min(means[j][i:]) for j in range(i + 1)) for i in range(count)])
