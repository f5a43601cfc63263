"""How long a part of a run takes on a device: by its data sheet, or measured here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from lightning_difftune.cli.plan.probe import PARTS, Costs, Probe


class Speed(Protocol):
    """Seconds for one sample of a part."""

    name: str

    def seconds(self, part: str) -> float:
        """Seconds for one sample of one of :data:`~lightning_difftune.cli.plan.probe.PARTS`."""
        ...


@dataclass(frozen=True)
class Accelerator:
    """A device by its data sheet.

    Attributes:
        memory: GiB.
        flops: Dense peak in FLOP/s, by the type that matrices are multiplied in.
    """

    memory: int
    flops: dict[str, float]


# Dense peaks of NVIDIA's data sheets, SXM modules; tf32 is what float32 matrices are multiplied in here.
ACCELERATORS = {
    "a100": Accelerator(80, {"bf16": 312e12, "tf32": 156e12}),
    "h100": Accelerator(80, {"bf16": 989e12, "tf32": 494e12}),
    "h200": Accelerator(141, {"bf16": 989e12, "tf32": 494e12}),
}
UTILISATION = 0.2
"""The part of an H100's bf16 peak that a training step reached: DiT-XL/2 at batch 32, its blocks compiled.

At batch 128 it was 38 %, in sampling with guidance 24 % and, with compiled blocks, 41 %; see docs/performance.md.
"""
TYPES = {"bf16-mixed": "bf16", "bf16-true": "bf16", "16-mixed": "bf16", "16-true": "bf16"}  # fp16's peak is bf16's


class DataSheet:
    """A named accelerator that reaches a part of its peak.

    Args:
        device: Its name in :data:`ACCELERATORS`.
        utilisation: The part of the peak, in (0, 1].
        precision: The trainer's.
        costs: What is to be computed. Autoencoder and annotator compute in float32.
    """

    def __init__(self, device: str, utilisation: float, precision: str, costs: Costs) -> None:
        self.costs, self.utilisation = costs, utilisation
        self.accelerator = ACCELERATORS[device]
        self.networks = TYPES.get(precision, "tf32")
        self.name = f"{device.upper()} at {utilisation:.0%} of its {self.networks} peak"

    def seconds(self, part: str) -> float:
        """FLOPs over FLOP/s."""
        kind = self.networks if part in ("train", "denoise", "denoise_source") else "tf32"
        return self.costs.flops[part] / (self.accelerator.flops[kind] * self.utilisation)


class Measured:
    """This machine's device, timed.

    Args:
        of_training: A probe of the training's batch size, on the device. Its weights are trained on.
        of_building: One of the batch size that banks, caches and pictures are made in.
        least: Seconds that each part is timed for at least.
    """

    def __init__(self, of_training: Probe, of_building: Probe, least: float = 1.0) -> None:
        module = of_training.module
        device = module.device
        self.name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type.upper()}, alone"
        )
        optimizer = module.optimizer(of_training.parameters)

        def step() -> None:
            of_training.loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        parts: dict[str, Callable[[], object]] = {part: getattr(of_building, part) for part in PARTS}
        parts["train"] = step
        sizes = {part: of_training.batch_size if part == "train" else of_building.batch_size for part in parts}
        self._seconds = {part: timed(run, device, least) / sizes[part] for part, run in parts.items()}

    def seconds(self, part: str) -> float:
        """As measured."""
        return self._seconds[part]


def timed(run: Callable[[], object], device: torch.device, least: float) -> float:
    """Seconds of one call after a first: the least of as many as fit into the time, and of three unless they are slow.

    What else a machine is doing only adds to a time, so that the least is nearest to what an idle one takes; on a CPU
    the time that others have it is not counted at all.
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
    """Seconds, once the device has nothing left to do; on a CPU those that this thread has computed."""
    if device.type == "cpu":
        return time.thread_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


FLOAT = 4  # bytes of float32, in which weights, gradients and Adam's moments are kept, also under autocast
HALF = 2  # bytes of bfloat16, in which fully sharded training sends weights and gradients under bf16-mixed


@dataclass(frozen=True)
class Setup:
    """A network on some devices.

    Attributes:
        trained: Parameters that are trained.
        frozen: Parameters that are not, which every device holds in float32.
        devices: N.
        sharded: Whether the devices share out weights, gradients and moments (FSDP) or hold them whole (DDP).
        averages: Whether averages of the weights (EMA) are kept, which sharded training cannot.

    Example:
        >>> xl = Setup(trained=673_799_072, devices=8)
        >>> f"{xl.memory / 1e9:.1f} GB, {xl.communication / 1e9:.1f} GB per step"
        '13.5 GB, 4.7 GB per step'
    """

    trained: int
    frozen: int = 0
    devices: int = 1
    sharded: bool = False
    averages: bool = True

    @property
    def memory(self) -> float:
        """Bytes on each device: weights, gradients, two moments of Adam and averages.

        Activations, and the half-precision copies that autocast makes of weights, come on top.
        """
        copies = 4 + (self.averages and not self.sharded)
        return self.trained * FLOAT * copies / (self.devices if self.sharded else 1) + self.frozen * FLOAT

    @property
    def communication(self) -> float:
        """Bytes that each device sends in a step.

        A ring sends (N - 1) / N of what is gathered or scattered, and twice that to reduce it for all. DDP reduces the
        gradients in float32. FSDP gathers the weights in the forward and in the backward pass and scatters the
        gradients, in bfloat16 under bf16-mixed.
        """
        passes = 3 * HALF if self.sharded else 2 * FLOAT
        return self.trained * passes * (self.devices - 1) / self.devices
