"""Networks in diffusers' layout: opening them, and converting a DiT's names and weights.

The layout differs from the official one in three ways. diffusers keeps a copy of the timestep and label embedders in
every block, has separate projections for query, key and value, and computes the position embedding instead of storing
it. Its class also computes another function unless :func:`make_exact` is applied.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lightning_difftune.errors import CheckpointError
from lightning_difftune.files import check_sums
from lightning_difftune.models.checkpoint_files import DIFFUSERS, find_weights, missing_shards
from lightning_difftune.models.dit import sincos_2d
from lightning_difftune.models.hub import folder_of, without_bars

if TYPE_CHECKING:
    from diffusers.models import DiTTransformer2DModel

Model = TypeVar("Model")


def targets(depth: int) -> Iterator[tuple[str, list[str]]]:
    """Official tensor names, each with the diffusers tensors that it becomes.

    Several targets are equal copies, except for ``qkv``, which is split into as many parts along its first dimension.
    ``pos_embed`` has no target.
    """
    blocks = [f"transformer_blocks.{i}" for i in range(depth)]
    modules = {
        "x_embedder.proj": ["pos_embed.proj"],
        "t_embedder.mlp.0": [f"{block}.norm1.emb.timestep_embedder.linear_1" for block in blocks],
        "t_embedder.mlp.2": [f"{block}.norm1.emb.timestep_embedder.linear_2" for block in blocks],
        "final_layer.linear": ["proj_out_2"],
        "final_layer.adaLN_modulation.1": ["proj_out_1"],
    }
    for i, block in enumerate(blocks):
        modules |= {
            f"blocks.{i}.attn.qkv": [f"{block}.attn1.to_{part}" for part in "qkv"],
            f"blocks.{i}.attn.proj": [f"{block}.attn1.to_out.0"],
            f"blocks.{i}.mlp.fc1": [f"{block}.ff.net.0.proj"],
            f"blocks.{i}.mlp.fc2": [f"{block}.ff.net.2"],
            f"blocks.{i}.adaLN_modulation.1": [f"{block}.norm1.linear"],
        }
    yield "y_embedder.embedding_table.weight", [f"{b}.norm1.emb.class_embedder.embedding_table.weight" for b in blocks]
    for module, names in modules.items():
        for tensor in ("weight", "bias"):
            yield f"{module}.{tensor}", [f"{name}.{tensor}" for name in names]


def to_diffusers(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Rename and rearrange an official state dict; the results share its memory."""
    result: dict[str, Tensor] = {}
    for official, names in targets(depth):
        tensor = state[official]
        parts = tensor.chunk(len(names)) if ".qkv." in official else [tensor] * len(names)
        result.update(zip(names, parts, strict=True))
    return result


def from_diffusers(state: dict[str, Tensor], architecture: dict[str, Any], source: Path) -> dict[str, Tensor]:
    """Rename and rearrange a complete diffusers state dict."""
    side = architecture["input_size"] // architecture["patch_size"]
    with torch.device("cpu"):
        result = {"pos_embed": sincos_2d(side, architecture["hidden_size"])}
    for official, names in targets(architecture["depth"]):
        parts = [state[name] for name in names]
        if ".qkv." in official:
            result[official] = torch.cat(parts)
            continue
        for name, part in zip(names[1:], parts[1:], strict=True):
            if not torch.equal(part, parts[0]):
                raise CheckpointError(
                    f"{source}: {name} differs from {names[0]}. A DiT has one such embedder for all blocks; copies "
                    "that differ come from training diffusers' own class, and no DiT can compute the same."
                )
        result[official] = parts[0]
    return result


def to_config(architecture: dict[str, Any]) -> dict[str, Any]:
    """Arguments of diffusers' ``DiTTransformer2DModel`` for an architecture."""
    if architecture["mlp_ratio"] != 4:
        raise CheckpointError(
            f"diffusers' DiT has an mlp_ratio of 4 only, this model has {architecture['mlp_ratio']}. "
            "Export it with format='safetensors'."
        )
    return {
        "num_attention_heads": architecture["num_heads"],
        "attention_head_dim": architecture["hidden_size"] // architecture["num_heads"],
        "in_channels": architecture["in_channels"],
        "out_channels": architecture["in_channels"] * (2 if architecture["learn_sigma"] else 1),
        "num_layers": architecture["depth"],
        "sample_size": architecture["input_size"],
        "patch_size": architecture["patch_size"],
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": architecture["num_classes"],
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }


def to_architecture(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """Architecture of a ``DiTTransformer2DModel``'s configuration."""
    try:
        if config["norm_type"] != "ada_norm_zero" or config["activation_fn"] != "gelu-approximate":
            raise CheckpointError(
                f"{source} describes no DiT: norm_type is {config['norm_type']!r}, activation_fn "
                f"{config['activation_fn']!r}; a DiT has 'ada_norm_zero' and 'gelu-approximate'."
            )
        return {
            "input_size": config["sample_size"],
            "patch_size": config["patch_size"],
            "in_channels": config["in_channels"],
            "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
            "depth": config["num_layers"],
            "num_heads": config["num_attention_heads"],
            "mlp_ratio": 4.0,
            "num_classes": config["num_embeds_ada_norm"],
            "learn_sigma": (config["out_channels"] or config["in_channels"]) == 2 * config["in_channels"],
        }
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source} does not configure diffusers' DiTTransformer2DModel: {error!r}.") from error


def make_exact(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Make diffusers' DiT compute the authors' function: their timestep frequencies and their norms' epsilon.

    Unchanged, its timestep embedding uses ``downscale_freq_shift = 1``, but DiT was trained with 0. On random weights
    that changes the output by 2 % at t = 100 and by 11 % at t = 999.

    Args:
        transformer: The model, changed in place; ``pipeline.transformer`` of a ``DiTPipeline``.

    Returns:
        The same model.
    """
    blocks: Any = transformer.transformer_blocks
    for block in blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return transformer


def load_exact_transformer(folder: str | Path) -> DiTTransformer2DModel:
    """Open an exported diffusers folder, or its ``transformer`` folder, with diffusers' class made exact.

    Args:
        folder: An export of :func:`~lightning_difftune.models.export_dit` with ``format="diffusers"``.

    Returns:
        The model in float32 and eval mode.

    Raises:
        CheckpointError: If the folder cannot be opened.
    """
    from diffusers.models import DiTTransformer2DModel as Transformer

    subfolder = "transformer" if (Path(folder) / "transformer").is_dir() else ""
    return make_exact(open_network(Transformer, Path(folder), subfolder)).eval()


def open_network(
    kind: type[Model],
    source: str | Path,
    subfolder: str = "",
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Open a network of a diffusers class in ``subfolder`` of a folder or hub repository, and cast it to ``dtype``.

    Weights may be sharded, and must be complete. If a folder has no full precision, its bfloat16 or float16 is read.
    """
    folder = folder_of(source, subfolder, revision) / subfolder
    diffusers_class: Any = kind
    check_sums(folder)
    try:
        # If the configuration has another class, diffusers would return a default network with random weights.
        config: dict[str, Any] = diffusers_class.load_config(str(folder), local_files_only=True)
        if config.get("_class_name") != kind.__name__:
            raise CheckpointError(f"{folder} holds a {config.get('_class_name')}, expected {kind.__name__}.")
        weights = find_weights([file.name for file in folder.iterdir()])
        if weights is None:
            raise CheckpointError(no_weights(folder))
        with without_bars("diffusers"):
            network, info = diffusers_class.from_pretrained(
                str(folder),
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
                variant=weights.variant,
                use_safetensors=weights.is_safe,
                dtype=dtype,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} cannot be opened as diffusers' {kind.__name__}: {error}. It needs config.json and "
            f"{DIFFUSERS[0]}; name the subfolder if they lie in one."
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            names = sorted(map(str, info[problem]))[:3]
            raise CheckpointError(
                f"{folder}: the weights do not fit config.json; {problem.replace('_', ' ')}: {names}."
            )
    if any(parameter.dtype != dtype for parameter in network.parameters()):  # diffusers leaves parts in float32
        network.to(dtype)
    return network


def no_weights(folder: Path) -> str:
    """The message for a folder without a model's complete weights."""
    names = sorted(file.name for file in folder.iterdir())
    missing = missing_shards(names)
    if missing:
        return f"{folder} lacks {len(missing)} shards of the weights, the first is {missing[0]}. Download it again."
    return (
        f"{folder} has no weights: it needs {DIFFUSERS[0]}, or its shards with their index, also of the variants bf16 "
        f"and fp16; found {names[:8]}."
    )
