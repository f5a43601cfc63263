"""Common parts of both quickstarts: two methods, each a ``difftune fit``, and the printed comparison."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_difftune.cli.lightning import DiffTuneCLI, run_lightning
from lightning_difftune.cli.record import circumstances
from lightning_difftune.cli.tuned import stop_if_asked
from lightning_difftune.files import atomic_write

METHODS = {"Diff-Tuning": [], "Full fine-tuning": ["presets/full.yaml"]}  # overlays on the quickstart's config


def tune(name: str, config: str, output: Path, seed: int, settings: Sequence[str]) -> tuple[DiffTuneCLI, float]:
    """Run one of the methods in its own folder below ``output``, which also has the memory bank.

    ``config`` is an installed config, and ``settings`` are further command-line arguments. Returns the finished run and
    its seconds.
    """
    print(f"\n{name}", flush=True)
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
        stop_if_asked(cli)
    return cli, time.perf_counter() - start


def write_metrics(output: Path, methods: Mapping[str, Any], seed: int, started: float, **others: Any) -> None:
    """Write ``metrics.json``: metrics of each method and of the whole, ``started`` at ``time.perf_counter()``."""
    seconds = round(time.perf_counter() - started, 1)
    metrics = {"methods": methods, **others, "seed": seed, "seconds": seconds, **circumstances()}
    atomic_write(output / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())


def print_summary(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], explained: str, output: Path, results: str
) -> None:
    """Print each method's result, its meaning, and the paths of the files."""
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(("method", *columns)):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(soft_wrap=True)
    console.print()
    console.print(table)
    places = f"Look at      {output / 'report.png'}\nFigures      {output / 'metrics.json'}"
    console.print(f"{explained}\n{places}\n{results}", highlight=False)
