"""What people ask a model to show: a class by its name or number, a prompt, what follows a control picture."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_difftune.errors import ConfigError

FEW = 10  # classes that are shown where nobody asks for any


class Subject(NamedTuple):
    """What one row of a grid of generated pictures shows.

    Attributes:
        name: For people.
        asked: What the module makes a condition of: a class number, or a prompt.
        control: The control map (c, H, W) uint8 that the pictures follow, if they follow one.
    """

    name: str
    asked: Any = None
    control: Tensor | None = None


def class_subjects(asked: Sequence[str] | None, names: Sequence[str] | None, count: int) -> list[Subject]:
    """A row for each class that is asked for, or for the first ones.

    Args:
        asked: Names or numbers.
        names: Of the first classes, or of all.
        count: How many classes there are.
    """
    first = range(min(FEW, count if names is None else len(names)))
    labels = first if asked is None else [class_number(name, names, count) for name in asked]
    known = dict(enumerate(names or ()))
    return [Subject(known.get(label, f"class {label}"), label) for label in labels]


def class_number(asked: str, names: Sequence[str] | None, count: int) -> int:
    """The number of a class, by its exact name, a loose one, a number, or one of several names between commas.

    A name is loose in case, underscores and hyphens. The first of the four that fits is taken.

    Raises:
        ConfigError: If there is no such class, or the name fits several.

    Example:
        >>> class_number("white shark", ["tench, Tinca tinca", "great white shark, White_shark"], 2)
        1
        >>> class_number("1", None, 2), class_number("UPPER", ["upper", "UPPER"], 2)
        (1, 1)
    """
    names = names or ()
    loose = [_plain(name) for name in names]
    synonyms = [{_plain(part) for part in name.split(",")} for name in names]
    number = int(asked) if asked.isdecimal() and int(asked) < count else None
    for fitting in (
        [label for label, name in enumerate(names) if name == asked],
        [label for label, name in enumerate(loose) if name == _plain(asked)],
        [] if number is None else [number],
        [label for label, parts in enumerate(synonyms) if _plain(asked) in parts],
    ):
        if len(fitting) > 1:
            found = ", ".join(f"{label} ({names[label]})" for label in fitting)
            raise ConfigError(f"{asked!r} is the name of {len(fitting)} classes. Ask for one by its number: {found}.")
        if fitting:
            return fitting[0]
    if not names:
        raise ConfigError(f"There is no class {asked!r}: this model has no names, and the numbers 0 to {count - 1}.")
    known = {part: name for name, parts in zip(names, synonyms, strict=True) for part in parts}
    near = difflib.get_close_matches(_plain(asked), known, n=5)
    fix = f"Did you mean {', '.join(dict.fromkeys(known[part] for part in near))}?"
    if not near:
        fix = f"Its classes are {', '.join(names[:FEW])}{', ...' if len(names) > FEW else '.'}"
    raise ConfigError(f"There is no class {asked!r} among the {len(names)}. {fix}")


def refuse(asked: Iterable[tuple[str, Any]], takes: str) -> None:
    """Refuse ways of asking that a model does not understand.

    Args:
        asked: Each way and what was asked so, ``None`` if nothing was.
        takes: What the model takes instead, as a sentence.

    Raises:
        ConfigError: If something was asked.
    """
    for way, what in asked:
        if what is not None:
            raise ConfigError(f"This model does not take {way}: {takes}")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()
