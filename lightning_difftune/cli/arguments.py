"""Options of the commands that are not Lightning's."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lightning_difftune.errors import ConfigError


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose mistakes are a :class:`ConfigError`, in one line and without the usage.

    Args:
        command: What is typed after ``difftune``.
        description: Shown by ``--help`` as it is.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"difftune {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage=f"difftune {command} [options]",
            allow_abbrev=False,  # what is not known here may be a key of a config
        )

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise ConfigError(f"{message[:1].upper()}{message[1:]}\n`{self.prog} --help` lists the options.")
