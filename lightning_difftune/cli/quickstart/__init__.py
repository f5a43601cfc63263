"""``difftune quickstart``: tunes a bundled model and draws a report, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_difftune.cli.arguments import CommandParser

DESCRIPTION = """Diff-Tune a bundled model, compare with full fine-tuning, and draw a report: the Omniglot DiT to
handwritten digits in about four minutes, or a Canny ControlNet for 32 px flowers."""


def quickstart(argv: Sequence[str]) -> None:
    """Diff-Tune a bundled model, compare with full fine-tuning and draw the report."""
    parser = CommandParser("quickstart", DESCRIPTION)
    parser.add_argument("--controlnet", action="store_true", help="the ControlNet instead of the digits")
    parser.add_argument("--output", type=Path, default=None, help="folder of the results (default: below runs/)")
    parser.add_argument("--steps", type=int, default=None, help="training steps of each method (default: the config's)")
    parser.add_argument("--seed", type=int, default=0, help="of model, data and bank (default: 0)")
    parser.add_argument(
        "--flowers",
        type=Path,
        default=Path("data/flowers"),
        help="with --controlnet: torchvision's folder of Flowers102, which is downloaded if it is missing, or an .npz "
        "file with splits train and test (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    if options.controlnet:
        from lightning_difftune.cli.quickstart.controlnet import quickstart_controlnet

        quickstart_controlnet(options.output or Path("runs/quickstart-controlnet"), options)
    else:
        from lightning_difftune.cli.quickstart.digits import quickstart_digits

        quickstart_digits(options.output or Path("runs/quickstart"), options)
