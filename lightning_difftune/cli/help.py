"""What the commands that take a config say about their keys: the ones that people set, and the one that was meant."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Collection, Iterable
from importlib import import_module
from typing import Any

import lightning as L

from lightning_difftune.data import MemoryBankDataModule
from lightning_difftune.modules import DiffTuningModule

WIDTH = 80
KEYS = {  # of each part of a config, those that people set
    "model": ("objective", "optimizer", "lr_scheduler", "tuner", "sampler", "bank_sampler"),
    "data": (
        *("target", "val_target", "num_classes", "image_size", "channels", "batch_size", "bank", "bank_size"),
        *("retention_share", "latent_cache", "horizontal_flip", "num_workers"),
    ),
    "trainer": ("max_steps", "val_check_interval", "precision", "devices", "callbacks", "default_root_dir"),
}
CLASSES: dict[str, Any] = {"model": DiffTuningModule, "data": MemoryBankDataModule, "trainer": L.Trainer}


def short_help(command: str) -> str:
    """A screen about a command that takes a config: how it is used, and the keys that people set."""
    lines = [
        f"difftune {command} --config FILE [--config OVERLAY ...] [--KEY VALUE ...]",
        f"difftune {command} RUN [--KEY VALUE ...]      resume a run",
        "",
        "--config may be given several times; a later one counts more, and keys given",
        "as options count most. A key inside of a class is written without init_args.",
    ]
    for part, keys in KEYS.items():
        told = arguments_of(CLASSES[part])
        lines.append("")
        if part == "model":
            lines.append(row("model CLASS", "the model family, such as DiTDiffTuningModule"))
            lines.append(row("model.model", "the pre-trained model: a name, file, folder or hub id"))
        lines += [row(f"{part}.{key}", told.get(key, "")) for key in keys]
    lines += [
        "",
        "  --seed_everything N         seed of model, data and bank",
        "  --print_config              print the composed config and stop",
        "",
        "All keys of a class, such as DiTDiffTuningModule or ImageFolder:",
        f"  difftune {command} --model.help CLASS     (or --data.help, --data.target.help)",
        f"All keys of the trainer: difftune {command} --help_all",
    ]
    return "\n".join(lines)


def row(key: str, about: str) -> str:
    """A line about a key that fits, cut off behind a word."""
    line = f"  --{key:<28}{about}"
    return line if len(line) <= WIDTH else line[: WIDTH - 3].rsplit(" ", 1)[0].rstrip(" ,;:") + " ..."


def arguments_of(kind: Any) -> dict[str, str]:
    """What the docstring of a class, or of its constructor, says first about each argument."""
    text = inspect.cleandoc(kind.__doc__ or "") + "\n" + inspect.cleandoc(kind.__init__.__doc__ or "")
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section[1] if section else "", re.DOTALL | re.MULTILINE)
    plain = {name: re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", " ".join(about.split())) for name, about in entries}
    return {name: re.split(r"(?<!Eq)[.;] ", about)[0].replace("`", "").rstrip(".") for name, about in plain.items()}


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
