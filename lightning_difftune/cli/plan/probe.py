"""The parts of a run, one batch of each, for counting or timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from lightning_difftune.draws import Draws
from lightning_difftune.errors import CheckpointError
from lightning_difftune.models.frozen import Frozen
from lightning_difftune.modules import DiffTuningModule
from lightning_difftune.modules.bank_sources import PretrainedSamples
from lightning_difftune.protocols import Annotator, DiffTuningBatch, TargetBatch

PARTS = ("train", "teacher", "denoise", "denoise_source", "encode", "decode", "bank_columns")


class Probe:
    """A module with a batch of random pictures, and the parts of a run.

    The methods named after :data:`PARTS` each do that part once for the whole batch.

    Args:
        module: The built module, on the measured device; it has ``encode``.
        picture_shape: (C, H, W) of the pictures.
        batch_size: Batch size B.
        precision: The trainer's precision, such as ``bf16-mixed``.
    """

    def __init__(
        self, module: DiffTuningModule, picture_shape: tuple[int, ...], batch_size: int, precision: str
    ) -> None:
        self.module: Any = module
        self.batch_size = batch_size
        device = module.device
        self.autocast: Callable[[], Any] = nullcontext
        if precision == "bf16-mixed":
            self.autocast = lambda: torch.autocast(device.type, torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        self.indices = torch.arange(batch_size)
        pictures = torch.rand(batch_size, *picture_shape, generator=generator) * 2 - 1
        self.target = cast(
            "TargetBatch",
            {
                "pixel_values": pictures.to(device),
                "class_labels": torch.zeros(batch_size, dtype=torch.int64, device=device),
                "captions": ["a picture"] * batch_size,
            },
        )
        self.latents = torch.randn(batch_size, *module.sample_shape, generator=generator).to(device)
        self.t = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.source_condition = module.source_conditions(self.indices)[0]
        self.source = module.frozen_denoiser()
        self.bank = PretrainedSamples(module, module.objective)
        self.bank.denoise = self.source  # not a second copy
        self.encoded = self.encode()
        self.columns = self.bank_columns()
        batch: DiffTuningBatch = {"target": self.encoded}
        self.x0, self.condition, self.is_retention = module.prepare(batch, Draws(0, 0, device))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return self.module.trainable_parameters()

    def loss(self) -> Tensor:
        """The objective on target samples; a bank sample costs the same, and its :meth:`teacher`."""
        module, noise = self.module, torch.zeros_like(self.x0)
        samples = self.x0, self.condition, self.is_retention, self.t, noise
        with self.autocast():
            return module.objective.at(module.denoise, *samples, None, module.teacher).loss

    def train(self) -> None:
        """Forward and backward."""
        self.backward(self.loss())

    def backward(self, loss: Tensor) -> None:
        """The backward pass."""
        torch.autograd.grad(loss, self.parameters, allow_unused=True)

    @torch.no_grad()
    def teacher(self) -> Tensor | None:
        """What retained samples are compared with, if not their noise."""
        target = self.module.objective.retention_target
        if target is None:
            return None
        condition = self.module.retention_condition(self.columns)
        with self.autocast():
            return target.predictions(self.columns, self.latents, self.t, condition, self.bank.teacher)

    @torch.no_grad()
    def denoise(self) -> Tensor:
        """One forward pass of the tuned network."""
        with self.autocast():
            return self.module.denoise(self.latents, self.t, self.condition)

    @torch.no_grad()
    def denoise_source(self) -> Tensor:
        """One forward pass of the pre-trained network."""
        with self.autocast():
            return self.source(self.latents, self.t, self.source_condition)

    @torch.no_grad()
    def encode(self) -> TargetBatch:
        """Encode pictures for training."""
        return self.module.encode(self.target)

    @torch.no_grad()
    def decode(self) -> Tensor:
        """Decode latents to pictures."""
        return self.module.decode(self.latents)

    @torch.no_grad()
    def bank_columns(self) -> dict[str, Tensor]:
        """The bank's columns: latents, and such as control maps of the decoded samples."""
        return self.bank.with_columns(self.indices, self.latents)


@dataclass(frozen=True)
class Costs:
    """What one sample costs."""

    flops: dict[str, float]  # floating-point operations of each part, where a multiply-add is two
    activation_bytes: float  # kept by a training step for the backward pass
    bank_bytes: float  # on disk, in a memory bank
    cache_bytes: float  # on disk, in a latent cache, without the mirror image
    trained: int  # number of trained parameters
    frozen_bytes: float  # frozen parameters, in their stored types
    text_bytes: float  # the part of them in text encoders
    teacher_bytes: float = 0.0  # the copy of the pre-trained network that retained samples are compared with


def count(
    module: DiffTuningModule, picture_shape: tuple[int, ...], precision: str, mode: AbstractContextManager[Any]
) -> Costs:
    """Count the costs of one sample, for pictures (C, H, W), on the CPU.

    The networks compute on fake tensors of the ``mode``, so that the largest is counted in seconds. An annotator, which
    may not be a network, gets a real picture.
    """
    annotator: Any = getattr(module, "annotator", None)
    maps = 0.0 if annotator is None else annotator_flops(annotator, picture_shape)
    if annotator is not None:
        module.annotator = Unseen(annotator.channels)
    probe, pair = (Probe(module, picture_shape, batch_size, precision) for batch_size in (1, 2))
    flops = {}
    with mode, FlopCounterMode(display=False) as counter:
        with saved_tensors() as saved_bytes:
            loss = probe.loss()
        flops["denoise"], of_one = float(counter.get_total_flops()), saved_bytes()
        probe.backward(loss)
    flops["train"] = float(counter.get_total_flops())
    for part in PARTS:
        if part not in flops:
            with mode, FlopCounterMode(display=False) as counter:
                getattr(probe, part)()
            flops[part] = float(counter.get_total_flops())
    flops["encode"] += maps
    flops["bank_columns"] += maps
    with mode, saved_tensors() as saved_bytes:
        loss = pair.loss()
    return costs_of(probe, flops, saved_bytes() - of_one)


@dataclass(frozen=True)
class Unseen:
    """An annotator for fake tensors: maps of zeros."""

    channels: int

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) uint8 => (B, channels, H, W) uint8."""
        return torch.zeros_like(pictures[:, :1]).expand(-1, self.channels, -1, -1)

    def identity(self) -> str:
        """A placeholder."""
        return "unseen"


def annotator_flops(annotator: Annotator, picture_shape: tuple[int, ...]) -> float:
    """Operations of an annotator on one picture (3, H, W); 0 if its weights are not available."""
    picture = torch.randint(256, (1, *picture_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        with FlopCounterMode(display=False) as counter:
            annotator(picture)
    except CheckpointError:
        return 0.0
    return float(counter.get_total_flops())


def costs_of(probe: Probe, flops: dict[str, float], activation_bytes: float) -> Costs:
    """The costs of the one sample of a probe."""
    trained = probe.parameters
    names = {id(parameter) for parameter in trained}
    frozen = [p for p in all_parameters(probe.module) if id(p) not in names]
    cached = [x for x in probe.encoded.values() if isinstance(x, Tensor)]
    text: Any = getattr(probe.module, "text_encoder", None)
    return Costs(
        flops,
        activation_bytes,
        sum(x.nbytes for x in probe.columns.values()),
        sum(x.numel() * (2 if x.is_floating_point() else x.element_size()) for x in cached),
        sum(p.numel() for p in trained),
        sum(p.nbytes for p in frozen),
        sum(p.nbytes for p in text.network.parameters()) if text is not None else 0,
        copy_bytes(probe) if flops.get("teacher") else 0.0,
    )


def copy_bytes(probe: Probe) -> float:
    """Bytes of the frozen pre-trained network, if it is not a part of the module."""
    known = {id(parameter) for parameter in all_parameters(probe.module)}
    parts = [part for part in (probe.source, *getattr(probe.source, "args", ())) if isinstance(part, nn.Module)]
    return sum(p.nbytes for part in parts for p in part.parameters() if id(p) not in known)


def without_values() -> FakeTensorMode:
    """A mode in which tensors have shapes but no values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def saved_tensors() -> Iterator[Callable[[], float]]:
    """A ``with`` block for a forward pass, and a function for the bytes that its graph keeps for the backward pass.

    Each storage counts once, weights too, as long as the graph is there.
    """
    # a weak reference prevents reuse of the storage's address, and tells whether the graph still holds it
    storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        storages.setdefault(reference.cdata, (reference, storage.nbytes()))
        return tensor

    def nbytes() -> float:
        return float(sum(size for reference, size in storages.values() if not reference.expired()))

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield nbytes


def all_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of a module and of the frozen networks that it keeps out of its checkpoints."""
    parts = [module, *(part.network for part in module.modules() if isinstance(part, Frozen))]
    return list({id(p): p for part in parts for p in part.parameters()}.values())
