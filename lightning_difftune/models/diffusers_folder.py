"""Networks in diffusers' layout, opened and written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

from lightning_difftune.errors import CheckpointError
from lightning_difftune.files import atomic_path, check_sums, write_sums
from lightning_difftune.models import hub
from lightning_difftune.models.checkpoint_files import DIFFUSERS, find_weights, missing_shards
from lightning_difftune.models.checkpoints import BUNDLED, fingerprint

Model = TypeVar("Model")


def folder_of(source: str | Path, subfolder: str, revision: str | None = None) -> Path:
    """The local folder of a pipeline or of a network, fetched from the hub if ``source`` is a repository.

    Bundled pipelines, such as ``"sd-nano-flowers"``, go by their names.

    Raises:
        CheckpointError: If it is neither a folder nor a repository that can be reached.
    """
    bundled = BUNDLED / source
    folder = bundled if bundled.is_dir() else Path(source).expanduser()
    if folder.exists():
        return folder
    repository = hub.repository_of(source, revision) if isinstance(source, str) else None
    if repository is None:
        raise CheckpointError(f"{str(source)!r} is not a local folder; a hub repository is written 'owner/name'.")
    return hub.fetch(repository[0], (subfolder,), repository[1])


def open_network(
    kind: type[Model],
    source: str | Path,
    subfolder: str = "",
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Open a network of one class, refusing weights that do not fill it.

    Weights may be in shards. Where a folder has no full precision, its bfloat16 or float16 is read.

    Args:
        kind: diffusers' class, such as ``UNet2DConditionModel``.
        source: Local folder or hub repository.
        subfolder: Folder of the network in ``source``, such as ``"unet"`` of a pipeline.
        revision: Branch, tag or commit of a hub repository.
        dtype: What the weights become.

    Raises:
        CheckpointError: If the source is not found, unreadable, or of another class.
    """
    folder = folder_of(source, subfolder, revision) / subfolder
    diffusers_class: Any = kind
    check_sums(folder)
    try:
        # Through a folder whose configuration has another class, diffusers would fill a default network at random.
        config: dict[str, Any] = diffusers_class.load_config(str(folder), local_files_only=True)
        if config.get("_class_name") != kind.__name__:
            raise CheckpointError(f"{folder} holds a {config.get('_class_name')}, expected {kind.__name__}.")
        weights = find_weights([file.name for file in folder.iterdir()])
        if weights is None:
            raise CheckpointError(no_weights(folder))
        with without_bars():
            network, info = diffusers_class.from_pretrained(
                str(folder),
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
                variant=weights.variant,
                use_safetensors=weights.is_safe,
                torch_dtype=dtype,
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
    """A message about a folder without the whole weights of a model."""
    names = sorted(file.name for file in folder.iterdir())
    missing = missing_shards(names)
    if missing:
        return f"{folder} lacks {len(missing)} shards of the weights, the first is {missing[0]}. Download it again."
    return (
        f"{folder} has no weights: it needs {DIFFUSERS[0]}, or its shards with their index, also of the variants bf16 "
        f"and fp16; found {names[:8]}."
    )


@contextmanager
def without_bars() -> Iterator[None]:
    """Leave out diffusers' progress bars over shards, which take the screen for files that are read in a moment."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def export_network(network: Any, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a UNet or a ControlNet as a folder that diffusers opens.

    A tuner's layers must have been merged first. What is read back has the same weights to the bit, so pipelines draw
    the same pictures with it.

    Args:
        network: A diffusers model in float32, on any device.
        folder: The folder; ``ControlNetModel.from_pretrained(folder)`` opens it for diffusers' pipelines.
        overwrite: Replace what is there.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the folder is taken or cannot be written, the network holds a tuner's layers or values that
            are not finite, or does not read back as it was. Nothing is left then, and what was there stays.
    """
    folder = Path(folder)
    tuner = getattr(network, "tuned_by", None)
    if tuner is not None:
        raise CheckpointError(f"Not exported: the layers of {tuner} are in the network. Export what its merge returns.")
    with exported(network, folder, overwrite) as draft:
        network.save_pretrained(draft)
        write_sums(draft)
        if fingerprint(open_network(type(network), draft)) != fingerprint(network):
            raise CheckpointError("Not exported: what was written does not read back as the same weights.")
    return folder


@contextmanager
def exported(network: nn.Module, path: Path, overwrite: bool) -> Iterator[Path]:
    """Where to write an export of a network, which takes the place of ``path`` when the block ends without an error.

    Raises:
        CheckpointError: If ``path`` is taken or cannot be written, or the network has values that are not finite.
    """
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
