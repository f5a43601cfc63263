"""Command lines of the commands that are not Lightning's: their parser, and options by name."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_difftune.errors import ConfigError, did_you_mean

CONFIG_OPTIONS = ("--config", "-c")


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises a :class:`ConfigError`, in one line and without the usage.

    Options may have hyphens in place of underscores.

    Args:
        command: The command's name after ``difftune``.
        description: Text of ``--help``: paragraphs are wrapped at the terminal's width, indented lines are kept.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"difftune {command}",
            description=wrapped(description),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage=f"difftune {command} [options]",
            allow_abbrev=False,  # unknown options may be keys of a config
        )
        self._most_runs = 0

    def add_run(
        self, help: str = "folder of a run, or a checkpoint", metavar: str = "RUN", several: bool = False
    ) -> None:
        """Add an argument for one or two runs, also as ``--ckpt_path``."""
        self.usage = f"{self.prog} {f'{metavar} [{metavar}]' if several else metavar} [options]"
        self.add_argument("run", nargs="*", metavar=metavar, help=help)
        self.add_argument("--ckpt_path", action="append", default=[], metavar=metavar, help=f"the same as {metavar}")
        self._most_runs = 2 if several else 1

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse known options, and return the others with their values."""
        own, rest = self._divided(list(sys.argv[1:] if args is None else args))
        options, unknown = super().parse_known_args(own, namespace)
        if self._most_runs:
            late = [word for word in unknown if not word.startswith("-")]  # argparse leaves words after an option
            unknown = [word for word in unknown if word.startswith("-")]
            runs = [*options.run, *late, *options.ckpt_path]
            if not runs:
                self.error("name a run first: its folder or one of its checkpoints")
            if len(runs) > self._most_runs:
                self.error(f"{len(runs)} runs are more than {self._most_runs}: {', '.join(runs)}")
            options.run = runs if self._most_runs > 1 else runs[0]
        for option in (word.partition("=")[0] for word in rest if word.startswith("--") and "." not in word):
            if near := did_you_mean(option, self._option_string_actions, cutoff=0.8):  # else a key of a config
                self.error(f"{option} is not an option. {near}")
        return options, [*unknown, *rest]

    def _divided(self, args: list[str]) -> tuple[list[str], list[str]]:
        """The known options with the words around them, and the others with one value each."""
        known = {option for action in self._actions for option in action.option_strings}
        own, rest = list[str](), list[str]()
        while args:
            arg = args.pop(0)
            option, equals, value = arg.partition("=")
            underscored = f"--{option[2:].replace('-', '_')}"
            if not arg.startswith("--") or arg in known:
                own.append(arg)
            elif underscored in known:
                own.append(underscored + equals + os.path.expanduser(value))
            else:
                rest.append(arg)
                if args and not equals and not args[0].startswith("--"):
                    rest.append(args.pop(0))
        return own, rest

    def error(self, message: str) -> NoReturn:
        """Raise a :class:`ConfigError`."""
        end = "" if message.endswith(("?", ".")) else "."
        raise ConfigError(f"{message[:1].upper()}{message[1:]}{end} `{self.prog} --help` lists the options.")


def check_writable(folder: Path) -> None:
    """Refuse a folder that could not be made or written, before the work whose result it is for.

    Raises:
        ConfigError: If the nearest of its parents that exists is a file or read-only.
    """
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        why = "is read-only" if nearest.is_dir() else "is a file"
        raise ConfigError(f"{folder} cannot be written, since {nearest} {why}. Choose another --output.")


def values_of(args: Sequence[str], *options: str) -> list[str]:
    """All values of an option, given as ``--option value`` or ``--option=value``, in order.

    Example:
        >>> values_of(["fit", "--config", "a.yaml", "--config=b.yaml"], "--config")
        ['a.yaml', 'b.yaml']
    """
    found: list[str] = []
    for place, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if option in options:
            found += [value] if equals else args[place + 1 : place + 2]
    return found


def wrapped(text: str) -> str:
    r"""Paragraphs wrapped at the terminal's width; those that begin with spaces, such as examples, are kept.

    Example:
        >>> print(wrapped("Some\nlines.\n\n  an example\n  another"))
        Some lines.
        <BLANKLINE>
          an example
          another
    """
    width = min(shutil.get_terminal_size().columns, 120)
    return "\n\n".join(
        paragraph if paragraph.startswith(" ") else textwrap.fill(paragraph, width) for paragraph in text.split("\n\n")
    )
