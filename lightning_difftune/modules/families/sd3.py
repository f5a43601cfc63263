"""Stable Diffusion 3 and 3.5: a transformer by flow matching, with two CLIP text encoders and T5's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_difftune.densities import Uniform
from lightning_difftune.errors import CheckpointError
from lightning_difftune.modules.families.text import PipelineText
from lightning_difftune.sampling import NoiseScheduler, Sampler
from lightning_difftune.source import SourceFacts, scheduler_from


class StableDiffusion3:
    """The family of diffusers' ``StableDiffusion3Pipeline``.

    Conditions are ``prompt_embeds`` (B, 333, 4096), both CLIPs' padded to T5's width and T5's behind them; and
    ``pooled_prompt_embeds`` (B, 2048). The null condition is the empty prompt's.
    """

    network_folder = "transformer"
    is_autocast_throughout = True

    def network_class(self) -> Any:
        """``SD3Transformer2DModel``."""
        from diffusers.models import SD3Transformer2DModel

        return SD3Transformer2DModel

    def sample_size(self, network: Any) -> int:
        """128 latents per side."""
        size: int = network.config.sample_size
        return size

    def open_text(self, model: str | Path, revision: str | None, image_size: int, dtype: torch.dtype) -> PipelineText:
        """The three encoders; without T5's its part is zeros, as in the pipeline."""
        from diffusers import StableDiffusion3Pipeline

        return PipelineText(
            StableDiffusion3Pipeline, model, revision, encode, lambda pipeline: encode(pipeline, [""]), dtype
        )

    def check(self, model: str, network: Any, text: PipelineText, latent_channels: int) -> None:
        """Refuse parts of several pipelines.

        Raises:
            CheckpointError: If they are.
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
        """28 steps with guidance 7, as the pipeline has."""
        return Sampler(num_inference_steps=28, guidance_scale=7.0, guidance_channels=None)

    def scheduler(self, source: SourceFacts) -> NoiseScheduler:
        """The published one: Euler's steps over a shifted grid."""
        config = dict(source.scheduler or {})
        scheduler: NoiseScheduler = scheduler_from(str(config["_class_name"]), config)
        return scheduler

    def density(self, num_tokens: int) -> Uniform:
        """Uniform over the grid that sampling has: shift 3."""
        return Uniform(3.0)

    def is_step_distilled(self, network: Any, scheduler: dict[str, Any]) -> bool:
        """Not told by these; Turbo's transformer and scheduler are as the others', and only its name differs."""
        return False

    def takes_guidance(self, network: Any) -> bool:
        """No: guidance is between two branches."""
        return False


def encode(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    """The conditions of B prompts."""
    device = pipeline.text_encoder.device
    given: dict[str, Any] = {"prompt_2": prompts, "prompt_3": prompts, "device": device}
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, **given, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


FAMILY = StableDiffusion3()
