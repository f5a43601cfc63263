"""Quality of the samples of finished runs against the scale of guidance, also with Domain Guidance.

    python benchmarks/guidance.py RUN [RUN ...] --scales 1 1.5 2 --domain_scales 1.5

RUN is a folder of a class-conditional run with held-out pictures. All its samples start from the same noise.
Diff-Tuning and Self-teacher retain under the null class, on which the samples depend at scales other than 1. With a
domain scale the null class is the pre-trained model's, as `domain_guidance` of a sampler has it. The figures are
written after every scale, and those that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from harness import parser_of, report
from lightning.pytorch.callbacks import Callback

from lightning_difftune.cli.lightning import run_lightning
from lightning_difftune.cli.run import Run
from lightning_difftune.cli.tuned import measure
from lightning_difftune.metrics import EfficientNetLite0Features, SampleQuality


class Scales(Callback):
    """Measures the samples at all scales, in one validation, with the averaged weights if there are any."""

    def __init__(self, name: str, options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
        self.name, self.options, self.results = name, options, results
        self.quality = SampleQuality(
            EfficientNetLite0Features(), options.num_samples, options.batch_size, cache_dir=options.cache_dir
        )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure what is missing."""
        module: Any = pl_module
        own = module.sampler
        settings = [(scale, False) for scale in self.options.scales]
        settings += [(scale, True) for scale in self.options.domain_scales]
        for scale, domain in settings:
            key = f"{scale:g}{' domain' if domain else ''}"
            if key in self.results.setdefault(self.name, {}):
                continue
            module.sampler = replace(own, guidance_scale=scale, domain_guidance=domain)
            self.results[self.name][key] = self.quality.evaluate(module)
            show(self.options, self.results)
        module.sampler = own


def show(options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Print and write the figures so far."""
    rows = [
        [name, key, *(f"{value:.4g}" for value in values.values())]
        for name, scales in results.items()
        for key, values in scales.items()
    ]
    columns = list(next(iter(next(iter(results.values())).values())))
    report(options, "Samples by the scale of guidance", ["run", "scale", *columns], rows, results)


def earlier(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures that are there already, if they are of as many samples."""
    if not options.output.exists():
        return {}
    content = json.loads(options.output.read_text())
    if (count := content["settings"]["num_samples"]) != str(options.num_samples):
        raise SystemExit(f"{options.output} has figures of {count} samples. Take another --output, or as many.")
    return content["results"]


def main(options: argparse.Namespace) -> None:
    """Measure every run."""
    names = [place.resolve().name for place in options.runs]
    if len(set(names)) < len(names):
        raise SystemExit(f"Two of the runs have the same name: {', '.join(names)}.")
    results = earlier(options)
    for name, place in zip(names, options.runs, strict=True):
        run = Run.find(place, saved=True)
        settings = run.settings(tuple(options.trust))
        quiet = [f"--trainer.{key}=false" for key in ("logger", "enable_progress_bar", "inference_mode")]
        quiet.append("--trainer.limit_val_batches=1")
        cli = run_lightning(["--config", yaml.safe_dump(settings), *quiet], run=False)
        assert run.checkpoint is not None
        measure(cli, Scales(name, options, results), run.checkpoint)


if __name__ == "__main__":
    parser = parser_of(__doc__, "guidance")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--scales", type=float, nargs="*", default=[1.0, 1.5, 2.0], help="with the run's own null class"
    )
    parser.add_argument("--domain_scales", type=float, nargs="*", default=[1.5], help="with the pre-trained model's")
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--cache_dir", type=Path, help="features of the real pictures")
    parser.add_argument("--trust", action="append", default=[], metavar="NAME", help="as for difftune fit")
    main(parser.parse_args())
