"""Reads DiT weights from the authors' files, safetensors and diffusers folders; fingerprints of models."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.files import check_sums, read_safetensors, tensor_digest
from lightning_difftune.models import diffusers_layout, hub
from lightning_difftune.models.checkpoint_files import DIFFUSERS, find_weights, missing_shards, read_json, read_torch
from lightning_difftune.models.dit import SIZES, DiT

SAMPLING_FILE = "sampling.json"  # in an exported diffusers folder, next to model_index.json
FORMAT_VERSION = 1  # of the safetensors files of export_dit
PUBLISHED_HEADS = {(hidden_size, depth): num_heads for hidden_size, depth, num_heads in SIZES.values()}
WEIGHT_FILES = {".safetensors", ".pt", ".pth", ".bin", ".ckpt"}  # a name with such a suffix is a path, not a repository


class Contents(NamedTuple):
    """The contents of a checkpoint, before a model is built."""

    state: dict[str, Tensor]
    architecture: dict[str, Any]
    class_names: list[str] | None
    file: Path  # file of the tensors
    sampling: dict[str, Any] | None = None  # scheduler, steps and guidance of the exported run


def load_dit(source: str | Path, *, num_heads: int | None = None, revision: str | None = None) -> DiT:
    """Open a DiT.

    Args:
        source: One of

            - the name of a bundled model, such as ``"dit-nano-omniglot"``;
            - a file with the official key names: the authors' ``.pt``, a training checkpoint of their code (its EMA
              weights are taken), or safetensors; no code in a pickle is ever run;
            - a diffusers folder: a pipeline's, or its ``transformer`` folder;
            - a repository on the Hugging Face hub in that layout, ``"facebook/DiT-XL-2-256"`` or, at a branch, tag or
              commit, ``"facebook/DiT-XL-2-256@main"``.
        num_heads: Attention heads. Weights do not show their number, so a file needs it unless it states its
            architecture (as exports do) or has a published size.
        revision: Branch, tag or commit of a hub repository.

    Returns:
        The model on the CPU, in float32 and train mode, independent of the file.

    Raises:
        CheckpointError: If the source is not found, unreadable, or another model.
    """
    path = locate(source, revision)
    contents = read_folder(path) if path.is_dir() else read_file(path, num_heads)
    state, architecture, class_names, file, sampling = contents
    if num_heads is not None and num_heads != architecture.get("num_heads"):
        raise CheckpointError(f"{path} says that it has {architecture.get('num_heads')} heads, not {num_heads}.")
    try:
        with torch.device("meta"):
            model = DiT(**architecture, class_names=class_names)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path} describes a DiT that cannot be built: {error}") from error
    if path.is_dir():
        check_state(state, diffusers_layout.to_diffusers(model.state_dict(), architecture["depth"]), file)
        state = diffusers_layout.from_diffusers(state, architecture, file)
    check_state(state, model.state_dict(), file)
    model.sampling = sampling
    # One copy at a time: afterwards the model owns its memory and no longer depends on the mapped file.
    model.load_state_dict({name: state.pop(name).to(torch.float32, copy=True) for name in list(state)}, assign=True)
    return model


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The file or folder of a source, downloaded if necessary."""
    bundled = {file.stem: file for file in sorted(hub.BUNDLED.glob("*.safetensors"))}
    if isinstance(source, str) and source in bundled:
        return bundled[source]
    path = Path(source).expanduser()
    if path.exists():
        return path
    repository = hub.repository_of(source, revision) if isinstance(source, str) else None
    if repository is not None and path.suffix not in WEIGHT_FILES:
        return hub.fetch(repository[0], ("transformer", ""), repository[1])
    raise CheckpointError(
        f"{str(source)!r} is not a file, a folder or a bundled model (bundled: {', '.join(bundled) or 'none'}). "
        "Check the path; a hub repository is written 'owner/name'."
    )


def read_file(file: Path, num_heads: int | None = None) -> Contents:
    """Read a file with the official key names; the architecture comes from its metadata, else from the shapes."""
    state, metadata = (read_torch(file), {}) if file.suffix != ".safetensors" else read_safetensors(file)
    if "architecture" not in metadata:
        state = unwrapped(state, file)
        return Contents(state, infer_architecture(state, num_heads, file), None, file)
    try:
        version = int(metadata["format_version"])
        architecture, class_names = dict(json.loads(metadata["architecture"])), json.loads(metadata["class_names"])
        sampling = json.loads(metadata.get("sampling", "null"))
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: its metadata is incomplete or damaged ({error!r}). Export it again.") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version}; this release reads up to {FORMAT_VERSION}. "
            "Upgrade lightning_difftune."
        )
    return Contents(state, architecture, class_names, file, sampling)


def read_folder(folder: Path) -> Contents:
    """Read a diffusers folder: a pipeline, which may name the classes, or a transformer."""
    inner = folder / "transformer" if (folder / "transformer" / "config.json").exists() else folder
    names = sorted(entry.name for entry in inner.iterdir())
    weights = find_weights(names)
    for place in {folder, inner}:
        check_sums(place)
    if weights is None or "config.json" not in names:
        missing = missing_shards(names)
        raise CheckpointError(
            f"{folder} is not a whole diffusers folder: it needs config.json and {DIFFUSERS[0]} or its shards with "
            f"their index, in it or in its 'transformer' folder; {f'missing {missing[:3]}' if missing else 'found'} "
            f"{'' if missing else names[:8]}."
        )
    config = inner / "config.json"
    architecture = diffusers_layout.to_architecture(read_json(config), config)
    index = folder / "model_index.json"
    labels = read_json(index).get("id2label") or {} if index.exists() else {}
    classes = [str(i) for i in range(architecture["num_classes"])]
    named = classes[: len(labels)]  # the first classes, or all
    class_names = [labels[i] for i in named] if named and labels.keys() >= set(named) else None
    state: dict[str, Tensor] = {}
    for file in (inner / name for name in weights.tensors):
        state |= read_safetensors(file)[0] if weights.is_safe else read_torch(file)
    return Contents(state, architecture, class_names, file, sampling_of(folder))


def sampling_of(folder: Path) -> dict[str, Any] | None:
    """An export's sampling settings, or another pipeline's scheduler; ``None`` if there is neither."""
    settings, stated = folder / SAMPLING_FILE, folder / "scheduler" / "scheduler_config.json"
    if settings.exists():
        return read_json(settings)
    config = read_json(stated) if stated.exists() else {}
    return {"scheduler": config["_class_name"], "scheduler_config": config} if "_class_name" in config else None


def unwrapped(state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """A DiT's tensors under their own names, without the prefixes of wrappers.

    DistributedDataParallel, ``torch.compile``, Lightning and other trainers prefix each name with ``module.``,
    ``_orig_mod.`` or an attribute. Of several copies, the average (``ema``) is used.

    Raises:
        CheckpointError: If there are several DiTs and it is not clear which one to use.

    Example:
        >>> weight = torch.zeros(1)
        >>> list(unwrapped({"module.net.x_embedder.proj.weight": weight, "module.step": weight}, Path("dit.pt")))
        ['x_embedder.proj.weight']
    """
    anchor = "x_embedder.proj.weight"
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    prefixes = sorted(name.removesuffix(anchor) for name in plain if f".{name}".endswith(f".{anchor}"))
    if len(prefixes) > 1:
        averages = [prefix for prefix in prefixes if "ema" in prefix.lower()]
        if len(averages) != 1:
            raise CheckpointError(
                f"{file} holds {len(prefixes)} DiTs, whose names start with {prefixes[:4]}. Save the state dict of the "
                "one that you want."
            )
        prefixes = averages
    prefix = prefixes[0] if prefixes else ""
    return {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}


def infer_architecture(state: Mapping[str, Tensor], num_heads: int | None, file: Path) -> dict[str, Any]:
    """The architecture implied by the shapes of official weights."""
    try:
        hidden_size, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        _, tokens, _ = state["pos_embed"].shape
        rows, _ = state["y_embedder.embedding_table.weight"].shape
        outputs, _ = state["final_layer.linear.weight"].shape
        mlp_width, _ = state["blocks.0.mlp.fc1.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{file} holds no DiT under the official key names: {error}. Its keys start with {sorted(state)[:4]}."
        ) from error
    if outputs not in {patch_size**2 * channels, 2 * patch_size**2 * channels} or math.isqrt(tokens) ** 2 != tokens:
        raise CheckpointError(
            f"{file} is not a DiT on square inputs: {tokens} positions and {outputs} outputs per token for patches of "
            f"{patch_size} x {patch_size} x {channels}."
        )
    num_heads = num_heads or PUBLISHED_HEADS.get((hidden_size, depth))
    if num_heads is None:
        raise CheckpointError(
            f"{file} has hidden size {hidden_size} and depth {depth}, which is not a published size, so its number of "
            "attention heads cannot be known. Pass num_heads."
        )
    mlp_ratio = mlp_width / hidden_size
    if int(hidden_size * mlp_ratio) != mlp_width:  # rounded down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    return {
        "input_size": math.isqrt(tokens) * patch_size,
        "patch_size": patch_size,
        "in_channels": channels,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio,
        "num_classes": rows - 1,
        "learn_sigma": outputs == 2 * patch_size**2 * channels,
    }


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Differences in names and shapes of two state dicts, with a few of the names; empty if there are none."""
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {shapes[name]} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and shapes[name] != tuple(tensor.shape)
        ],
    }
    parts = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in problems.items()
        if names
    ]
    return "; ".join(parts)


def check_state(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path | str) -> None:
    """Refuse a state dict whose names or shapes differ from a model's.

    Raises:
        CheckpointError: If they differ; the message names a few missing, unexpected and misshaped tensors.
    """
    problems = differences(found, expected)
    if problems:
        raise CheckpointError(f"{source} does not hold the tensors of this model: {problems}.")


def fingerprint(module: nn.Module) -> str:
    """Identity of a module's weights: SHA-256 over its state dict, the same on every device.

    Covers names, dtypes, shapes and values in the order of the names; copies at most one tensor at a time. For meta
    tensors, as in `difftune plan`, it leaves out the values.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> fingerprint(layer) == fingerprint(layer.double()), len(fingerprint(layer))
        (False, 64)
    """
    return tensor_digest(module.state_dict())
