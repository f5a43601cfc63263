"""Published models by their shapes alone, so that a plan needs neither their weights nor a connection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import swap_tensors

from lightning_difftune.cli.plan.probe import without_values
from lightning_difftune.models import checkpoints, hub
from lightning_difftune.models.dit import SIZES, DiT

WEIGHTS = "DiT.safetensors"  # stands for a DiT's file; holds its architecture
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}
_SD15_UNET = {  # all else is the class's default
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SDXL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_CLIP_L = {
    "model_type": "clip_text_model",
    "architectures": ["CLIPTextModel"],
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
_CLIP_BIGG = {
    **_CLIP_L,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


_T5_XXL = {
    "model_type": "t5",
    "architectures": ["T5EncoderModel"],
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_FLUX_TRANSFORMER = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}  # all else is the default
_SD35_TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "attention_head_dim": 64,
    "qk_norm": "rms_norm",
}
_SD35_SIZES: dict[str, dict[str, Any]] = {
    "medium": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
    | {"dual_attention_layers": list(range(13))},
    "large": {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192},
}
_VAE_16 = {**_VAE, "sample_size": 1024, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


def published(name: str) -> dict[str, dict[str, Any]] | None:
    """JSON files of a published model by their paths in its repository; None where its shapes are not known here.

    Example:
        >>> sorted(published("stabilityai/sd-vae-ft-ema")), published("somebody/else")
        (['config.json'], None)
    """
    owner, _, model = name.partition("/")
    noise = {**_BETAS, "prediction_type": "epsilon"}
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    if name in ("facebook/DiT-XL-2-256", "facebook/DiT-XL-2-512"):
        sizes = dict(zip(("hidden_size", "depth", "num_heads"), SIZES["XL"], strict=True))
        return {WEIGHTS: {"input_size": 32 if name.endswith("256") else 64, "patch_size": 2, "in_channels": 4, **sizes}}
    if name in ("stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-mse"):
        return {"config.json": _VAE}
    if name in ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"):
        return pipeline(
            {"_class_name": "StableDiffusionPipeline"},
            {**noise, "_class_name": "DDIMScheduler"},
            unet=_SD15_UNET,
            vae={**_VAE, "sample_size": 512},
            text_encoder=_CLIP_L,
        )
    if name == "stabilityai/stable-diffusion-xl-base-1.0":
        return pipeline(
            {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
            {**noise, "_class_name": "EulerDiscreteScheduler"},
            unet=_SDXL_UNET,
            vae={**_VAE, "sample_size": 1024, "scaling_factor": 0.13025},
            text_encoder=_CLIP_L,
            text_encoder_2=_CLIP_BIGG,
        )
    if owner == "black-forest-labs" and model in ("FLUX.1-dev", "FLUX.1-Krea-dev"):
        return pipeline(
            {"_class_name": "FluxPipeline"},
            {**flow, "use_dynamic_shifting": True},
            transformer=_FLUX_TRANSFORMER,
            vae={**_VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
            text_encoder=_CLIP_L,
            text_encoder_2=_T5_XXL,
        )
    if owner == "stabilityai" and (size := model.removeprefix("stable-diffusion-3.5-")) in _SD35_SIZES:
        return pipeline(
            {"_class_name": "StableDiffusion3Pipeline"},
            flow,
            transformer={**_SD35_TRANSFORMER, **_SD35_SIZES[size]},
            vae={**_VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
            text_encoder={**_CLIP_L, "architectures": ["CLIPTextModelWithProjection"], "projection_dim": 768},
            text_encoder_2=_CLIP_BIGG,
            text_encoder_3=_T5_XXL,
        )
    return None


def pipeline(index: dict[str, Any], scheduler: dict[str, Any], **networks: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """JSON files of a pipeline: what ``model_index.json`` states, and the configs of the scheduler and networks."""
    parts = {"scheduler": ["diffusers", scheduler["_class_name"]]}
    files = {"scheduler/scheduler_config.json": scheduler}
    for name, config in networks.items():
        is_text = name.startswith("text_encoder")
        kind = config["architectures"][0] if is_text else config["_class_name"]
        parts[name] = ["transformers" if is_text else "diffusers", kind]
        files[f"{name}/config.json"] = config
        if is_text:
            tokenizer = name.replace("text_encoder", "tokenizer")
            parts[tokenizer] = ["transformers", "CLIPTokenizer"]  # any other counts alike
            files[f"{tokenizer}/tokenizer_config.json"] = {"model_max_length": 77}
    return {"model_index.json": {**index, **parts}, **files}


@contextmanager
def published_shapes(with_values: bool) -> Iterator[AbstractContextManager[Any]]:
    """A ``with`` block in which published models are made of their shapes, and nothing is downloaded.

    Args:
        with_values: Whether their weights have values, random ones, so that they can be timed; without, the largest
            model takes no memory.

    Yields:
        The mode that tensors without values are computed in.
    """
    shapes = without_values()
    mode: Any = nullcontext() if with_values else shapes
    from diffusers.models.modeling_utils import ModelMixin
    from transformers import PreTrainedModel

    fetch, fetch_file, read = hub.fetch, hub.fetch_file, checkpoints.read_safetensors
    opened, opened_text = (vars(kind)["from_pretrained"].__func__ for kind in (ModelMixin, PreTrainedModel))
    with TemporaryDirectory() as folder:
        root = Path(folder)

        def stand_in(repo_id: str, subfolders: tuple[str, ...], revision: str | None = None) -> Path:
            files = published(repo_id)
            if files is None:
                return fetch(repo_id, subfolders, revision)
            folder = write(root / repo_id, files)
            return folder / WEIGHTS if WEIGHTS in files else folder

        def stand_in_file(repo_id: str, name: str, revision: str | None = None) -> Path:
            files = published(repo_id)
            return fetch_file(repo_id, name, revision) if files is None else write(root / repo_id, files) / name

        def dit_state(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
            if root not in Path(file).parents:
                return read(file)
            with mode:
                return DiT(**json.loads(file.read_text())).state_dict(), {}

        def opener(original: Any, build: Any) -> Any:
            def from_pretrained(cls: Any, path: Any, *args: Any, **options: Any) -> Any:
                if root not in Path(path).parents:
                    return original(cls, path, *args, **options)
                with mode, default_dtype(options.get("torch_dtype", options.get("dtype"))):
                    made = build(cls, path).eval()
                whole = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
                return (made, whole) if options.get("output_loading_info") else made

            return classmethod(from_pretrained)

        network = opener(opened, lambda cls, path: cls.from_config(cls.load_config(path)))
        text_network = opener(opened_text, lambda cls, path: cls(cls.config_class.from_pretrained(path)))
        with (
            mock.patch.object(hub, "fetch", stand_in),
            mock.patch.object(hub, "fetch_file", stand_in_file),
            mock.patch.object(checkpoints, "read_safetensors", dit_state),
            mock.patch.object(ModelMixin, "from_pretrained", network),
            mock.patch.object(PreTrainedModel, "from_pretrained", text_network),
            mock.patch.object(torch.utils, "swap_tensors", swap_what_differs),
        ):
            yield shapes


def swap_what_differs(ours: Tensor, theirs: Tensor) -> None:
    """What ``module.to`` does to a parameter without values: nothing where it is of that type and place already.

    Some parameters without values cannot be swapped.
    """
    if (ours.dtype, ours.device) != (theirs.dtype, theirs.device):
        swap_tensors(ours, theirs)


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """A ``with`` block in which weights are made in a precision, float32 by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if dtype is not None else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def write(folder: Path, files: dict[str, dict[str, Any]]) -> Path:
    """Write a model's JSON files, and what else its openers look for."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
        for weights in ("diffusion_pytorch_model.safetensors", "model.safetensors"):  # which nothing reads
            file.with_name(weights).touch()
        if file.name == "tokenizer_config.json":  # which words it knows does not change what they cost
            bundled = hub.BUNDLED / "sd-nano-flowers" / "tokenizer"
            (file.parent / "tokenizer.json").write_bytes((bundled / "tokenizer.json").read_bytes())
            file.write_text(json.dumps({**json.loads((bundled / file.name).read_text()), **content}))
    return folder
