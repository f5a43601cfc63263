"""``difftune report``: a run as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_difftune.cli.arguments import CommandParser
from lightning_difftune.cli.facts import sample_command
from lightning_difftune.cli.report.page import page
from lightning_difftune.cli.run import Run
from lightning_difftune.errors import DataError

DESCRIPTION = """Write a run's curves, pictures, config, environment and what to try next as one HTML page.

The page needs no network and no other file, so it can be sent to someone. Runs that are still training or were killed
have what they got to.

  difftune report runs/quickstart/diff-tuning
  difftune report runs/flowers/lightning_logs/version_0 --output flowers.html

RUN is the run's default_root_dir (its newest launch that trained), the folder of a launch, or a checkpoint."""


def report(argv: Sequence[str]) -> None:
    """Write the page and say where it is."""
    parser = CommandParser("report", DESCRIPTION)
    parser.add_run()
    parser.add_argument("--output", type=Path, default=None, help="the page (default: report.html in the run's folder)")
    options = parser.parse_args(argv)
    run = Run.find(options.run)
    output = options.output or run.path / "report.html"
    content = page(run).encode()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(content)
    except OSError as error:
        raise DataError(f"The report cannot be written: {error}. Choose another place: --output FILE.html.") from error
    print(f"{output}: {len(content) / 1e6:.1f} MB, of the run in {run.path}; open it in a browser")
    if run.checkpoint is not None:
        print(f"Next: {sample_command(run)}")
