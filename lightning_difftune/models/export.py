"""Exports of models, written atomically and read back to verify them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_difftune import __version__
from lightning_difftune.errors import CheckpointError, check_choice
from lightning_difftune.files import atomic_path, write_safetensors, write_sums
from lightning_difftune.models.autoencoder import FrozenAutoencoder
from lightning_difftune.models.checkpoints import FORMAT_VERSION, SAMPLING_FILE, check_state, fingerprint, load_dit
from lightning_difftune.models.diffusers_layout import load_exact_transformer, open_network, to_config, to_diffusers
from lightning_difftune.models.dit import DiT
from lightning_difftune.models.usage import usage_of_dit

Network = TypeVar("Network", bound=nn.Module)


def export_dit(
    model: DiT,
    path: str | Path,
    format: Literal["safetensors", "diffusers"] = "safetensors",
    *,
    autoencoder: FrozenAutoencoder | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model, read it back, and compare outputs and weights before it replaces ``path``.

    Args:
        model: The model, on any device; written in float32.
        path: A file ending in ``.safetensors``, or a folder for diffusers.
        format: ``"safetensors"`` keeps the official key names, with the architecture and class names as metadata.
            ``"diffusers"`` is a folder for ``DiTPipeline``; its README states what that computes differently.
        autoencoder: Added to the diffusers folder as ``vae``.
        overwrite: Replace an existing ``path``.

    Returns:
        The path.

    Raises:
        CheckpointError: If ``path`` exists or cannot be written, the model has layers beyond a plain DiT's or values
            that are not finite, or the written model computes another function. The draft is then deleted, and an
            existing ``path`` stays.
        ConfigError: If the format is not one of the two.
    """
    path = Path(path)
    check_choice("export_dit", "format", format, "safetensors", "diffusers")
    if format == "safetensors" and path.suffix != ".safetensors":
        raise CheckpointError(f"{path} must end in .safetensors, so that load_dit knows what it is.")
    if format == "safetensors" and autoencoder is not None:
        raise CheckpointError("An autoencoder goes into a diffusers folder; format='safetensors' holds only the DiT.")
    with torch.device("meta"):
        plain = DiT(**model.architecture)
    check_state(model.state_dict(), plain.state_dict(), "The model to export")
    with exported(model, path, overwrite) as draft:
        if format == "safetensors":
            write_file(model, draft)
        else:
            write_diffusers(model, draft, autoencoder)
            write_sums(draft)
        verify(model, draft)
    return path


def export_network(network: Any, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a UNet or a ControlNet as a folder for diffusers.

    Merge a tuner's layers first. The written weights are the same to the bit, so pipelines draw the same pictures.

    Args:
        network: A diffusers model in float32, on any device.
        folder: The folder; ``ControlNetModel.from_pretrained(folder)`` opens it for diffusers' pipelines.
        overwrite: Replace an existing folder.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the folder exists or cannot be written, the network has a tuner's layers or values that are
            not finite, or reads back differently. The draft is then deleted, and an existing folder stays.
    """
    folder = Path(folder)
    tuner = getattr(network, "tuned_by", None)
    if tuner is not None:
        raise CheckpointError(f"Not exported: the layers of {tuner} are in the network. Export what its merge returns.")
    with exported(network, folder, overwrite) as draft:
        network.save_pretrained(draft)
        write_sums(draft)
        if fingerprint(open_network(type(network), draft)) != fingerprint(network):
            raise CheckpointError("Not exported: the weights that were read back differ from the model's.")
    return folder


@contextmanager
def exported(network: nn.Module, path: Path, overwrite: bool) -> Iterator[Path]:
    """A path for an export of a network, which replaces ``path`` when the block ends without an error."""
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists. Choose another path, or pass overwrite=True.")
    broken = [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(f"Not exported: NaN or infinity in {len(broken)} tensors, {broken[:3]}.")
    try:
        with atomic_path(path) as draft:
            yield draft
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot write {path}: {error}. Is the disk full, or the folder protected?") from error


def plain_state(model: DiT) -> dict[str, Tensor]:
    """The model's state dict in float32 on the CPU."""
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in model.state_dict().items()}


def write_file(model: DiT, file: Path) -> None:
    """Write the official layout with the architecture in the metadata."""
    metadata = {
        "format": "pt",
        "format_version": str(FORMAT_VERSION),
        "library_version": __version__,
        "architecture": json.dumps(model.architecture),
        "class_names": json.dumps(model.class_names),
        **({} if model.sampling is None else {"sampling": json.dumps(model.sampling)}),
    }
    write_safetensors(plain_state(model), file, metadata)


def write_diffusers(model: DiT, folder: Path, autoencoder: FrozenAutoencoder | None) -> None:
    """Write a folder for ``DiTPipeline``."""
    import diffusers
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    architecture = model.architecture
    version = {"_diffusers_version": diffusers.__version__}
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    config = {"_class_name": "DiTTransformer2DModel", **version, **to_config(architecture)}
    write_json(transformer / "config.json", config)
    state = {name: tensor.clone() for name, tensor in to_diffusers(plain_state(model), architecture["depth"]).items()}
    save_file(state, transformer / "diffusion_pytorch_model.safetensors", {"format": "pt"})

    kind = "DDIMScheduler"
    if model.sampling is None:
        DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False).save_pretrained(folder / "scheduler")
    else:
        kind, settings = model.sampling["scheduler"], model.sampling["scheduler_config"]
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": kind, **version, **settings})
        write_json(folder / SAMPLING_FILE, model.sampling)
    index: dict[str, object] = {
        "_class_name": "DiTPipeline",
        **version,
        "scheduler": ["diffusers", kind],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": [None, None],
    }
    if model.class_names is not None:
        index["id2label"] = {str(i): name for i, name in enumerate(model.class_names)}
    if autoencoder is not None:
        index["vae"] = ["diffusers", "AutoencoderKL"]
        autoencoder.network.save_pretrained(folder / "vae")
        config_file = folder / "vae" / "config.json"
        config = json.loads(config_file.read_text(encoding="utf-8"))
        write_json(config_file, {**config, **autoencoder.scale.settings()})
    write_json(folder / "model_index.json", index)

    usage = usage_of_dit(architecture, model.sampling, autoencoder is not None)
    readme = f"# DiT exported by lightning_difftune {__version__}\n\n{usage}"
    (folder / "README.md").write_text(readme, encoding="utf-8")


def write_json(file: Path, content: dict[str, object]) -> None:
    """Write a JSON object."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def verify(model: DiT, draft: Path) -> None:
    """Read an export back, and refuse it if a weight or an output differs from the model's.

    Outputs of diffusers' class may differ by 1e-5 of the largest.
    """
    live = in_float32(model)
    device = live.pos_embed.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *model.sample_shape, generator=generator).to(device)
    t = torch.tensor([0, 100, 999], device=device)
    y = torch.tensor([0, model.num_classes // 2, model.null_class], device=device)

    reloaded = load_dit(draft).to(device)
    theirs = reloaded.state_dict()
    changed = [name for name, tensor in live.state_dict().items() if not torch.equal(tensor, theirs[name])]
    if changed:
        raise CheckpointError(
            f"Not exported: {len(changed)} tensors change when they are written and read back, {changed[:3]}. "
            "A diffusers folder holds no position embeddings other than the fixed ones."
        )
    with exact_arithmetic(device):
        expected = live(x, t, y)
        if not expected.isfinite().all():
            raise CheckpointError("Not exported: the model's outputs are not finite.")
        if not torch.equal(reloaded(x, t, y), expected):
            raise CheckpointError("Not exported: the model that was read back computes a different output.")
        if draft.is_dir():
            del reloaded, theirs
            transformer: nn.Module = load_exact_transformer(draft)
            output = transformer.to(device)(x, timestep=t, class_labels=y).sample
            error = (output - expected).abs().max() / expected.abs().max().clamp(min=1)
            if error > 1e-5:
                raise CheckpointError(f"Not exported: diffusers' class differs by {error:.1e}.")


def in_float32(network: Network) -> Network:
    """The network itself if its weights are float32, else a copy whose weights are."""
    is_plain = all(p.dtype == torch.float32 for p in network.parameters())
    return network if is_plain else copy.deepcopy(network).float()


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Full float32: no autocast, no TF32 or bfloat16 inside matrix products."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
