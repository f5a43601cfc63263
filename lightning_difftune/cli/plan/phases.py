"""The phases of a run in samples of each part, and the speed of a device for each part."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_difftune.cli.plan.course import Course, held_out_seen
from lightning_difftune.cli.plan.probe import PARTS, Costs, Probe
from lightning_difftune.cli.run import entries
from lightning_difftune.data.batches import retained_samples
from lightning_difftune.data.building import BATCH_SIZE
from lightning_difftune.modules import DiffTuningModule
from lightning_difftune.protocols import SupportsEncode
from lightning_difftune.sampling import Reverse, Sampler

# Dense peaks in FLOP/s from NVIDIA's data sheets, SXM modules; float32 matrix products use tf32 here.
PEAKS = {
    "a100": {"bf16": 312e12, "tf32": 156e12},
    "h100": {"bf16": 989e12, "tf32": 494e12},
    "h200": {"bf16": 989e12, "tf32": 494e12},
}
UTILISATION = 0.2
"""The part of an H100's bf16 peak that a training step reached: DiT-XL/2 at batch 32, its blocks compiled.

At batch 128 it was 38 %, in sampling with guidance 24 % and, with compiled blocks, 41 %; see docs/performance.md.
"""
OF_NETWORKS = ("train", "teacher", "denoise", "denoise_source")
TYPES = {"bf16-mixed": "bf16", "bf16-true": "bf16", "16-mixed": "bf16", "16-true": "bf16"}  # fp16's peak is bf16's


@dataclass(frozen=True)
class Speed:
    """The speed of a device."""

    name: str  # the device, in words
    seconds: Mapping[str, float]  # for one sample of each of PARTS

    @classmethod
    def of_data_sheet(cls, device: str, utilisation: float, precision: str, costs: Costs) -> Speed:
        """The speed of a device in :data:`PEAKS` at a fraction, in (0, 1], of its peak.

        The networks compute in the trainer's ``precision``; autoencoder and annotator compute in float32.
        """
        of_networks = TYPES.get(precision, "tf32")
        kinds = {part: of_networks if part in OF_NETWORKS else "tf32" for part in PARTS}
        seconds = {part: costs.flops[part] / (PEAKS[device][kind] * utilisation) for part, kind in kinds.items()}
        return cls(f"{device.upper()} at {utilisation:.0%} of its {of_networks} peak", seconds)

    @classmethod
    def measured(cls, of_training: Probe, of_building: Probe, least: float = 1.0) -> Speed:
        """The measured speed of the probes' device, each part timed for at least some seconds.

        The weights of the probe of training are changed; the other has the batch size for banks, caches and pictures.
        """
        device = of_training.module.device
        optimizer = of_training.module.optimizer(of_training.parameters)

        def step() -> None:
            of_training.loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds = {"train": timed(step, device, least) / of_training.batch_size}
        for part in PARTS[1:]:
            seconds[part] = timed(getattr(of_building, part), device, least) / of_building.batch_size
        is_gpu = device.type == "cuda"
        return cls(torch.cuda.get_device_name(device) if is_gpu else f"this {device.type.upper()}", seconds)


def timed(run: Callable[[], object], device: torch.device, least: float) -> float:
    """Seconds of one call after a warm-up: the minimum of all calls within the time, at least three unless slow.

    Other load only adds to a time, so the minimum is nearest to that of an idle machine; on a CPU the time of other
    processes is not counted.
    """
    times: list[float] = []
    run()
    begun = time.perf_counter()
    while not times or time.perf_counter() - begun < (least if len(times) >= 3 else 2 * least):
        start = now(device)
        run()
        times.append(now(device) - start)
    return min(times)


def now(device: torch.device) -> float:
    """The time after synchronising the device; on a CPU the CPU time of this thread."""
    if device.type == "cpu":
        return time.thread_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Phase:
    """One phase of a run."""

    name: str  # such as `memory bank`
    what: str  # description
    samples: Mapping[str, float] = field(default_factory=dict)  # number of samples of each part
    disk: float = 0.0  # bytes written

    def flops(self, costs: Costs) -> float:
        """Floating-point operations."""
        return sum(count * costs.flops[part] for part, count in self.samples.items())

    def seconds(self, speed: Speed, devices: int) -> float:
        """Seconds on that many devices, which share the work of all phases evenly."""
        return sum(count * speed.seconds[part] for part, count in self.samples.items()) / devices


def forward_passes(sampler: Sampler, sample_shape: tuple[int, ...]) -> int:
    """Forward passes of the network per sample: those of the solver's steps, doubled by guidance.

    Some solvers take more than one per step, such as Heun's.
    """
    given: Any = sampler  # completed, since the module is built
    steps = len(Reverse(torch.zeros(1, *sample_shape), given.scheduler, given.num_inference_steps))
    return steps * (1 if sampler.guidance_scale == 1 else 2)


def phases_of(
    config: Namespace, module: DiffTuningModule, costs: Costs, num_targets: int | None, num_held_out: int | None
) -> list[Phase]:
    """The phases of ``difftune fit``; a number of pictures is ``None`` if the files are not available."""
    data, trainer = config.data.init_args, config.trainer
    devices = num_devices(trainer)
    has_bank = data.bank is not None and module.uses_retention
    found = [bank(data, module, costs, num_targets)] if has_bank else []
    is_cached = data.latent_cache is not None and has_encoder(module)
    if is_cached:
        found.append(latent_cache(data, costs, num_targets))
    retained = retained_samples(data.retention_share, data.batch_size) if has_bank else 0
    course = Course.of(trainer, (data.batch_size - retained) * devices, num_targets, num_held_out != 0)
    batch, steps, updates = data.batch_size * devices, course.steps, course.window
    seen = {"train": float(steps * batch * updates), "teacher": float(steps * retained * devices * updates)}
    if not is_cached and has_encoder(module):
        seen["encode"] = float(steps * (data.batch_size - retained) * devices * updates)
    words = f"{steps:,} steps of {batch:,} samples" + (f", {updates} batches each" if updates > 1 else "")
    found.append(Phase("training", words, seen, checkpoint_bytes(trainer, costs, steps)))
    found.append(evaluation(config, module, course, num_held_out))
    return found


def checkpoint_bytes(trainer: Namespace, costs: Costs, steps: int) -> float:
    """Bytes of the checkpoints that are kept, with the weights, two moments of Adam, and what callbacks save."""
    kinds = callbacks_of(trainer)
    copies = 3 + sum(hasattr(kind, "average_parameters") or bool(init.get("save_reference")) for kind, init in kinds)
    kept = [files_kept(init, steps) for kind, init in kinds if issubclass(kind, ModelCheckpoint)]
    return costs.trained * 4 * copies * (sum(kept) if kept or trainer.enable_checkpointing is False else 1)


def keepers_of_weights(trainer: Namespace) -> list[str]:
    """Names of the callbacks that keep a copy of the trained weights on the device: averages, and EWC's reference."""
    return [
        kind.__name__
        for kind, init in callbacks_of(trainer)
        if (hasattr(kind, "average_parameters") or "save_reference" in init) and not init.get("offload")
    ]


def files_kept(init: Mapping[str, Any], steps: int) -> int:
    """Number of files that a ``ModelCheckpoint`` leaves."""
    best, every = init.get("save_top_k", 1), init.get("every_n_train_steps")
    if best == -1:
        best = steps // every if every else 1
    return int(best) + (init.get("save_last") is True)


def callbacks_of(trainer: Namespace) -> list[tuple[Any, Mapping[str, Any]]]:
    """Class and arguments of each callback; not the callback, since some constructors open weights."""
    found = entries(trainer.callbacks)
    return [(resolve_name(entry.class_path), vars(entry.get("init_args") or Namespace())) for entry in found]


def bank(data: Namespace, module: DiffTuningModule, costs: Costs, num_targets: int | None) -> Phase:
    """The samples of the pre-trained model, or pictures in place of them."""
    size = data.bank_size
    if data.bank_source == "target" and num_targets is not None:
        size = min(size, num_targets)
    if data.bank_source is not None:
        samples = {"encode": float(size) if has_encoder(module) else 0.0, "bank_columns": float(size)}
        return Phase("memory bank", f"{size:,} pictures", samples, size * costs.bank_bytes)
    sampler = module.bank_sampler
    if not any(getattr(module, "bank_prompts", [True])):  # the empty prompt has no guidance
        sampler = replace(sampler, guidance_scale=1.0)
    passes = forward_passes(sampler, module.sample_shape)
    guided = ", guided" if sampler.guidance_scale != 1 else ""
    words = f"{size:,} samples, {sampler.num_inference_steps} steps{guided}"
    samples = {"denoise_source": float(size * passes), "bank_columns": float(size)}
    return Phase("memory bank", words, samples, size * costs.bank_bytes)


def latent_cache(data: Namespace, costs: Costs, num_targets: int | None) -> Phase:
    """Encoding the target by the frozen networks."""
    ways = 2 if data.horizontal_flip else 1
    if num_targets is None:
        return Phase("latent cache", "unknown: the target's files are not here")
    words = f"{num_targets:,} pictures" + (" and their mirror images" if ways == 2 else "")
    return Phase("latent cache", words, {"encode": float(num_targets * ways)}, num_targets * ways * costs.cache_bytes)


def evaluation(config: Namespace, module: DiffTuningModule, course: Course, num_held_out: int | None) -> Phase:
    """The validations: held-out losses and the callbacks' samples, without their extractors."""
    if course.validations is None:
        return Phase("evaluation", "unknown: its times depend on the target's files, or on the clock")
    pictures, trainer = 0.0, config.trainer
    for kind, init in callbacks_of(trainer):
        if hasattr(kind, "trajectories"):
            times = course.times_due(init.get("every_n_steps")) + bool(init.get("at_start"))
            pictures += times * init["num_samples"] * kind.trajectories(init)
    build = config.data.init_args.build_batch_size
    largest = build if isinstance(build, int) else BATCH_SIZE
    validated = held_out_seen(num_held_out or 0, largest, trainer.limit_val_batches, num_devices(trainer))
    times = len(course.validations)
    samples = {
        "denoise": pictures * forward_passes(module.sampler, module.sample_shape) + times * validated,
        "decode": pictures,
        "encode": float(times * validated) if has_encoder(module) else 0.0,
    }
    words = f"{times:,} validation{'s' if times != 1 else ''}, {pictures:,.0f} pictures generated in all"
    return Phase("evaluation", words, samples)


def has_encoder(module: DiffTuningModule) -> bool:
    """Whether a frozen network encodes the pictures before training."""
    return isinstance(module, SupportsEncode) and module.encoder_identity() is not None


def num_devices(trainer: Namespace) -> int:
    """Devices of all nodes, if the config names them; else 1."""
    devices = trainer.devices
    if isinstance(devices, str) and "," in devices:  # their indices
        devices = [index for index in devices.split(",") if index.strip()]
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    return max(1, count) * max(1, int(trainer.num_nodes))
