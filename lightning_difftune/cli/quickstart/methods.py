"""The two methods that a quickstart sets side by side, each a ``difftune fit``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from lightning_difftune.cli.lightning import DiffTuneCLI, run_lightning

METHODS = {"Diff-Tuning": [], "Full fine-tuning": ["presets/full.yaml"]}  # overlays on the quickstart's config


def tune(name: str, config: str, output: Path, seed: int, settings: Sequence[str]) -> tuple[DiffTuneCLI, float]:
    """Run one method in a folder of its own below ``output``, where the memory bank is, too.

    Args:
        name: One of :data:`METHODS`.
        config: The file below the installed configs.
        output: The quickstart's folder.
        seed: Seed of the run.
        settings: Further arguments of the command line.

    Returns:
        The finished run and the seconds it took.
    """
    folder = output / name.lower().replace(" ", "-")
    overlays = METHODS[name]
    with as_file(files("lightning_difftune.configs")) as configs:
        args = ["fit"]
        for file in [config, *overlays]:
            args += ["--config", str(configs / file)]
        if not overlays:
            args += ["--data.init_args.bank", str(output / "bank")]
        args += [*settings, "--seed_everything", str(seed)]
        args += ["--trainer.default_root_dir", str(folder), "--trainer.logger.init_args.save_dir", str(folder)]
        start = time.perf_counter()
        cli = run_lightning(args)
    return cli, time.perf_counter() - start
