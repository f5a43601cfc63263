"""Facts of a pre-trained model: its noise process, prediction type, latent space and condition."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from lightning_difftune.diffusion import ForwardProcess, GaussianDiffusion, PredictionType, RectifiedFlow
from lightning_difftune.errors import CheckpointError, ConfigError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


@dataclass(frozen=True)
class LatentScale:
    """How an autoencoder's raw latents become those that a model denoises: (raw - shift) * scale, or per channel.

    z = (raw - ``shift_factor``) * ``scaling_factor``; with ``latents_mean`` and ``latents_std``, one number per
    channel, it is (raw - mean) / std * ``scaling_factor``. The names are those of diffusers' autoencoders.

    Raises:
        ConfigError: If the scale or a deviation is not positive, one of mean and std is missing, or both a shift and
            means are given.
    """

    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.scaling_factor > 0:
            raise ConfigError(f"scaling_factor must be positive, got {self.scaling_factor}.")
        mean, std = self.latents_mean, self.latents_std
        if (mean is None) != (std is None) or (mean is not None and std is not None and len(mean) != len(std)):
            raise ConfigError(
                f"latents_mean and latents_std go together, one number per channel; got {mean} and {std}."
            )
        if std is not None and not all(value > 0 for value in std):
            raise ConfigError(f"latents_std must be positive, got {std}.")
        if mean is not None and self.shift_factor:
            raise ConfigError(
                f"An autoencoder with both shift_factor = {self.shift_factor} and latents_mean is not known here: "
                "diffusers' models have one or the other."
            )

    @classmethod
    def of_config(cls, config: Mapping[str, Any], scaling_factor: float = 0.18215) -> Self:
        """The scale in an autoencoder's ``config.json``; ``scaling_factor`` is the default."""
        stated = config.get("scaling_factor")
        mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
        return cls(
            scaling_factor if stated is None else stated,
            config.get("shift_factor") or 0.0,
            None if mean is None else tuple(mean),
            None if std is None else tuple(std),
        )

    @classmethod
    def of_export(cls, sampling: Mapping[str, Any], own: LatentScale | None) -> LatentScale | None:
        """The scale in an export's settings, if any; early exports have only the autoencoder's factor.

        Args:
            sampling: The settings.
            own: The scale of the autoencoder of the export.
        """
        if sampling.get("latents") is not None:
            return cls.of_config(sampling["latents"])
        factor = sampling.get("autoencoder", {}).get("scaling_factor")
        return None if factor is None or own is None else replace(own, scaling_factor=factor)

    def scale(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, c, h, w) of raw latents => of scaled latents."""
        offset, factor = self._affine(mean)
        return (mean - offset) * factor, std * factor

    def unscale(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, c, h, w) => raw latents."""
        offset, factor = self._affine(latents)
        return latents / factor + offset

    def _affine(self, like: Tensor) -> tuple[Any, Any]:
        if self.latents_mean is None or self.latents_std is None:
            return self.shift_factor, self.scaling_factor
        both = torch.tensor([self.latents_mean, self.latents_std], dtype=torch.float32, device=like.device)
        mean, std = both.view(2, 1, -1, 1, 1)
        return mean, self.scaling_factor / std

    def settings(self) -> dict[str, Any]:
        """The scale, and shift or statistics if any, as JSON values."""
        others = {"shift_factor": self.shift_factor or None, "latents_mean": self.latents_mean}
        others["latents_std"] = self.latents_std
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in others.items() if v is not None}
        return {"scaling_factor": self.scaling_factor, **plain}

    def is_close(self, other: LatentScale) -> bool:
        """Whether both give the same latents to three digits."""

        def numbers(one: LatentScale) -> list[float]:
            return [one.scaling_factor, one.shift_factor, *(one.latents_mean or ()), *(one.latents_std or ())]

        ours, theirs = numbers(self), numbers(other)
        return len(ours) == len(theirs) and all(math.isclose(*pair, rel_tol=1e-3) for pair in zip(ours, theirs))  # noqa: B905

    def __str__(self) -> str:
        """For identities: only the scale if there is nothing else."""
        others = ", ".join(f"{name} {value}" for name, value in self.settings().items() if name != "scaling_factor")
        return f"{self.scaling_factor}" + (f" ({others})" if others else "")


@dataclass(frozen=True, eq=False)
class SourceFacts:
    """The facts of one pre-trained model, read by a family's ``build()`` from the files next to the weights.

    Objective, schedule and samplers take their process and prediction type from here unless the user gave them, in
    which case they are compared. ``None`` means that the model states none, and the objective's is used.

    Args:
        name: Name of the model, for messages.
        fingerprint: Identity of its weights.
        process: The forward process of its training.
        prediction_type: What it predicts, in diffusers' terms.
        learned_variance: Whether its output has a second half of channels for the variance.
        latents: The scale of the latents that it denoises; ``None`` for a pixel model.
        condition: What conditions it, such as ``"classes"`` or ``"text"``.
        scheduler: Class (``_class_name``) and settings of the scheduler that it was published with.
        density: Noise levels that its family is trained at, see :mod:`~lightning_difftune.densities`; ``None`` is
            uniform.
        identity: What else identifies it, as plain values; checkpoints hold it with name and fingerprint.
    """

    name: str
    fingerprint: str
    process: ForwardProcess | None = None
    prediction_type: PredictionType | None = None
    learned_variance: bool = False
    latents: LatentScale | None = None
    condition: str | None = None
    scheduler: Mapping[str, Any] | None = None
    density: Any = None
    identity: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_identity(cls, identity: Mapping[str, Any]) -> Self:
        """Facts with only name, fingerprint and what else identifies the model."""
        others = {key: value for key, value in identity.items() if key not in ("name", "fingerprint")}
        return cls(identity["name"], identity["fingerprint"], identity=others)

    @classmethod
    def of_scheduler(cls, name: str, fingerprint: str, scheduler: Mapping[str, Any] | None, **others: Any) -> Self:
        """Facts with the process and prediction type of a scheduler's settings, if there are any.

        Raises:
            CheckpointError: If the installed diffusers lacks the scheduler, or its process is not supported.
        """
        if scheduler is None:
            return cls(name, fingerprint, **others)
        try:
            made = scheduler_from(str(scheduler.get("_class_name")), scheduler)
            process, prediction = process_of(made), prediction_type_of(made)
        except ConfigError as error:
            raise CheckpointError(f"{name}: its scheduler cannot be read. {error}") from error
        return cls(name, fingerprint, process, prediction, scheduler=dict(scheduler), **others)

    @property
    def base_identity(self) -> dict[str, Any]:
        """Name, fingerprint and what else identifies the model, flat."""
        return {"name": self.name, "fingerprint": self.fingerprint, **self.identity}

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores for comparison: prediction type, noise levels a_t, scale of the latents."""
        return {
            "prediction_type": self.prediction_type,
            "signal": None if self.process is None else self.process.levels()[0],
            "latents": None if self.latents is None else str(self.latents),
        }

    def differences(self, state: Mapping[str, Any]) -> list[str]:
        """Differences from a checkpoint's :meth:`state`, in words; what one side lacks is not compared."""
        ours = self.state()
        found = [
            f"{name.replace('_', ' ')} {state[name]} instead of {ours[name]}"
            for name in ("prediction_type", "latents")
            if None not in (ours[name], state.get(name)) and ours[name] != state[name]
        ]
        signal, theirs = ours["signal"], state.get("signal")
        if signal is not None and theirs is not None:
            theirs = theirs.to(signal.device)
            if signal.shape != theirs.shape or (signal - theirs).abs().max() > 1e-3:
                found.append("other noise levels")
        return found


# -- schedulers -----------------------------------------------------------------------------------------------------


def scheduler_from(name: str, config: Mapping[str, Any]) -> Any:
    """A diffusers scheduler, by its class name and all of its settings.

    Raises:
        ConfigError: If this version of diffusers does not have it.
    """
    import diffusers

    kind: Any = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if kind is None:
        raise ConfigError(f"This version of diffusers has no {name}, which the model was sampled with.")
    return kind.from_config(dict(config))


def prediction_type_of(scheduler: Any) -> PredictionType | None:
    """The prediction type of a scheduler; ``None`` if it has none.

    Schedulers only for flow matching, such as ``FlowMatchEulerDiscreteScheduler``, have no such setting.
    """
    stated, is_flow = scheduler.config.get("prediction_type"), "flow" in type(scheduler).__name__.lower()
    if stated == "flow_prediction" and not is_flow and "use_flow_sigmas" not in scheduler.config:
        return None  # its steps do not use it
    if stated in PREDICTION_TYPES:
        return stated
    return "flow_prediction" if stated is None and is_flow else None


def process_of(scheduler: Any) -> ForwardProcess:
    """The forward process that a scheduler reverses, by its ``alphas_cumprod``, or the straight path of flow matching.

    Raises:
        ConfigError: If it is neither.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    if prediction_type_of(scheduler) == "flow_prediction":
        return RectifiedFlow(config.num_train_timesteps)
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(table, Tensor):
        raise ConfigError(f"{kind} has no alphas_cumprod, so the process that it reverses is not known.")
    table = table.detach().double().cpu()
    is_zero = bool(config.get("rescale_betas_zero_snr", False))
    if config.get("trained_betas") is None and config.get("beta_schedule") in ("linear", "scaled_linear"):
        process = GaussianDiffusion(
            len(table), config.beta_start, config.beta_end, config.beta_schedule, rescale_betas_zero_snr=is_zero
        )
        # Ours is exact; theirs, in float32, is what the scheduler uses.
        if (process.sqrt_alphas_cumprod - table.sqrt()).abs().max() < 1e-3:
            return process
    if is_zero:
        table[-1] = 0  # some have 2^-24 there, to divide by
    return GaussianDiffusion.from_alphas_cumprod(table)


def betas_of(source: SourceFacts) -> dict[str, Any]:
    """The settings that give a diffusers scheduler the model's process and prediction type.

    For a Gaussian diffusion: ``num_train_timesteps``, the betas, and ``rescale_betas_zero_snr`` if the last step is
    pure noise.
    """
    process = source.process
    if isinstance(process, GaussianDiffusion):
        settings: dict[str, Any] = {"num_train_timesteps": process.num_timesteps, **process.scheduler_settings}
        return {**settings, "prediction_type": source.prediction_type}
    return {} if process is None else {"num_train_timesteps": process.num_timesteps}
