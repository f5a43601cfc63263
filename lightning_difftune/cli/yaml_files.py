"""How configs and options are read: a key twice is said, and what a scheduler takes from the run may be left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from jsonargparse._loaders_dumpers import yaml_load

# Arguments that the classes themselves want to be given; -1 is what they are if they are left out.
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "OneCycleLR": {"max_lr": -1.0, "total_steps": -1},
    "CosineAnnealingLR": {"T_max": -1},
    "PolynomialLR": {"total_iters": -1},
}


def load(text: str) -> Any:
    """Read YAML.

    Raises:
        yaml.YAMLError: If it is not, or has a key twice.
    """
    if ":" in text:
        for key, first, second in _repeated(yaml.compose(text, Loader=yaml.SafeLoader), set()):
            raise yaml.YAMLError(f"the key {key!r} is there twice, in lines {first} and {second}; delete one")
    content = yaml_load(text)
    _fill(content, set())
    return content


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


def _fill(content: Any, seen: set[int]) -> None:
    """Set what is left out of the ``lr_scheduler`` anywhere in a config."""
    if id(content) in seen:
        return
    seen.add(id(content))
    if isinstance(content, dict):
        scheduler = content.get("lr_scheduler")
        if isinstance(scheduler, dict) and isinstance(scheduler.get("class_path"), str):
            left_out = _LEFT_OUT.get(scheduler["class_path"].rpartition(".")[2])
            given = scheduler.get("init_args")
            if left_out is not None and (given is None or isinstance(given, dict)):
                scheduler["init_args"] = left_out | (given or {})
        for value in content.values():
            _fill(value, seen)
    elif isinstance(content, list):
        for value in content:
            _fill(value, seen)


def filled(args: Sequence[str]) -> list[str]:
    """A command line in which what is left out of an ``lr_scheduler`` follows its class; what is given counts more.

    Example:
        >>> filled(["fit", "--model.lr_scheduler", "CosineAnnealingLR"])
        ['fit', '--model.lr_scheduler', 'CosineAnnealingLR', '--model.lr_scheduler.T_max=-1']
    """
    found: list[str] = []
    for before, arg in zip(["", *args], args, strict=False):
        found.append(arg)
        option, _, value = arg.partition("=") if arg.startswith("--") else (before, "", arg)
        if option.endswith(".lr_scheduler"):
            left_out = _LEFT_OUT.get(value.rpartition(".")[2], {})
            found += [f"{option}.{key}={number}" for key, number in left_out.items()]
    return found


def resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """A composed config in which what a scheduler takes from the run is there in numbers."""
    model = settings.get("model", {}).get("init_args", {})
    scheduler, optimizer = model.get("lr_scheduler"), model.get("optimizer")
    if not isinstance(scheduler, dict):
        return settings
    taken = {"max_lr": optimizer.get("init_args", {}).get("lr") if isinstance(optimizer, dict) else None}
    steps = settings.get("trainer", {}).get("max_steps")
    given = scheduler.get("init_args", {})
    for key in _LEFT_OUT.get(scheduler["class_path"].rpartition(".")[2], {}):
        if given.get(key) in (None, -1):
            given[key] = taken.get(key, steps)
    return settings
