"""``difftune report``: a run as one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_difftune.cli.report.page import page
from lightning_difftune.cli.report.run_folder import find_run, read_run
from lightning_difftune.errors import DataError

DESCRIPTION = """Write a run's curves, pictures, config, environment and what to try next as one HTML page.

The page needs no network and no other file, so it can be sent to someone. Runs that are still going or were killed have
what they got to.

  difftune report runs/quickstart/diff-tuning
  difftune report runs/dit/flowers/lightning_logs/version_0 --output flowers.html"""


def report(argv: Sequence[str]) -> None:
    """Write the page and say where it is.

    Args:
        argv: The command line after ``report``.

    Raises:
        DataError: If the folder is no run's, or the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="difftune report", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run, or the trainer's default_root_dir for its latest one")
    parser.add_argument("--output", type=Path, default=None, help="the page (default: report.html in the run's folder)")
    options = parser.parse_args(argv)
    folder = find_run(options.run)
    output = options.output or folder / "report.html"
    content = page(read_run(folder)).encode()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(content)
    except OSError as error:
        raise DataError(f"The report cannot be written: {error}. Choose another place: --output FILE.html.") from error
    print(f"{output}: {len(content) / 1e6:.1f} MB, of the run in {folder}")
