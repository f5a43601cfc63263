"""Few-step solvers: cost of sampling and quality of digits, by solver and number of steps.

    python benchmarks/solvers.py

Draws digits with the quickstart's Diff-Tuned model (runs/quickstart/dit-nano-digits.safetensors, from `difftune
quickstart`), always from the same noise: Fréchet distance to held-out digits in the digit classifier's features, and
the share that it recognises. At a guidance scale of 1 there is no unconditional pass, as the last lines show.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from harness import now, parser_of, report
from torch import Tensor

from lightning_difftune import DiTDiffTuningModule
from lightning_difftune.data import HandwrittenDigits
from lightning_difftune.data.images import ImageTargets
from lightning_difftune.metrics import DigitClassifier, FrechetDistance
from lightning_difftune.sampling import Sampler, ddim

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SOLVERS = {
    "DDIM": ddim(),
    "DPM-Solver++": DPMSolverMultistepScheduler(**BETAS),
    "UniPC": UniPCMultistepScheduler(**BETAS),
}


def samples_of(module: DiTDiffTuningModule, count: int) -> tuple[Tensor, float]:
    """Pictures (count, 1, H, W) uint8, and seconds for one, the median of the batches."""
    pictures, seconds = [], []
    for indices in torch.arange(count).split(100):
        start = now()
        pictures.append(module.generate(indices).cpu())
        seconds.append((now() - start) / len(indices))
    return torch.cat(pictures), statistics.median(seconds)


def main(options: argparse.Namespace) -> None:
    """Sample with every solver and number of steps."""
    classifier = DigitClassifier()
    held_out = ImageTargets(HandwrittenDigits("test", crop=24), 20, 1)
    real = torch.cat([held_out.uint8(part.tolist()) for part in torch.arange(len(held_out)).split(100)])
    results: dict[str, Any] = {}
    rows = []
    for scale in (options.guidance_scale, 1.0):
        for name, scheduler in SOLVERS.items():
            for steps in options.steps if scale != 1 else options.steps[:1]:
                sampler = Sampler(scheduler, steps, scale, guidance_channels=None)
                module = DiTDiffTuningModule(str(options.model), sampler=sampler)
                module.configure_model()
                pictures, seconds = samples_of(module.eval(), options.samples)
                distance = FrechetDistance(classifier)
                distance.update(real, real=True)
                distance.update(pictures, real=False)
                digits = torch.cat([classifier.classify(part) for part in pictures.split(100)])
                share = (digits == torch.arange(options.samples) % 10).float().mean().item()
                value = distance.compute().item()
                key = f"{name}, {steps} steps, guidance {scale:g}"
                results[key] = {"milliseconds": 1e3 * seconds, "distance": value, "recognised": share}
                rows.append((key, f"{1e3 * seconds:.1f} ms", f"{value:.2f}", f"{share:.1%}"))
    title = f"Solvers, {options.samples} digits of {options.model.name}"
    report(options, title, ("solver", "a picture", "Fréchet distance", "recognised"), rows, results)


if __name__ == "__main__":
    parser = parser_of(__doc__, "solvers")
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/dit-nano-digits.safetensors"))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    main(parser.parse_args())
