"""The parts of gpu.py: what is measured, on full and on tiny shapes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_measure import (
    Figures,
    Size,
    bare,
    batch_of,
    compile_blocks,
    device,
    drawn,
    fit,
    fit_data,
    forward_flops,
    module_of,
    network,
    regional,
    sampling_module,
)
from gpu_profile import profiled_fit
from torch import Tensor

from lightning_difftune import ControlNetDiffTuningModule, MemoryBankDataModule, TextToImageDiffTuningModule
from lightning_difftune.callbacks import EMA
from lightning_difftune.data import ArrayImages
from lightning_difftune.models import FrozenAutoencoder

Rows = Iterator[tuple[str, Callable[[], Figures]]]

SIZES = {
    "full": Size(
        {"input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28, "num_heads": 16},
        {"input_size": 32, "patch_size": 4, "in_channels": 3, "hidden_size": 320, "depth": 12, "num_heads": 5},
        {"input_size": 32, "patch_size": 4, "in_channels": 4, "hidden_size": 768, "depth": 12, "num_heads": 12},
        *(32, 128, 512, 64, 2000, 50, 6, 20, "inductor"),
        {},
        *(64, 768, 4),
    ),
    "tiny": Size(
        {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 2, "num_heads": 2},
        {"input_size": 8, "patch_size": 4, "in_channels": 3, "hidden_size": 16, "depth": 2, "num_heads": 2},
        {"input_size": 8, "patch_size": 4, "in_channels": 4, "hidden_size": 16, "depth": 2, "num_heads": 2},
        *(10, 20, 10, 2, 4, 2, 1, 2, "eager"),
        {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
        },
        *(8, 16, 5),
    ),
}


def fewer_steps(size: Size) -> Size:
    """For what is slow."""
    return Size(**{**vars(size), "warm_up": min(2, size.warm_up), "steps": max(2, size.steps // 2)})


def xl(size: Size) -> Rows:
    """DiT-XL/2: eager, regional, bare."""
    model = network(size.xl)
    flops = 3 * forward_flops(model)
    module, shape = module_of(model), model.sample_shape
    small, large = (batch_of(shape, count) for count in (size.batch, size.large_batch))
    one, many, fewer = size.batch, size.large_batch, fewer_steps(size)
    work: dict[str, Any] = {"pictures": one, "flops": flops * one}
    yield f"eager, batch {one}", partial(fit, module, small, size, **work)
    yield f"bare loop, eager, batch {one}", partial(bare, model, small, size, one, flops * one)
    yield f"RegionalCompile, batch {one}", partial(fit, module, small, size, regional(size), **work)
    yield f"bare loop, the same blocks compiled, batch {one}", partial(bare, model, small, size, one, flops * one)
    work = {"pictures": many, "flops": flops * many}
    yield f"RegionalCompile, batch {many}", partial(fit, module, large, fewer, regional(size), **work)
    yield f"bare loop, the same blocks compiled, batch {many}", partial(bare, model, large, fewer, many, flops * many)


def profile(size: Size) -> Rows:
    """Where the time of a step of DiT-XL/2 is."""
    model = network(size.xl)
    module, shape = module_of(model), model.sample_shape
    small, large = (batch_of(shape, count) for count in (size.batch, size.large_batch))
    module.configure_model()
    yield f"eager, batch {size.batch}", partial(profiled_fit, module, small)
    yield "compiling blocks for what follows", partial(compile_blocks, module, size)
    yield f"compiled blocks, batch {size.batch}", partial(profiled_fit, module, small)
    yield f"compiled blocks, batch {size.large_batch}", partial(profiled_fit, module, large)


def casts(size: Size) -> Rows:
    """What casting weights together gains, and averages every eight steps."""
    model = network(size.xl)
    module, batch = module_of(model), batch_of(model.sample_shape, size.batch)
    work: dict[str, Any] = {"pictures": size.batch, "flops": 3 * forward_flops(model) * size.batch}
    for compiled in ([], [regional(size)]):
        how = f"{'RegionalCompile' if compiled else 'eager'}, batch {size.batch}"
        yield f"{how}, weights cast together", partial(fit, module, batch, size, *compiled, **work)
        yield f"{how}, cast by autocast", partial(fit, module, batch, size, *compiled, together=False, **work)
    yield (
        f"{how}, cast together, EMA every 8 steps",
        partial(fit, module, batch, size, ema=EMA(every_n_steps=8), **work),
    )


def sampling(size: Size) -> Rows:
    """DiT-XL/2: bank and FID."""
    count, steps = size.sampling_batch, size.inference_steps
    module = sampling_module(size.xl, steps, 1.5)
    flops = forward_flops(module.dit)
    draw = partial(drawn, module, count, steps)
    yield f"bank, no guidance, bf16, {count} samples in {steps} steps", partial(draw, flops, bank=True)
    yield f"FID, guidance 1.5, bf16, {count} samples in {steps} steps", partial(draw, 2 * flops)
    yield f"bank, no guidance, TF32, {count} samples in {steps} steps", partial(draw, flops, True, "32-true")
    yield "compiling blocks for what follows", partial(compile_blocks, module, size)
    yield f"FID, guidance 1.5, bf16, compiled blocks, {count} samples in {steps} steps", partial(draw, 2 * flops)


def small(size: Size) -> Rows:
    """The pixel DiT and DiT-B/4."""
    for name, architecture, count in (
        ("pixel DiT", size.pixel, size.pixel_batch),
        ("DiT-B/4", size.b4, size.pixel_batch // 2),
    ):
        module = module_of(network(architecture))
        model = network(architecture)
        batch = batch_of(model.sample_shape, count)
        flops = 3 * forward_flops(model) * count
        of = f"{name}, batch {count}"
        if name == "pixel DiT":
            yield f"{of}, eager", partial(fit, module, batch, size, pictures=count, flops=flops)
            yield f"{of}, bare loop, eager", partial(bare, model, batch, size, count, flops)
        yield f"{of}, RegionalCompile", partial(fit, module, batch, size, regional(size), pictures=count, flops=flops)
        if name == "pixel DiT":
            draws = sampling_module(architecture, size.inference_steps, 1.5)
            work = 2 * forward_flops(draws.dit)
            yield (
                f"{name}, guidance 1.5, bf16, {size.many} samples in {size.inference_steps} steps",
                partial(drawn, draws, size.many, size.inference_steps, work),
            )


def graphs(size: Size) -> Rows:
    """The pixel DiT compiled as a whole and replayed from CUDA graphs, for steps that wait for the host."""
    yield from of_whole(size, "pixel DiT", size.pixel, size.pixel_batch, "reduce-overhead")


def whole(size: Size) -> Rows:
    """The pixel DiT and DiT-XL/2 compiled as a whole, the latter also with CUDA graphs."""
    yield from of_whole(size, "pixel DiT", size.pixel, size.pixel_batch, None)
    yield from of_whole(size, "DiT-XL/2", size.xl, size.batch, None)
    yield from of_whole(size, "DiT-XL/2", size.xl, size.batch, "reduce-overhead")


def of_whole(size: Size, name: str, architecture: dict[str, Any], count: int, mode: str | None) -> Rows:
    """Our step, the same with weights cast by autocast, and a bare loop."""
    model = network(architecture)
    module, batch = module_of(network(architecture)), batch_of(model.sample_shape, count)
    flops = 3 * forward_flops(model) * count
    of = f"{name}, batch {count}, whole network{', CUDA graphs' if mode else ''}"
    mode = mode if size.backend == "inductor" else None
    ours = partial(fit, module, batch, size, regional(size, whole=True, mode=mode), pictures=count, flops=flops)
    yield of, ours
    yield f"{of}, weights cast by autocast", partial(ours, together=False)
    yield f"{of}, bare loop", partial(bare, model, batch, size, count, flops, whole=True, options={"mode": mode})


def data(size: Size) -> Rows:
    """Our step fed by the data module."""
    from training_step import autoencoder_folder

    rng = np.random.default_rng(0)
    side = size.pixel["input_size"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        module = module_of(network(size.pixel), inference_steps=2)
        pictures = ArrayImages(rng.integers(0, 256, (2 * size.pixel_batch, side, side, 3), np.uint8))
        settings: dict[str, Any] = {"num_classes": 100, "bank": folder / "bank", "bank_size": 64}
        module_data = MemoryBankDataModule(pictures, image_size=side, batch_size=size.pixel_batch, **settings)
        yield (
            f"pixel DiT, batch {size.pixel_batch}, RegionalCompile, pixels in memory",
            partial(fit_data, module, module_data, size, regional(size), size.pixel_batch),
        )
        side = 8 * size.b4["input_size"]
        module = module_of(network(size.b4), inference_steps=2)
        module.autoencoder = FrozenAutoencoder(str(autoencoder_folder(folder)))
        pictures = ArrayImages(rng.integers(0, 256, (2 * size.batch, side, side, 3), np.uint8))
        settings |= {"bank": folder / "latent_bank", "latent_cache": folder / "latents"}
        latent_data = MemoryBankDataModule(pictures, image_size=side, batch_size=size.batch, **settings)
        yield (
            f"DiT-B/4, batch {size.batch}, RegionalCompile, cached latents",
            partial(fit_data, module, latent_data, size, regional(size), size.batch),
        )


def authors(size: Size) -> Rows:
    """DiT-XL/2 as the authors train it, on cached latents."""
    model = network(size.xl)
    batch, flops = batch_of(model.sample_shape, size.batch), 3 * forward_flops(model) * size.batch
    yield f"batch {size.batch}", partial(bare, model, batch, fewer_steps(size), size.batch, flops, authors=True)


def text(size: Size) -> Rows:
    """Text-to-image."""
    yield from of_pipeline(size, "text-to-image", TextToImageDiffTuningModule)


def controlnet(size: Size) -> Rows:
    """ControlNet."""
    from gpu_pipeline import GreyMaps

    yield from of_pipeline(size, "ControlNet", partial(ControlNetDiffTuningModule, GreyMaps()))


def of_pipeline(size: Size, label: str, make: Callable[..., Any]) -> Rows:
    """Steps on Stable Diffusion 1.5's shapes."""
    from gpu_pipeline import write_pipeline

    count, side = size.text_batch, 8 * size.latent
    with tempfile.TemporaryDirectory() as name:
        folder = write_pipeline(Path(name), size.unet, size.latent, size.context, device())
        module = make(model=folder, optimizer=partial(torch.optim.AdamW, lr=1e-5, fused=True))
        module.configure_model()
        pixels = torch.rand(count - 1, 3, side, side) * 2 - 1
        maps = torch.zeros(count, 1, side, side, dtype=torch.uint8)
        target = {"pixel_values": pixels, "captions": ["a cat"] * len(pixels)}
        if label == "ControlNet":
            target["conditioning_pixel_values"] = maps[1:]
        encoded = module.encode(target)
        retention: dict[str, Tensor] = {
            "latents": torch.randn(1, *module.sample_shape),
            "class_labels": torch.zeros(1, dtype=torch.int64),
            "conditioning_pixel_values": maps[:1],
        }
        encoded |= {"conditioning_pixel_values": maps[1:]}
        batch = {"target": encoded, "retention": retention}
        yield f"{label}, batch {count}", partial(fit, module, batch, size, pictures=count)
        yield (
            f"{label}, batch {count}, cast by autocast",
            partial(fit, module, batch, size, pictures=count, together=False),
        )
        compiled = partial(fit, module, batch, size, regional(size), pictures=count)
        yield f"{label}, batch {count}, RegionalCompile", compiled


# Those that have never been measured come first.
PARTS: dict[str, Callable[[Size], Rows]] = {
    "casts": casts,
    "graphs": graphs,
    "authors": authors,
    "text": text,
    "controlnet": controlnet,
    "data": data,
    "whole": whole,
    "xl": xl,
    "sampling": sampling,
    "profile": profile,
    "small": small,
}
