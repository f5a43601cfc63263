"""Tiny text-to-image pipelines with random weights, one per family, saved as folders."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import tiny_autoencoder

from lightning_difftune import MemoryBankDataModule, TextToImageDiffTuningModule

FAMILIES = ("sdxl", "flux", "sd3")  # each has a function here that makes its pipeline
PROMPTS = ["a cat", "grey dog", "red"]
ATTENTION = ("to_q", "to_v")


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=12)


def clip_encoder(projects: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=len(tokenizer),
        max_position_embeddings=12,
        projection_dim=32,
        hidden_act="gelu",
        **ids,
    )
    encoder: Any = (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)
    return encoder


def t5(width: int = 32) -> tuple[Any, Any]:
    import transformers
    from transformers import T5Config, T5EncoderModel

    kind: Any = transformers
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary += [(letter, -3.0) for letter in string.ascii_lowercase]
    tokenizer = kind.T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        feed_forward_proj="gated-gelu",
    )
    encoder = T5EncoderModel(config)
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)
    return encoder, tokenizer


def autoencoder(**settings: Any) -> Any:
    return tiny_autoencoder(4, 8, norm_num_groups=1, sample_size=32, **settings)


def stable_diffusion(folder: Path) -> Path:
    """Stable Diffusion 1.x: pictures of 16 px, latents (4, 8, 8), text (8, 16)."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = ["a photo of a cat", "a photo of a dog", "grey", "a high-quality, detailed, and professional image"]
    tokenizer: Any = CLIPTokenizer().train_new_from_iterator(words, vocab_size=600, show_progress=False)
    tokenizer.model_max_length = 8
    text_encoder: Any = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight)
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline: Any = StableDiffusionPipeline(
        vae=tiny_autoencoder(8, 8, sample_size=16, scaling_factor=0.5),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def sdxl(folder: Path, forces_zeros: bool = True) -> Path:
    """Pictures of 32 px, latents (4, 16, 16)."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=1,
    )
    pipeline: Any = StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip_encoder(projects=False),
        text_encoder_2=clip_encoder(projects=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        force_zeros_for_empty_prompt=forces_zeros,
    )
    pipeline.save_pretrained(folder)
    return folder


def flux_transformer(guidance_embeds: bool) -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )


def flux(folder: Path, is_schnell: bool = False) -> Path:
    """Pictures of 32 px, latents (4, 16, 16)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    torch.manual_seed(0)
    transformer = flux_transformer(guidance_embeds=not is_schnell)
    encoder, tokenizer = t5()
    shift: dict[str, Any] = {"shift": 1.0} if is_schnell else {"shift": 3.0, "use_dynamic_shifting": True}
    pipeline: Any = FluxPipeline(
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(projects=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
    )
    pipeline.save_pretrained(folder)
    return folder


def sd3(folder: Path) -> Path:
    """Pictures of 32 px, latents (4, 16, 16)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    encoder, tokenizer = t5(64)
    pipeline: Any = StableDiffusion3Pipeline(
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(projects=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(projects=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.save_pretrained(folder)
    return folder


def module_of(folder: str, **settings: Any) -> TextToImageDiffTuningModule:
    defaults = {"image_size": 32, "prompts": PROMPTS, "bank_prompts": PROMPTS[:2]}
    return TextToImageDiffTuningModule(folder, **{**defaults, **settings})


def built(folder: str, **settings: Any) -> TextToImageDiffTuningModule:
    module = module_of(folder, **settings)
    module.configure_model()
    return module.eval()


def pipeline_of(folder: str) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def data_of(tmp_path: Path, **settings: Any) -> MemoryBankDataModule:
    rng = np.random.default_rng(0)
    source: Any = [(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), PROMPTS[i % 3]) for i in range(6)]
    defaults = {"bank": tmp_path / "bank", "bank_size": 4, "batch_size": 5, "image_size": 32}
    return MemoryBankDataModule(source, **{**defaults, **settings})
