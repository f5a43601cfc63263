"""Files of checkpoints: written whole or not at all, checked when they are read, and opened without running code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.serialization import get_unsafe_globals_in_checkpoint

from lightning_difftune.errors import CheckpointError
from lightning_difftune.files import atomic_file, discard_temporaries, own_number
from lightning_difftune.models.checkpoint_files import check_records


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, safe from kills, full disks and power loss, and detects damage on reading.

    Lightning's own writes to the system's temporary folder and moves the result, which is a copy if that is another
    disk, without an fsync. This one writes next to the old checkpoint, syncs, and replaces it; it holds no second copy
    in memory. Each record is compared with its CRC-32 before use, which ``torch.load`` does not do. Addresses such as
    ``s3://`` are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: If the disk is full or refuses; the old file at ``path`` stays.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        try:
            discard_temporaries(file.parent, file.name)
            with atomic_file(file) as opened:
                torch.save(with_own_numbers(checkpoint), opened)
        except (OSError, RuntimeError) as error:  # torch's writer may raise an error of its own over the disk's
            cause = next((cause for cause in (error, error.__context__) if isinstance(cause, OSError)), error)
            state = "the one that was there is as it was" if file.exists() else "none is there"
            saved = any(file.parent.glob("*.ckpt"))
            again = (
                "resume the run: `difftune fit RUN`" if saved else "start the run again; it had saved nothing before"
            )
            raise CheckpointError(
                f"The checkpoint {file} cannot be written ({cause}); {state}. Free some space or make the folder "
                f"writable, then {again}."
            ) from error
        if found := foreign_objects(file):
            rank_zero_warn(
                f"Checkpoints of this run hold {found}, in the state of a callback or of the data. Opening such "
                "objects may run code: resuming needs weights_only=False, and commands such as `difftune sample` "
                "refuse the file. Let state_dict() return numbers, texts, lists, dictionaries and tensors."
            )

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


def with_own_numbers(tree: Any) -> Any:
    """A copy of dictionaries, lists and tuples with the numbers of NumPy as Python's; all else is not copied."""
    if type(tree) is dict:
        return {key: with_own_numbers(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(with_own_numbers, tree))
    return own_number(tree)


def foreign_objects(file: Path) -> str:
    """Names of the classes in a checkpoint that are opened only as trusted code; empty if there are none."""
    try:
        return ", ".join(get_unsafe_globals_in_checkpoint(file)[:3])
    except Exception:  # a damaged file, for which it has no type of its own
        return ""


def write_whole(strategy: Any) -> None:
    """Make a trainer's strategy use :class:`AtomicCheckpointIO`, unless it has its own."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO and not isinstance(strategy, FSDPStrategy):
        strategy.checkpoint_io = AtomicCheckpointIO()


def read_run(
    path: Path, map_location: Any = "cpu", weights_only: bool = True, mmap: bool = False, checked: bool = True
) -> dict[str, Any]:
    """The checkpoint of a run; if ``checked``, each of its records is compared with its CRC-32.

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
        if weights_only and (found := foreign_objects(path)):
            raise CheckpointError(
                f"{path} holds {found}, and opening such objects may run code. If you trust the file, pass "
                "weights_only=False; on the command line, --weights_only false of `difftune fit` and `validate`."
            ) from error
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} is not a whole checkpoint of a run ({reason}). Take another one of the run's; weights without a "
            "run, such as an export, go into --model.init_args.model."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{path} is not a checkpoint of a run; pass weights as --model.init_args.model.")
    return content
