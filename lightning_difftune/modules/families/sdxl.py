"""Stable Diffusion XL: a UNet over latents, conditioned by two CLIP text encoders, a pooled one, and sizes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_difftune.errors import CheckpointError
from lightning_difftune.modules.families.stable_diffusion import FURTHER_INPUTS, has_few_steps
from lightning_difftune.modules.families.text import PipelineText
from lightning_difftune.sampling import NoiseScheduler, Sampler
from lightning_difftune.source import SourceFacts, betas_of


class StableDiffusionXL:
    """The family of diffusers' ``StableDiffusionXLPipeline``.

    Conditions are ``prompt_embeds`` (B, 77, 2048), the last hidden states but one of both encoders side by side;
    ``pooled_prompt_embeds`` (B, 1280), of the second; and ``time_ids`` (B, 6): the picture's original height and width,
    the top and left of its crop, the height and width to draw. Pictures are squares here, not cropped: (n, n, 0, 0, n,
    n), which is also what the pipeline is asked by default.
    """

    network_folder = "unet"
    is_autocast_throughout = True

    def network_class(self) -> Any:
        """``UNet2DConditionModel``."""
        from diffusers.models import UNet2DConditionModel

        return UNet2DConditionModel

    def sample_size(self, network: Any) -> int:
        """128 latents per side."""
        size: int = network.config.sample_size
        return size

    def open_text(self, model: str | Path, revision: str | None, image_size: int, dtype: torch.dtype) -> PipelineText:
        """Both encoders; the null condition is zeros where the pipeline forces them, as the published one does."""
        from diffusers import StableDiffusionXLPipeline

        return PipelineText(
            StableDiffusionXLPipeline, model, revision, partial(encode, image_size), partial(null, image_size), dtype
        )

    def check(self, model: str, network: Any, text: PipelineText, latent_channels: int) -> None:
        """Refuse a UNet with other inputs, such as the refiner's and those of inpainting.

        Raises:
            CheckpointError: If it takes others, or the parts are of several pipelines.
        """
        config = network.config
        widths = [encoder.config.hidden_size for encoder in text.network]
        found = config.in_channels, config.out_channels, config.addition_embed_type, config.cross_attention_dim
        wanted = latent_channels, latent_channels, "text_time", sum(widths)
        inputs = config.projection_class_embeddings_input_dim
        pooled = 6 * config.addition_time_embed_dim + text.network[-1].config.projection_dim
        if found != wanted or inputs != pooled or len(widths) != 2:
            raise CheckpointError(
                f"{model}: its UNet has input and output channels, further inputs and text width {found} with {inputs} "
                f"numbers of text and size; SDXL's text encoders and autoencoder go with {wanted} and {pooled}. The "
                "refiner and pipelines for inpainting are not supported."
            )
        further = [name for name in FURTHER_INPUTS if name != "addition_embed_type" and config.get(name) is not None]
        if further:
            raise CheckpointError(
                f"{model}: its UNet takes inputs beyond noisy latents, text and sizes ({', '.join(further)}), as those "
                "of consistency models (LCM) and IP adapters do. They are not supported."
            )

    def unet_inputs(self, condition: dict[str, Tensor]) -> dict[str, Any]:
        """Text and sizes, as the UNet and a ControlNet beside it take them."""
        added = {"text_embeds": condition["pooled_prompt_embeds"], "time_ids": condition["time_ids"]}
        return {"encoder_hidden_states": condition["prompt_embeds"], "added_cond_kwargs": added}

    def call(self, network: Any, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The UNet under text and sizes."""
        output: Tensor = network(x_t, t, **self.unet_inputs(condition)).sample
        return output

    def sampler(self) -> Sampler:
        """30 steps with guidance 5, which is the pipeline's."""
        return Sampler(num_inference_steps=30, guidance_scale=5.0, guidance_channels=None)

    def scheduler(self, source: SourceFacts) -> NoiseScheduler:
        """Euler's steps, with which SDXL is published."""
        from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

        settings = {name: value for name, value in betas_of(source).items() if value is not None}
        spacing = "trailing" if settings.get("rescale_betas_zero_snr") else "leading"
        return EulerDiscreteScheduler(**settings, timestep_spacing=spacing, steps_offset=1)

    def density(self, num_tokens: int) -> None:
        """SDXL is trained at uniform timesteps."""

    def is_step_distilled(self, network: Any, scheduler: dict[str, Any]) -> bool:
        """Turbo, LCM and the like, by the few-step scheduler that they are published with."""
        return has_few_steps(scheduler)

    def takes_guidance(self, network: Any) -> bool:
        """No: guidance is between two branches."""
        return False


def encode(image_size: int, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    """The conditions of B prompts."""
    device = pipeline.text_encoder_2.device
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "time_ids": sizes(image_size, pooled)}


def null(image_size: int, pipeline: Any) -> dict[str, Tensor]:
    """The pipeline's own negative: zeros, or the empty prompt's embeddings."""
    device = pipeline.text_encoder_2.device
    _, embeds, _, pooled = pipeline.encode_prompt([""], device=device, do_classifier_free_guidance=True)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "time_ids": sizes(image_size, pooled)}


def sizes(image_size: int, pooled: Tensor) -> Tensor:
    """(B, 6) for pooled embeddings (B, D)."""
    n = float(image_size)
    return torch.tensor([n, n, 0, 0, n, n], device=pooled.device).expand(len(pooled), 6)


FAMILY = StableDiffusionXL()
