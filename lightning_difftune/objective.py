"""The Diff-Tuning objective (Eq. 5): sampled timesteps, or a uniform timestep with weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lightning_difftune.conditions import take
from lightning_difftune.densities import TimestepDensity, cdf, describe_missing_half, masses
from lightning_difftune.diffusion import (
    ForwardProcess,
    GaussianDiffusion,
    PredictionType,
    RectifiedFlow,
    Tables,
    same_process,
)
from lightning_difftune.draws import Draws, seed_of
from lightning_difftune.errors import ConfigError, check_kinds
from lightning_difftune.losses import Loss, hybrid_loss, loss_for, prediction_type_of
from lightning_difftune.protocols import Denoiser, RetentionBatch
from lightning_difftune.retention_targets import RetentionTarget, retained_rows
from lightning_difftune.schedules import ForgettingSchedule, MirroredPowerSchedule, describe_backwards, tables_of
from lightning_difftune.source import SourceFacts
from lightning_difftune.weightings import LossWeighting


class ObjectiveOutput(NamedTuple):
    """The training loss and its parts."""

    loss: Tensor  # scalar, the minimised value
    reconsolidation: Tensor  # scalar, mean over the target samples (Eq. 4)
    retention: Tensor  # scalar, mean over the memory bank's samples (Eq. 3); 0 if there are none
    per_sample: Tensor  # (B,), weighted within its stream, not across streams
    timesteps: Tensor  # (B,) int64


class DiffTuningObjective(Tables):
    """Draw t from psi for target samples and from xi for retained ones, then apply the plain loss (App. B.2).

    loss = ``reconsolidation_weight`` * mean over target of L(t ~ psi / sum psi)
    + ``retention_weight`` * mean over bank of L(t ~ xi / sum xi).

    With a ``retention_target`` the retention term compares with the pre-trained network's predictions instead of the
    noise; the variational term of a hybrid loss does not change (see :func:`~lightning_difftune.losses.hybrid_loss`).

    The forward process and the loss default to those of the pre-trained model, which a module binds the objective to
    (:meth:`bind`); given ones are compared with it. Unbound, the objective has DiT's process and the hybrid loss. The
    process and the two distributions are buffers outside the state dict.

    Args:
        schedule: Psi and xi; ``MirroredPowerSchedule(tau=1)`` by default.
        loss: Per-sample loss of :mod:`~lightning_difftune.losses`; by default the one for the model's prediction type.
        retention_weight: Weight of the retention term; 0.1 in the authors' code, 1 in the paper. 0 is the ablation
            "reconsolidation only" (Fig. 6b).
        diffusion: The forward process, such as ``RectifiedFlow()``; by default that of the model.
        reconsolidation_weight: Weight of the reconsolidation term; 0 is the ablation "retention only" (Fig. 6b).
        weighting: Weights of the noise levels in both terms, of :mod:`~lightning_difftune.weightings`; none by default.
        retention_target: Target of retained samples, see :mod:`~lightning_difftune.retention_targets`; by default their
            noise, which is replay (Eq. 3).
        density: Factor of psi and xi, of :mod:`~lightning_difftune.densities`; by default the one that the model's
            family is trained with.

    Raises:
        ConfigError: If psi or xi is negative or not finite somewhere, psi is zero everywhere, both terms have no
            weight, or loss, forward process and model do not match.

    Example:
        >>> objective = DiffTuningObjective()
        >>> is_retention = torch.tensor([False] * 4 + [True])
        >>> zero_network = lambda x_t, t, condition: torch.zeros(len(x_t), 2, 8, 8)
        >>> out = objective(zero_network, torch.zeros(5, 1, 8, 8), None, is_retention)
        >>> out.loss.shape, out.timesteps.shape
        (torch.Size([]), torch.Size([5]))
    """

    loss: Loss
    density: TimestepDensity | None
    psi: Tensor
    xi: Tensor
    reconsolidation_cdf: Tensor
    retention_cdf: Tensor
    density_cdf: Tensor

    def __init__(
        self,
        schedule: ForgettingSchedule | None = None,
        loss: Loss | None = None,
        retention_weight: float = 0.1,
        diffusion: ForwardProcess | None = None,
        reconsolidation_weight: float = 1.0,
        weighting: LossWeighting | None = None,
        retention_target: RetentionTarget | None = None,
        density: TimestepDensity | None = None,
    ) -> None:
        super().__init__()
        check_kinds(
            type(self).__name__,
            schedule=(schedule, ForgettingSchedule, "a schedule, such as PowerSchedule(tau=1.0)"),
            loss=(loss, Callable, "a loss, such as eps_mse_loss"),
            diffusion=(diffusion, ForwardProcess, "a forward process, such as RectifiedFlow()"),
            weighting=(weighting, LossWeighting, "a weighting, such as MinSNRWeighting()"),
            retention_target=(retention_target, RetentionTarget, "a retention target, such as OnlineTeacher()"),
            density=(density, TimestepDensity, "a density, such as LogitNormal()"),
        )
        if not (retention_weight >= 0 and reconsolidation_weight >= 0):
            raise ConfigError(
                f"The weights of the two terms must be at least 0, got retention_weight = {retention_weight} and "
                f"reconsolidation_weight = {reconsolidation_weight}."
            )
        self.schedule = schedule if schedule is not None else MirroredPowerSchedule()
        self.retention_weight = retention_weight
        self.reconsolidation_weight = reconsolidation_weight
        self.weighting = weighting
        self.retention_target = retention_target
        self._said: set[str] = set()
        self._given: dict[str, Any] = {"loss": loss, "diffusion": diffusion, "density": density}
        self._bound: dict[str, Any] = {}
        self.bind(SourceFacts("The model", "", learned_variance=True))

    def bind(self, source: SourceFacts) -> SourceFacts:
        """Take the forward process and loss of a model, or compare the given ones with them, and bind the schedule.

        Returns:
            The facts, with the process and prediction type of this objective if the model states none.

        Raises:
            ConfigError: If loss, process and model contradict each other, or a noise prediction meets a last step of
                pure noise.
        """
        for name, value in self._bound.items():
            if getattr(self, name) is not value:  # assigned since, and used from now on
                self._given[name] = getattr(self, name)
        loss, process, density = self._given.values()
        said = prediction_type_of(loss) if loss is not None else None
        usual: PredictionType = "flow_prediction" if isinstance(process, RectifiedFlow) else "epsilon"
        prediction = source.prediction_type or said or usual
        if process is None:
            process = source.process or (RectifiedFlow() if prediction == "flow_prediction" else GaussianDiffusion())
        if prediction == "epsilon" and isinstance(process, GaussianDiffusion) and process.has_zero_terminal_snr:
            raise ConfigError(
                f"{source.name}: the last step of this process is pure noise (rescale_betas_zero_snr), where a noise "
                "prediction says nothing about the picture. It needs a network that predicts v or the clean sample."
            )
        if said not in (None, prediction):
            fit, found = loss_for(prediction, source.learned_variance).__name__, getattr(loss, "__name__", loss)
            raise ConfigError(
                f"{source.name} predicts {prediction!r}, but the objective's loss is {found}, for {said!r}. "
                f"Leave the loss out, or set it to {fit}."
            )
        if source.process is not None and not same_process(process, source.process):
            raise ConfigError(
                f"{source.name} was trained with another noise schedule than the objective's diffusion, a "
                f"{type(process).__name__}: {type(source.process).__name__} "
                f"{getattr(source.process, 'scheduler_settings', '')}. Leave the diffusion out: it is then the model's."
            )
        if (prediction == "flow_prediction") != isinstance(process, RectifiedFlow):
            raise ConfigError(
                f"The objective's loss is for {prediction!r}, and its diffusion is a {type(process).__name__}. "
                "velocity_mse_loss goes with RectifiedFlow, and the other losses with GaussianDiffusion."
            )
        if said == "epsilon" and not source.learned_variance and loss is hybrid_loss:
            raise ConfigError(
                f"hybrid_loss trains a variance, and {source.name} predicts none. Leave the loss out, or set it to "
                "eps_mse_loss."
            )
        self.density = density if density is not None else source.density
        self.prediction_type: PredictionType = prediction
        self.loss = loss if loss is not None else loss_for(prediction, source.learned_variance)
        device = next((table.device for table in self.buffers()), torch.device("cpu"))
        self.diffusion: ForwardProcess = process.to(device)
        self._bound = {name: getattr(self, name) for name in self._given}
        self._model = source.fingerprint
        if hasattr(self.schedule, "bind"):
            self.schedule.bind(process)
        self._tabulate(device)
        return replace(source, process=process, prediction_type=prediction)

    def of(self, source: SourceFacts) -> Self:
        """This objective or, if it is bound to another model, a copy: two modules may be given the same one."""
        return self if self._model in ("", source.fingerprint) else copy.deepcopy(self)

    def _tabulate(self, device: torch.device) -> None:
        psi, xi = tables_of(self.schedule, self.diffusion.num_timesteps)
        uniform = torch.ones(len(psi), dtype=torch.float64, device="cpu")
        p0 = uniform if self.density is None else masses(self.density, len(psi))
        missing = None if self.density is None else describe_missing_half(self.density, psi, xi)
        for text in (describe_backwards(self.schedule, psi, xi), missing):
            if text is not None and text not in self._said:
                from lightning.fabric.utilities.rank_zero import rank_zero_warn  # the objective needs torch alone

                self._said.add(text)
                rank_zero_warn(text)
        self.uses_retention = bool(xi.any()) and self.retention_weight > 0
        if self.reconsolidation_weight == 0 and not self.uses_retention:
            raise ConfigError(
                f"Nothing is learned: reconsolidation_weight is 0 and so is retention, with retention_weight = "
                f"{self.retention_weight} and {self.schedule!r}. Raise one of the two."
            )
        for name, table in {
            "psi": psi,
            "xi": xi,
            "density_cdf": cdf(p0),
            "reconsolidation_cdf": cdf(p0 * psi),
            "retention_cdf": cdf(p0 * xi if xi.any() else p0),
        }.items():
            self.register_buffer(name, table.float().to(device), persistent=False)

    def timesteps(self, uniform: Tensor, is_retention: Tensor) -> Tensor:
        """Timesteps (B,) int64 by inverting the two distributions at uniform numbers (B,) in [0, 1)."""
        target = torch.searchsorted(self.reconsolidation_cdf, uniform, right=True)
        retained = torch.searchsorted(self.retention_cdf, uniform, right=True)
        return torch.where(is_retention, retained, target).clamp_(max=self.diffusion.num_timesteps - 1)

    def weights(self, t: Tensor, is_retention: Tensor) -> Tensor:
        """Weights (B,) of the samples within their stream: 1, since t is drawn from psi or xi."""
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
            condition: Their condition, passed to ``denoise`` unchanged.
            is_retention: (B,) bool, true for samples of the memory bank.
            draws: Source of random numbers, by default seeded by torch's global generator.
            retained: The bank's columns of the retained samples, in the mask's order, for a ``retention_target``.
            teacher: The pre-trained network, for a ``retention_target`` that evaluates it on the retained samples.
        """
        if draws is None:
            draws = Draws(seed_of("objective", int(torch.randint(2**31, ()))), 0, x0.device)
        t = self.timesteps(draws.uniform(len(x0)), is_retention)
        noise = draws.normal(*x0.shape)
        if self.retention_target is not None and retained is not None:
            rows = retained_rows(is_retention, len(retained["latents"]))[0]
            t_retained, noise_retained = self.retention_target.draws(retained, t[rows], noise[rows])
            t, noise = t.index_copy(0, rows, t_retained), noise.index_copy(0, rows, noise_retained)
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
            rows, others = retained_rows(is_retention, len(retained["latents"]))
            learned = self.retention_target.predictions(retained, x_t[rows], t[rows], take(condition, rows), teacher)
            target_losses = self._losses(tuple(part[others] for part in batch))
            bank_losses = self._losses(tuple(part[rows] for part in batch), learned)
            losses = torch.cat([target_losses, bank_losses])[torch.cat([others, rows]).argsort()]
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
        used = {"weighting": self.weighting, "target": target}  # a loss may take neither
        return self.loss(*batch, self.diffusion, **{name: value for name, value in used.items() if value is not None})


class WeightedDiffTuningObjective(DiffTuningObjective):
    """Draw t uniformly and weight the loss by psi(s) or xi(s), as written in Eqs. 3-5.

    Same arguments as :class:`DiffTuningObjective`. In expectation its terms are those of that class times Z_psi =
    mean_t psi(s_t) and Z_xi = mean_t xi(s_t), both 1/2 for tau = 1 in the limit of many steps. It trains less stably
    (App. B.2).
    """

    def timesteps(self, uniform: Tensor, is_retention: Tensor) -> Tensor:
        """Timesteps (B,) int64 from the density, uniform over the T steps by default."""
        steps, cdf = self.diffusion.num_timesteps, self.density_cdf
        t = (uniform * steps).long() if self.density is None else torch.searchsorted(cdf, uniform, right=True)
        return t.clamp_(max=steps - 1)

    def weights(self, t: Tensor, is_retention: Tensor) -> Tensor:
        """Psi(s_t) for target samples and xi(s_t) for retained ones, (B,)."""
        return torch.where(is_retention, self.xi[t], self.psi[t])


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (B,) where the mask is set, 0 if it is nowhere set; without waiting for the device."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)
