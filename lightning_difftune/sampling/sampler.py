"""The settings of the reverse process, and checks that they fit a model."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import Tensor

from lightning_difftune.diffusion import ForwardProcess, GaussianDiffusion, same_process
from lightning_difftune.errors import ConfigError, check_counts
from lightning_difftune.protocols import Denoiser
from lightning_difftune.sampling.loop import Guided, sample, swap
from lightning_difftune.sampling.schedulers import NoiseScheduler, ddim, scheduler_class, scheduler_named, set_grid
from lightning_difftune.source import SourceFacts, prediction_type_of, process_of, scheduler_from


@dataclass
class Sampler:
    """Settings of :func:`~lightning_difftune.sampling.sample`; unset fields are those of the model's family.

    A module fills in unset fields when it builds its model, see :meth:`completed`: DiT's family has the authors'
    evaluation protocol, DDIM in 50 steps with guidance 1.5 on the first 3 channels; Stable Diffusion's has DPM-Solver++
    in 20 steps with guidance 7.5 on all. Without a module, unset fields are those of the authors' protocol.

    Args:
        scheduler: Any diffusers scheduler of the model's process and prediction type, or the name of its class, such as
            ``"diffusers.UniPCMultistepScheduler"``, which is then made for the model.
        num_inference_steps: Number of reverse steps.
        guidance_scale: Strength of the guidance; 1 is none.
        guidance_channels: Number of guided leading channels; ``null`` guides all, ``"family"`` as many as the family.
        domain_guidance: Take the unconditional branch from the frozen pre-trained network (arXiv 2504.01521).
        pretrained_tail: Share of the steps, those nearest to the data, that the pre-trained network does instead of
            the tuned one (Fig. 1 of the paper).

    Raises:
        ConfigError: If there is no step or no guided channel, the share is outside [0, 1), or a name is not a
            scheduler's.

    Example:
        >>> Sampler(num_inference_steps=30).completed(Sampler(None, 20, 7.5, None))
        Sampler(scheduler=None, num_inference_steps=30, guidance_scale=7.5, guidance_channels=None, \
domain_guidance=False, pretrained_tail=0.0)
    """

    scheduler: Any = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_channels: int | Literal["family"] | None = "family"
    domain_guidance: bool = False
    pretrained_tail: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.scheduler, str):
            scheduler_class(self.scheduler)
        check_counts("Sampler", num_inference_steps=self.num_inference_steps)
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ConfigError(f"guidance_scale must be a number, such as 1.5; got {self.guidance_scale}.")
        channels = self.guidance_channels
        if not (channels in (None, "family") or (isinstance(channels, int) and channels > 0)):
            raise ConfigError(
                f"guidance_channels is how many leading channels are guided: a number from 1, null for all, or "
                f"'family'; got {channels!r}."
            )
        if not 0 <= self.pretrained_tail < 1:
            raise ConfigError(
                f"pretrained_tail is the share of the last steps that the pre-trained model does: a number in [0, 1), "
                f"such as 0.1; got {self.pretrained_tail}."
            )

    def completed(self, family: Sampler) -> Sampler:
        """This sampler with its unset fields taken from another one."""
        unset = {"scheduler": None, "num_inference_steps": None, "guidance_scale": None, "guidance_channels": "family"}
        left_out = {name for name, value in unset.items() if getattr(self, name) == value}
        return replace(self, **{name: getattr(family, name) for name in left_out})

    @property
    def reverse(self) -> NoiseScheduler:
        """The scheduler; with DiT's betas if there is none or only its name."""
        if isinstance(self.scheduler, str):
            return scheduler_named(self.scheduler, ddim().config)
        return self.scheduler if self.scheduler is not None else ddim()

    def __call__(
        self,
        denoise: Denoiser,
        noise: Tensor,
        condition: Any,
        null_condition: Any,
        on_step: Callable[[int, Tensor], None] | None = None,
        null_denoise: Denoiser | None = None,
    ) -> Tensor:
        """Noise (B, C, H, W) => clean samples (B, C, H, W).

        Raises:
            ConfigError: If Domain Guidance is on without a ``null_denoise``, or off with one.
        """
        if self.domain_guidance != (null_denoise is not None):
            raise ConfigError(
                f"domain_guidance is {self.domain_guidance}, but the network of the unconditional branch is "
                f"{'given' if null_denoise is not None else 'missing'}. Pass the frozen pre-trained network as "
                "null_denoise, with a null_condition in its terms, if and only if domain_guidance is on."
            )
        own: Any = self.completed(AUTHORS)
        return sample(
            denoise,
            noise,
            self.reverse,
            own.num_inference_steps,
            condition=condition,
            null_condition=null_condition,
            guidance_scale=own.guidance_scale,
            guidance_channels=own.guidance_channels,
            on_step=on_step,
            null_denoise=null_denoise,
        )

    def guided(
        self, denoise: Denoiser, condition: Any, null_condition: Any, null_denoise: Denoiser | None = None
    ) -> Guided:
        """A network with its condition and this sampler's guidance."""
        own: Any = self.completed(AUTHORS)
        return Guided(denoise, condition, null_condition, own.guidance_scale, own.guidance_channels, null_denoise)

    def swap(self, model: Guided, tail: Guided, noise: Tensor, fractions: Sequence[float]) -> Tensor:
        """Noise (B, C, H, W) => samples (P, B, C, H, W) whose last ``fractions`` (P of them) are done by ``tail``."""
        own: Any = self.completed(AUTHORS)
        return swap(model, tail, noise, self.reverse, fractions, own.num_inference_steps)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Sampler:
        """The sampler of :meth:`settings`.

        Raises:
            ConfigError: If they are incomplete, or this version of diffusers lacks the scheduler.
        """
        try:
            scheduler = scheduler_from(settings["scheduler"], settings["scheduler_config"])
            others = {key: settings[key] for key in ("num_inference_steps", "guidance_scale", "guidance_channels")}
        except KeyError as error:
            raise ConfigError(f"This description of a sampler lacks {error}: {dict(settings)}") from error
        return cls(
            scheduler,
            **others,
            **{key: settings[key] for key in ("domain_guidance", "pretrained_tail") if key in settings},
        )

    def settings(self) -> dict[str, Any]:
        """The input of :meth:`from_settings`, as JSON values; infinities are kept.

        Example:
            >>> Sampler.from_settings(Sampler(num_inference_steps=7).settings()).num_inference_steps
            7
        """
        config = {key: value for key, value in self.reverse.config.items() if not key.startswith("_")}
        return {**self.spec(), "scheduler_config": json.loads(json.dumps(config, default=lambda array: array.tolist()))}

    def spec(self) -> dict[str, Any]:
        """The settings as strict JSON values, for a memory bank's manifest."""
        own, reverse = self.completed(AUTHORS), self.reverse
        config = {key: plain(value) for key, value in reverse.config.items() if not key.startswith("_")}
        spec = {
            "scheduler": type(reverse).__name__,
            "scheduler_config": config,
            "num_inference_steps": own.num_inference_steps,
            "guidance_scale": own.guidance_scale,
            "guidance_channels": own.guidance_channels,
        }
        # Left out if they are off, so that banks of earlier versions keep their spec.
        switches = {"domain_guidance": self.domain_guidance, "pretrained_tail": self.pretrained_tail}
        return spec | {name: value for name, value in switches.items() if value}


AUTHORS = Sampler(None, 50, 1.5, 3)
"""The authors' evaluation protocol, with DDIM over the model's own noise levels."""


def plain(value: Any) -> Any:
    """The value if it is strict JSON, else its representation; DPM-Solver's settings have an infinity."""
    is_plain = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if is_plain else repr(value)


def check_steps(sampler: Sampler, role: str = "the sampler") -> None:
    """Refuse more steps than there are, and settings for the pre-trained network that would change nothing, or all.

    Args:
        sampler: A completed sampler.
        role: The setting's name in the message.

    Raises:
        ConfigError: If the scheduler refuses as many steps, Domain Guidance is on without guidance, or the pre-trained
            tail is no step or all steps.

    Example:
        >>> check_steps(Sampler(None, 50, 1.5, 3, pretrained_tail=0.1))
    """
    if sampler.domain_guidance and sampler.guidance_scale == 1:
        raise ConfigError(
            f"{role}: domain_guidance changes nothing at a guidance_scale of 1, which is no guidance. Set "
            "guidance_scale above 1, such as 1.5, or leave domain_guidance out."
        )
    tail, number = sampler.pretrained_tail, cast("int", sampler.num_inference_steps)
    if not tail and number <= sampler.reverse.config.get("num_train_timesteps", math.inf):
        return
    reverse: Any = copy.deepcopy(sampler.reverse)
    try:
        set_grid(reverse, number, (1, 8, 8), "cpu")
    except ValueError as error:
        raise ConfigError(f"{role}: {type(reverse).__name__} cannot take {number:,} steps: {error}") from error
    steps = len(reverse.timesteps)  # Heun has two for each of num_inference_steps
    if tail and round(tail * steps) in (0, steps):
        raise ConfigError(
            f"{role}: a pretrained_tail of {tail:g} is {round(tail * steps)} of {steps} steps, so that the "
            f"{'tuned' if round(tail * steps) else 'pre-trained'} model would do none. One step is {1 / steps:g}."
        )


def check_scheduler(scheduler: Any, source: SourceFacts, role: str = "the sampler") -> None:
    """Refuse a scheduler that would not draw the model's samples.

    Args:
        scheduler: A scheduler of diffusers.
        source: Facts of the model, with a process and a prediction type.
        role: The setting's name in the message, such as ``"bank_sampler"``.

    Raises:
        ConfigError: If it takes another prediction type, reverses another process, clips latents, or needs a variance
            that the network does not predict.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    process, wanted = source.process, source.prediction_type
    found = prediction_type_of(scheduler)
    if found != wanted:
        takes = f"takes {found!r}" if found is not None else "does not say what it takes"
        fix = (
            "Take one of flow matching, such as diffusers.FlowMatchEulerDiscreteScheduler"
            if wanted == "flow_prediction"
            else f"Set the scheduler's prediction_type to {wanted!r}"
            if "prediction_type" in config
            else "Take one of a Gaussian diffusion, such as diffusers.DDIMScheduler"
        )
        raise ConfigError(
            f"{source.name} predicts {wanted!r}, but {role} integrates with {kind}, which {takes}. {fix}, or leave the "
            "scheduler out: it is then made for the model."
        )
    if config.get("timestep_type") == "continuous":
        raise ConfigError(
            f"{role}: {kind} has timestep_type 'continuous', which gives the network logarithms of its noise, and "
            f"{source.name} takes timesteps. Set the scheduler's timestep_type to 'discrete'."
        )
    uses_flow = config.get("use_flow_sigmas")
    if uses_flow is not None and bool(uses_flow) != (wanted == "flow_prediction"):
        raise ConfigError(
            f"{role}: {kind} has use_flow_sigmas = {uses_flow} with prediction_type {found!r}. Set both for flow "
            "matching, or neither."
        )
    try:
        reversed_process = process_of(scheduler)
    except ConfigError as error:
        raise ConfigError(
            f"{role}: {error} Take one with betas, such as diffusers.DDIMScheduler, or leave the scheduler out: it is "
            "then made for the model."
        ) from error
    if process is not None and not same_process(reversed_process, process):
        raise ConfigError(
            f"{role}: {kind} reverses another noise schedule than {source.name} was trained with: "
            f"{_levels(scheduler)}. Give it the betas of {_described(process)}, or leave the scheduler out: it is then "
            "made for the model."
        )
    clips = bool(config.get("clip_sample", False))
    if source.latents is not None and (clips or config.get("thresholding", False)):
        name = "clip_sample" if clips else "thresholding"
        raise ConfigError(
            f"{role}: {kind} has {name} on, which is for pixels in [-1, 1]; {source.name} denoises latents, which have "
            f"no bounds and would be cut. Set the scheduler's {name} to false."
        )
    if clips and config.get("clip_sample_range", 1.0) != 1.0:
        raise ConfigError(
            f"{role}: {kind} clips samples to {config.clip_sample_range}, and pixels are in [-1, 1]. Set its "
            "clip_sample_range to 1.0."
        )
    if str(config.get("variance_type")).startswith("learned") and not source.learned_variance:
        raise ConfigError(
            f"{role}: {kind} has variance_type {config.variance_type!r}, but {source.name} predicts no variance. "
            "Set it to 'fixed_small'."
        )


def _levels(scheduler: Any) -> str:
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")
    return f"{ {k: scheduler.config[k] for k in names if scheduler.config.get(k) is not None} }"


def _described(process: ForwardProcess) -> str:
    if isinstance(process, GaussianDiffusion):
        settings = {k: v for k, v in process.scheduler_settings.items() if k != "trained_betas"}
        return str(settings or "the model's own scheduler_config.json")
    return f"{type(process).__name__} over {process.num_timesteps} steps"
