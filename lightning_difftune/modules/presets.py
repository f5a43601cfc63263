"""The two presets, the authors' released code and the paper to the letter, compared with a run's settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_difftune.objective import DiffTuningObjective
from lightning_difftune.schedules import PowerSchedule


@dataclass(frozen=True)
class Preset:
    """The choices in which the authors' code and the paper differ."""

    retention_share: str
    retention_weight: float
    schedule: str
    loss: str
    label_table: str
    guidance_channels: str
    reconsolidation_weight: float = 1.0
    loss_weighting: str = "none"
    retention_target: str = "replay"
    timestep_density: str = "uniform"
    bank: str = "samples"


OFFICIAL = Preset("int(0.2 B)", 0.1, "MirroredPowerSchedule(tau=1)", "hybrid_loss", "keep", "first 3")
PAPER = Preset("int(0.5 B)", 1.0, "PowerSchedule(tau=1)", "eps_mse_loss", "resize", "all")


def active_settings(module: Any, datamodule: Any) -> Preset:
    """The choices of a run as it is about to start."""
    objective, channels, share = module.objective, module.sampler.guidance_channels, "no retention"
    if module.uses_retention and not hasattr(datamodule, "retention_share"):
        share = "that of the data"  # the batches of a custom loader may have any share
    elif module.uses_retention and getattr(datamodule, "bank_path", True) is not None:
        share = f"int({datamodule.retention_share:g} B)"
    pictures = getattr(datamodule, "bank_source", None) if "int" in share else None
    own = pictures is not None and pictures is datamodule.target
    schedule, kind = objective.schedule, type(objective)
    return Preset(
        retention_share=share,
        retention_weight=objective.retention_weight,
        schedule=repr(schedule) if kind is DiffTuningObjective else f"{schedule!r} in {kind.__name__}",
        loss=getattr(objective.loss, "__name__", repr(objective.loss)),
        label_table=getattr(module, "label_table", "none"),
        guidance_channels="all" if channels is None else f"first {channels}",
        reconsolidation_weight=objective.reconsolidation_weight,
        loss_weighting="none" if objective.weighting is None else repr(objective.weighting),
        retention_target="replay" if objective.retention_target is None else repr(objective.retention_target),
        timestep_density="uniform" if objective.density is None else repr(objective.density),
        bank="samples" if pictures is None else "the target's own pictures" if own else "other pictures",
    )


def describe_preset(module: Any, datamodule: Any) -> str:
    """One paragraph that names the active preset and the deviations from it."""
    active = asdict(active_settings(module, datamodule))
    presets = {"official code": asdict(OFFICIAL), "paper-literal": asdict(PAPER)}
    differences = {
        name: {key: value for key, value in active.items() if value != preset[key]} for name, preset in presets.items()
    }
    name = min(differences, key=lambda key: len(differences[key]))
    settings = "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in active.items())
    power = module.objective.schedule
    if isinstance(power, PowerSchedule) and power.tau == 0:
        return f"Preset: standard fine-tuning (tau = 0). {settings}."
    if not differences[name]:
        return f"Preset: {name}. {settings}."
    changed = ", ".join(f"{key.replace('_', ' ')} = {value}" for key, value in differences[name].items())
    return f"Preset: custom; nearest is {name}, with {changed}. {settings}."


def announce(module: Any) -> None:
    """Announce what is trained and by which preset, and warn of a precision that the CPU emulates."""
    trained = sum(parameter.numel() for parameter in module.trainable_parameters())
    rank_zero_info(f"Training {trained:,} parameters of {module.base_identity.get('name', 'the model')}.")
    rank_zero_info(describe_preset(module, getattr(module.trainer, "datamodule", None)))
    precision = str(module.trainer.precision)
    if (
        precision.startswith("bf16")
        and module.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
    ):
        rank_zero_warn(
            f"This CPU has AVX2 and nothing newer: it emulates {precision}, which is several times slower than "
            "32-true. Set the trainer's precision to 32-true."
        )
