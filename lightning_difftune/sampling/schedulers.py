"""Interface of diffusers schedulers, their grids, and the network's timesteps on them."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_difftune.diffusion import GaussianDiffusion
from lightning_difftune.errors import ConfigError, did_you_mean
from lightning_difftune.source import SourceFacts, betas_of, prediction_type_of

# Settings that describe the process that a scheduler reverses, not how it does so.
_PROCESS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)

# Settings of the grid in schedulers only for flow matching.
_FLOW = ("shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")

FEW_STEPS = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")
"""Schedulers of models that were distilled to a few steps."""

_LEARNED = ("learned", "learned_range")


class NoiseScheduler(Protocol):
    """What the loop needs of a diffusers scheduler.

    Schedulers of variance-preserving processes also have ``init_noise_sigma`` and ``scale_model_input``; those of flow
    matching have ``sigmas`` instead.
    """

    config: Any
    timesteps: Tensor

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Choose the grid of timesteps, noisiest first."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
        """One reverse step; the result has ``prev_sample``."""


def ddim() -> NoiseScheduler:
    """The paper's sampler: DDIM (eta 0) over DiT's linear betas, "leading" grid {0, 20, ..., 980} at 50 steps."""
    return ddim_for(SourceFacts("DiT", "", GaussianDiffusion(), "epsilon"))


def ddim_for(source: SourceFacts) -> NoiseScheduler:
    """DDIM for a model's process and prediction type; Euler steps for a flow.

    If the last step is pure noise, the grid is "trailing", which starts there (Lin et al., 2024).
    """
    if source.prediction_type == "flow_prediction":
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        euler: NoiseScheduler = FlowMatchEulerDiscreteScheduler(**betas_of(source))
        return euler
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    settings = betas_of(source)
    spacing = "trailing" if settings.get("rescale_betas_zero_snr") else "leading"
    return DDIMScheduler(**settings, clip_sample=False, set_alpha_to_one=True, timestep_spacing=spacing)


def is_flow(scheduler: NoiseScheduler) -> bool:
    """Whether a scheduler integrates a velocity (flow matching) instead of denoising a variance-preserving process.

    Schedulers only for flow matching, such as ``FlowMatchEulerDiscreteScheduler``, have no ``prediction_type``; others
    can be set to ``flow_prediction``.

    Example:
        >>> is_flow(ddim())
        False
    """
    return prediction_type_of(scheduler) == "flow_prediction"


def set_grid(
    scheduler: NoiseScheduler, num_inference_steps: int, latent_shape: Sequence[int], device: torch.device | str
) -> None:
    """Set the grid of timesteps as the scheduler's own pipelines do.

    Flow schedulers with ``use_dynamic_shifting`` shift their grid by the size of the sample: sigma decreases from 1
    to 1/N in equal steps, and mu is on the line through (base_image_seq_len, base_shift) and (max_image_seq_len,
    max_shift) at h w / 4 tokens.

    Args:
        scheduler: Any diffusers scheduler; it is changed.
        num_inference_steps: Number N of reverse steps.
        latent_shape: (c, h, w) of a sample.
        device: Device of the grid.
    """
    settings: dict[str, Any] = {}
    if scheduler.config.get("use_dynamic_shifting", False):
        settings["mu"] = _dynamic_mu(scheduler.config, latent_shape[-2] * latent_shape[-1] // 4)
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            settings["sigmas"] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
    scheduler.set_timesteps(num_inference_steps, device=device, **settings)


def grid_shift(config: Mapping[str, Any], num_tokens: int) -> float:
    """The shift of a flow scheduler's grid, as of :class:`~lightning_difftune.densities.Uniform`.

    Args:
        config: Settings of the scheduler.
        num_tokens: h w / 4 of the latents, for schedulers that shift by the size of the sample.

    Example:
        >>> round(grid_shift({"use_dynamic_shifting": True}, 4096), 2), grid_shift({"shift": 3.0}, 4096)
        (3.16, 3.0)
    """
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("shift", 1.0))
    mu = _dynamic_mu(config, num_tokens)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def _dynamic_mu(config: Mapping[str, Any], num_tokens: int) -> float:
    """On the line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift)."""
    ends = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    shifts = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu: float = shifts[0] + (shifts[1] - shifts[0]) / (ends[1] - ends[0]) * (num_tokens - ends[0])
    return mu


def network_timesteps(scheduler: NoiseScheduler) -> Tensor:
    """The network's timestep at each step of the grid: (N,), fractions included.

    For noise predictions they are the scheduler's. A flow scheduler's own timesteps are T sigma in (0, T]; here index t
    has the noise level s = (t + 1) / T, so the network gets T sigma - 1.
    """
    if not is_flow(scheduler):
        return scheduler.timesteps
    steps = scheduler.config.num_train_timesteps
    sigmas: Tensor = scheduler.sigmas[: len(scheduler.timesteps)]  # type: ignore[attr-defined]
    exact = (sigmas.double() * steps - 1).to(scheduler.timesteps.device)
    near = exact.round()  # for indices up to float32 rounding
    return torch.where((exact - near).abs() < 1e-4, near, exact).float()


def describe_unfit(scheduler: NoiseScheduler, num_inference_steps: int, source: SourceFacts) -> str | None:
    """A warning about a scheduler that draws, but not what the model can; ``None`` for one that fits.

    Args:
        scheduler: A scheduler of the model's process and prediction type.
        num_inference_steps: Number of reverse steps.
        source: Facts of the model.

    Example:
        >>> print(describe_unfit(scheduler_named("LCM", ddim().config), 4, SourceFacts("DiT", "")))
        LCMScheduler is for models that were distilled to a few steps, and DiT does not say that it was: it would ...
    """
    kind, published = type(scheduler).__name__, (source.scheduler or {}).get("_class_name")
    if kind in FEW_STEPS and published not in FEW_STEPS:
        stated = "does not say that it was" if published is None else f"was published with {published}"
        return (
            f"{kind} is for models that were distilled to a few steps, and {source.name} {stated}: it would draw "
            "blurred or noisy pictures. Take diffusers.DDIMScheduler, say, or leave the scheduler out."
        )
    process = source.process
    if isinstance(process, GaussianDiffusion) and process.has_zero_terminal_snr:
        reverse: Any = copy.deepcopy(scheduler)
        set_grid(reverse, num_inference_steps, (1, 8, 8), "cpu")
        first, last = float(reverse.timesteps[0]), process.num_timesteps - 1
        if first < last - 0.5:
            return (
                f"{kind} starts at timestep {first:g} with its timestep_spacing {scheduler.config.timestep_spacing!r}, "
                f"and {source.name} was trained to begin at {last}, where there is only noise: brightness and contrast "
                "would be wrong. Set the scheduler's timestep_spacing to 'trailing', or leave the scheduler out."
            )
    return None


def learns_variance(scheduler: NoiseScheduler) -> bool:
    """Whether its steps use the network's variance, as the authors' 250 steps do."""
    return hasattr(scheduler, "_get_variance") and scheduler.config.get("variance_type") in _LEARNED


def check_reverses(scheduler: NoiseScheduler) -> None:
    """Refuse a scheduler that does not go from noise to data by predictions at T timesteps.

    Raises:
        ConfigError: If it does not; the message gives the reason.
    """
    name = type(scheduler).__name__
    parameters = list(inspect.signature(scheduler.step).parameters.values())[3:]
    asked = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if asked:
        problem = f"its steps need {', '.join(asked)}, which only its own pipeline has"
    elif "Inverse" in name:
        problem = "it leads from data to noise"
    elif not is_flow(scheduler) and not hasattr(scheduler, "alphas_cumprod"):
        problem = "it has no noise levels at T timesteps (alphas_cumprod)"
    else:
        return
    raise ConfigError(f"{name} does not fit here: {problem}. Take DDIMScheduler or UniPCMultistepScheduler, say.")


def scheduler_class(name: str) -> Any:
    """A scheduler class of diffusers by its name.

    Args:
        name: Its name, such as ``"diffusers.DDIMScheduler"``, ``"DDIMScheduler"`` or ``"DDIM"``.

    Raises:
        ConfigError: If diffusers has no such class.
    """
    import diffusers

    asked = name.removeprefix("diffusers.").removesuffix("Scheduler")
    class_name = f"{asked}Scheduler"
    if class_name not in dir(diffusers):
        known = [entry.removesuffix("Scheduler") for entry in dir(diffusers) if entry.endswith("Scheduler")]
        near = [entry for entry in known if entry.lower().startswith(asked.lower())]
        fix = f"Did you mean {' or '.join(near[:4])}?" if near else did_you_mean(asked, known)
        raise ConfigError(f"diffusers has no {class_name}. {fix or 'Two that work are DDIM and UniPCMultistep.'}")
    return getattr(diffusers, class_name)


def scheduler_named(name: str, process: Mapping[str, Any]) -> NoiseScheduler:
    """A diffusers scheduler with the noise levels of another one, and defaults for all other settings.

    Args:
        name: Its class, see :func:`scheduler_class`.
        process: Settings of the other scheduler, for its betas and prediction type, or the shift of its flow.

    Raises:
        ConfigError: If diffusers has no such class, or the class does not support these noise levels.

    Example:
        >>> scheduler_named("UniPCMultistep", ddim().config).config.beta_end
        0.02
    """
    kind = scheduler_class(name)
    accepted = inspect.signature(kind.__init__).parameters
    wanted: dict[str, Any] = {key: process[key] for key in _PROCESS if key in process}
    wanted["clip_sample"] = False  # latents are unbounded, and pixels are clamped once, at the end
    if process.get("prediction_type", "flow_prediction") == "flow_prediction":
        wanted |= {key: process[key] for key in _FLOW if key in process}
        if "use_flow_sigmas" in accepted:  # also supports diffusions
            shift = process.get("flow_shift", process.get("shift", 1.0))
            wanted |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    elif process.get("rescale_betas_zero_snr"):
        wanted["timestep_spacing"] = "trailing"  # starts at pure noise
    try:
        scheduler: NoiseScheduler = kind(**{key: value for key, value in wanted.items() if key in accepted})
    except (ImportError, TypeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().partition(chr(10))[0]
        raise ConfigError(f"{kind.__name__} cannot be made: {reason}") from error
    return scheduler


def adds_noise(scheduler: NoiseScheduler) -> bool:
    """Whether steps draw random numbers, so that a sample depends on earlier draws.

    Example:
        >>> adds_noise(ddim()), adds_noise(scheduler_named("DDPM", ddim().config))
        (False, True)
    """

    def last_of(seed: int) -> Tensor:
        reverse: Any = copy.deepcopy(scheduler)
        x = torch.ones(1, 1, 2, 2)
        set_grid(reverse, 12, x.shape[1:], x.device)
        torch.manual_seed(seed)
        for timestep in reverse.timesteps:
            model_input = reverse.scale_model_input(x, timestep) if hasattr(reverse, "scale_model_input") else x
            x = reverse.step(model_input, timestep, x).prev_sample
        return x

    with torch.random.fork_rng(devices=[]):
        return not torch.equal(last_of(0), last_of(1))
