"""What a command says at its end: what it left where, and which command comes next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from lightning_difftune.cli.run import Run
from lightning_difftune.errors import DiffTuneError


def name_of(run: Run) -> str:
    """The shortest path that stands for a run: its ``default_root_dir`` as long as that means this launch."""
    root = run.setting("trainer", "default_root_dir")
    try:
        if root and Run.find(root).path.resolve() == run.path.resolve():
            return shlex.quote(str(root))
    except DiffTuneError:  # the run was moved, or given from another folder
        pass
    return shlex.quote(str(run.path))


def sample_command(run: Run) -> str:
    """How to draw with a run: by the name of a class where its classes have names, after a picture for a ControlNet."""
    asked = ""
    if run.class_names:
        asked = f" --classes {shlex.quote(run.class_names[0])}"
    elif run.setting("model", "init_args", "annotator") is not None:
        asked = " --controls PICTURE.jpg"
    return f"difftune sample {name_of(run)}{asked}"


def export_command(run: Run) -> str:
    """How to hand a run's model on."""
    return f"difftune export {name_of(run)} --output my-model"


def summary(trainer: Any) -> str:
    """What ``difftune fit`` leaves: run folder, checkpoint, latest scores, pictures, and the next commands.

    Args:
        trainer: After ``fit``; it has a logger's folder or a ``default_root_dir``.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    run = Run(folder)
    told = [name for name in run.metrics if name in run.scores or name == "val/loss"]
    latest = [f"{name} {series[-1][1]:.4g}" for name in told if (series := run.finite(name))]
    pictures = [str(grids[max(grids)]) for grids in run.grids.values()]
    rows = [
        ("Run", f"{folder}, {trainer.global_step:,} steps"),
        ("Checkpoint", str(run.checkpoint or "none: the config has no ModelCheckpoint")),
        ("Metrics", f"{folder / 'metrics.csv'}: {', '.join(latest) or 'losses alone'}"),
        *(("Pictures", picture) for picture in pictures),
        ("Next", f"difftune report {name_of(run)}"),
    ]
    if run.checkpoint is not None:
        rows += [("", sample_command(run)), ("", export_command(run))]
    return "\n".join(f"{name:<12}{value}" for name, value in rows)
