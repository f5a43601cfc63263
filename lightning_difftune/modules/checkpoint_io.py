"""How checkpoints are written and read: whole or not at all, and without running what is in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy

from lightning_difftune.errors import CheckpointError
from lightning_difftune.files import atomic_file, discard_temporaries
from lightning_difftune.models.checkpoint_files import check_records


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that no kill, full disk or loss of power leaves half-written, and whose damage is noticed.

    Lightning's own writes to the system's folder of temporary files and moves the result, which is a copy where that
    is another disk, and does not wait for the disk. This one writes in the folder of the old checkpoint, waits, and
    exchanges the two; nor does it hold a second copy in memory. Each record is compared with its CRC-32 before it is
    used, which ``torch.load`` does not do. Addresses such as ``s3://`` are left to Lightning.
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
            cause = next((cause for cause in (error, error.__context__) if isinstance(cause, OSError)), error)
            state = "the one that was there is as it was" if file.exists() else "none is there"
            raise CheckpointError(
                f"The checkpoint {file} cannot be written ({cause}); {state}. Free some space or make the folder "
                "writable, then resume the run: `difftune fit RUN`."
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; objects other than tensors and plain values only with ``weights_only=False``.

        Raises:
            CheckpointError: If a local file is missing, damaged, or something else.
        """
        safe = weights_only is not False
        if "://" in str(path) or Path(path).is_dir():
            return super().load_checkpoint(path, map_location, safe)
        return read_run(Path(path), map_location, safe)


def write_whole(strategy: Any) -> None:
    """Have a trainer's strategy write its checkpoints so, unless it has a way of its own."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO and not isinstance(strategy, FSDPStrategy):
        strategy.checkpoint_io = AtomicCheckpointIO()


def read_run(
    path: Path, map_location: Any = "cpu", weights_only: bool = True, mmap: bool = False, checked: bool = True
) -> dict[str, Any]:
    """The checkpoint of a run; ``checked``, each of its records is compared with its CRC-32.

    Raises:
        CheckpointError: If it is missing, truncated, altered or something else.
    """
    if not path.is_file():
        raise CheckpointError(f"The checkpoint {path} does not exist. Check ckpt_path.")
    if checked:
        check_records(path)
    try:
        content = torch.load(path, map_location=map_location, weights_only=weights_only, mmap=mmap)
    except Exception as error:  # torch.load has no type of its own for damaged files
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} is not a whole checkpoint of a run ({reason}). Take another one of the run's; weights without a "
            "run, such as an export, go into --model.init_args.model."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{path} is not a checkpoint of a run; weights alone go into --model.init_args.model.")
    return content
