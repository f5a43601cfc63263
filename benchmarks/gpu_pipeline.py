"""A Stable Diffusion pipeline with random weights, for gpu.py: the UNet at any size, the frozen parts small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_pipeline(folder: Path, unet: dict[str, Any], latent: int, context: int, device: str) -> str:
    """Save the pipeline; the UNet has Stable Diffusion 1.5's sizes unless ``unet`` overrides them.

    Args:
        folder: The folder to write.
        unet: Arguments of diffusers' ``UNet2DConditionModel``.
        latent: Side of the latents.
        context: Width of the text embeddings.
        device: Device that draws the weights.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = ["a photo of a cat", "a high-quality, detailed, and professional image"]
    tokenizer = CLIPTokenizer().train_new_from_iterator(words, vocab_size=600, show_progress=False)
    tokenizer.model_max_length = 77
    settings: dict[str, Any] = {
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "hidden_size": context,
        "intermediate_size": context,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    with torch.device(device):
        network: Any = UNet2DConditionModel(sample_size=latent, cross_attention_dim=context, **unet)
    pipeline: Any = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8,) * 4,
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=4,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **settings)),
        tokenizer=tokenizer,
        unet=network.half().cpu(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return str(folder / "pipeline")


class GreyMaps:
    """Control maps that cost nothing: the pictures' first channel."""

    channels = 1

    def __call__(self, pictures: Tensor, /) -> Any:
        """Pictures (B, 3, H, W) uint8 => maps (B, 1, H, W) uint8."""
        return pictures[:, :1]

    def identity(self) -> str:
        """The name."""
        return "grey"
