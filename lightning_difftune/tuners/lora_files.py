"""LoRA files: peft's adapters, and the formats of diffusers' pipelines and trainers, and of kohya."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor, nn

from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.files import SUMS, atomic_path, check_sums, order_metadata, read_safetensors, write_sums

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"  # peft's names
WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name
OTHER_METHODS = ("dora_scale", "lora_magnitude_vector", "hada_", "lokr_", "oft_")


@contextmanager
def folder_for(folder: str | Path) -> Iterator[Path]:
    """A draft of a LoRA's folder, which replaces it, with digests, when the ``with`` block ends."""
    folder = Path(folder)
    ours = {CONFIG, ADAPTER, WEIGHTS, SUMS, "README.md"}
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in ours) if folder.is_dir() else []
    if others or folder.is_file():
        raise CheckpointError(
            f"{folder} {f'holds {others[:3]}' if others else 'is a file'}, and a LoRA's folder is replaced as a whole. "
            "Name a folder of its own."
        )
    try:
        with atomic_path(folder) as draft:
            draft.mkdir()
            yield draft
            write_sums(draft)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot write {folder}: {error}. Is the disk full, or the folder protected?") from error


def settings_of(config: LoraConfig) -> dict[str, Any]:
    """A configuration of peft as JSON values, with sorted sets."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def write_config(config: LoraConfig, file: Path) -> None:
    """Write a configuration as peft does, but with reproducible bytes."""
    file.write_text(json.dumps(settings_of(config), indent=2, sort_keys=True), encoding="utf-8")


def loader_of(model: nn.Module) -> Any:
    """The class of diffusers that reads and writes a network's LoRA files."""
    import diffusers

    name = type(model).__name__
    if name == "UNet2DConditionModel":
        is_xl = getattr(model.config, "addition_embed_type", None) == "text_time"
        return diffusers.StableDiffusionXLPipeline if is_xl else diffusers.StableDiffusionPipeline
    # A pipeline is named after its transformer: FluxTransformer2DModel, StableDiffusion3 by the short name SD3.
    stem = name.removesuffix("Model").removesuffix("2D").removesuffix("Transformer")
    pipeline = getattr(diffusers, f"{ {'SD3': 'StableDiffusion3'}.get(stem, stem) }Pipeline", None)
    if not hasattr(model, "save_pretrained") or not hasattr(pipeline, "save_lora_weights"):
        raise ConfigError(
            f"diffusers has no pipeline that opens LoRA files of a {name}. Write peft's format: save_adapter, or "
            "difftune export --format peft."
        )
    return pipeline


def write_diffusers(model: nn.Module, state: dict[str, Tensor], config: LoraConfig, folder: Path) -> None:
    """Write a LoRA with diffusers' own writer, with rank, alpha and targets in the metadata, and read it back."""
    loader = loader_of(model)
    prefix = prefix_of(loader)
    metadata = settings_of(config)
    loader.save_lora_weights(
        str(folder), **{f"{prefix}_lora_layers": state, f"{prefix}_lora_adapter_metadata": metadata}
    )
    order_metadata(folder / WEIGHTS)
    again, _, stated = open_file(loader, folder / WEIGHTS)
    same = {f"{prefix}.{name}" for name in state} == again.keys()
    same = same and all(tensor.equal(again[f"{prefix}.{name}"]) for name, tensor in state.items())
    if not same or stated.get(f"{prefix}.lora_alpha") != config.lora_alpha:
        raise CheckpointError("Not written: the LoRA that was read back differs from the tuned one.")


def open_file(loader: Any, file: Path, **config: Any) -> tuple[dict[str, Tensor], Any, Any]:
    """Tensors, alphas by layer and metadata (or ``None``) of a LoRA's file, by diffusers' own reader."""
    config |= {"weight_name": file.name, "local_files_only": True, "return_lora_metadata": True}
    if "return_alphas" in inspect.signature(loader.lora_state_dict).parameters:
        config["return_alphas"] = True
    found = loader.lora_state_dict(str(file.parent), **config)
    return found if len(found) == 3 else (found[0], None, found[1])


def prefix_of(loader: Any) -> str:
    """The prefix of names in a pipeline's LoRA files: ``"unet"`` or ``"transformer"``."""
    return "unet" if "unet" in loader._lora_loadable_modules else "transformer"


def read_diffusers(
    model: nn.Module, source: str | Path, scale: float, network_only: bool
) -> tuple[Path, dict[str, Tensor]]:
    """Read a LoRA of diffusers or kohya: its file, and its factors rescaled to layers whose alpha / rank is ``scale``.

    The names are peft's (``layer.lora_A.weight``). Updates of text encoders are refused, or ignored with
    ``network_only``.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    loader = loader_of(model)
    file = Path(source).expanduser()
    file = file / WEIGHTS if file.is_dir() else file
    if not file.is_file() or file.suffix != ".safetensors":
        raise CheckpointError(f"{file} is not a safetensors file. A folder of a LoRA has {WEIGHTS}.")
    check_sums(file.parent)
    names = list(read_safetensors(file)[0])
    other = [name for name in names if any(method in name for method in OTHER_METHODS)]
    if other:
        raise CheckpointError(f"{file} is not a plain LoRA: it has {other[0]}. DoRA, LoHa and LoKr are not supported.")
    prefix = prefix_of(loader)
    config = {"unet_config": model.config} if prefix == "unet" else {}
    try:
        state, alphas, metadata = open_file(loader, file, **config)
    except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"{file} is not a LoRA that diffusers can read: {error}") from error
    encoders = sorted(name for name in state if not name.startswith(f"{prefix}."))
    if encoders and not network_only:
        raise CheckpointError(
            f"{file} has {len(encoders)} tensors beyond the {prefix}'s, such as {encoders[0]}, which are not trained "
            "here; without them, the result is different. To leave them out, pass network_only=True."
        )
    network = {name.removeprefix(f"{prefix}."): t for name, t in state.items() if name.startswith(f"{prefix}.")}
    factors = network if any(".lora_A." in name for name in network) else convert_unet_state_dict_to_peft(network)
    if not factors:
        raise CheckpointError(f"{file} has no updates of the {prefix}; its names start with {names[:3]}.")
    scales = scales_of(factors, alphas, metadata, prefix)
    return file, {
        name: tensor * (scales[name.partition(".lora_")[0]] / scale) if ".lora_B." in name else tensor
        for name, tensor in factors.items()
    }


def scales_of(
    factors: dict[str, Tensor], alphas: dict[str, Any] | None, metadata: dict[str, Any] | None, prefix: str
) -> dict[str, float]:
    """Alpha / rank of each layer: from its own alpha (kohya), the file's metadata (diffusers), else 1."""
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft.utils.other import get_pattern_key

    own = {name.removeprefix(f"{prefix}."): float(alpha) for name, alpha in (alphas or {}).items()}
    own = {
        name.partition(".lora_")[0].removesuffix(".alpha"): alpha
        for name, alpha in (convert_unet_state_dict_to_peft(own) if own else {}).items()
    }
    stated = {name.removeprefix(f"{prefix}."): value for name, value in (metadata or {}).items()}
    patterns: dict[str, float] = stated.get("alpha_pattern") or {}
    common: float | None = stated.get("lora_alpha")
    scales = {}
    for name, tensor in factors.items():
        if ".lora_A." not in name:
            continue
        layer, rank = name.partition(".lora_")[0], len(tensor)
        by_pattern = patterns.get(get_pattern_key(list(patterns), layer), common)
        alpha = own.get(layer, by_pattern)
        scales[layer] = 1.0 if alpha is None else alpha / rank
    return scales
