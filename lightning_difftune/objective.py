"""The Diff-Tuning objective (Eq. 5): sampled timesteps, or a uniform timestep with weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_difftune.diffusion import ForwardProcess, GaussianDiffusion
from lightning_difftune.draws import Draws, seed_of
from lightning_difftune.errors import ConfigError
from lightning_difftune.losses import hybrid_loss
from lightning_difftune.protocols import Denoiser, RetentionBatch
from lightning_difftune.retention_targets import RetentionTarget, last
from lightning_difftune.schedules import ForgettingSchedule, MirroredPowerSchedule
from lightning_difftune.weightings import LossWeighting


class ObjectiveOutput(NamedTuple):
    """The training loss and its parts."""

    loss: Tensor  # scalar, what is minimised
    reconsolidation: Tensor  # scalar, mean over the target samples (Eq. 4)
    retention: Tensor  # scalar, mean over the memory bank's samples (Eq. 3); 0 if there are none
    per_sample: Tensor  # (B,), weighted within its stream, not across streams
    timesteps: Tensor  # (B,) int64


class DiffTuningObjective(nn.Module):
    """Draw t from psi for target samples and from xi for retained ones, then apply the plain loss (App. B.2).

    loss = ``reconsolidation_weight`` * mean over target of L(t ~ psi / sum psi)
    + ``retention_weight`` * mean over bank of L(t ~ xi / sum xi).

    Relation to :class:`WeightedDiffTuningObjective`: with Z_psi = mean_t psi(s_t) and Z_xi = mean_t xi(s_t), its two
    terms have Z_psi and Z_xi times the expectation of the two terms here.

    With a ``retention_target`` the retention term compares with the pre-trained network's predictions in place of the
    noise; the variational term of a hybrid loss stays as it is (see :func:`~lightning_difftune.losses.hybrid_loss`).

    The defaults are those of the authors' released code. The forward process and the two distributions are buffers
    outside the state dict.

    Args:
        schedule: Psi and xi; ``MirroredPowerSchedule(tau=1)`` by default.
        loss: Per-sample loss of :mod:`~lightning_difftune.losses`, the one of the network's prediction type.
        retention_weight: Weight of the retention term; 0.1 in the authors' code, 1 in the paper. 0 is the ablation
            "reconsolidation only" (Fig. 6b).
        diffusion: The forward process; T = 1000 and DiT's linear betas by default.
            :class:`~lightning_difftune.diffusion.RectifiedFlow` trains by flow matching.
        reconsolidation_weight: Weight of the reconsolidation term; 0 is the ablation "retention only" (Fig. 6b).
        weighting: Weights of the noise levels in both terms, over the SNR of ``diffusion``: see
            :mod:`~lightning_difftune.weightings`. All count alike by default.

        retention_target: What retained samples are compared with: see :mod:`~lightning_difftune.retention_targets`.
            Their noise by default, which is replay (Eq. 3).

    Raises:
        ConfigError: If psi or xi is negative or not finite somewhere, psi is zero everywhere, or both terms have no
            weight.

    Example:
        >>> objective = DiffTuningObjective()
        >>> is_retention = torch.tensor([False] * 4 + [True])
        >>> zero_network = lambda x_t, t, condition: torch.zeros(len(x_t), 2, 8, 8)
        >>> out = objective(zero_network, torch.zeros(5, 1, 8, 8), None, is_retention)
        >>> out.loss.shape, out.timesteps.shape
        (torch.Size([]), torch.Size([5]))
    """

    psi: Tensor
    xi: Tensor
    reconsolidation_cdf: Tensor
    retention_cdf: Tensor

    def __init__(
        self,
        schedule: ForgettingSchedule | None = None,
        loss: Callable[..., Tensor] = hybrid_loss,
        retention_weight: float = 0.1,
        diffusion: ForwardProcess | None = None,
        reconsolidation_weight: float = 1.0,
        weighting: LossWeighting | None = None,
        retention_target: RetentionTarget | None = None,
    ) -> None:
        super().__init__()
        if not (retention_weight >= 0 and reconsolidation_weight >= 0):
            raise ConfigError(
                f"The weights of the two terms must be at least 0, got retention_weight = {retention_weight} and "
                f"reconsolidation_weight = {reconsolidation_weight}."
            )
        self.schedule = schedule if schedule is not None else MirroredPowerSchedule()
        self.loss = loss
        self.retention_weight = retention_weight
        self.reconsolidation_weight = reconsolidation_weight
        self.weighting = weighting
        self.retention_target = retention_target
        self.diffusion: ForwardProcess = diffusion if diffusion is not None else GaussianDiffusion()
        if hasattr(self.schedule, "bind"):
            self.schedule.bind(self.diffusion)

        steps = self.diffusion.num_timesteps
        s = torch.arange(1, steps + 1, dtype=torch.float64, device="cpu") / steps
        psi, xi = self.schedule.reconsolidation(s), self.schedule.retention(s)
        for name, weights in (("reconsolidation", psi), ("retention", xi)):
            if weights.shape != s.shape or not weights.isfinite().all() or (weights < 0).any():
                raise ConfigError(
                    f"{name}(s) of {self.schedule!r} must give finite weights >= 0 of s's shape; "
                    f"got shape {tuple(weights.shape)}, range {weights.min():.3g} to {weights.max():.3g}."
                )
        if not psi.any():
            raise ConfigError(f"{self.schedule!r} gives the target no weight at any timestep: psi is 0 everywhere.")
        self.uses_retention = bool(xi.any()) and retention_weight > 0
        if reconsolidation_weight == 0 and not self.uses_retention:
            raise ConfigError(
                f"Nothing is learned: reconsolidation_weight is 0 and so is retention, with retention_weight = "
                f"{retention_weight} and {self.schedule!r}. Raise one of the two."
            )
        for name, table in {
            "psi": psi,
            "xi": xi,
            "reconsolidation_cdf": (psi / psi.sum()).cumsum(0),
            "retention_cdf": (xi / xi.sum() if xi.any() else torch.full_like(xi, 1 / steps)).cumsum(0),
        }.items():
            self.register_buffer(name, table.float(), persistent=False)

    def timesteps(self, uniform: Tensor, is_retention: Tensor) -> Tensor:
        """Timesteps (B,) int64 by inverting the two distributions at uniform numbers (B,) in [0, 1)."""
        target = torch.searchsorted(self.reconsolidation_cdf, uniform, right=True)
        retained = torch.searchsorted(self.retention_cdf, uniform, right=True)
        return torch.where(is_retention, retained, target).clamp_(max=self.diffusion.num_timesteps - 1)

    def weights(self, t: Tensor, is_retention: Tensor) -> Tensor:
        """Weights (B,) of the samples within their stream: 1, since t was drawn from psi or xi."""
        return torch.ones_like(t, dtype=torch.float32)

    def forward(
        self,
        denoise: Denoiser,
        x0: Tensor,
        condition: Any,
        is_retention: Tensor,
        draws: Draws | None = None,
        retained: RetentionBatch | None = None,
        teacher: Denoiser | None = None,
    ) -> ObjectiveOutput:
        """Draw timesteps and noise, then compute the loss of one batch.

        Args:
            denoise: The network, ``denoise(x_t, t, condition)``.
            x0: Clean samples (B, C, H, W), target and retained ones in one batch.
            condition: Their condition, passed to ``denoise`` untouched.
            is_retention: (B,) bool, which samples come from the memory bank.
            draws: Where random numbers come from; torch's global generator seeds them by default.
            retained: What the bank knows of the retained samples, which then are the last ones of the batch; a
                ``retention_target`` needs it.
            teacher: The pre-trained network, for a ``retention_target`` that asks it. It is given the retained samples
                and their part of ``condition``.
        """
        if draws is None:
            draws = Draws(seed_of("objective", int(torch.randint(2**31, ()))), 0, x0.device)
        t = self.timesteps(draws.uniform(len(x0)), is_retention)
        noise = draws.normal(*x0.shape)
        if self.retention_target is not None and retained is not None:
            first = len(x0) - len(retained["latents"])
            t_retained, noise_retained = self.retention_target.draws(retained, t[first:], noise[first:])
            t, noise = torch.cat([t[:first], t_retained]), torch.cat([noise[:first], noise_retained])
        return self.at(denoise, x0, condition, is_retention, t, noise, retained, teacher)

    def at(
        self,
        denoise: Denoiser,
        x0: Tensor,
        condition: Any,
        is_retention: Tensor,
        t: Tensor,
        noise: Tensor,
        retained: RetentionBatch | None = None,
        teacher: Denoiser | None = None,
    ) -> ObjectiveOutput:
        """The same loss at given timesteps (B,) int64 and noise (B, C, H, W)."""
        x_t = self.diffusion.add_noise(x0, noise, t)
        batch = denoise(x_t, t, condition), x0, x_t, noise, t
        if self.retention_target is not None and retained is not None:
            count = len(retained["latents"])
            learned = self.retention_target.predictions(
                retained, x_t[-count:], t[-count:], last(condition, count), teacher
            )
            of_target, of_bank = tuple(part[:-count] for part in batch), tuple(part[-count:] for part in batch)
            losses = torch.cat([self._losses(of_target), self._losses(of_bank, learned)])
        else:
            losses = self._losses(batch)
        per_sample = losses * self.weights(t, is_retention)
        reconsolidation = masked_mean(per_sample, ~is_retention)
        retention = masked_mean(per_sample, is_retention)
        loss = self.reconsolidation_weight * reconsolidation
        if self.uses_retention:
            loss = loss + self.retention_weight * retention
        return ObjectiveOutput(loss, reconsolidation, retention, per_sample, t)

    def _losses(self, batch: tuple[Tensor, ...], target: Tensor | None = None) -> Tensor:
        options = {"weighting": self.weighting, "target": target}
        used = {name: option for name, option in options.items() if option is not None}  # a loss may know neither
        return self.loss(*batch, self.diffusion, **used)


class WeightedDiffTuningObjective(DiffTuningObjective):
    """Draw t uniformly and weight the loss by psi(s) or xi(s): Eqs. 3-5 as they are written.

    Same arguments as :class:`DiffTuningObjective`. The paper reports that it trains less stably (App. B.2). Its two
    terms have Z_psi = mean_t psi(s_t) and Z_xi = mean_t xi(s_t) times the expectation of the sampled form; both are
    1/2 in the limit of many steps for tau = 1.
    """

    def timesteps(self, uniform: Tensor, is_retention: Tensor) -> Tensor:
        """Timesteps (B,) int64, uniform over the T steps."""
        return (uniform * self.diffusion.num_timesteps).long().clamp_(max=self.diffusion.num_timesteps - 1)

    def weights(self, t: Tensor, is_retention: Tensor) -> Tensor:
        """Psi(s_t) for target samples and xi(s_t) for retained ones, (B,)."""
        return torch.where(is_retention, self.xi[t], self.psi[t])


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (B,) where the mask is set, 0 if it never is; without waiting for the device."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)
