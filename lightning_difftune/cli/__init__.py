"""The command line: ``difftune fit | validate | test | predict --config ...`` and the commands around them."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from lightning_difftune import __version__
from lightning_difftune.errors import ConfigError, DiffTuneError, did_you_mean

# The commands of `difftune`, in the groups of the help.
COMMANDS = {
    "quickstart": "Diff-Tune a small bundled model on a CPU, in four minutes",
    "init": "look at your pictures and write a config for them",
    "data": "what is in a data set: `difftune data check PATH`",
    "plan": "what a config will cost: operations, memory, disk and hours",
    "fit": "fine-tune; builds a missing memory bank first",
    "validate": "validation loss, FID and sample grid of a checkpoint",
    "test": "the loss on a test set; without one, on held-out pictures",
    "predict": "build the memory bank on purpose, on all devices",
    "sample": "pictures of a run, an export or a bundled model, as PNG files",
    "report": "a run as one HTML page: curves, pictures, what to try next",
    "export": "a tuned model as a file or folder for others, or on the hub",
    "swap": "leave the last steps to the pre-trained model, and measure",
    "compare": "a study: configs over seeds, in tables and figures",
}


def lines_about(*names: str) -> str:
    """The help's lines about some commands."""
    return "\n".join(f"  {name:<12}{COMMANDS[name]}" for name in names)


HELP = f"""difftune {__version__}: Diff-Tuning for diffusion models

First steps
{lines_about("quickstart", "init", "data", "plan")}

Runs: each takes --config FILE several times, and any key of it as an option
{lines_about("fit", "validate", "test", "predict")}

Results
{lines_about("sample", "report", "export", "swap", "compare")}

Examples
  difftune quickstart --controlnet
  difftune fit --config configs/dit/base.yaml --config configs/dit/flowers.yaml
  difftune fit --config configs/quickstart.yaml --trainer.max_steps 100
  difftune fit --config configs/quickstart.yaml --print_config
  difftune fit RUN
  difftune sample RUN --classes sunflower rose
  difftune export RUN --output tuned

RUN is the folder of a run, or one of its checkpoints. `difftune COMMAND --help`
lists the options of a command; --debug, anywhere, shows an error's traceback.

Exit status: 0 done; 1 `data check` found pictures that cannot be read, or
there is a bug, with its traceback; 2 a mistake in the input, which is named;
130 stopped by Ctrl-C: `difftune fit RUN` resumes from the last checkpoint;
143 a run was stopped by a signal and has saved: `difftune fit RUN` resumes it.
"""

# The most used keys of a config, in the rest of a line of 80 characters.
KEYS = {
    "model": {
        "model": "what is tuned: a name, file, folder or hub id",
        "objective": "the loss: Eq. 5 of the paper with a schedule",
        "optimizer": "class of an optimizer; lr and others below it",
        "lr_scheduler": "class of a scheduler, stepped each step",
        "tuner": "LoRA or another method of few parameters",
        "sampler": "how pictures are drawn for FID and grids",
        "bank_sampler": "how the memory bank is drawn",
    },
    "data": {
        "target": "training pictures, such as ImageFolder",
        "val_target": "held-out pictures",
        "num_classes": "classes of the target",
        "image_size": "side of the pictures in pixels",
        "channels": "1 (grey) or 3 (RGB)",
        "batch_size": "samples of a batch on each process, both streams",
        "bank": "folder of the memory bank; null for none",
        "bank_size": "samples in the memory bank",
        "retention_share": "share of a batch that comes from the bank",
        "latent_cache": "folder of encoded pictures, for latent models",
        "horizontal_flip": "whether half of the pictures are mirrored",
        "num_workers": "processes that read the pictures",
    },
    "trainer": {
        "max_steps": "length of the run in steps",
        "val_check_interval": "batches between two validations",
        "precision": "bf16-mixed, 16-mixed or 32-true",
        "devices": "how many GPUs or processes",
        "callbacks": "+= adds one, such as EMA or SampleGrid",
        "default_root_dir": "folder of logs and checkpoints",
    },
}

# Commands that are not Lightning's, and their modules; each is a function of that name that takes the arguments.
OWN = {name: name for name in ("quickstart", "init", "plan", "sample", "report", "export", "swap", "compare")}
OWN["data"] = "data_check"

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # full or read-only
INTERRUPTED = 130  # exit status of a process ended by Ctrl-C, 128 + 2
STOPPED = 143  # exit status of a process ended by SIGTERM, 128 + 15


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``difftune``; returns the exit status, see :data:`HELP`."""
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
        return start(args)
    except DiffTuneError as error:
        if debug:
            raise
        print(f"difftune: {message_of(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if debug or (error.filename is None and error.errno not in DISK):  # errors of a full disk name no file
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
        print(f"difftune: {what}. --debug shows where it was raised.", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as error:
        if KeyboardInterrupt in (type(error), type(error.__context__)) and not debug:  # Lightning exits from within
            print("\ndifftune: stopped by Ctrl-C", file=sys.stderr)
            return INTERRUPTED
        if type(error) in (KeyboardInterrupt, SystemExit):
            raise
        return STOPPED  # Lightning's SIGTERMException, whose module is not imported for `--help`


def start(args: list[str]) -> int:
    """Run one command and return its exit status; imports lazily, so that ``--help`` is quick."""
    command, *rest = args
    if command in OWN:
        module = import_module(f"{__name__}.{OWN[command]}")
        return int(getattr(module, command)(rest) or 0)
    if command not in COMMANDS and not command.startswith("-"):
        known = did_you_mean(command, COMMANDS) or f"Choose from {', '.join(COMMANDS)}."
        raise ConfigError(f"{command!r} is not a command. {known} `difftune --help` says more.")
    if {"-h", "--help"} & {*rest}:
        print(short_help(command))
        return 0
    from lightning_difftune.cli.lightning import run_lightning

    args = ["--help" if arg == "--help_all" else arg for arg in args]
    trainer: Any = run_lightning(args).trainer
    if command == "fit" and not trainer.fast_dev_run:
        from lightning_difftune.cli.facts import after_fit

        told = after_fit(trainer)  # on all processes, since it needs the logger's folder
        if trainer.is_global_zero:
            print(f"\n{told}")
    return 0


def message_of(error: DiffTuneError) -> str:
    """The message of an error, extracted from the traceback if a data loader's worker raised it."""
    kind = type(error)
    return str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()


def short_help(command: str) -> str:
    """A short help for a command that takes a config: its usage and the most used keys."""
    use = {"fit": "resume a run", "predict": "build the bank of a run"}.get(command, "look at a finished run")
    keys = "\n\n".join(
        "\n".join(f"  --{f'{part}.{key}':<28}{about}" for key, about in rows.items()) for part, rows in KEYS.items()
    )
    return f"""difftune {command} --config FILE [--config OVERLAY ...] [--KEY VALUE ...]
difftune {command} RUN [--KEY VALUE ...]      {use}

--config may be given several times; a later one counts more, and keys given
as options count most. A key inside of a class is written without init_args.

  --model CLASS                 the model family, such as DiTDiffTuningModule
{keys}

  --seed_everything N           seed of model, data and bank
  --print_config                print the composed config and stop

All keys of a class, such as DiTDiffTuningModule, and all those of the trainer:
  difftune {command} --model.help lightning_difftune.DiTDiffTuningModule
  difftune {command} --data.help lightning_difftune.MemoryBankDataModule
  difftune {command} --help_all"""
