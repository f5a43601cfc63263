"""``difftune quickstart``: Diff-Tuning on real handwriting."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_difftune.cli.quickstart.methods import METHODS, print_summary, tune, write_metrics
from lightning_difftune.cli.tuned import averaged_weights, count_trainable, scoring
from lightning_difftune.data import HandwrittenDigits, ImageTargets, MemoryBank
from lightning_difftune.files import atomic_file
from lightning_difftune.metrics import RecognisedDigits
from lightning_difftune.models import export_dit, load_dit
from lightning_difftune.pictures import to_uint8
from lightning_difftune.plots import curves, picture_grid

COLUMNS = 20  # pictures per digit that are generated and classified


@dataclass
class Tuned:
    """One finished method."""

    samples: Tensor  # (10 * COLUMNS, 1, 20, 20) uint8, one row per digit
    recognised: float  # share that the classifier recognises as the digit of their row
    curve: list[tuple[int, float]]  # Fréchet distance over training steps
    seconds: float
    parameters: int


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Pictures (N, 1, 20, 20) uint8 and labels (N,) of the quickstart."""
    source = HandwrittenDigits("train" if split == "train" else "test", crop=24)
    return ImageTargets(source, image_size=20, channels=1).uint8(range(len(source))), torch.from_numpy(source.labels)


def quickstart_digits(output: Path, options: argparse.Namespace) -> None:
    """Sample a bank, tune twice, export, and draw the report."""
    started = time.perf_counter()
    evaluator = RecognisedDigits(COLUMNS)
    real, labels = digits("test")
    accuracy = (evaluator.classifier.classify(real) == labels).float().mean().item()

    settings = []
    if options.steps is not None:
        settings += ["--trainer.max_steps", str(options.steps)]
        settings += ["--trainer.val_check_interval", str(max(1, options.steps // 4))]
    tuned, export = dict[str, Tuned](), output / "dit-nano-digits.safetensors"
    for name in METHODS:
        cli, seconds = tune(name, "quickstart.yaml", output, options.seed, settings)
        with averaged_weights(cli):
            samples = evaluator.samples(cli.model)
            if name == "Diff-Tuning":
                export_dit(cli.model.dit, export, overwrite=True)
        (distance,) = scoring(cli)
        tuned[name] = Tuned(samples, evaluator.share(samples), distance.history, seconds, count_trainable(cli))
    load_dit(export)  # check that it opens
    figures = {
        name: {
            "recognised": round(run.recognised, 4),
            "frechet_distance_digit_classifier": [
                {"step": step, "value": round(value, 4)} for step, value in run.curve
            ],
            "fit_seconds": round(run.seconds, 1),
            "trainable_parameters": run.parameters,
        }
        for name, run in tuned.items()
    }
    of_real = {"classifier_accuracy_on_real_test_digits": round(accuracy, 4), "pictures_counted": 10 * COLUMNS}
    write_metrics(output, figures, options.seed, started, **of_real)
    draw_report(output / "report.png", real, MemoryBank(output / "bank"), tuned)
    print_summary(
        "Quickstart",
        ("recognised", "Fréchet distance", "time"),
        (
            (name, f"{run.recognised:.1%}", f"{run.curve[-1][1]:.2f}", f"{run.seconds:.0f} s")
            for name, run in tuned.items()
        ),
        f"Recognised: share of {10 * COLUMNS} generated pictures that a classifier (accuracy {accuracy:.1%} on real "
        "test digits) takes for the digit of their row.",
        output,
        f"Tuned model  {export}   (load_dit opens it)\n"
        f"A run's page difftune report {output / 'diff-tuning'}\n"
        "Next         difftune init FOLDER, of your own pictures in one folder for each class",
    )


def draw_report(path: Path, real: Tensor, bank: MemoryBank, tuned: dict[str, Tuned]) -> None:
    """Draw real digits, the pre-trained model's samples, both tuned models' samples, and the curves."""
    from matplotlib.figure import Figure

    digits = [str(digit) for digit in range(10)]
    by_digit = torch.cat([real[100 * digit : 100 * digit + 10] for digit in range(10)])
    latents = bank.read(torch.arange(100))["latents"]
    pretrained = to_uint8(latents)

    figure = Figure(figsize=(13, 9), layout="constrained", facecolor="white")
    axes = figure.subplot_mosaic([["real", "pretrained", "curve"], [*tuned, "curve"]], width_ratios=[1, 1, 1.15])
    picture_grid(axes["real"], by_digit, 10, "Target: real digits, held out", digits)
    picture_grid(axes["pretrained"], pretrained, 10, "Pre-trained on Omniglot: its memory bank")
    for name, run in tuned.items():
        shown = run.samples.view(10, COLUMNS, *run.samples.shape[1:])[:, :10].flatten(0, 1)
        picture_grid(axes[name], shown, 10, f"{name}: {run.recognised:.1%} recognised as their row", digits)
    series = {
        f"{name}: {run.curve[-1][1]:.3g} at the end": [(step, [value]) for step, value in run.curve]
        for name, run in tuned.items()
    }
    curves(axes["curve"], series, "Distance to the real test digits", "Fréchet distance (digit-classifier features)")
    axes["curve"].set_ylim(bottom=0)
    figure.suptitle("From Omniglot characters to digits: the same steps, batch and start", fontsize=13)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
