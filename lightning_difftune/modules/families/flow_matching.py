"""Flow-matching transformers: Stable Diffusion 3 and 3.5, and FLUX.1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_difftune.densities import Uniform
from lightning_difftune.errors import CheckpointError
from lightning_difftune.modules.families.text import PipelineText
from lightning_difftune.sampling import NoiseScheduler, Sampler
from lightning_difftune.sampling.schedulers import grid_shift
from lightning_difftune.source import SourceFacts, scheduler_from

T5_TOKENS = 512  # of FLUX's prompts


class StableDiffusion3:
    """The family of diffusers' ``StableDiffusion3Pipeline``.

    Conditions are ``prompt_embeds`` (B, 333, 4096), both CLIPs' embeddings padded to T5's width followed by T5's; and
    ``pooled_prompt_embeds`` (B, 2048). The null condition is the empty prompt's.
    """

    network_folder = "transformer"
    is_autocast_throughout = True
    patch_size = 2

    def network_class(self) -> Any:
        """``SD3Transformer2DModel``."""
        from diffusers.models import SD3Transformer2DModel

        return SD3Transformer2DModel

    def sample_size(self, network: Any) -> int:
        """128 latents per side."""
        size: int = network.config.sample_size
        return size

    def open_text(self, model: str | Path, revision: str | None, image_size: int, dtype: torch.dtype) -> PipelineText:
        """The three encoders; without T5, its part is zeros, as in the pipeline."""
        from diffusers import StableDiffusion3Pipeline

        return PipelineText(StableDiffusion3Pipeline, model, revision, encode_sd3, dtype)

    def check(self, model: str, network: Any, text: PipelineText, latent_channels: int) -> None:
        """Refuse parts of different pipelines.

        Raises:
            CheckpointError: If they do not fit.
        """
        config, encoders = network.config, text.network
        found = config.in_channels, config.out_channels, config.pooled_projection_dim
        wanted = latent_channels, latent_channels, sum(encoder.config.projection_dim for encoder in encoders[:2])
        if found != wanted or any(e.config.d_model != config.joint_attention_dim for e in encoders[2:]):
            raise CheckpointError(
                f"{model}: its transformer has input and output channels and a pooled width of {found}; autoencoder "
                f"and text encoders make {wanted}. The parts are not of one pipeline."
            )

    def call(self, network: Any, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Velocity noise - x0 at 1000 s = t + 1."""
        output: Tensor = network(
            hidden_states=x_t,
            timestep=(t + 1).float(),
            encoder_hidden_states=condition["prompt_embeds"],
            pooled_projections=condition["pooled_prompt_embeds"],
        ).sample
        return output

    def sampler(self) -> Sampler:
        """28 steps with guidance 7, the pipeline's defaults."""
        return Sampler(num_inference_steps=28, guidance_scale=7.0, guidance_channels=None)

    def scheduler(self, source: SourceFacts) -> NoiseScheduler:
        """The published one: Euler steps over a shifted grid."""
        config = dict(source.scheduler or {})
        scheduler: NoiseScheduler = scheduler_from(str(config["_class_name"]), config)
        return scheduler

    def density(self, scheduler: Mapping[str, Any], num_tokens: int) -> Uniform:
        """Uniform over the grid of sampling, whose shift is 3 in the published pipelines."""
        return Uniform(grid_shift(scheduler, num_tokens))

    def is_step_distilled(self, network: Any, scheduler: dict[str, Any]) -> bool:
        """False: Turbo has the same transformer and scheduler as the others, and differs only by name."""
        return False

    def takes_guidance(self, network: Any) -> bool:
        """False: guidance combines two branches."""
        return False


def encode_sd3(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    """The conditions of B prompts."""
    device = pipeline.text_encoder.device
    given: dict[str, Any] = {"prompt_2": prompts, "prompt_3": prompts, "device": device}
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, **given, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


class Flux:
    """The family of diffusers' ``FluxPipeline``.

    Conditions are ``prompt_embeds`` (B, 512, 4096) of T5, ``pooled_prompt_embeds`` (B, 768) of CLIP and, where the
    network is guidance-distilled, ``guidance`` (B,). Sampling has no unconditional branch, so the bank is drawn and
    retained under captions.
    """

    network_folder = "transformer"
    is_autocast_throughout = True
    patch_size = 2

    def network_class(self) -> Any:
        """``FluxTransformer2DModel``."""
        from diffusers.models import FluxTransformer2DModel

        return FluxTransformer2DModel

    def sample_size(self, network: Any) -> int:
        """128 latents per side: pictures of 1024 px."""
        return 128

    def open_text(self, model: str | Path, revision: str | None, image_size: int, dtype: torch.dtype) -> PipelineText:
        """CLIP and T5; the null condition is the empty prompt's."""
        from diffusers import FluxPipeline

        return PipelineText(FluxPipeline, model, revision, encode_flux, dtype)

    def check(self, model: str, network: Any, text: PipelineText, latent_channels: int) -> None:
        """Refuse a transformer with other inputs, such as Fill's, Depth's and Canny's.

        Raises:
            CheckpointError: If it takes others, or the parts are of different pipelines.
        """
        config = network.config
        clip, t5 = text.network
        found = config.in_channels, config.joint_attention_dim, config.pooled_projection_dim
        wanted = 4 * latent_channels, t5.config.d_model, clip.config.hidden_size
        if found != wanted or (config.out_channels or config.in_channels) != config.in_channels:
            raise CheckpointError(
                f"{model}: its transformer takes latents, text and pooled text of widths {found}; the autoencoder and "
                f"text encoders make {wanted}. FLUX.1 Fill, Depth and Canny take more than noisy latents and are not "
                "supported."
            )

    def call(self, network: Any, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Velocity noise - x0 at s = (t + 1) / T; each 2 x 2 latents are one token of 4c channels."""
        batch, channels, height, width = x_t.shape
        rows, columns = height // 2, width // 2
        tokens = x_t.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        ids = torch.zeros(rows, columns, 3, device=x_t.device)
        ids[..., 1] += torch.arange(rows, device=x_t.device)[:, None]
        ids[..., 2] += torch.arange(columns, device=x_t.device)
        text = condition["prompt_embeds"]
        output: Tensor = network(
            hidden_states=tokens.reshape(batch, rows * columns, 4 * channels),
            timestep=((t + 1).float() / 1000).to(x_t.dtype),  # the network multiplies by 1000 again
            guidance=condition.get("guidance"),
            pooled_projections=condition["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device),
            img_ids=ids.view(rows * columns, 3),
        ).sample
        output = output.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return output.reshape(x_t.shape)

    def sampler(self) -> Sampler:
        """28 steps, without guidance between two branches."""
        return Sampler(num_inference_steps=28, guidance_scale=1.0, guidance_channels=None)

    def scheduler(self, source: SourceFacts) -> NoiseScheduler:
        """The published one: Euler steps from sigma = 1 to 1/N, shifted by the picture's size except for schnell."""
        config = dict(source.scheduler or {})
        if not config.get("use_dynamic_shifting", False):  # the same shift at each size, over the same grid
            shift = math.log(config.get("shift", 1.0))
            config |= {"use_dynamic_shifting": True, "base_shift": shift, "max_shift": shift}
        scheduler: NoiseScheduler = scheduler_from(str(config["_class_name"]), config)
        return scheduler

    def density(self, scheduler: Mapping[str, Any], num_tokens: int) -> Uniform:
        """Uniform over the grid of sampling: shift exp(mu), mu 0.5 at 256 tokens, 1.15 at 4096; 1 for schnell."""
        return Uniform(grid_shift(scheduler, num_tokens))

    def is_step_distilled(self, network: Any, scheduler: dict[str, Any]) -> bool:
        """True for schnell: no guidance number, and a grid without a shift by size."""
        return not network.config.guidance_embeds and not scheduler.get("use_dynamic_shifting", False)

    def takes_guidance(self, network: Any) -> bool:
        """Whether it is guidance-distilled: dev and Krea are, schnell is not."""
        return bool(network.config.guidance_embeds)


def encode_flux(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    """The conditions of B prompts."""
    device = pipeline.text_encoder.device
    embeds, pooled, _ = pipeline.encode_prompt(prompts, device=device, max_sequence_length=T5_TOKENS)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
