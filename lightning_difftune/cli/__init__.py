"""The command line: ``difftune fit | validate | test | predict --config ...``, ``quickstart`` and ``compare``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_difftune import __version__
from lightning_difftune.errors import ConfigError, DiffTuneError

HELP = f"""difftune {__version__}: Diff-Tuning for diffusion models.

  difftune quickstart            Diff-Tune a small bundled model to handwritten digits: about four minutes on a CPU
  difftune quickstart --controlnet
                                 train a Canny ControlNet for 32 px flowers, with and without Diff-Tuning
  difftune fit --config ...      fine-tune; builds a missing memory bank first
  difftune validate --config ... validation loss, FID and sample grid
  difftune plan --config ...     what it will cost: operations, memory, disk and hours
  difftune compare STUDY.yaml    run configs over seeds, resume, and compare them in tables and figures
  difftune predict --config ...  build the memory bank on purpose, on all devices
  difftune swap --config ... --ckpt_path ...
                                 pictures whose last steps the pre-trained model does, and their distance
  difftune data check PATH       what is in a data set: classes, sizes, damaged files, duplicates, the split
  difftune sample SOURCE ...     pictures of a run, an export or a bundled model, by class or prompt
  difftune export --ckpt_path ... --output ...
                                 a run's tuned model as a file or folder of its own, averaged and merged
  difftune report RUN            a run's curves, pictures and config, and what to try next, as one HTML page

Configs compose from left to right, and any key can be set on the command line:

  difftune fit --config configs/dit/base.yaml --config configs/dit/flowers.yaml --trainer.devices 8
  difftune fit --config configs/dit/base.yaml --config configs/presets/paper.yaml --print_config

`difftune COMMAND --help` lists the options of a command. `--debug` anywhere shows the traceback of an error.
"""


COMMANDS = (
    *("quickstart", "fit", "validate", "test", "predict", "compare", "swap", "sample", "export", "plan", "data"),
    "report",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``difftune``; returns the exit status: 0, or 2 for a mistake in the input."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if not args or args[0] in {"-h", "--help"}:
        print(HELP)
        return 0
    if args[0] == "--version":
        print(__version__)
        return 0
    try:
        return run(args)
    except DiffTuneError as error:
        if debug:
            raise
        print(f"difftune: {message_of(error)}", file=sys.stderr)
        return 2


def run(args: list[str]) -> int:
    """Run one command and return its exit status; imports what it needs, so that ``--help`` is quick."""
    if args[0] == "quickstart":
        from lightning_difftune.cli.quickstart import quickstart

        quickstart(args[1:])
    elif args[0] == "compare":
        from lightning_difftune.cli.compare import compare

        compare(args[1:])
    elif args[0] == "swap":
        from lightning_difftune.cli.swap import swap

        swap(args[1:])
    elif args[0] == "data":
        from lightning_difftune.cli.data_check import data

        return data(args[1:])
    elif args[0] == "sample":
        from lightning_difftune.cli.sample import sample

        sample(args[1:])
    elif args[0] == "export":
        from lightning_difftune.cli.export import export

        export(args[1:])
    elif args[0] == "plan":
        from lightning_difftune.cli.plan import plan

        plan(args[1:])
    elif args[0] == "report":
        from lightning_difftune.cli.report import report

        report(args[1:])
    elif args[0] in COMMANDS or args[0].startswith("-"):
        from lightning_difftune.cli.lightning import run_lightning

        run_lightning(args)
    else:
        raise ConfigError(f"{args[0]!r} is no command; choose from {', '.join(COMMANDS)}. `difftune --help` says more.")
    return 0


def message_of(error: DiffTuneError) -> str:
    """What an error says; one from a data loader's worker comes inside that process's printed traceback."""
    kind = type(error)
    return str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()
