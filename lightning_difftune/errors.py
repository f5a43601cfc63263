"""Errors that a user can fix. Each message states what is wrong, what was found and what to do."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any


class DiffTuneError(Exception):
    """Base of errors caused by the input, not by a bug.

    The command line prints its message without a traceback and exits with status 2.
    """


class ConfigError(DiffTuneError):
    """A setting, or a combination of settings, that cannot work."""


class CheckpointError(DiffTuneError):
    """Weights that are missing, unreadable, or of another model."""


class DataError(DiffTuneError):
    """Images, labels or folders that cannot be used."""


class StoreError(DiffTuneError):
    """A memory bank or latent cache that is incomplete, altered, or made by something else."""


class NumericsError(DiffTuneError):
    """A loss or weights that are no longer finite."""


def did_you_mean(name: str, known: Iterable[str], spelled: Mapping[str, str] | None = None, cutoff: float = 0.6) -> str:
    """``Did you mean ...?`` for a name that is close to known ones; else empty.

    Args:
        name: What was found.
        known: What would be right.
        spelled: How the known names are spelled in the message, if differently.
        cutoff: How similar names must be, of 1.

    Example:
        >>> did_you_mean("max_step", ["max_steps", "precision"])
        'Did you mean max_steps?'
    """
    close = difflib.get_close_matches(name, [*known], cutoff=cutoff)
    near = dict.fromkeys((spelled or {}).get(entry, entry) for entry in close)
    return f"Did you mean {' or '.join(near)}?" if near else ""


def check_counts(owner: str, **counts: int | None) -> None:
    """Refuse counts below 1 among the settings of a class; ``None`` is a count that is not set.

    Raises:
        ConfigError: If one of them is below 1, or not a whole number.
    """
    for name, count in counts.items():
        check_kinds(owner, **{name: (count, Integral, "a whole number")})
        if count is not None and count < 1:
            raise ConfigError(f"{name} of {owner} must be at least 1, found {count}.")


def check_choice(owner: str, name: str, given: object, *known: str) -> None:
    """Refuse a setting of a class that is none of the known ones.

    Raises:
        ConfigError: If it is not.

    Example:
        >>> check_choice("FID", "reference", "test", "val", "train")
        Traceback (most recent call last):
        lightning_difftune.errors.ConfigError: reference of FID must be 'val' or 'train', found 'test'.
    """
    if given not in known:
        raise ConfigError(f"{name} of {owner} must be {' or '.join(map(repr, known))}, found {given!r}.")


def check_kinds(owner: str, **given: tuple[object, Any, str]) -> None:
    """Refuse settings of a class that are of another kind; ``None`` is not set.

    Args:
        owner: The class.
        given: By name, the value, its class or protocol, and words for it.

    Raises:
        ConfigError: If one of them is of another kind, or is a class where an object of it is meant.

    Example:
        >>> check_kinds("FID", seed=("0", Integral, "a whole number"))
        Traceback (most recent call last):
        lightning_difftune.errors.ConfigError: seed of FID must be a whole number, found '0'.
    """
    for name, (value, kind, words) in given.items():
        is_class = isinstance(value, type) and kind is not Callable
        if value is not None and (is_class or not isinstance(value, kind)):
            found = repr(value) if isinstance(value, str | int | float | type) else f"a {type(value).__name__}"
            raise ConfigError(f"{name} of {owner} must be {words}, found {found}.")


def check_lists(owner: str, **lists: Sequence[str] | None) -> None:
    """Refuse a text where a class takes a list of texts, since it would be taken letter by letter.

    Raises:
        ConfigError: If one of them is a text.
    """
    for name, given in lists.items():
        if isinstance(given, str):
            raise ConfigError(f"{name} of {owner} is a list of texts, got {given!r}. Write [{given!r}].")
