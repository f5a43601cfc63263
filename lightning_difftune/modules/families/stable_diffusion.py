"""Stable Diffusion 1.x and 2.x: a UNet over latents, conditioned by one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_difftune.errors import CheckpointError
from lightning_difftune.models import FrozenTextEncoder
from lightning_difftune.sampling import NoiseScheduler, Sampler, ddim_for
from lightning_difftune.source import SourceFacts, betas_of

FURTHER_INPUTS = (  # of other pipelines' UNets: upscalers, unCLIP, SDXL, consistency models, IP adapters
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "time_cond_proj_dim",
    "encoder_hid_dim",
)


class StableDiffusion:
    """The family of diffusers' ``StableDiffusionPipeline``, whatever it predicts."""

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

    def open_text(
        self, model: str | Path, revision: str | None, image_size: int, dtype: torch.dtype
    ) -> FrozenTextEncoder:
        """CLIP's embeddings; the null condition is the empty prompt's."""
        encoder = FrozenTextEncoder(model, revision)
        if encoder.network.dtype != dtype:  # without values, as plan has it, nothing can be cast
            encoder.network.to(dtype)
        return encoder

    def check(self, model: str, network: Any, text: FrozenTextEncoder, latent_channels: int) -> None:
        """Refuse a UNet with inputs beyond noisy latents and text, such as those of inpainting.

        Raises:
            CheckpointError: If there are any, or the parts are of several pipelines.
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
        """``prompt_embeds`` (B, L, D), as the UNet and a ControlNet beside it take them."""
        return {"encoder_hidden_states": condition["prompt_embeds"]}

    def call(self, network: Any, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The UNet under text."""
        output: Tensor = network(x_t, t, **self.unet_inputs(condition)).sample
        return output

    def sampler(self) -> Sampler:
        """20 steps of DPM-Solver++, which stand for the 50 of DDIM that the paper has, with guidance 7.5."""
        return Sampler(num_inference_steps=20, guidance_scale=7.5, guidance_channels=None)

    def scheduler(self, source: SourceFacts) -> NoiseScheduler:
        """DPM-Solver++; Euler steps for a UNet that was trained by flow matching."""
        if source.prediction_type == "flow_prediction":
            return ddim_for(source)
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler(**betas_of(source))

    def density(self, num_tokens: int) -> None:
        """Stable Diffusion is trained at uniform timesteps."""

    def is_step_distilled(self, network: Any, scheduler: dict[str, Any]) -> bool:
        """Turbo, LCM and the like, by the few-step scheduler that they are published with."""
        return has_few_steps(scheduler)

    def takes_guidance(self, network: Any) -> bool:
        """No: guidance is between two branches."""
        return False


def has_few_steps(scheduler: Mapping[str, Any]) -> bool:
    """Whether a published scheduler is one for a few steps of a network that predicts noise."""
    kind, spacing = scheduler.get("_class_name"), scheduler.get("timestep_spacing")
    few = kind in ("LCMScheduler", "TCDScheduler") or (spacing == "trailing" and str(kind).startswith("Euler"))
    return few and scheduler.get("prediction_type", "epsilon") == "epsilon"


FAMILY = StableDiffusion()
