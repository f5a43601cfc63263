"""Which classes and functions a config inside a file may name: opening a downloaded file must not run its code."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from lightning_difftune.errors import ConfigError

PACKAGES = ("lightning_difftune", "torch", "torchvision", "lightning", "diffusers", "transformers", "peft", "datasets")

# In other packages: classes of these kinds do only what their arguments say, which are checked.
_BASES = {
    "torch.optim.optimizer.Optimizer",
    "torch.optim.lr_scheduler.LRScheduler",
    "torch.nn.modules.module.Module",
    "torch.utils.data.dataset.Dataset",
    "torch.utils.data.sampler.Sampler",
    "lightning.pytorch.callbacks.callback.Callback",
    "lightning.fabric.loggers.logger.Logger",
    "lightning.pytorch.strategies.strategy.Strategy",
    "lightning.fabric.accelerators.accelerator.Accelerator",
    "lightning.pytorch.profilers.profiler.Profiler",
    "lightning.fabric.plugins.precision.precision.Precision",
    "lightning.fabric.plugins.io.checkpoint_io.CheckpointIO",
    "lightning.fabric.plugins.environments.cluster_environment.ClusterEnvironment",
    "lightning.pytorch.plugins.layer_sync.LayerSync",
    "lightning.pytorch.core.datamodule.LightningDataModule",
    "diffusers.configuration_utils.ConfigMixin",
    "transformers.configuration_utils.PretrainedConfig",
    "transformers.configuration_utils.PreTrainedConfig",
    "transformers.tokenization_utils_base.PreTrainedTokenizerBase",
    "peft.config.PeftConfigMixin",
}
# Modules whose functions, and whose classes of any kind, may be named.
_ROOMS = (
    "torch.nn.functional",
    "torchvision.transforms",
    *(
        f"lightning_difftune.{room}"
        for room in ("losses", "diffusion", "schedules", "weightings", "sampling", "metrics", "modules", "prompts")
    ),
)
# Classes of those kinds or packages that nevertheless run code or unpickle.
_REFUSED = (
    "torch.jit",
    "torch.fx",
    "torch.package",
    "torch.distributed",
    "torch.multiprocessing",
    "torch.utils.data.datapipes",
    "torchvision.datasets.lsun",
    "lightning_difftune.cli",
)
# Arguments with which a trusted class would run code from elsewhere.
_SWITCHES = {"trust_remote_code": True, "weights_only": False, "allow_pickle": True}
_PLAIN = ("datetime.timedelta", "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath")
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_LARGEST_CONFIG = 1 << 20  # bytes; larger files cannot be part of a config


def check_trust(settings: Any, source: str, trusted: Sequence[str] = ()) -> None:
    """Refuse settings from a file that name classes or functions which could run arbitrary code.

    Allowed are the classes of this package; optimizers, schedulers, networks, data sets, transforms, callbacks, loggers
    and similar classes of torch, torchvision, lightning, diffusers, transformers, peft and datasets; functions of a few
    modules, such as losses; and ``trusted`` names. Nothing outside these packages is imported.

    Args:
        settings: A config: mappings, lists and plain values.
        source: Name of the file in the error message.
        trusted: Further packages, modules or names that the user trusts.

    Raises:
        ConfigError: If a name is refused; the message lists all of them and how to allow them.
    """
    refused = sorted({f"{name} ({reason})" for name, reason in _refusals(settings, tuple(trusted), {})})
    if refused:
        raise ConfigError(
            f"The config in {source} names {', '.join(refused)}. A class or function of a config is made and called, "
            f"so one that comes inside a file may only be of {', '.join(PACKAGES)}, and nothing of those that runs "
            "other code. If you trust whoever made the file, allow it by name, such as --trust my_package, or pass the "
            "config yourself: --config FILE."
        )


def split_trusted(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line without its ``--trust NAME`` options, and the names.

    Raises:
        ConfigError: If there is no name after one.
    """
    rest: list[str] = []
    names: list[str] = []
    given = iter(args)
    for arg in given:
        if arg == "--trust" or arg.startswith("--trust="):
            value = arg.partition("=")[2] or next(given, "")
            if not value or value.startswith("-"):
                raise ConfigError("--trust takes the name of a package, such as --trust my_package.")
            names += value.split(",")
        else:
            rest.append(arg)
    return rest, names


def _refusals(
    value: Any, trusted: tuple[str, ...], seen: dict[tuple[int, Any], Any], key: Any = None
) -> Iterator[tuple[str, str]]:
    """(name, reason) of each refused name in a value; parts of YAML may share one object."""
    if isinstance(value, Mapping | list | tuple | set):
        if (id(value), key) in seen:
            return
        seen[id(value), key] = value  # keeps the value alive, so that its id is not reused
    if len(seen) > 100_000:
        yield "settings", "too many"
    elif isinstance(value, Mapping):
        for inner, content in value.items():
            switch = _SWITCHES.get(inner) if isinstance(inner, str) else None
            if switch is not None and (content is switch or str(content).lower() == str(switch).lower()):
                yield f"{inner}: {content}", "code in a file would be run"
            yield from _refusals(content, trusted, seen, inner)
            yield from _refusals(inner, trusted, seen)
    elif isinstance(value, list | tuple | set):
        for content in value:
            yield from _refusals(content, trusted, seen, key)
    elif isinstance(value, str):
        if _DOTTED.fullmatch(value):
            reason = _reason(value, trusted, is_class=key == "class_path")
            if reason is not None:
                yield value, reason
        yield from _refusals(_part(value), trusted, seen)
    elif inspect.isroutine(value) or inspect.isclass(value):
        name = f"{value.__module__}.{value.__qualname__}"
        reason = _reason(name, trusted, is_class=True)
        if reason is not None:
            yield name, reason


def _reason(name: str, trusted: tuple[str, ...], is_class: bool) -> str | None:
    """Why a dotted name is refused; ``None`` if it is allowed or names nothing."""
    if _below(name, trusted) or name in _PLAIN:
        return None
    if not _below(name, PACKAGES):
        if is_class:
            return "of another package"
        return "of another package" if _is_importable(name) and not Path(name).exists() else None
    found = _resolve(name)
    if found is None:
        return None  # the config's parser reports it
    if inspect.ismodule(found):
        return "a module" if is_class else None
    home = getattr(found, "__module__", None) or type(found).__module__
    where = f"{home}.{getattr(found, '__qualname__', '')}"
    if _below(where, trusted):
        return None
    if not _below(where, PACKAGES):
        return f"it is {where}"
    if _below(where, _REFUSED) or _below(name, _REFUSED):
        return "it can run other code"
    if _below(where, _ROOMS):
        return None
    if not inspect.isclass(found):
        return "a function that is not known to be harmless" if callable(found) else None
    kinds = {f"{base.__module__}.{base.__qualname__}" for base in found.__mro__}
    ours = _below(where, ("lightning_difftune",))
    return None if ours or kinds & _BASES else "a class that is not known to be harmless"


def _below(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _is_importable(name: str) -> bool:
    """Whether reading a dotted name would import a module; finds out without doing so."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        try:
            spec = find_spec(".".join(parts[:end]))  # imports its parents, which are packages without code
        except (ImportError, ValueError, AttributeError):
            return False
        if spec is None:
            return False
        if spec.origin is not None:
            return True
    return False


def _resolve(name: str) -> Any:
    """The object that a dotted name of a trusted package refers to, if any."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                found = getattr(found, part)
            return found
        except (ImportError, AttributeError, RuntimeError, OSError):
            continue
    return None


def _part(value: str) -> Any:
    """The content of the file that a string names, if it could be part of a config; jsonargparse would read it."""
    try:
        file = Path(value)
        if "\n" in value or len(value) > 4096 or not file.is_file() or file.stat().st_size > _LARGEST_CONFIG:
            return None
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return content if isinstance(content, dict | list) else None
