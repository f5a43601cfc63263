"""Reads configs and options, with messages about invalid keys, classes and values."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

import yaml
from jsonargparse._loaders_dumpers import yaml_load
from lightning.pytorch.cli import LightningArgumentParser

from lightning_difftune.cli.arguments import CONFIG_OPTIONS, values_of
from lightning_difftune.errors import ConfigError, did_you_mean
from lightning_difftune.modules.checkpoints import parameter_names

LONGEST_PATH = 255  # characters
A_CLASS = "the path of a class"
WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "list": "a list"}
ROOMS = [f"lightning_difftune{room}" for room in ("", ".callbacks", ".tuners", ".data", ".losses", ".metrics")]
# Lines of jsonargparse's messages that describe its search among types, not the value.
ABOUT_TYPES = re.compile(
    r"^ *(-? ?Does not validate|Subtypes:|Errors:|- Expected a <class 'NoneType'>|Given value).*\n?", re.MULTILINE
)


class DiffTuneParser(LightningArgumentParser):
    """A parser with one-line error messages, without the usage of two hundred options."""

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:
        """Parse a command line and its configs."""
        self._command = str(args[0]) if args else ""
        if isinstance(args, list | tuple):
            for value in values_of(args, *CONFIG_OPTIONS):
                if len(value) < LONGEST_PATH:  # else the text of a config
                    check_file(Path(value))
            args = with_left_out(args)
        try:
            return super().parse_args(args, *more, **options)
        except (UnicodeError, RecursionError, ValueError, TypeError, LookupError, AttributeError, OSError) as error:
            reason = " ".join(str(error).split()) or "nested too deeply"
            raise ConfigError(f"A config cannot be read ({type(error).__name__}: {reason:.300}).") from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a :class:`ConfigError`, or leave it to the outer parser if there is one."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", self)
        if parser is self and self._subcommands_action is not None:
            parser = self._subcommands_action.choices.get(getattr(self, "_command", ""), self)
        options = [option for action in parser._actions for option in action.option_strings]
        said = clearer(message, options)
        command = "difftune fit" if parser.prog == "difftune" else parser.prog.replace(" [options]", "")
        raise ConfigError(f"{said} `{command} --help` lists the keys.") from ex


def check_file(config: Path) -> None:
    """Refuse what is not a config, by its name.

    Raises:
        ConfigError: If it is a folder or empty, or not a YAML mapping.
    """
    if config.is_dir():
        raise ConfigError(f"{config} is a folder, not a config. Name a file in it.")
    if not config.is_file():
        return
    try:
        content = load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date without a month
        raise ConfigError(f"The config {config} cannot be read: {yaml_problem(error)}.") from error
    if content is None:
        raise ConfigError(f"The config {config} is empty.")
    if not isinstance(content, dict):
        raise ConfigError(f"The config {config} is a {type(content).__name__}, not a mapping of keys to values.")


def yaml_problem(error: Exception) -> str:
    """What is wrong with a text of YAML and where, in one line.

    Example:
        >>> try:
        ...     yaml.safe_load("model: data: 3")
        ... except yaml.YAMLError as error:
        ...     yaml_problem(error)
        'line 1, column 12: mapping values are not allowed here'
    """
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split()) or "it is nested too deeply"
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def part_parser(kind: type, key: str) -> DiffTuneParser:
    """A parser for one part of a config."""
    parser = DiffTuneParser()
    parser.add_lightning_class_args(kind, key, subclass_mode=True)
    return parser


def clearer(message: str, options: Iterable[str]) -> str:
    """A message of jsonargparse in one line, with a suggestion if a key, option or class is close."""
    whole, message = message, ABOUT_TYPES.sub("", message).strip()
    if re.match(r"the following arguments are required: (\w+\.)?data", message):
        return "There is no model and no data. Pass --config FILE, or name a run first, to resume it."
    if match := re.search(r"the following arguments are required: (\w+)", message):
        place = ".".join(re.findall(r'Parser key "([^"]+)"', message))
        key = f"{place}.{match[1]}"
        return f"{key} has no value, and needs one. Add a --config FILE that sets it, or set --{key}."
    if match := re.search(r"""Parser key "config":.*File does not exist: '(.+)'""", message, re.DOTALL):
        return f"The config {match[1]} does not exist."
    keys = {option.removeprefix("--") for option in options}
    parts = {key.partition(".")[0] for key in keys}
    place = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    if match := re.search(
        r"Option '([^']+)' is not accepted(?:\. Got value: Namespace\(class_path='([^']+)')?", message
    ):
        name = match[1]
        paths = re.findall(r"Problem with given class_path '([^']+)'", message[: match.start()])
        paths += [match[2]] if match[2] else []
        if not paths:
            return f"{name} is not a key.{meant(name.partition('.')[0], parts)}"
        known = parameters_of(paths[-1])
        takes = f"; it takes {', '.join(sorted(known))}" if known else ""
        near = meant(name.partition(".")[0], known)
        return f"{place}.{name} is not a key: {paths[-1]} has no argument {name!r}{near and '.'}{near or takes + '.'}"
    if match := re.search(r"(Group|Subcommand) '([^']+)' does not accept option '([^']+)'", message):
        name = match[3] if match[1] == "Subcommand" else f"{match[2]}.{match[3]}"
        if (top := name.partition(".")[0]) not in parts:
            return f"{top} is not a key.{meant(top, parts)}"
        return f"{name} is not a key.{meant(name, keys)}"
    if match := re.match(r"unrecognized arguments: (?!-)(\S+\.ya?ml)$", message):
        return f"{match[1]} is a config: write --config {match[1]}."
    if match := re.match(r"unrecognized arguments: (--[\w.]+)", message):
        name = match[1].removeprefix("--")
        return f"{match[1]} is not an option.{meant(name, keys) or meant(name.partition('.')[0], parts)}"
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        near = meant(match[2], {name for name in dir(import_module(match[1])) if not name.startswith("_")})
        return f"{place}: {match[1]} has no class {match[2]}.{near}"
    if match := re.search(r"(?:subclass of|implement protocol) (?:<class )?'?([^>\n]+?)'?>?\.*( Got| -|\n|$)", message):
        kinds = re.sub(r"Union\[|\]|[\w.]+\.(?=\w)", "", match[1]).replace(", ", " or ")
        found = re.search(r"(?:Expected|class_path=|[Vv]alue:) ?'?((?:\w+\.)+\w+)", message)
        return f"{place} takes a class of the kind {kinds}, which {found[1] if found else 'the given one'} is not."
    return wrong_value(place, whole)


def wrong_value(place: str, message: str) -> str:
    """A message of jsonargparse about an invalid value, in one line.

    Example:
        >>> wrong_value("trainer.max_steps", "Expected a <class 'int'>. Got value: many")
        "trainer.max_steps takes a whole number, found 'many'."
    """
    values = re.findall(r"G(?:ot|iven) value: (?!NestedArg)(.+)|Expected a path but (.+) either not", message)
    found = next((first or second for first, second in values), None)
    expected = re.findall(r"Expected an? (?!path|<class 'NoneType'>)(.+?)(?:\. Got value: .*)?$", message, re.MULTILINE)
    if not expected or found is None:
        lines = [line.strip(" -") for line in ABOUT_TYPES.sub("", message).splitlines()]
        about = " ".join(
            line for line in lines if line and not line.startswith(("Parser key", "Problem with", "Expected a path"))
        )
        return f"{place and f'{place}: '}{about.removesuffix('.')}."
    choices = re.findall(r"'([^']+)'|(\d+)", " ".join(kind for kind in expected if kind.startswith("typing.Literal")))
    kinds = [in_words(kind) for kind in expected if not kind.startswith("typing.Literal")]
    if choices:
        kinds.append(f"one of {', '.join(dict.fromkeys(word or number for word, number in choices))}")
    known = [f"{room}.{found}" for room in ROOMS if found in getattr(import_module(room), "__all__", ())]
    path = f" Write {known[0]}." if known and A_CLASS in kinds else ""
    return f"{place} takes {' or '.join(dict.fromkeys(kinds))}, found {found!r}.{path}"


def in_words(kind: str) -> str:
    """A type in jsonargparse's notation, in words."""
    if match := re.match(r"<class '(\w+)'>", kind):
        return WORDS.get(match[1], f"a {match[1]}")
    return A_CLASS if kind.startswith(("dot import path", "instantiatable class")) else kind


def meant(name: str, known: Collection[str]) -> str:
    """:func:`did_you_mean` as the end of a message: after a space, or empty."""
    return f" {said}" if (said := did_you_mean(name, known)) else ""


def parameters_of(path: str) -> set[str]:
    """Arguments of a class by its path; none if it cannot be imported."""
    try:
        return parameter_names(resolve_name(path))
    except (ImportError, AttributeError, ValueError, TypeError):
        return set()


CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")

# Required arguments of the classes; -1 is their value if they are omitted.
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "OneCycleLR": {"max_lr": -1.0, "total_steps": -1},
    "CosineAnnealingLR": {"T_max": -1},
    "PolynomialLR": {"total_iters": -1},
}


def _left_out(class_path: str) -> dict[str, Any]:
    return _LEFT_OUT.get(class_path.rpartition(".")[2], {})


def load(text: str) -> Any:
    """Read YAML, refuse misspelled keys of classes, and add the omitted arguments of every ``lr_scheduler``."""
    if ":" in text:
        check_keys(yaml.compose(text, Loader=yaml.SafeLoader))
    content = yaml_load(text)
    _complete(content, set())
    return content


def check_keys(document: Any) -> None:
    """Refuse a composed YAML document with a key that is there twice, of which the last would be read."""
    for key, first, second in _repeated(document, set()):
        raise yaml.YAMLError(f"the key {key!r} is there twice, in lines {first} and {second}; delete one")


def _repeated(node: Any, seen: set[int]) -> Iterator[tuple[str, int, int]]:
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines and key.value != "<<":
                    yield key.value, lines[key.value], line
                lines[key.value] = line
            yield from _repeated(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _repeated(value, seen)


def _complete(content: Any, seen: set[int]) -> None:
    if id(content) in seen:
        return
    seen.add(id(content))
    if isinstance(content, dict):
        for key in () if len(content) > len(CLASS_KEYS) else content.keys() - CLASS_KEYS:
            if near := did_you_mean(str(key), CLASS_KEYS, cutoff=0.8):
                raise yaml.YAMLError(f"{key} is not a key of a class. {near}")
        scheduler = content.get("lr_scheduler")
        if isinstance(scheduler, dict) and isinstance(scheduler.get("class_path"), str):
            left_out, given = _left_out(scheduler["class_path"]), scheduler.get("init_args")
            if left_out and (given is None or isinstance(given, dict)):
                scheduler["init_args"] = left_out | (given or {})
        for value in content.values():
            _complete(value, seen)
    elif isinstance(content, list):
        for value in content:
            _complete(value, seen)


def with_left_out(args: Sequence[str]) -> list[str]:
    """A command line with the omitted arguments of an ``lr_scheduler`` added after its class, before given ones.

    Example:
        >>> with_left_out(["fit", "--model.lr_scheduler", "CosineAnnealingLR"])
        ['fit', '--model.lr_scheduler', 'CosineAnnealingLR', '--model.lr_scheduler.T_max=-1']
    """
    found: list[str] = []
    for before, arg in zip(["", *args], args, strict=False):
        found.append(arg)
        option, _, value = arg.partition("=") if arg.startswith("--") else (before, "", arg)
        if option.endswith(".lr_scheduler"):
            found += [f"{option}.{key}={number}" for key, number in _left_out(value).items()]
    return found


def resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """A composed config with numbers for the settings that a scheduler takes from the run."""
    model = settings.get("model", {}).get("init_args", {})
    scheduler, optimizer = model.get("lr_scheduler"), model.get("optimizer")
    if not isinstance(scheduler, dict):
        return settings
    taken = {"max_lr": optimizer.get("init_args", {}).get("lr") if isinstance(optimizer, dict) else None}
    steps = settings.get("trainer", {}).get("max_steps")
    given = scheduler.get("init_args", {})
    for key in _left_out(scheduler["class_path"]):
        if given.get(key) in (None, -1):
            given[key] = taken.get(key, steps)
    return settings
