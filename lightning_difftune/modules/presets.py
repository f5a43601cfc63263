"""The two presets, the authors' released code and the paper to the letter, and which of them a run matches."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from lightning_difftune.objective import DiffTuningObjective
from lightning_difftune.sampling import Sampler
from lightning_difftune.schedules import PowerSchedule


class Configured(Protocol):
    """A module, as far as its settings go."""

    objective: DiffTuningObjective

    @property
    def sampler(self) -> Sampler:
        """How it draws."""

    @property
    def uses_retention(self) -> bool:
        """Whether the memory bank has any weight."""


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


OFFICIAL = Preset("int(0.2 B)", 0.1, "MirroredPowerSchedule(tau=1)", "hybrid_loss", "keep", "first 3")
PAPER = Preset("int(0.5 B)", 1.0, "PowerSchedule(tau=1)", "eps_mse_loss", "resize", "all")


def active_settings(module: Configured, datamodule: Any) -> Preset:
    """The choices of a run as it is about to start."""
    share = "no retention"
    if module.uses_retention and not hasattr(datamodule, "retention_share"):
        share = "that of the data"  # batches of a loader of one's own may have any
    elif module.uses_retention and getattr(datamodule, "bank_path", True) is not None:
        share = f"int({datamodule.retention_share:g} B)"
    channels = module.sampler.guidance_channels
    schedule = module.objective.schedule
    kind = type(module.objective)
    return Preset(
        retention_share=share,
        retention_weight=module.objective.retention_weight,
        schedule=repr(schedule) if kind is DiffTuningObjective else f"{schedule!r} in {kind.__name__}",
        loss=getattr(module.objective.loss, "__name__", repr(module.objective.loss)),
        label_table=getattr(module, "label_table", "none"),
        guidance_channels="all" if channels is None else f"first {channels}",
        reconsolidation_weight=module.objective.reconsolidation_weight,
        loss_weighting="none" if module.objective.weighting is None else repr(module.objective.weighting),
        retention_target="replay"
        if module.objective.retention_target is None
        else repr(module.objective.retention_target),
        timestep_density="uniform" if module.objective.density is None else repr(module.objective.density),
    )


def describe_preset(module: Configured, datamodule: Any) -> str:
    """One paragraph that says which preset is active, and what differs from it."""
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
