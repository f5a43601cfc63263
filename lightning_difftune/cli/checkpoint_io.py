"""How the command line writes and reads checkpoints: whole or not at all, and without running what is in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_difftune.errors import CheckpointError
from lightning_difftune.files import atomic_file, discard_temporaries


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that no kill, full disk or loss of power leaves half-written.

    Lightning's own writes to the system's folder of temporary files and moves the result, which is a copy where that
    is another disk, and does not wait for the disk. This one writes beside the old checkpoint, waits, and exchanges
    the two; nor does it hold a second copy in memory. Addresses such as ``s3://`` are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: If the disk is full or refuses; what was at ``path`` stays.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            discard_temporaries(file.parent, file.name)
            with atomic_file(file) as opened:
                torch.save(checkpoint, opened)
        except (OSError, RuntimeError) as error:  # torch's writer may put an error of its own before the disk's
            cause = next((one for one in (error, error.__context__) if isinstance(one, OSError)), error)
            state = "the one that was there is as it was" if file.exists() else "none is there"
            raise CheckpointError(
                f"The checkpoint {file} cannot be written ({cause}); {state}. Free some space or make the folder "
                "writable, then go on with --ckpt_path last."
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; objects other than tensors and plain values only with ``weights_only=False``."""
        return super().load_checkpoint(path, map_location, weights_only is not False)
