"""The cost of the instruments: the forgetting meter in training, and swapped pictures with a shared trajectory.

    python benchmarks/instruments.py

Diff-Tunes the bundled models, dit-nano-omniglot to digits and a Canny ControlNet on sd-nano-flowers to random pictures,
with a ForgettingMeter at its default interval, and times its hooks as a share of the training without them. Then it
generates the eleven swapped pictures of Fig. 1 in one pass with a shared trajectory, and in eleven separate passes, in
turns. The meter should stay below 3 %.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from harness import Stopwatch, now, parser_of, quiet_trainer, report

from lightning_difftune import ControlNetDiffTuningModule, DiTDiffTuningModule, MemoryBankDataModule
from lightning_difftune.callbacks import ForgettingMeter
from lightning_difftune.data import HandwrittenDigits
from lightning_difftune.data.annotators import Canny
from lightning_difftune.sampling import Sampler

FRACTIONS = [k / 10 for k in range(11)]


def digits(folder: Path) -> tuple[DiTDiffTuningModule, MemoryBankDataModule]:
    """The quickstart's transfer."""
    sampler = Sampler(num_inference_steps=10, guidance_scale=2.0, guidance_channels=None)
    module = DiTDiffTuningModule("dit-nano-omniglot", num_classes=10, sampler=sampler)
    data = MemoryBankDataModule(
        HandwrittenDigits("train", crop=24),
        num_classes=10,
        image_size=20,
        channels=1,
        bank=folder / "bank",
        bank_size=250,
        batch_size=64,
        val_target=HandwrittenDigits("test", crop=24),
    )
    return module, data


def flowers(folder: Path) -> tuple[ControlNetDiffTuningModule, MemoryBankDataModule]:
    """A ControlNet on pictures of noise: what they show does not change what a step costs."""
    sampler = Sampler(None, 4, 1.0, None)
    module = ControlNetDiffTuningModule(Canny(), "sd-nano-flowers", sampler=sampler, bank_sampler=sampler)
    pictures = np.random.default_rng(0).integers(0, 256, (256, 32, 32, 3), dtype=np.uint8)
    source: Any = [(picture, "a photo of a rose") for picture in pictures]
    data = MemoryBankDataModule(
        source,
        image_size=32,
        bank=folder / "bank",
        bank_size=100,
        latent_cache=folder / "latents",
        batch_size=16,
        val_target=source[:64],
    )
    return module, data


def meter(module: L.LightningModule, data: MemoryBankDataModule, folder: Path, intervals: int) -> dict[str, Any]:
    """The meter's shares of a training: of its regular measurements, and of its start in addition."""
    data.prepare_data()
    found = ForgettingMeter(dirpath=folder)
    # Builds what is missing, and finds the interval after enough samples of the bank.
    quiet_trainer(10, found, limit_val_batches=1).fit(module, data)
    measured = ForgettingMeter(dirpath=folder)
    clock = Stopwatch(measured, ("on_train_start", "on_train_batch_start", "on_train_batch_end", "on_train_end"), 0)
    assert found.interval is not None
    steps = intervals * found.interval
    quiet_trainer(steps, clock, measured, limit_val_batches=1).fit(module, data)
    regular = clock.own["on_train_batch_end"] / clock.training
    return {"interval": found.interval, "steps": steps, "share": regular, "share_with_start": clock.share}


def swap(module: DiTDiffTuningModule, repeats: int) -> dict[str, float]:
    """Seconds of the shared pass and of separate ones, medians of runs in turns; the pictures are compared."""
    indices = torch.arange(32)
    seconds: dict[str, list[float]] = {"shared": [], "separate": []}
    module.eval()
    for _ in range(repeats):
        start = now()
        shared = module.generate_swapped(indices, FRACTIONS)
        middle = now()
        separate = torch.cat([module.generate_swapped(indices, [fraction]) for fraction in FRACTIONS])
        seconds["shared"].append(middle - start)
        seconds["separate"].append(now() - middle)
        if not torch.equal(shared, separate):
            raise SystemExit("The pictures of the shared pass are not those of the separate ones.")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return medians | {"ratio": medians["separate"] / medians["shared"]}


def main(options: argparse.Namespace) -> None:
    """Run the three cases."""
    L.seed_everything(0)
    results: dict[str, Any] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (("DiT on digits", digits), ("ControlNet", flowers)):
            (Path(folder) / name).mkdir()
            module, data = make(Path(folder) / name)
            row = results[f"forgetting meter, {name}"] = meter(module, data, Path(folder) / name, options.intervals)
            figures = f"{row['share']:.2%} every {row['interval']} steps; {row['share_with_start']:.2%} with its start"
            rows.append((f"forgetting meter, {name}, {row['steps']} steps", figures))
            if isinstance(module, DiTDiffTuningModule):
                results["swap"] = swap(module, options.repeats)
    both = results["swap"]
    figures = f"{both['shared']:.2f} s in one pass, {both['separate']:.2f} s in eleven; {both['ratio']:.2f} times"
    rows.append(("swap, 11 fractions of 32 digits, 10 steps", figures))
    report(options, "Instruments", ("instrument", "cost"), rows, results)


if __name__ == "__main__":
    parser = parser_of(__doc__, "instruments")
    parser.add_argument("--intervals", type=int, default=3, help="intervals of the meter that are timed")
    parser.add_argument("--repeats", type=int, default=5, help="turns of the two ways to swap")
    main(parser.parse_args())
