"""What annotators with a network have in common: opened when first needed, frozen, and in nobody's checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_difftune.errors import CheckpointError
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.models.hub import folder_of
from lightning_difftune.pictures import check_pictures


class NetworkAnnotator(ABC):
    """Base of annotators that look through a network.

    It is not an ``nn.Module``, so a module that holds one neither trains its network nor saves it. The network is
    opened when the first map or the identity is asked for, follows the pictures to their device, and computes in
    float32 whatever autocast is active around it.

    Args:
        source: The network, which is taken over and frozen; or the local folder or hub repository to open it from.
    """

    name: ClassVar[str]
    channels: ClassVar[int]

    def __init__(self, source: nn.Module | str | Path) -> None:
        self.source = source
        self._network: Any = None
        self._fingerprint: str | None = None

    @abstractmethod
    def open(self, source: str | Path) -> nn.Module:
        """Open the network from a folder or repository."""

    @abstractmethod
    def annotate(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) float32 in [0, 1], on the network's device => maps (B, channels, H, W) uint8."""

    @abstractmethod
    def constants(self) -> str:
        """The settings that decide the maps, for the identity."""

    @property
    def network(self) -> Any:
        """The network.

        Raises:
            CheckpointError: If it cannot be had; says which annotator, which source and what to do.
        """
        if self._network is None:
            network = self.source
            if not isinstance(network, nn.Module):
                try:
                    # What opens a network may fill it at random first; trainer.validate runs in inference mode.
                    with isolate_rng(), torch.inference_mode(False):
                        network = self.open(network)
                except CheckpointError as error:
                    raise CheckpointError(
                        f"{type(self).__name__} has no weights for its network from {str(self.source)!r}: {error} Pass "
                        f"what you have as {type(self).__name__}(source=...): a local folder, or the network itself."
                    ) from error
            self._network = self.prepare(network).requires_grad_(False).eval()
        return self._network

    def prepare(self, network: nn.Module) -> nn.Module:
        """Change a network, given or opened, before it is used; the base changes nothing."""
        return network

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) uint8 => control maps (B, channels, H, W) uint8 on the same device.

        Raises:
            DataError: If the pictures have another type or shape.
            CheckpointError: If the network cannot be had.
        """
        check_pictures(pictures, f"{type(self).__name__} was given", channels=(3,))
        self.network.to(pictures.device)
        with torch.no_grad(), torch.autocast(pictures.device.type, enabled=False):
            return self.annotate(pictures.float() / 255).to(pictures.device)

    def identity(self) -> str:
        """The name, the constants, and the class and fingerprint of the network.

        Raises:
            CheckpointError: If the network cannot be had.
        """
        network = self.network
        if self._fingerprint is None:
            self._fingerprint = fingerprint(network)
        return f"{self.name} {self.constants()} {type(network).__name__} {self._fingerprint}"


def open_transformers(kind: str, source: str | Path, unused: tuple[str, ...] = ()) -> Any:
    """Open a network of transformers in float32, refusing weights that do not fill it.

    Args:
        kind: The class, such as ``DPTForDepthEstimation``.
        source: Local folder or hub repository.
        unused: Beginnings of parameter names that may be missing, because nothing computes with them.

    Raises:
        CheckpointError: If the source is not found, unreadable, or of another class.
    """
    folder = folder_of(source, "")
    import transformers  # slow to import

    try:
        network, info = getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, ImportError) as error:
        raise CheckpointError(f"{folder} cannot be opened as transformers' {kind}: {error}") from error
    missing = sorted(key for key in map(str, info["missing_keys"]) if not key.startswith(unused or ("\0",)))
    if missing or info["mismatched_keys"]:
        names = missing or sorted(map(str, info["mismatched_keys"]))
        raise CheckpointError(
            f"{folder} does not hold the weights of a {kind}: {len(names)} do not fit, the first is {names[0]}."
        )
    return network
