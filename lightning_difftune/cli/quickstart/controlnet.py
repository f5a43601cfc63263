"""``difftune quickstart --controlnet``: a Canny ControlNet on flowers, with and without Diff-Tuning."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_difftune.cli.quickstart.methods import METHODS, print_summary, tune, write_metrics
from lightning_difftune.cli.tuned import callbacks_with, count_trainable, scoring
from lightning_difftune.errors import DataError
from lightning_difftune.files import atomic_file
from lightning_difftune.models import export_network
from lightning_difftune.pictures import pictures_of
from lightning_difftune.plots import curves, evenly, picture_grid

STEPS = 600  # per method; configs/controlnet/flowers.yaml has more
SHOWN = 5  # steps of the training shown in the report


@dataclass
class Tuned:
    """One finished method."""

    curve: list[tuple[int, float]]  # similarity over training steps
    leap: Any
    convergence_step: int | None
    grids: dict[int, Path]  # the callback's pictures by step
    seconds: float
    parameters: int


def quickstart_controlnet(output: Path, options: argparse.Namespace) -> None:
    """Sample and annotate a bank, train twice, export, and draw the report."""
    started = time.perf_counter()
    steps = options.steps if options.steps is not None else STEPS
    settings = [
        *flowers(options.flowers),
        *("--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(interval_of(steps))),
        *("--data.init_args.latent_cache", str(output / "latents"), "--data.init_args.bank_size", "300"),
    ]
    tuned = dict[str, Tuned]()
    for name in METHODS:
        cli, seconds = tune(name, "controlnet/flowers.yaml", output, options.seed, settings)
        (similarity,) = scoring(cli)
        (convergence,) = callbacks_with(cli, "convergence_step")
        tuned[name] = Tuned(
            similarity.history,
            convergence.leap,
            convergence.convergence_step,
            similarity.picture_log.files(),
            seconds,
            count_trainable(cli),
        )
        if name == "Diff-Tuning":
            export = export_network(cli.model.controlnet, output / "controlnet-canny-flowers", overwrite=True)
    figures = {
        name: {
            "control_ssim": [{"step": step, "value": round(value, 4)} for step, value in run.curve],
            "leap": run.leap._asdict() if run.leap is not None else None,
            "convergence_step": run.convergence_step,
            "fit_seconds": round(run.seconds, 1),
            "trainable_parameters": run.parameters,
        }
        for name, run in tuned.items()
    }
    write_metrics(output, figures, options.seed, started)
    draw_report(output / "report.png", tuned)
    rows = []
    for name, run in tuned.items():
        leap = run.leap
        cells = ("none", "") if leap is None else (f"{leap.rise:.3f}", f"{leap.start_step}-{leap.end_step}")
        rows.append((name, f"{run.curve[-1][1]:.3f}", *cells, f"{run.seconds:.0f} s"))
    print_summary(
        "Quickstart: ControlNet",
        ("SSIM at the end", "largest leap", "between steps", "time"),
        rows,
        "SSIM: similarity of blurred Canny maps, of held-out pictures and of what was drawn after their maps.",
        output,
        f"ControlNet   {export}   (diffusers' ControlNetModel.from_pretrained opens it)\n"
        "Next         difftune init FOLDER --control canny, of your own pictures",
    )


def interval_of(steps: int) -> int:
    """Steps between validations: a dozen validations per run, or two in a short run.

    Example:
        >>> interval_of(600), interval_of(40), interval_of(1)
        (50, 20, 1)
    """
    return steps // 12 if steps >= STEPS else max(1, -(-steps // 2))


def flowers(path: Path) -> list[str]:
    """Settings for training on these pictures; torchvision's are downloaded if missing."""
    if path.suffix == ".npz":
        sources = {"target": "train", "val_target": "test"}  # the file's own names
        kind, key = "lightning_difftune.data.NpzImages", "path"
    else:
        from torchvision.datasets import Flowers102

        try:
            Flowers102(str(path), download=True)
        except Exception as error:  # the download may raise anything without a connection
            raise DataError(
                f"Oxford Flowers is not in {path} and cannot be downloaded ({type(error).__name__}: {error}). Run this "
                "where there is a connection, copy the folder, and name it with --flowers."
            ) from error
        sources = {"target": "test", "val_target": "train"}
        kind, key = "torchvision.datasets.Flowers102", "root"
    settings = []
    for name, split in sources.items():
        source = f"--data.init_args.{name}.init_args.source"
        settings += [source, kind, f"{source}.init_args.{key}", str(path), f"{source}.init_args.split", split]
    return settings


def strip_of(grids: dict[int, Path], columns: int) -> tuple[list[int], Tensor]:
    """Steps of a training, and pictures (steps + 1, columns, 3, H, W): the controls, then the generated ones."""
    chosen = evenly(list(grids), SHOWN)
    at = [pictures_of(grids[step], 3, columns) for step in chosen]
    return chosen, torch.stack([at[0][0], *(pictures[1] for pictures in at)])


def draw_report(path: Path, tuned: dict[str, Tuned], columns: int = 8) -> None:
    """Draw both curves, and each method's pictures for the same controls at the same steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6.2), layout="constrained", facecolor="white")
    axes = figure.subplot_mosaic([["curve", *tuned]], width_ratios=[1.1, 1, 1])
    series = {name: [(step, [value]) for step, value in run.curve] for name, run in tuned.items()}
    curves(axes["curve"], series, "How well pictures follow held-out edges", "SSIM of blurred Canny maps")
    for name, run in tuned.items():
        steps, strip = strip_of(run.grids, columns)
        labels = ["control", *(f"step {step}" for step in steps)]
        picture_grid(axes[name], strip.flatten(0, 1), columns, name, labels)
    figure.suptitle("A Canny ControlNet for 32 px flowers: the same steps, batch, start and noise", fontsize=13)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
