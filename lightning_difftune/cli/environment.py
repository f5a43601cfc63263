"""Where a run happens: versions, hardware, commit and data, written next to its config for whoever repeats it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_difftune import __version__, draws


def circumstances() -> dict[str, Any]:
    """Versions, threads and hardware, for whoever repeats the run."""
    return {
        "versions": {
            "lightning_difftune": __version__,
            "torch": torch.__version__,
            "lightning": L.__version__,
            "python": platform.python_version(),
        },
        "draws": draws.VERSION,  # of the random streams
        "threads": torch.get_num_threads(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
    }


def commit() -> dict[str, Any] | None:
    """The commit of the repository that the command was given in, and whether its files differ; None elsewhere."""
    try:
        head = _git("rev-parse", "HEAD")
        return {"commit": head, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or no commit yet
        return None


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def class_counts(datamodule: Any) -> dict[str, int] | None:
    """Pictures of each class, by its name or index, where the target knows them without reading its pictures."""
    target: Any = getattr(datamodule, "target", None)
    labels = target.labels() if hasattr(target, "labels") else None
    if labels is None:
        return None
    counts = torch.bincount(labels, minlength=getattr(datamodule, "num_classes", None) or 0).tolist()
    names = getattr(target, "class_names", None) or []
    return {str(names[i]) if i < len(names) else str(i): count for i, count in enumerate(counts)}


def scores(callbacks: Iterable[Any]) -> dict[str, Any]:
    """What the callbacks log that tells a better model from a worse one."""
    return {name: facts for callback in callbacks for name, facts in getattr(callback, "scores", dict)().items()}


class SaveRun(SaveConfigCallback):
    """Saves ``environment.json`` next to the ``config.yaml`` that Lightning saves when a run starts."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder on all processes, since ``trainer.log_dir`` is a broadcast, then save on the first."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        if stage != "fit":
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what is about to be trained; what a checkpoint cannot be resumed with is refused before."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write when and where the run starts. What cannot be written is a warning; the run is worth more."""
        record = {
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": sys.argv,
            **circumstances(),
            "processes": trainer.world_size,
            "git": commit(),
            "class_counts": class_counts(getattr(trainer, "datamodule", None)),
            "scores": scores(vars(trainer)["callbacks"]),
        }
        path = self._folder / "environment.json"
        try:
            path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            rank_zero_warn(f"{path} could not be saved: {error}. Training continues.")
