"""Stable Diffusion 1.x and 2.x, and SDXL: a UNet over latents, conditioned by CLIP's text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_difftune.errors import CheckpointError
from lightning_difftune.models import FrozenTextEncoder
from lightning_difftune.modules.families.text import PipelineText
from lightning_difftune.sampling import NoiseScheduler, Sampler, ddim_for
from lightning_difftune.sampling.schedulers import FEW_STEPS
from lightning_difftune.source import SourceFacts, betas_of

FURTHER_INPUTS = (  # of UNets in other pipelines: upscalers, unCLIP, SDXL, consistency models, IP adapters
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "time_cond_proj_dim",
    "encoder_hid_dim",
)


class StableDiffusion:
    """The family of diffusers' ``StableDiffusionPipeline``, with any prediction type."""

    network_folder = "unet"
    is_autocast_throughout = True

    def network_class(self) -> Any:
        """``UNet2DConditionModel``."""
        from diffusers.models import UNet2DConditionModel

        return UNet2DConditionModel

    def sample_size(self, network: Any) -> int:
        """64 latents per side for 512 px."""
        size: int = network.config.sample_size
        return size

    def open_text(self, model: str | Path, revision: str | None, image_size: int, dtype: torch.dtype) -> Any:
        """CLIP's embeddings; the null condition is the empty prompt's."""
        encoder = FrozenTextEncoder(model, revision)
        if encoder.network.dtype != dtype:  # `plan` has meta tensors, which cannot be cast
            encoder.network.to(dtype)
        return encoder

    def check(self, model: str, network: Any, text: Any, latent_channels: int) -> None:
        """Refuse a UNet with inputs beyond noisy latents and text, such as those of inpainting.

        Raises:
            CheckpointError: If there are any, or the parts are of different pipelines.
        """
        config = network.config
        channels = config.in_channels, config.out_channels
        if channels != (latent_channels, latent_channels):
            raise CheckpointError(
                f"{model}: its UNet takes {channels[0]} channels and returns {channels[1]}, the autoencoder's latents "
                f"have {latent_channels}. UNets that take more than noisy latents, as for inpainting, InstructPix2Pix "
                "and upscalers, are not supported: they would need the other inputs, too."
            )
        further = [name for name in FURTHER_INPUTS if config.get(name) is not None]
        if further:
            raise CheckpointError(
                f"{model}: its UNet takes inputs beyond noisy latents and text ({', '.join(further)}), as those of "
                "upscalers, unCLIP and SDXL do. They are not supported as Stable Diffusion."
            )
        if config.cross_attention_dim != text.shape[1]:
            raise CheckpointError(
                f"{model}: the UNet takes embeddings of width {config.cross_attention_dim}, the text encoder makes "
                f"{text.shape[1]}. The parts are not of one pipeline."
            )

    def unet_inputs(self, condition: dict[str, Tensor]) -> dict[str, Any]:
        """``prompt_embeds`` (B, L, D), as the UNet and its ControlNets take them."""
        return {"encoder_hidden_states": condition["prompt_embeds"]}

    def call(self, network: Any, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Output of the UNet for the inputs of :meth:`unet_inputs`."""
        output: Tensor = network(x_t, t, **self.unet_inputs(condition)).sample
        return output

    def sampler(self) -> Sampler:
        """20 steps of DPM-Solver++ in place of the paper's 50 of DDIM, with guidance 7.5."""
        return Sampler(num_inference_steps=20, guidance_scale=7.5, guidance_channels=None)

    def scheduler(self, source: SourceFacts) -> NoiseScheduler:
        """DPM-Solver++; Euler steps for a UNet that was trained by flow matching."""
        if source.prediction_type == "flow_prediction":
            return ddim_for(source)
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler(**betas_of(source))

    def density(self, scheduler: Mapping[str, Any], num_tokens: int) -> None:
        """Stable Diffusion is trained at uniform timesteps."""

    def is_step_distilled(self, network: Any, scheduler: dict[str, Any]) -> bool:
        """True for Turbo, LCM and the like, by the few-step scheduler that they are published with."""
        kind, spacing = scheduler.get("_class_name"), scheduler.get("timestep_spacing")
        few = kind in FEW_STEPS or (spacing == "trailing" and str(kind).startswith("Euler"))
        return few and scheduler.get("prediction_type", "epsilon") == "epsilon"

    def takes_guidance(self, network: Any) -> bool:
        """False: guidance combines two branches."""
        return False


class StableDiffusionXL(StableDiffusion):
    """The family of diffusers' ``StableDiffusionXLPipeline``.

    Conditions are ``prompt_embeds`` (B, 77, 2048), the penultimate hidden states of both encoders side by side;
    ``pooled_prompt_embeds`` (B, 1280), of the second; and ``time_ids`` (B, 6): the picture's original height and width,
    the top and left of its crop, the height and width to draw. Pictures are squares here, not cropped: (n, n, 0, 0, n,
    n), which is also the pipeline's default.
    """

    def open_text(self, model: str | Path, revision: str | None, image_size: int, dtype: torch.dtype) -> PipelineText:
        """Both encoders; the null condition is zeros if the pipeline forces them, as the published one does."""
        from diffusers import StableDiffusionXLPipeline

        ours, null = partial(encode_sdxl, image_size), partial(encode_sdxl, image_size, prompts=None)
        return PipelineText(StableDiffusionXLPipeline, model, revision, ours, dtype, null)

    def check(self, model: str, network: Any, text: Any, latent_channels: int) -> None:
        """Refuse a UNet with other inputs, such as the refiner's and those of inpainting.

        Raises:
            CheckpointError: If it takes others, or the parts are of different pipelines.
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
        """Text and sizes, as the UNet and its ControlNets take them."""
        added = {"text_embeds": condition["pooled_prompt_embeds"], "time_ids": condition["time_ids"]}
        return {"encoder_hidden_states": condition["prompt_embeds"], "added_cond_kwargs": added}

    def sampler(self) -> Sampler:
        """30 steps with the pipeline's guidance, 5."""
        return Sampler(num_inference_steps=30, guidance_scale=5.0, guidance_channels=None)

    def scheduler(self, source: SourceFacts) -> NoiseScheduler:
        """The published one: Euler steps."""
        from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

        settings = {name: value for name, value in betas_of(source).items() if value is not None}
        spacing = "trailing" if settings.get("rescale_betas_zero_snr") else "leading"
        return EulerDiscreteScheduler(**settings, timestep_spacing=spacing, steps_offset=1)


def encode_sdxl(image_size: int, pipeline: Any, prompts: list[str] | None) -> dict[str, Tensor]:
    """The conditions of B prompts; ``None`` is the pipeline's null condition: zeros, or the empty prompt's."""
    device, is_null = pipeline.text_encoder_2.device, prompts is None
    embeds, negative_embeds, pooled, negative_pooled = pipeline.encode_prompt(
        prompts or [""], device=device, do_classifier_free_guidance=is_null
    )
    if is_null:
        embeds, pooled = negative_embeds, negative_pooled
    n = float(image_size)
    sizes = torch.tensor([n, n, 0, 0, n, n], device=pooled.device).expand(len(pooled), 6)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "time_ids": sizes}
