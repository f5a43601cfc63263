"""How gpu.py measures: training steps, bare loops, sampling and profiles, each as a dictionary of figures."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import lightning as L
import torch
from harness import device_name, now, quiet_trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_difftune import DiTDiffTuningModule
from lightning_difftune.callbacks import EMA, RegionalCompile
from lightning_difftune.diffusion import GaussianDiffusion
from lightning_difftune.losses import hybrid_loss
from lightning_difftune.models import DiT
from lightning_difftune.modules import dit as dit_module
from lightning_difftune.sampling import Sampler
from lightning_difftune.source import SourceFacts

Figures = dict[str, Any]
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, SXM, NVIDIA's data sheets
BF16 = "bf16-mixed"


@dataclass
class Size:
    """Shapes and lengths of all parts."""

    xl: dict[str, Any]
    pixel: dict[str, Any]
    b4: dict[str, Any]
    batch: int
    large_batch: int
    pixel_batch: int
    sampling_batch: int
    many: int  # of the pixel DiT's sampling
    inference_steps: int
    warm_up: int
    steps: int
    backend: str  # of torch.compile
    unet: dict[str, Any]
    latent: int
    context: int
    text_batch: int


def device() -> str:
    """Where everything runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def network(architecture: dict[str, Any], classes: int = 100) -> DiT:
    """A DiT with random weights, its modulations not zero, made where it runs."""
    with torch.device(device()):
        model = DiT(**architecture, num_classes=classes)
        for name, parameter in model.named_parameters():
            if "adaLN" in name and parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
    return model


class Unhashed(DiTDiffTuningModule):
    """Hashing gigabytes of weights is not part of a step."""

    def build(self) -> SourceFacts:
        """As usual, without the fingerprint."""
        with patch.object(dit_module, "fingerprint", lambda network: "random weights"):
            return super().build()


def module_of(model: DiT, inference_steps: int = 50) -> DiTDiffTuningModule:
    """Our module with the optimizer that fuses its step."""
    optimizer = partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0, fused=True)
    return Unhashed(model, optimizer=optimizer, sampler=Sampler(num_inference_steps=inference_steps))


def batch_of(shape: tuple[int, ...], size: int, classes: int = 100) -> Any:
    """One batch as from the data module, a fifth of it retained, in memory that the device reads."""
    retained = size // 5
    generator = torch.Generator().manual_seed(0)
    batch = {
        "target": {
            "latent_mean": torch.randn(size - retained, *shape, generator=generator),
            "latent_std": torch.full((size - retained, *shape), 0.1),
            "class_labels": torch.arange(size - retained) % classes,
        },
        "retention": {"latents": torch.randn(retained, *shape, generator=generator)},
    }
    if torch.cuda.is_available():
        batch = {name: {key: x.pin_memory() for key, x in part.items()} for name, part in batch.items()}
    return batch


class Clock(Callback):
    """Seconds of a step, without the first ones."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.began, self.seconds = warm_up, 0.0, 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Start."""
        if trainer.global_step == self.warm_up:
            self.began = now()

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop."""
        self.seconds = (now() - self.began) / (trainer.global_step - self.warm_up)


def forward_flops(model: DiT) -> float:
    """Floating-point operations of one sample's forward pass, a multiplication and an addition being two."""
    x = torch.zeros(1, *model.sample_shape, device=device())
    index = torch.zeros(1, dtype=torch.int64, device=device())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, index, index)
    return float(counter.get_total_flops())


def rate(seconds: float, pictures: int, flops: float = 0.0) -> Figures:
    """Figures of something that took ``seconds``."""
    figures: Figures = {
        "device": device_name(),
        "ms": round(1e3 * seconds, 2),
        "pictures_per_s": round(pictures / seconds, 1),
    }
    peak = next((peak for name, peak in PEAKS.items() if name in figures["device"]), None)
    if flops and peak:
        figures["of_peak_percent"] = round(100 * flops / seconds / peak, 1)
    if torch.cuda.is_available():
        figures["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return figures


def cleared() -> None:
    """Free memory and reset the peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def fit(
    module: Any,
    batch: Any,
    size: Size,
    *callbacks: Callback,
    pictures: int,
    flops: float = 0.0,
    ema: EMA | None = None,
    together: bool = True,
) -> Figures:
    """Our training step on a batch in memory, under the Trainer with EMA; weights are cast together or one by one."""
    cleared()
    clock = Clock(size.warm_up)
    steps = size.warm_up + size.steps
    trainer = quiet_trainer(steps, clock, ema or EMA(), *callbacks, precision=BF16, accelerator="auto")
    setattr(trainer.strategy, "teardown", lambda: None)  # noqa: B010  # which would move weights and moments to the host
    if not together:
        module.weights_cast = lambda denoise: contextlib.nullcontext()
    try:
        trainer.fit(module, DataLoader(cast("Any", [batch] * steps), batch_size=None))
    finally:
        vars(module).pop("weights_cast", None)
    module._trainer = None
    return rate(clock.seconds, pictures, flops)


def bare_step(model: DiT, batch: Any, *, authors: bool = False, compiled: Any = None) -> Callable[[], None]:
    """A hand-written loop with the same loss and averages, or the authors' loop."""
    where = device()
    model.to(where).train()
    run = compiled if compiled is not None else model
    trained: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in trained]
    how: dict[str, Any] = {"foreach": False, "fused": False} if authors else {"fused": True}
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, **how)
    process = GaussianDiffusion().to(where)

    def step() -> None:
        target = {key: x.to(where, non_blocking=True) for key, x in batch["target"].items()}
        retained = batch["retention"]["latents"].to(where, non_blocking=True)
        mean, labels = target["latent_mean"], target["class_labels"]
        labels = torch.where(torch.rand(len(labels), device=where) < 0.1, model.null_class, labels)
        x0 = torch.cat([mean, retained])
        labels = torch.cat([labels, labels.new_full((len(retained),), model.null_class)])
        high, low = torch.rand(len(mean), device=where).sqrt(), 1 - torch.rand(len(retained), device=where).sqrt()
        t = (torch.cat([high, low]) * 1000).long().clamp(max=999)
        noise = torch.randn_like(x0)
        x_t = process.add_noise(x0, noise, t)
        with torch.autocast(where, torch.bfloat16, enabled=not authors):
            losses = hybrid_loss(run(x_t, t, labels), x0, x_t, noise, t, process)
        loss = losses[: len(mean)].mean() + 0.1 * losses[len(mean) :].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            if authors:
                for average, parameter in zip(averages, trained, strict=True):
                    average.mul_(0.9999).add_(parameter, alpha=0.0001)
            else:
                torch._foreach_lerp_(averages, trained, 0.0001)

    return step


def timed(step: Callable[[], object], size: Size, pictures: int, flops: float = 0.0) -> Figures:
    """Seconds of a step of a loop."""
    for _ in range(size.warm_up):
        step()
    start = now()
    for _ in range(size.steps):
        step()
    return rate((now() - start) / size.steps, pictures, flops)


def bare(model: DiT, batch: Any, size: Size, pictures: int, flops: float, **how: Any) -> Figures:
    """The bare loop, timed."""
    cleared()
    if how.pop("whole", False):
        torch._dynamo.reset()
        how["compiled"] = torch.compile(model, backend=size.backend, **how.pop("options", {}))
    return timed(bare_step(model, batch, **how), size, pictures, flops)


def regional(size: Size, **how: Any) -> RegionalCompile:
    """RegionalCompile that compiles here."""
    return RegionalCompile(devices=(device(),), backend=size.backend, **how)


def drawn(module: Any, count: int, steps: int, flops: float, bank: bool = False, precision: str = BF16) -> Figures:
    """Pictures per second of the bank's generator or of `generate`."""
    torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
    generator = module.bank_generator()

    def draw() -> None:
        with torch.no_grad(), torch.autocast(device(), torch.bfloat16, enabled=precision == BF16):
            generator.generate_bank(torch.arange(count)) if bank else module.generate(torch.arange(count))

    sampler, kept = module.sampler, module.sampler.num_inference_steps
    module.sampler.num_inference_steps = module.bank_sampler.num_inference_steps = 2
    draw()
    sampler.num_inference_steps = module.bank_sampler.num_inference_steps = kept
    start = now()
    draw()
    return rate(now() - start, count, flops * count * steps)


def sampling_module(architecture: dict[str, Any], steps: int, scale: float) -> DiTDiffTuningModule:
    """A module that draws pictures, built and on the device."""
    bank_sampler = Sampler(num_inference_steps=steps, guidance_scale=1.0)
    sampler = Sampler(num_inference_steps=steps, guidance_scale=scale)
    module = Unhashed(network(architecture), sampler=sampler, bank_sampler=bank_sampler)
    module.configure_model()
    return module.eval().to(device())


def compile_blocks(module: nn.Module, size: Size) -> Figures:
    """Compile the blocks as RegionalCompile does."""
    for block in module.dit.blocks:  # type: ignore[union-attr]
        block.compile(backend=size.backend)
    return {"device": device_name(), "blocks": len(module.dit.blocks)}  # type: ignore[union-attr, arg-type]


def fit_data(module: Any, data: Any, size: Size, callback: Callback, pictures: int) -> Figures:
    """Our training step on the data module's batches."""
    cleared()
    clock = Clock(size.warm_up)
    trainer = quiet_trainer(size.warm_up + size.steps, clock, EMA(), callback, precision=BF16, accelerator="auto")
    with contextlib.redirect_stdout(sys.stderr):
        trainer.fit(module, data)
    return rate(clock.seconds, pictures)
