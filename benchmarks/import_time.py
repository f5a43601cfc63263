"""How long imports take, each in a fresh interpreter: the least and the median of a few.

    python benchmarks/import_time.py

`import lightning_difftune` should stay far below 3 seconds; the rest is torch, Lightning and torchmetrics.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

STATEMENTS = (
    "pass",
    "import lightning_difftune",
    "from lightning_difftune.cli import main",
    "import torch",
    "from lightning_difftune import DiffTuningObjective",
    "import lightning",
    "from lightning_difftune import MemoryBankDataModule",
    "from lightning_difftune import DiTDiffTuningModule",
    "from lightning_difftune.callbacks import FID",
)


def main() -> None:
    """Time each statement and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    table = Table("statement", "least (s)", f"median of {repeats} (s)")
    for statement in STATEMENTS:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            seconds.append(time.perf_counter() - start)
        table.add_row(statement, f"{min(seconds):.2f}", f"{statistics.median(seconds):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
