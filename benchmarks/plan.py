"""The estimate of `difftune plan --device measured`, compared with the run itself.

    python benchmarks/plan.py
    python benchmarks/plan.py -- --config configs/quickstart.yaml --trainer.max_steps 300

Plans a run, then does it, and compares the seconds of its memory bank, its training and its evaluation. They should
agree within 20 % on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
from harness import now, parser_of, report
from lightning.pytorch.callbacks import Callback

from lightning_difftune.cli.lightning import run_lightning
from lightning_difftune.cli.plan import plan


class Clock(Callback):
    """Seconds before the training, of the training, and of its validations."""

    def __init__(self) -> None:
        self.began, self.seconds = now(), {"memory bank": 0.0, "training": 0.0, "evaluation": 0.0}
        self.validation = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The bank is built."""
        self.seconds["memory bank"], self.began = now() - self.began, now()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A validation begins."""
        self.validation = now()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A validation ends."""
        self.seconds["evaluation"] += now() - self.validation

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The training ends."""
        self.seconds["training"] = now() - self.began - self.seconds["evaluation"]


def main(options: argparse.Namespace) -> None:
    """Plan, run, compare."""
    config = options.config or ["--config", "configs/quickstart.yaml"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan([*config, "--device", "measured", "--json", str(folder / "plan.json")])
        planned = json.loads((folder / "plan.json").read_text())["phases"]
        places = ["--trainer.default_root_dir", str(folder), "--data.init_args.bank", str(folder / "bank")]
        cli = run_lightning([*config, *places, "--trainer.enable_progress_bar", "false"], run=False)
        clock = Clock()
        trainer: Any = cli.trainer
        trainer.callbacks.append(clock)
        clock.began = now()
        trainer.fit(cli.model, datamodule=cli.datamodule)
    results = {}
    for phase, measured in clock.seconds.items():
        if phase in planned:
            seconds = planned[phase]["seconds"]
            results[phase] = {"planned": seconds, "measured": measured, "ratio": seconds / measured}
    whole = {key: sum(result[key] for result in results.values()) for key in ("planned", "measured")}
    results["in all"] = {**whole, "ratio": whole["planned"] / whole["measured"]}
    rows = [
        (phase, f"{row['planned']:.1f} s", f"{row['measured']:.1f} s", f"{row['ratio']:.2f}")
        for phase, row in results.items()
    ]
    report(options, "Plan against run", ("phase", "planned", "measured", "planned / measured"), rows, results)


if __name__ == "__main__":
    parser = parser_of(__doc__, "plan")
    parser.add_argument("config", nargs="*", help="--config and overrides, after --; the quickstart's by default")
    main(parser.parse_args())
