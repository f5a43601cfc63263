"""What a config has a machine do: bank, cache, training and evaluation, in samples of each part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jsonargparse import Namespace

from lightning_difftune.cli.plan.probe import Costs
from lightning_difftune.cli.plan.speed import Speed
from lightning_difftune.modules import DiffTuningModule
from lightning_difftune.protocols import SupportsEncode
from lightning_difftune.sampling import Sampler


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        name: Such as ``memory bank``.
        what: In words.
        samples: How many samples of each of :data:`~lightning_difftune.cli.plan.probe.PARTS` it computes.
        disk: Bytes that it writes.
    """

    name: str
    what: str
    samples: Mapping[str, float] = field(default_factory=dict)
    disk: float = 0.0

    def flops(self, costs: Costs) -> float:
        """Floating-point operations."""
        return sum(count * costs.flops[part] for part, count in self.samples.items())

    def seconds(self, speed: Speed, devices: int) -> float:
        """On that many devices, which share all phases' work evenly."""
        return sum(count * speed.seconds(part) for part, count in self.samples.items()) / devices


def forward_passes(sampler: Sampler) -> int:
    """Of the network for one sample: the steps, twice with guidance."""
    steps: Any = sampler.num_inference_steps  # a number, since the module is built
    return int(steps) * (1 if sampler.guidance_scale == 1 else 2)


def phases(
    config: Namespace, module: DiffTuningModule, costs: Costs, num_targets: int | None, num_held_out: int | None
) -> list[Phase]:
    """The phases of ``difftune fit``.

    Args:
        config: The composed config.
        module: Its module.
        costs: What a sample costs.
        num_targets: Pictures of the target; ``None`` if they are not here to be counted.
        num_held_out: Held-out pictures; ``None`` likewise.
    """
    data, trainer = config.data.init_args, config.trainer
    devices = num_devices(trainer)
    found = [bank(data, module, costs)] if data.bank is not None and module.uses_retention else []
    if data.latent_cache is not None and has_encoder(module):
        found.append(latent_cache(data, costs, num_targets))
    batch = data.batch_size * devices
    steps = num_steps(trainer, num_targets, batch)
    updates = trainer.accumulate_grad_batches or 1
    seen = {"train": float(steps * batch * updates)}
    if not any(phase.name == "latent cache" for phase in found) and has_encoder(module):
        seen["encode"] = seen["train"]
    checkpoint = costs.trained * 4 * 4  # weights, their averages, two moments of Adam
    words = f"{steps:,} steps of {batch:,} samples" + (f", {updates} batches each" if updates > 1 else "")
    found.append(Phase("training", words, seen, checkpoint))
    found.append(evaluation(config, module, steps, num_targets, num_held_out, batch))
    return found


def bank(data: Namespace, module: DiffTuningModule, costs: Costs) -> Phase:
    """The samples of the pre-trained model, or pictures in place of them."""
    size = data.bank_size
    if data.bank_source is not None:
        samples = {"encode": float(size) if has_encoder(module) else 0.0, "bank_columns": float(size)}
        return Phase("memory bank", f"{size:,} pictures", samples, size * costs.bank_bytes)
    sampler = module.bank_sampler
    if not any(getattr(module, "bank_prompts", [True])):  # the empty prompt has nothing to be guided from
        sampler = replace(sampler, guidance_scale=1.0)
    passes = forward_passes(sampler)
    guided = ", guided" if sampler.guidance_scale != 1 else ""
    words = f"{size:,} samples, {sampler.num_inference_steps} steps{guided}"
    samples = {"denoise_source": float(size * passes), "bank_columns": float(size)}
    return Phase("memory bank", words, samples, size * costs.bank_bytes)


def latent_cache(data: Namespace, costs: Costs, num_targets: int | None) -> Phase:
    """The target as the frozen networks see it."""
    ways = 2 if data.horizontal_flip else 1
    if num_targets is None:
        return Phase("latent cache", "unknown: the target's files are not here")
    words = f"{num_targets:,} pictures" + (" and their mirror images" if ways == 2 else "")
    return Phase("latent cache", words, {"encode": float(num_targets * ways)}, num_targets * ways * costs.cache_bytes)


def evaluation(
    config: Namespace,
    module: DiffTuningModule,
    steps: int,
    num_targets: int | None,
    num_held_out: int | None,
    batch: int,
) -> Phase:
    """The validations: held-out losses, and what the callbacks generate. Their extractors are not counted."""
    per_epoch = max(1, num_targets // batch) if num_targets is not None else None
    interval = validation_interval(config.trainer, per_epoch)
    times = -(-steps // interval) if interval else 0  # the last step always has one
    pictures = 0.0
    for callback in callbacks_of(config.trainer):
        kind, arguments = callback
        if not hasattr(kind, "trajectories"):
            continue
        every = max(interval or steps, arguments.get("every_n_steps") or 1)
        runs = math.ceil(steps / every) if times else 0
        pictures += runs * arguments["num_samples"] * kind.trajectories
    samples = {
        "denoise": pictures * forward_passes(module.sampler) + times * (num_held_out or 0),
        "decode": pictures,
        "encode": float(times * (num_held_out or 0)) if has_encoder(module) else 0.0,
    }
    return Phase(
        "evaluation",
        f"{times:,} validation{'s' if times != 1 else ''}, {pictures:,.0f} pictures generated in all",
        samples,
    )


def has_encoder(module: DiffTuningModule) -> bool:
    """Whether pictures are encoded by a frozen network before they are trained on."""
    return isinstance(module, SupportsEncode) and module.encoder_identity() is not None


def num_devices(trainer: Namespace) -> int:
    """Devices of all nodes, as far as the config names them; 1 where it does not."""
    devices = trainer.devices
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    return max(1, count) * max(1, int(trainer.num_nodes))


def num_steps(trainer: Namespace, num_targets: int | None, batch: int) -> int:
    """Optimizer steps: ``max_steps``, or those of ``max_epochs``."""
    if trainer.max_steps is not None and trainer.max_steps > 0:
        return int(trainer.max_steps)
    if num_targets is None:
        return 0
    return int((trainer.max_epochs or 1000) * max(1, num_targets // batch))


def validation_interval(trainer: Namespace, steps_per_epoch: int | None) -> int | None:
    """Optimizer steps between validations; ``None`` if there are none, or an epoch's length is unknown."""
    if trainer.limit_val_batches in (0, 0.0):
        return None
    interval = trainer.val_check_interval if trainer.val_check_interval is not None else 1.0
    if isinstance(interval, int):
        return interval
    if steps_per_epoch is None or not isinstance(interval, float):
        return None
    return max(1, int(steps_per_epoch * interval)) * (trainer.check_val_every_n_epoch or 1)


def callbacks_of(trainer: Namespace) -> list[tuple[Any, dict[str, Any]]]:
    """Class and arguments of each callback in the config, which are not made: some open weights."""
    from importlib import import_module

    callbacks = trainer.callbacks or []
    found = []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        path, _, name = callback.class_path.rpartition(".")
        found.append((getattr(import_module(path), name), vars(callback.init_args) if "init_args" in callback else {}))
    return found
