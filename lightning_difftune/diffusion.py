"""Forward processes: how clean samples become noise, and what a network's prediction implies about them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lightning_difftune.errors import ConfigError, check_choice

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]  # diffusers' names


class Tables(nn.Module):
    """A module whose buffers follow it to a device but stay float32, whatever type the network computes in.

    Example:
        >>> from lightning_difftune.diffusion import GaussianDiffusion
        >>> GaussianDiffusion().bfloat16().log_betas.dtype
        torch.float32
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class ForwardProcess(Tables, ABC):
    """x_t = a_t x_0 + b_t eps at T discrete noise levels, t = 0 next to data and t = T - 1 next to noise.

    Attributes:
        num_timesteps: T.
    """

    num_timesteps: int

    @abstractmethod
    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The a_t and b_t at t (B,) int64, each shaped (B, 1, ...) to multiply ``like`` (B, ...)."""

    @abstractmethod
    def predict_x0(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean sample (B, ...) that x_t and a network's prediction (B, ...) imply."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, ...) from clean x0 (B, ...), standard normal noise (B, ...) and t (B,) int64."""
        a, b = self.coefficients(t, x0)
        return a * x0 + b * noise

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio (a_t / b_t)^2 at t (B,) int64, same shape; abar / (1 - abar) for a diffusion."""
        a, b = self.coefficients(t, t)
        return (a / b).square()

    def levels(self) -> Tensor:
        """a_t and b_t of all t as one table (2, T) float32 on the CPU."""
        device = next((table.device for table in self.buffers()), torch.device("cpu"))
        t = torch.arange(self.num_timesteps, device=device)
        return torch.stack(self.coefficients(t, t)).float().cpu()


class GaussianDiffusion(ForwardProcess):
    """Variance-preserving process over discrete steps (Ho et al., 2020).

    The defaults are DiT's. Stable Diffusion's is ``GaussianDiffusion(1000, 0.00085, 0.012, "scaled_linear")``.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. Tables are computed in float64 and kept in float32, as buffers that
    follow the model to its device but never enter a checkpoint.

    Args:
        num_timesteps: T, the number of discrete steps.
        beta_start: Variance added by the first step.
        beta_end: Variance added by the last step.
        beta_schedule: ``"linear"`` in beta, or ``"scaled_linear"``, which is linear in the square root of beta; the
            names are those of diffusers' schedulers.
        rescale_betas_zero_snr: Rescale to pure noise at the last step (Lin et al., 2024), where abar is then exactly 0
            and a noise prediction implies nothing about x_0: for networks that predict v or the clean sample.

    Attributes:
        scheduler_settings: Settings with which a diffusers scheduler reverses this process.

    Raises:
        ConfigError: If there are fewer than two steps, betas outside (0, 1) or decreasing, or an unknown schedule.

    Example:
        >>> process = GaussianDiffusion()
        >>> x0, noise = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
        >>> round(process.add_noise(x0, noise, torch.tensor([0])).mean().item(), 5)
        0.99995
    """

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    posterior_mean_x0: Tensor
    posterior_mean_xt: Tensor
    posterior_log_variance: Tensor
    log_betas: Tensor
    scheduler_settings: dict[str, Any]

    def __init__(
        self,
        num_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: Literal["linear", "scaled_linear"] = "linear",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        super().__init__()
        check_choice(type(self).__name__, "beta_schedule", beta_schedule, "linear", "scaled_linear")
        if num_timesteps < 2 or not 0 < beta_start <= beta_end < 1:
            raise ConfigError(
                f"A diffusion needs two steps or more and 0 < beta_start <= beta_end < 1; "
                f"got {num_timesteps} steps, betas {beta_start} to {beta_end}."
            )
        power = 1.0 if beta_schedule == "linear" else 0.5
        ends = beta_start**power, beta_end**power
        betas = torch.linspace(*ends, num_timesteps, dtype=torch.float64, device="cpu") ** (1 / power)
        alphas_cumprod = (1 - betas).cumprod(0)
        if rescale_betas_zero_snr:
            roots = alphas_cumprod.sqrt()
            alphas_cumprod = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
        self._tabulate(alphas_cumprod, None if rescale_betas_zero_snr else betas)
        self.scheduler_settings = {"beta_start": beta_start, "beta_end": beta_end, "beta_schedule": beta_schedule}
        if rescale_betas_zero_snr:
            self.scheduler_settings["rescale_betas_zero_snr"] = True

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> GaussianDiffusion:
        """The process of a table of abar_t (T,), which decreases from below 1 to at least 0.

        Raises:
            ConfigError: If it does not.
        """
        table = alphas_cumprod.detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) < 2 or not (table.diff() < 0).all() or not (table[0] < 1 and table[-1] >= 0):
            raise ConfigError("alphas_cumprod must be (T,) numbers that fall, from below 1 to 0 or more.")
        process = cls(len(table))
        process._tabulate(table)
        betas = 1 - table / torch.cat([torch.ones_like(table[:1]), table[:-1]])
        process.scheduler_settings = {"trained_betas": betas.tolist()}
        if table[-1] == 0:
            process.scheduler_settings["rescale_betas_zero_snr"] = True
        return process

    def _tabulate(self, alphas_cumprod: Tensor, betas: Tensor | None = None) -> None:
        self.num_timesteps = len(alphas_cumprod)
        previous = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), alphas_cumprod[:-1]])
        betas = 1 - alphas_cumprod / previous if betas is None else betas
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        posterior_variance[0] = posterior_variance[1]  # 0 at t = 0, where its logarithm is needed
        tables = {
            "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
            "posterior_mean_x0": betas * previous.sqrt() / (1 - alphas_cumprod),
            "posterior_mean_xt": (1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
            "posterior_log_variance": posterior_variance.log(),
            "log_betas": betas.log(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t)."""
        return at(self.sqrt_alphas_cumprod, t, like), at(self.sqrt_one_minus_alphas_cumprod, t, like)

    def predict_x0(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean sample (B, ...) that x_t and a noise prediction imply."""
        a, b = self.coefficients(t, x_t)
        return (x_t - b * prediction) / a

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether the last step is pure noise, where a noise prediction implies nothing about x_0."""
        return bool(self.sqrt_alphas_cumprod[-1] == 0)

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean (B, ...) of q(x_{t-1} | x_t, x_0), Eq. 7 of Ho et al. (2020)."""
        return at(self.posterior_mean_x0, t, x0) * x0 + at(self.posterior_mean_xt, t, x0) * x_t


class RectifiedFlow(ForwardProcess):
    """The straight path of flow matching (Liu et al., 2023): x_t = (1 - s) x_0 + s eps with s = (t + 1) / T.

    A network predicts the velocity dx/ds = eps - x_0. The T levels are those of the DiT's timestep embedding, of the
    schedules psi(s) and xi(s), and of diffusers' ``FlowMatchEulerDiscreteScheduler``, whose timesteps are T s = t + 1:
    t = T - 1 is pure noise and t = 0 has s = 1/T, the last level before data.

    Args:
        num_timesteps: T, the number of discrete levels.

    Example:
        >>> process = RectifiedFlow()
        >>> x0, noise = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
        >>> process.add_noise(x0, noise, torch.tensor([249])).mean().item()
        0.75
    """

    s: Tensor

    def __init__(self, num_timesteps: int = 1000) -> None:
        super().__init__()
        if num_timesteps < 2:
            raise ConfigError(f"A flow needs two noise levels or more, got {num_timesteps}.")
        self.num_timesteps = num_timesteps
        levels = torch.arange(1, num_timesteps + 1, dtype=torch.float64, device="cpu") / num_timesteps
        self.register_buffer("s", levels.float(), persistent=False)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """1 - s and s."""
        s = at(self.s, t, like)
        return 1 - s, s

    def predict_x0(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean sample (B, ...) that x_t and a velocity imply."""
        return x_t - at(self.s, t, x_t) * prediction


def same_process(first: ForwardProcess, second: ForwardProcess) -> bool:
    """Whether two processes have the same noise levels: a_t and b_t within 0.001 at each t.

    Example:
        >>> same_process(GaussianDiffusion(), GaussianDiffusion(1000, 0.00085, 0.012, "scaled_linear"))
        False
    """
    if first.num_timesteps != second.num_timesteps:
        return False
    ours, theirs = first.levels(), second.levels()
    return bool((ours - theirs).abs().max() < 1e-3)


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries of a table (T,) at t (B,), interpolated linearly, shaped (B, 1, ...) to multiply ``like`` (B, ...)."""
    if t.is_floating_point():
        low = t.floor().long().clamp(0, len(table) - 1)
        entries = torch.lerp(table[low], table[(low + 1).clamp(max=len(table) - 1)], (t - low).to(table.dtype))
        return entries.view(-1, *(1,) * (like.ndim - 1))
    return table[t].view(-1, *(1,) * (like.ndim - 1))
