"""Completion of command lines in a shell, as a script that ``shtab`` makes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from lightning_difftune.errors import ConfigError

LIGHTNING = ("fit", "validate", "test", "predict")  # the commands that take a config


def completion(shell: str, commands: Mapping[str, str]) -> str:
    """The script for a shell.

    Args:
        shell: ``"bash"``, ``"zsh"``, ``"fish"`` or another one that shtab knows.
        commands: What can be typed after ``difftune``, with a line about each.

    Raises:
        ConfigError: If ``shtab`` is not installed, or does not know the shell.
    """
    try:
        import shtab
    except ImportError as error:
        raise ConfigError(
            "Completion needs the package `shtab`. Install it: pip install 'lightning_difftune[completion]'."
        ) from error
    if shell not in shtab.SUPPORTED_SHELLS:
        raise ConfigError(f"There is completion for {', '.join(shtab.SUPPORTED_SHELLS)}, not for {shell!r}.")
    script: str = shtab.complete(whole_parser(commands), shell=shell)
    return script


def whole_parser(commands: Mapping[str, str]) -> argparse.ArgumentParser:
    """A parser that knows every command with its options; it is only ever looked at."""
    from shtab import FILE

    from lightning_difftune.cli import data_check, export, sample

    own = {"sample": sample.parser, "export": export.parser}
    whole = argparse.ArgumentParser(prog="difftune")
    whole.add_argument("--version", action="store_true")
    subparsers = whole.add_subparsers()
    configs = config_options()
    for name, about in commands.items():
        if name in own:
            subparsers.add_parser(name, help=about, parents=[own[name]()], add_help=False)
            continue
        parser = subparsers.add_parser(name, help=about)
        if name == "data":
            inner = parser.add_subparsers()
            inner.add_parser("check", help=about, parents=[data_check.parser()], add_help=False)
        elif name in LIGHTNING:
            for option in configs:
                parser.add_argument(option)
        else:
            parser.add_argument("file", nargs="*")
            parser.add_argument("--config")
            parser.add_argument("--output")
    for parser in [*subparsers.choices.values()]:
        for action in parser._actions:
            if action.type is not int and action.nargs != 0 and action.choices is None:
                action.complete = FILE  # type: ignore[attr-defined]  # where shtab looks
    return whole


def config_options() -> list[str]:
    """Options of the commands that take a config: the keys that do not depend on what is in it."""
    from lightning_difftune.cli.lightning import ConfigReader

    actions = ConfigReader().parser._actions
    options = [option for action in actions for option in action.option_strings if option.startswith("--")]
    return [*dict.fromkeys(option for option in (*options, "--ckpt_path") if option != "--help")]
