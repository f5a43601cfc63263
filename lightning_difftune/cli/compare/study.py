"""Study files: the configs to run, the seeds, and the compared metrics."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from lightning_difftune.cli.parser import check_keys, yaml_problem
from lightning_difftune.errors import ConfigError, did_you_mean

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class StudyRun:
    """One line of a study's table: overlays on the base, run once per seed."""

    name: str  # its key in the study file
    configs: tuple[Path, ...]  # overlays on the base
    settings: Mapping[str, Any]  # keys that it sets
    method: str  # its method, which several runs may share
    group: str  # its variant of the method, such as with or without Diff-Tuning
    at: Mapping[str, float]  # its position on the x-axis of a figure, by quantity
    against: str | None  # the run that its change is measured against


@dataclass(frozen=True)
class Study:
    """A study file, read and checked."""

    path: Path  # the file
    title: str  # heading of tables and figures
    output: Path  # folder of the runs, and of what they share
    kept: Path  # folder of results, tables and figures; by default the runs' folder
    seeds: tuple[int, ...]  # seeds of every run
    base: tuple[Path, ...]  # configs that all runs start from
    settings: Mapping[str, Any]  # keys that all runs set, between the base and their own configs
    evaluators: tuple[Mapping[str, Any], ...]  # `class_path` and `init_args` of Evaluator objects
    metrics: Mapping[str, Better]  # the compared metrics, the main one first, with their better directions
    gain_over: tuple[str, ...]  # metrics on the x-axis of the figure of the main one's changes
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


_CONFIGS = (list, "a list of config files, relative to this file or to the installed configs")
_SETTINGS = (dict, "a mapping of keys to values, such as {trainer.max_steps: 350}")
_TEXT = (str, "a text")
# The keys of a study file and of one of its runs: their types, and descriptions for messages.
STUDY_KEYS = {
    "title": _TEXT,
    "output": (str, "a folder such as runs/study"),
    "results": (str, "a folder such as results/study"),
    "seeds": (list, "a list of numbers such as [0, 1]"),
    "base": _CONFIGS,
    "set": _SETTINGS,
    "evaluate": (list, "a list of {class_path: ..., init_args: {...}}"),
    "metrics": (dict, "a mapping such as {fid: lower}, the main metric first"),
    "gain_over": (list, "a list of metrics"),
    "runs": (dict, "a mapping of names to runs"),
}
RUN_KEYS = {
    "configs": _CONFIGS,
    "set": _SETTINGS,
    "method": _TEXT,
    "group": _TEXT,
    "at": (dict, "a mapping of a quantity to its value, such as {tau: 0.5}"),
    "against": (str, "the name of another run"),
}


def read_study(path: Path, part: str | None = None) -> Study:
    """Read and check a study file.

    Args:
        path: The file, or its name among the installed configs, such as ``studies/digits.yaml``.
        part: Value of the key ``part`` of another YAML document in the file. That document inherits the keys of the
            first one that it does not set, except for its folders, which are inside those of the first document.

    Raises:
        ConfigError: If there is no such file or part, or a value is invalid; the message names the file and the key.
    """
    found = find_config(path, Path())
    if found is None:
        raise ConfigError(f"There is no study file {path}, here or among the installed configs. Check the path.")
    documents = read_yaml(found)
    keys = Keys(found, "", documents[0] if documents else None, STUDY_KEYS)
    if part is not None:
        keys = Keys(found, f"part {part}: ", keys.content | part_of(found, documents[1:], part, keys), STUDY_KEYS)
    runs = keys.get("runs")
    if not runs:
        raise keys.error("runs", "names no run", "Add one: NAME: {configs: [overlay.yaml]}.")
    seeds = keys.get("seeds", default=[0])
    check_seeds(seeds, f"{found}: seeds")
    metrics = {str(name): better for name, better in keys.get("metrics").items()}
    if not metrics:
        raise keys.error("metrics", "is empty")
    for name, better in metrics.items():
        if better not in get_args(Better):
            raise keys.error(f"metrics.{name}", f"is {better!r}", "Say which is better: lower or higher.")
    gain_over = keys.get("gain_over", default=[])
    if unknown := [name for name in gain_over if name not in metrics]:
        fix = f"Choose from {', '.join(metrics)}."
        raise keys.error("gain_over", f"names {unknown[0]!r}, which metrics does not", fix)
    evaluators = keys.get("evaluate", default=[])
    if not all(isinstance(entry, dict) and isinstance(entry.get("class_path"), str) for entry in evaluators):
        raise keys.error("evaluate", f"is {evaluators}")
    output = keys.get("output")
    return Study(
        path=found,
        title=keys.get("title", default=found.stem.replace("_", " ").capitalize()),
        output=Path(output),
        kept=Path(keys.get("results", default=output)),
        seeds=tuple(seeds),
        base=keys.configs("base"),
        settings=keys.settings(),
        evaluators=tuple(evaluators),
        metrics=metrics,
        gain_over=tuple(gain_over),
        runs={str(name): read_run(found, str(name), content, runs) for name, content in runs.items()},
    )


def check_seeds(seeds: Sequence[Any], name: str) -> None:
    """Refuse seeds that are no whole numbers or there twice, which would count a result twice."""
    if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{name} is {list(seeds)}. Give different whole numbers from 0, such as [0, 1].")


def read_yaml(path: Path) -> list[Any]:
    """The documents of a study file."""
    try:
        text = path.read_text()
        for document in yaml.compose_all(text, Loader=yaml.SafeLoader):
            check_keys(document)  # the last of two runs of one name would be the only one
        return list(yaml.safe_load_all(text))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date without a month
        raise ConfigError(f"The study file {path} is not YAML: {yaml_problem(error)}.") from error


def part_of(path: Path, documents: Sequence[Any], name: str, first: Keys) -> dict[str, Any]:
    """The settings of the part with this name, with its folders."""
    known = {"part": (str, "a name such as lr in every document after the first"), **STUDY_KEYS}
    parts = [Keys(path, "", document, known) for document in documents]
    names = [keys.get("part") for keys in parts]
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
    against = keys.get("against", default="")
    if against and against not in names:
        fix = f"Choose from {', '.join(names)}."
        raise keys.error("against", f"is {against!r}, which is not a run of this study", fix)
    at = keys.get("at", default={})
    for quantity, value in at.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise keys.error("at", f"gives {quantity} the value {value!r}", "Give a number; it is a figure's x.")
    return StudyRun(
        name=name,
        configs=keys.configs("configs", default=[]),
        settings=keys.settings(),
        method=keys.get("method", default=name),
        group=keys.get("group", default=""),
        at={str(quantity): float(value) for quantity, value in at.items()},
        against=against or None,
    )


class Keys:
    """One mapping of a study file, whose errors name the file and the key."""

    def __init__(self, path: Path, prefix: str, content: Any, known: Mapping[str, tuple[type, str]]) -> None:
        self.path, self.prefix, self.content, self.known = path, prefix, content, known
        if not isinstance(content, dict):
            raise self.error("", f"is {content!r}", f"Give a mapping with {', '.join(known)}.")
        for key in content:
            if key not in known:
                fix = did_you_mean(str(key), known) or f"Keys are {', '.join(known)}."
                raise self.error(str(key), "is not a key of a study file", fix)

    def error(self, key: str, found: str, fix: str = "") -> ConfigError:
        """The error for ``key``, with a remedy; by default the expected value."""
        where = f"{self.prefix}{key}".strip(".")
        return ConfigError(f"{self.path}: {where or 'the file'} {found}. {fix or f'Give {self.known[key][1]}.'}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``key``, checked for its type; required without a default."""
        value = self.content.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, self.known[key][0]):
            raise self.error(key, "is missing" if value is None else f"is {value!r}")
        return value

    def configs(self, key: str, default: list[str] | None = None) -> tuple[Path, ...]:
        """Config files, relative to the study file or to the installed configs."""
        paths = []
        for name in self.get(key, default):
            found = find_config(Path(str(name)), self.path.parent)
            if found is None:
                raise self.error(key, f"names {name}, which is not a file")
            paths.append(found)
        return tuple(paths)

    def settings(self) -> dict[str, Any]:
        """Deep keys and their values."""
        return {str(key): value for key, value in self.get("set", default={}).items()}


def find_config(path: Path, folder: Path) -> Path | None:
    """A config file relative to ``folder``, or else among the installed configs."""
    for candidate in (folder / path, Path(str(files("lightning_difftune.configs"))) / path):
        if os.path.isfile(candidate):  # unlike Path's, it accepts any name
            return candidate
    return None
