"""The autoencoder of the small text-to-image pipeline that :mod:`pretraining.nano_pipeline` writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_difftune.pictures import to_pixel_values

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL

BATCH_SIZE = 32
LEARNING_RATE = 2e-3
# Large against Stable Diffusion's: latents near unit normal are what a network of a few million parameters can learn.
KL_WEIGHT = 5e-4
# Edges are what a ControlNet is later judged by, and pictures of 32 pixels have few pixels to a stroke.
GRADIENT_WEIGHT = 0.5


def new_autoencoder(seed: int = 0) -> AutoencoderKL:
    """An untrained autoencoder, 0.5 M parameters: pictures (B, 3, H, W) to latents (B, 4, H / 2, W / 2)."""
    from diffusers.models import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=32,
    )


def train_autoencoder(
    autoencoder: AutoencoderKL,
    images: Tensor,
    steps: int,
    seed: int = 0,
    checkpoint: Callable[[int], None] | None = None,
    checkpoint_every: int = 2000,
) -> list[float]:
    """Train in place on pictures and their mirror images, and set the scaling factor.

    Args:
        autoencoder: The autoencoder; in eval mode afterwards.
        images: (N, 3, H, W) uint8.
        steps: Steps of 32 pictures.
        seed: Seed of the choice of pictures, mirror images and latents.
        checkpoint: Called with the number of finished steps, every ``checkpoint_every`` steps and at the end, with the
            scaling factor set.
        checkpoint_every: Steps between two calls.

    Returns:
        The loss of every step.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    autoencoder.train()
    losses: list[float] = []
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        mirrored = torch.rand(BATCH_SIZE, 1, 1, 1, generator=generator) < 0.5
        pixel_values = to_pixel_values(images[chosen])
        pixel_values = torch.where(mirrored, pixel_values.flip(-1), pixel_values)
        with torch.autocast("cpu", torch.bfloat16):  # 1.5 times as fast on one core, but not with channels_last
            posterior = autoencoder.encode(pixel_values).latent_dist
            reconstruction = autoencoder.decode(posterior.sample(generator)).sample.float()
        loss = reconstruction_loss(reconstruction, pixel_values)
        loss = loss + KL_WEIGHT * posterior.kl().float().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 200 == 0:
            print(f"step {step} of {steps}: loss {sum(losses[-200:]) / 200:.4f}", flush=True)
        if step == steps or step % checkpoint_every == 0:
            autoencoder.eval()
            autoencoder.register_to_config(scaling_factor=unit_variance_scale(autoencoder, images))
            if checkpoint is not None:
                checkpoint(step)
            autoencoder.train()
    autoencoder.eval()
    return losses


def reconstruction_loss(reconstruction: Tensor, pixel_values: Tensor) -> Tensor:
    """L1 + MSE of pixels (B, C, H, W), and L1 of the differences between neighbours; means over all entries."""
    error = reconstruction - pixel_values
    slopes = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + GRADIENT_WEIGHT * slopes


@torch.no_grad()
def unit_variance_scale(autoencoder: AutoencoderKL, images: Tensor) -> float:
    """1 / standard deviation of the latents of pictures (N, 3, H, W) uint8, diffusers' ``scaling_factor``."""
    count, total, squares = 0, 0.0, 0.0
    for batch in images.split(256):
        posterior = autoencoder.encode(to_pixel_values(batch)).latent_dist
        count += posterior.mean.numel()
        total += posterior.mean.sum().item()
        squares += (posterior.mean.square() + posterior.var).sum().item()
    return 1 / math.sqrt(squares / count - (total / count) ** 2)


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) uint8 => pixel values (N, 3, H, W) in [-1, 1] after encoding (to the mean) and decoding."""
    parts = [
        autoencoder.decode(autoencoder.encode(to_pixel_values(batch)).latent_dist.mode()).sample
        for batch in images.split(256)
    ]
    return torch.cat(parts).clamp(-1, 1)


def peak_signal_to_noise(autoencoder: AutoencoderKL, images: Tensor) -> float:
    """Mean PSNR in dB of reconstructions of pictures (N, 3, H, W) uint8."""
    errors = (reconstruct(autoencoder, images) - to_pixel_values(images)).square().mean(dim=(1, 2, 3))
    return float((10 * (4 / errors).log10()).mean())  # the range of [-1, 1] is 2
