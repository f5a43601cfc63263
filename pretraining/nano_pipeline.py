"""``python -m pretraining.nano_pipeline``: a text-to-image pipeline for 32 px, up to its pre-training.

It has the parts, the file layout and the noise schedule of Stable Diffusion 1.5 at a hundredth of its size, so that
the same configs train both: a CLIP tokenizer and text encoder, a UNet with cross-attention, a KL autoencoder. The
autoencoder is trained here. The UNet is random, and pre-trained later. The text encoder stays random: it only has to
distinguish captions, and the UNet learns what they mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from lightning_difftune.data import ImageTargets, NpzImages
from lightning_difftune.data.source_facts import class_names_of
from lightning_difftune.errors import DataError
from lightning_difftune.models.frozen import DEFAULT_PROMPT
from pretraining.nano_autoencoder import new_autoencoder, peak_signal_to_noise, train_autoencoder

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

IMAGE_SIZE = 32
MAX_TOKENS = 16  # with the start and the end of the text
CAPTIONS = ("a photo of a {}", "a high-quality, detailed photo of a {}")
PROMPTS = (DEFAULT_PROMPT, "a flower")  # without a name


def new_tokenizer(names: Sequence[str], captions: Sequence[str] = CAPTIONS) -> CLIPTokenizer:
    """A byte-level BPE tokenizer that has every word of the captions as one token, and any other word in pieces.

    Args:
        names: What the pictures show, such as ``"tiger lily"``.
        captions: Templates with one ``{}`` for the name.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    texts = [caption.format(name) for caption in captions for name in names]
    # More room than the words need: merges end when each word is whole.
    trained = CLIPTokenizer().train_new_from_iterator([*texts, *PROMPTS], vocab_size=8192, show_progress=False)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    vocabulary: dict[str, int] = model["vocab"]
    for byte in sorted(ByteLevel.alphabet()):  # the trainer knows each byte within a word, but few at its end
        vocabulary.setdefault(byte + model["end_of_word_suffix"], len(vocabulary))
    merges: list[Any] = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocabulary, merges, model_max_length=MAX_TOKENS)


def new_text_encoder(tokenizer: CLIPTokenizer, seed: int = 0) -> CLIPTextModel:
    """A random CLIP text encoder of 0.1 M parameters: tokens (B, 16) to embeddings (B, 16, 64)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # CLIP's initial 0.02 is for training. Without any, the words would drown in what attention averages over them.
    table = encoder.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    torch.nn.init.normal_(table)
    return encoder.eval().requires_grad_(False)


def new_unet(seed: int = 0) -> UNet2DConditionModel:
    """An untrained UNet of 6.6 M parameters: noise (B, 4, 16, 16) from latents, timesteps and text (B, n, 64)."""
    from diffusers.models import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=(2, 4, 4),  # the number of heads, despite its name: diffusers keeps an old mistake
        norm_num_groups=32,
    )


def assemble(tokenizer: CLIPTokenizer, autoencoder: AutoencoderKL, seed: int = 0) -> StableDiffusionPipeline:
    """The pipeline, with a random UNet and text encoder and Stable Diffusion's noise schedule."""
    from diffusers import DDIMScheduler
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,  # latents are not bounded
    )
    parts: dict[str, Any] = {
        "vae": autoencoder,
        "text_encoder": new_text_encoder(tokenizer, seed),
        "tokenizer": tokenizer,
        "unet": new_unet(seed),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
    }
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def save_half(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write a pipeline with UNet and autoencoder in half precision, which diffusers casts up when it opens them.

    The text encoder stays in single precision: transformers would open it in half, and the pipeline would not run.

    Args:
        pipeline: In single precision; afterwards as well, with the rounded weights that the files hold.
        folder: Folder of the parts and of ``model_index.json``.
    """
    networks = [pipeline.components[name] for name in ("unet", "vae")]
    for network in networks:
        network.half()
    pipeline.save_pretrained(folder)
    for network in networks:
        network.float()


def flowers(options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The largest official part (6,149 pictures), for training, and the other two (2,040)."""
    if options.npz is not None:
        return NpzImages(options.npz, "train"), NpzImages(options.npz, "test")
    from torchvision.datasets import Flowers102

    train, *rest = (Flowers102(options.torchvision, part, download=True) for part in ("test", "train", "val"))
    return train, ConcatDataset(rest)


def pixels(source: Dataset) -> Tensor:
    """All pictures of a source, (N, 3, 32, 32) uint8."""
    targets = ImageTargets(source, IMAGE_SIZE)
    return targets.uint8(range(len(targets)))


def main(argv: Sequence[str] | None = None) -> None:
    """Train the autoencoder, print its error on held-out pictures, and write the pipeline folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--npz", type=Path, help="file of pictures as NpzImages reads them, with splits train and test")
    source.add_argument("--torchvision", type=Path, help="folder of torchvision's Flowers102, downloaded if missing")
    parser.add_argument("--output", type=Path, required=True, help="the pipeline's folder")
    parser.add_argument("--steps", type=int, default=5000, help="of 32 pictures: 20 minutes for 5,000 on one core")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    train, held_out = flowers(options)
    names = class_names_of(train)
    if names is None:
        raise DataError("the pictures come without names of their classes, which the captions are made of; add them.")
    autoencoder = new_autoencoder(options.seed)
    train_autoencoder(
        autoencoder,
        pixels(train),
        options.steps,
        options.seed,
        checkpoint=lambda step: autoencoder.save_pretrained(options.output / "vae"),
    )
    print(f"PSNR on held-out pictures: {peak_signal_to_noise(autoencoder, pixels(held_out)):.1f} dB")
    save_half(assemble(new_tokenizer(names), autoencoder, options.seed), options.output)


if __name__ == "__main__":
    main()
