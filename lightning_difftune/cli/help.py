"""What the commands that take a config say about their keys: the ones that people set, and the one that was meant."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Collection, Iterable
from importlib import import_module

KEYS = {  # those that people set, in what is left of a line of 80 characters
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
        "batch_size": "samples of a step and process, both streams",
        "bank": "folder of the memory bank; null for none",
        "bank_size": "samples in the memory bank",
        "retention_share": "share of a batch that comes from the bank",
        "latent_cache": "folder of encoded pictures, for latent models",
        "horizontal_flip": "whether half of the pictures are mirrored",
        "num_workers": "processes that read the pictures",
    },
    "trainer": {
        "max_steps": "length of the run in steps",
        "val_check_interval": "steps between two validations",
        "precision": "bf16-mixed, 16-mixed or 32-true",
        "devices": "how many GPUs or processes",
        "callbacks": "+= adds one, such as EMA or SampleGrid",
        "default_root_dir": "folder of logs and checkpoints",
    },
}


def short_help(command: str) -> str:
    """A screen about a command that takes a config: how it is used, and the keys that people set."""
    use = {"fit": "resume a run", "predict": "build the bank of a run"}.get(command, "look at a finished run")
    lines = [
        f"difftune {command} --config FILE [--config OVERLAY ...] [--KEY VALUE ...]",
        f"difftune {command} RUN [--KEY VALUE ...]      {use}",
        "",
        "--config may be given several times; a later one counts more, and keys given",
        "as options count most. A key inside of a class is written without init_args.",
        "",
        row("model CLASS", "the model family, such as DiTDiffTuningModule"),
    ]
    for part, keys in KEYS.items():
        lines += [row(f"{part}.{key}", about) for key, about in keys.items()] + [""]
    lines += [
        row("seed_everything N", "seed of model, data and bank"),
        row("print_config", "print the composed config and stop"),
        "",
        "All keys of a class, such as DiTDiffTuningModule or ImageFolder:",
        f"  difftune {command} --model.help CLASS     (or --data.help, --data.target.help)",
        f"All keys of the trainer: difftune {command} --help_all",
    ]
    return "\n".join(lines)


def row(key: str, about: str) -> str:
    """A line about a key."""
    return f"  --{key:<28}{about}"


def clearer(message: str, options: Iterable[str]) -> str:
    """A message of jsonargparse's about a key or a class that is not there, in one line, with the one that was meant.

    Args:
        message: Of jsonargparse.
        options: All options of the command.
    """
    if re.match(r"the following arguments are required: (\w+\.)?data", message):
        return "There is no model and no data. Pass --config FILE, or name a run first, to resume it."
    if match := re.search(r"""Parser key "config":.*File does not exist: '(.+)'""", message, re.DOTALL):
        return f"The config {match[1]} does not exist."
    keys = {option.removeprefix("--") for option in options}
    place = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    paths = re.findall(r"Problem with given class_path '([^']+)'", message)
    if match := re.search(r"Option '([^']+)' is not accepted\s*$", message):
        name = match[1]
        if not paths:
            return f"{name} is not a key.{meant(name.partition('.')[0], {key.partition('.')[0] for key in keys})}"
        known = parameters_of(paths[-1])
        takes = f"; it takes {', '.join(sorted(known))}" if known else ""
        near = meant(name.partition(".")[0], known)
        return f"{place}.{name} is not a key: {paths[-1]} has no argument {name!r}{near and '.'}{near or takes + '.'}"
    if match := re.search(r"(Group|Subcommand) '([^']+)' does not accept option '([^']+)'", message):
        name = match[3] if match[1] == "Subcommand" else f"{match[2]}.{match[3]}"
        return f"{name} is not a key.{meant(name, keys)}"
    if match := re.match(r"unrecognized arguments: (--[\w.]+)", message):
        name = match[1].removeprefix("--")
        near = meant(name, keys) or meant(name.partition(".")[0], {key.partition(".")[0] for key in keys})
        return f"{match[1]} is not an option.{near}"
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'\s*$", message):
        near = meant(match[2], {name for name in dir(import_module(match[1])) if not name.startswith("_")})
        return f"{place}: {match[1]} has no class {match[2]}.{near}"
    return message


def meant(name: str, known: Collection[str]) -> str:
    """`` Did you mean ...?`` for a name that is close to known ones; else empty."""
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def parameters_of(path: str) -> set[str]:
    """Arguments of a class by its path; none if they cannot be had."""
    module, _, name = path.rpartition(".")
    try:
        return {key for key in inspect.signature(getattr(import_module(module), name)).parameters if key != "self"}
    except (ImportError, AttributeError, ValueError, TypeError):
        return set()
