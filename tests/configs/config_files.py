"""The files of the config hub, the test files that cover them, and the commands in their headers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
PRETRAINING = CONFIGS.parent / "pretraining"
ALL_FILES = sorted(
    path.relative_to(CONFIGS.parent).as_posix() for folder in (CONFIGS, PRETRAINING) for path in folder.rglob("*.yaml")
)
# Which files each test_<family>.py covers: folders, and files of configs/ itself.
FAMILIES = {
    "base_models": ("sdxl", "flux", "sd3"),
    "dit": ("ablations", "dit", "presets", "tuners"),
    "controlnet": ("controlnet",),
    "loggers": ("loggers",),
    "photos": ("photos",),
    "photos32": ("photos32",),
    "pretrain": ("pretraining", "quickstart.yaml"),
    "strategy": ("strategy",),
    "studies": ("studies",),
    "text_to_image": ("text_to_image",),
}


def files_of(family: str) -> list[str]:
    """The files that test_<family>.py covers."""
    return [file for file in ALL_FILES if {*Path(file).parts[:2]} & {*FAMILIES[family]}]


def header(file: str) -> str:
    """The comment that a file opens with, without its marks."""
    lines = (CONFIGS.parent / file).read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def commands(file: str) -> list[list[str]]:
    """The ``difftune`` commands in a file's header, without the program's name."""
    program = "(?:difftune|python -m lightning_difftune)"
    joined = header(file).replace("\\\n", " ")
    found = re.findall(rf"^ +{program} ((?:fit|compare) .*)$", joined, flags=re.MULTILINE)
    return [shlex.split(line) for line in found]


def arguments(file: str) -> list[str]:
    """The main command of a file, the last one in its header."""
    return commands(file)[-1]


def composition(file: str) -> list[str]:
    """What the ``difftune fit`` command that a file is for composes: its arguments without ``fit``."""
    command, *args = arguments(file)
    assert command == "fit"
    return args


def settings(file: str) -> Any:
    return yaml.safe_load((CONFIGS.parent / file).read_text())


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Settings by dotted path; lists count as one setting."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for name, branch in tree.items() for k, v in leaves(branch, f"{path}.{name}").items()}


def smaller_callbacks(file: str, folder: Path, **changes: dict[str, Any]) -> Path:
    """A config in ``folder`` with the callbacks of ``file``, whose arguments are changed by class name."""
    callbacks = settings(file)["trainer"]["callbacks"]
    for callback in callbacks:
        name = callback["class_path"].rpartition(".")[2]
        callback["init_args"] = {**callback.get("init_args", {}), **changes.get(name, {})}
    (folder / "smaller.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    return folder / "smaller.yaml"
