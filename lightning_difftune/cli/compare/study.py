"""Study files: which configs are run, over which seeds, and what is compared."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from lightning_difftune.errors import ConfigError

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class StudyRun:
    """One line of a study's table: overlays on the base, run once for each seed."""

    name: str  # its key in the study file
    configs: tuple[Path, ...]  # overlays on the base
    settings: Mapping[str, Any]  # keys that it sets
    method: str  # what it is, where several runs are of one method
    group: str  # which of the runs of its method it is, such as with or without Diff-Tuning
    at: Mapping[str, float]  # where it stands on the x-axis of a figure, by quantity
    against: str | None  # the run that its change is measured against


@dataclass(frozen=True)
class Study:
    """A study file that has been read and checked."""

    path: Path  # the file
    title: str  # heading of tables and figures
    output: Path  # folder of the runs, and of what they share
    kept: Path  # folder of results, tables and figures; the runs' folder where the study names no other
    seeds: tuple[int, ...]  # seeds of every run
    base: tuple[Path, ...]  # configs that all runs start from
    settings: Mapping[str, Any]  # keys that all runs set, between the base and their own configs
    evaluators: tuple[Mapping[str, Any], ...]  # `class_path` and `init_args` of Evaluator objects
    metrics: Mapping[str, Better]  # what is compared, the main one first, and which direction is better
    gain_over: tuple[str, ...]  # metrics that a figure shows the change of the main one over
    runs: Mapping[str, StudyRun]  # the runs by name, in the order of the file

    def arguments(self, run: StudyRun, seed: int) -> list[str]:
        """The command line of one run, without a command: configs and settings from left to right."""
        args = [arg for config in self.base for arg in ("--config", str(config))]
        args += setting_arguments(self.settings)
        args += [arg for config in run.configs for arg in ("--config", str(config))]
        return [*args, *setting_arguments(run.settings), "--seed_everything", str(seed)]


def setting_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Deep keys and values as options of the command line."""
    return [
        arg
        for key, value in settings.items()
        for arg in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def read_study(path: Path, part: str | None = None) -> Study:
    """Read and check a study file.

    Args:
        path: The file, or its name among the installed configs, such as ``studies/digits.yaml``.
        part: Which of the further YAML documents of the file to read, by the value of its key ``part``. It inherits
            the keys of the first document that it does not set itself, except for its folders, which are inside
            those of the first document.

    Raises:
        ConfigError: If there is no such file or part, or something in it cannot be used; names the file and the key.
    """
    found = find_config(path, Path())
    if found is None:
        raise ConfigError(f"There is no study file {path}, here or among the installed configs. Check the path.")
    documents = read_yaml(found)
    keys = Keys(found, "", documents[0] if documents else None, STUDY_KEYS)
    if part is not None:
        keys = Keys(found, f"part {part}: ", keys.content | part_of(found, documents[1:], part, keys), STUDY_KEYS)
    runs = keys.get("runs", dict, "a mapping of names to runs")
    if not runs:
        raise keys.error("runs", "names no run", "Add one: NAME: {configs: [overlay.yaml]}.")
    seeds = keys.get("seeds", list, "a list of numbers such as [0, 1]", default=[0])
    if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise keys.error("seeds", f"is {seeds}", "Give different whole numbers from 0, such as [0, 1].")
    output = keys.get("output", str, "a folder such as runs/study")
    metrics = keys.metrics()
    gain_over = keys.get("gain_over", list, "a list of metrics", default=[])
    if unknown := [name for name in gain_over if name not in metrics]:
        raise keys.error(
            "gain_over", f"names {unknown[0]!r}, which metrics does not", f"Choose from {', '.join(metrics)}."
        )
    return Study(
        path=found,
        title=keys.get("title", str, "a text", default=found.stem.replace("_", " ").capitalize()),
        output=Path(output),
        kept=Path(keys.get("results", str, "a folder such as results/study", default=output)),
        seeds=tuple(seeds),
        base=keys.configs("base", required=True),
        settings=keys.settings(),
        evaluators=keys.evaluators(),
        metrics=metrics,
        gain_over=tuple(gain_over),
        runs={str(name): read_run(found, str(name), content, runs) for name, content in runs.items()},
    )


def read_yaml(path: Path) -> list[Any]:
    """The documents of a study file.

    Raises:
        ConfigError: If it is not YAML.
    """
    try:
        return list(yaml.safe_load_all(path.read_text()))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date without a month
        raise ConfigError(f"The study file {path} is not YAML: {' '.join(str(error).split())}.") from error


def part_of(path: Path, documents: Sequence[Any], name: str, first: Keys) -> dict[str, Any]:
    """What the part of this name sets, with its folders.

    Raises:
        ConfigError: If there is no such part, or several.
    """
    parts = [Keys(path, "", document, ("part", *STUDY_KEYS)) for document in documents]
    names = [keys.get("part", str, "a name such as lr in every document after the first") for keys in parts]
    if names.count(name) != 1:
        raise ConfigError(f"{path} has {names.count(name)} parts {name!r}; its parts are {', '.join(names) or 'none'}.")
    settings = dict(parts[names.index(name)].content)
    del settings["part"]
    folders = {key: f"{first.content[key]}/{name}" for key in ("output", "results") if key in first.content}
    return folders | settings


def read_run(path: Path, name: str, content: Any, names: Collection[str]) -> StudyRun:
    """One entry of ``runs:``; an empty one is the base itself."""
    keys = Keys(path, f"runs.{name}.", content if content is not None else {}, RUN_KEYS)
    if not re.fullmatch(r"[\w][\w.+-]*", name):
        raise keys.error("", f"has the name {name!r}", "Names become file names: use letters, digits, - _ + and dots.")
    against = keys.get("against", str, "the name of another run", default="")
    if against and against not in names:
        raise keys.error(
            "against", f"is {against!r}, which is not a run of this study", f"Choose from {', '.join(names)}."
        )
    at = keys.get("at", dict, "a mapping of a quantity to its value, such as {tau: 0.5}", default={})
    for quantity, value in at.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise keys.error("at", f"gives {quantity} the value {value!r}", "Give a number; it is a figure's x.")
    return StudyRun(
        name=name,
        configs=keys.configs("configs", required=False),
        settings=keys.settings(),
        method=keys.get("method", str, "a text", default=name),
        group=keys.get("group", str, "a text", default=""),
        at={str(quantity): float(value) for quantity, value in at.items()},
        against=against or None,
    )


STUDY_KEYS = ("title", "output", "results", "seeds", "base", "set", "evaluate", "metrics", "gain_over", "runs")
RUN_KEYS = ("configs", "set", "method", "group", "at", "against")


class Keys:
    """One mapping of a study file, whose mistakes are named by file and key."""

    def __init__(self, path: Path, prefix: str, content: Any, known: tuple[str, ...]) -> None:
        self.path, self.prefix, self.content = path, prefix, content
        if not isinstance(content, dict):
            raise self.error("", f"is {content!r}", f"Give a mapping with {', '.join(known)}.")
        for key in content:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                fix = f"Is it {near[0]}?" if near else f"Keys are {', '.join(known)}."
                raise self.error(str(key), "is not a key of a study file", fix)

    def error(self, key: str, found: str, fix: str) -> ConfigError:
        """What is wrong under ``key``, what to do."""
        where = f"{self.prefix}{key}".strip(".")
        return ConfigError(f"{self.path}: {where or 'the file'} {found}. {fix}")

    def get(self, key: str, kind: type, wanted: str, default: Any = None) -> Any:
        """The value under ``key``, of one type."""
        value = self.content.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing", f"Give {wanted}.")
            return default
        if not isinstance(value, kind):
            raise self.error(key, f"is {value!r}", f"Give {wanted}.")
        return value

    def configs(self, key: str, required: bool) -> tuple[Path, ...]:
        """Config files, relative to the study file or to the installed configs."""
        wanted = "a list of config files, relative to this file or to the installed configs"
        paths = []
        for name in self.get(key, list, wanted, default=None if required else []):
            found = find_config(Path(str(name)), self.path.parent)
            if found is None:
                raise self.error(key, f"names {name}, which is not a file", f"Give {wanted}.")
            paths.append(found)
        return tuple(paths)

    def settings(self) -> dict[str, Any]:
        """Deep keys and their values."""
        wanted = "a mapping of keys to values, such as {trainer.max_steps: 350}"
        return {str(key): value for key, value in self.get("set", dict, wanted, default={}).items()}

    def evaluators(self) -> tuple[dict[str, Any], ...]:
        """Measurements at the end of a run."""
        wanted = "a list of {class_path: ..., init_args: {...}}"
        found = self.get("evaluate", list, wanted, default=[])
        if not all(isinstance(entry, dict) and isinstance(entry.get("class_path"), str) for entry in found):
            raise self.error("evaluate", f"is {found}", f"Give {wanted}.")
        return tuple(found)

    def metrics(self) -> dict[str, Better]:
        """What is compared."""
        wanted = "a mapping such as {fid: lower}, the main metric first"
        found = self.get("metrics", dict, wanted)
        for name, better in found.items():
            if better not in get_args(Better):
                raise self.error(f"metrics.{name}", f"is {better!r}", "Say which is better: lower or higher.")
        if not found:
            raise self.error("metrics", "is empty", f"Give {wanted}.")
        return {str(name): better for name, better in found.items()}


def find_config(path: Path, folder: Path) -> Path | None:
    """A config file relative to ``folder``, or else of the installed configs."""
    for candidate in (folder / path, Path(str(files("lightning_difftune.configs"))) / path):
        if os.path.isfile(candidate):  # unlike Path's, it takes any name
            return candidate
    return None
