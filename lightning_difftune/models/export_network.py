"""Networks in diffusers' layout, written, read back and compared before they take their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lightning_difftune.errors import CheckpointError
from lightning_difftune.files import atomic_path, write_sums
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.models.diffusers_folder import open_network


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
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder} exists. Choose another path, or pass overwrite=True.")
    tuner = getattr(network, "tuned_by", None)
    if tuner is not None:
        raise CheckpointError(f"Not exported: the layers of {tuner} are in the network. Export what its merge returns.")
    broken = [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(f"Not exported: NaN or infinity in {len(broken)} tensors, {broken[:3]}.")
    try:
        with atomic_path(folder) as draft:
            network.save_pretrained(draft)
            write_sums(draft)
            again = open_network(type(network), draft)
            if fingerprint(again) != fingerprint(network):
                raise CheckpointError("Not exported: what was written does not read back as the same weights.")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot write {folder}: {error}. Is the disk full, or the folder protected?") from error
    return folder
