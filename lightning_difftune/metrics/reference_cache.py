"""Statistics of reference pictures on disk, so that they are extracted once and not in every run."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightning_difftune.files import atomic_write, tensor_digest, text_digest

FORMAT = "difftune-reference-1"


class ReferenceCache:
    """A folder of safetensors files, one for each pair of reference pictures and feature extractor.

    Args:
        folder: Where the files are; created when the first one is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / f"reference-{text_digest(key)[:16]}.safetensors"

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The statistics stored under a key, or ``None`` if there are none or, with a warning, if they are damaged."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                intact = file.metadata() == {"format": FORMAT, "key": key, "sha256": tensor_digest(state)}
        except (OSError, SafetensorError):
            intact = False
        if not intact:
            rank_zero_warn(f"The reference statistics in {path} are damaged; they are computed again.")
            return None
        return state

    def store(self, key: str, state: dict[str, Tensor]) -> None:
        """Write statistics whole or not at all; on failure, only warn, since they can be computed again."""
        path = self.path(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, save(state, {"format": FORMAT, "key": key, "sha256": tensor_digest(state)}))
        except OSError as error:
            rank_zero_warn(f"The reference statistics could not be stored in {path}: {error}. Training continues.")


def reference_key(identity: str, feature_extractor: nn.Module) -> str:
    """What decides reference statistics: the identity of the pictures and the extractor with its weights."""
    kind = type(feature_extractor)
    return f"{identity} {kind.__module__}.{kind.__qualname__} {tensor_digest(feature_extractor.state_dict())}"
