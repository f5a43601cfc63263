"""What a checkpoint of a module holds, how it is completed when it is read, and how its module is rebuilt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse._parameter_resolvers import get_signature_parameters
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_difftune.errors import CheckpointError, ConfigError, NumericsError
from lightning_difftune.files import own_number
from lightning_difftune.models.checkpoints import check_state
from lightning_difftune.trust import check_trust

CONFIG = "config"  # the checkpoint's key for the settings of a run of the command line
ARGUMENTS = "arguments"  # the checkpoint's key for the module's arguments
LINKED = {"num_classes": "data", "image_size": "data"}  # the command line sets these once, for the data


def arguments_of(kind: type, args: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A module's arguments by name: the plain values, and for the others only that they were given."""
    signature = inspect.signature(kind)
    try:
        bound = signature.bind_partial(*args, **options).arguments
    except TypeError:  # the constructor raises it again
        return {"values": {}, "objects": []}
    given: dict[str, Any] = {}
    for name, value in bound.items():
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= value
        elif parameter.kind is parameter.VAR_POSITIONAL:  # by the names that its base has for them
            names = (p.name for p in get_signature_parameters(kind, "__init__") if p.name not in signature.parameters)
            given |= dict(zip(names, value, strict=False))
        else:
            given[name] = value
    values = _plain_values(given)
    return {"values": values, "objects": sorted(given.keys() - values.keys())}


def rebuild(kind: type, content: Mapping[str, Any], path: str, trusted: Sequence[str], options: dict[str, Any]) -> Any:
    """Rebuild the module of a checkpoint, without its weights.

    Args:
        kind: The module's class, or a base of it.
        content: What the checkpoint holds.
        path: Its name in error messages.
        trusted: Further packages and names that its config may name.
        options: Arguments that override the checkpoint's.

    Raises:
        ConfigError: If the checkpoint lacks an argument, is of another class, or names code that is not trusted.
    """
    if any("averages" in state for state in content.get("callbacks", {}).values()):
        rank_zero_info(
            f"{path} also holds averaged weights, by which its run validated; these are the raw ones. The averages "
            f"replace them inside `with averages_in(torch.load({path!r})).average_parameters(module):`, of "
            "lightning_difftune.callbacks.ema."
        )
    if isinstance(content.get(CONFIG), str):
        return _from_config(kind, content[CONFIG], path, trusted, options)
    known = content.get(ARGUMENTS, {"values": {}, "objects": []})
    missing = [f"{name}=..." for name in known["objects"] if name not in options]
    values = {**known["values"], **options}
    try:
        inspect.signature(kind).bind(**values)
    except TypeError as error:
        raise ConfigError(
            f"{path} does not hold the config of its run, so {kind.__name__} needs arguments: {error}."
        ) from error
    if inspect.isabstract(kind):
        raise ConfigError(f"{path} does not hold the config of its run: load it by the class that was saved.")
    if missing and not options:
        raise ConfigError(
            f"{path} does not hold the config of its run, and the objects that its {kind.__name__} was made with are "
            f"not in it. Pass them as they were: load_from_checkpoint(path, {', '.join(missing)})."
        )
    if missing:
        rank_zero_warn(
            f"The {kind.__name__} of {path} was made with {', '.join(missing)} as objects, which are left at their "
            "defaults."
        )
    return kind(**values)


def _from_config(kind: type, text: str, path: str, trusted: Sequence[str], options: dict[str, Any]) -> Any:
    settings = yaml.safe_load(text)
    model = settings.get("model") if isinstance(settings, dict) else None
    if not isinstance(model, dict) or "class_path" not in model:
        raise ConfigError(f"The config in {path} has no model with a class_path. Pass the module's arguments.")
    given = {key: value for key, value in (model.get("init_args") or {}).items() if key not in options}
    check_trust({"class_path": model["class_path"], "init_args": given}, path, trusted)
    found = _import(model["class_path"])
    if not inspect.isclass(found) or not issubclass(found, kind):
        raise ConfigError(f"The config in {path} has a {model['class_path']}, which is not a {kind.__name__}.")
    names = parameter_names(found)
    for name, part in LINKED.items():
        linked = ((settings.get(part) or {}).get("init_args") or {}).get(name)
        if name in names and name not in options and linked is not None:
            given.setdefault(name, linked)
    if "seed" not in options:
        given.setdefault("seed", int(settings.get("seed_everything") or 0))
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(found, "model", instantiate=False, skip=set(options))
    try:
        arguments = parser.instantiate_classes(parser.parse_object({"model": given})).model
    except Exception as error:  # jsonargparse's, which lists each type that an argument could have
        raise ConfigError(f"The config in {path} cannot be used: {error}") from error
    return found(**vars(arguments), **options)


def parameter_names(kind: type) -> set[str]:
    """The arguments of a class, including those that it passes on by ``**kwargs``."""
    return {parameter.name for parameter in get_signature_parameters(kind, "__init__")}


def _import(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{name} cannot be imported ({error}). Install or import what it is in.") from error


def _plain_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that a checkpoint can hold without code, paths as texts."""
    values = {key: str(value) if isinstance(value, Path) else own_number(value) for key, value in given.items()}
    return {key: value for key, value in values.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    return value is None or type(value) in (bool, int, float, str)


def frozen_names(module: nn.Module) -> set[str]:
    """State-dict names of the parameters that are not trained."""
    # FSDP wraps layers; state dicts do not show that.
    names = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name.replace("_fsdp_wrapped_module.", "") for name in names}


def make_lean(module: Any, checkpoint: dict[str, Any]) -> None:
    """Leave the frozen weights out of a checkpoint and add the identity of the base.

    Raises:
        NumericsError: If a weight is not finite; resume from the last checkpoint that was written.
    """
    frozen = frozen_names(module)
    state = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name not in frozen}
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise NumericsError(
            f"NaN or infinity in {len(broken)} of {len(state)} trained tensors, {', '.join(broken[:3])}; no checkpoint "
            "is written, and the last one is as it was. Lower the learning rate, set trainer.gradient_clip_val, or "
            "train in float32 or bf16-mixed."
        )
    checkpoint["state_dict"] = state
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):  # of save_hyperparameters(), objects included
        if key in checkpoint:
            checkpoint[key] = _plain_values(checkpoint[key])
    checkpoint["base_identity"] = module.base_identity
    checkpoint["source"] = module.source_facts.state()
    checkpoint["tuner"] = describe_tuner(module.tuner)


def describe_tuner(tuner: Any) -> str:
    """A tuner's class and plain settings, in words."""
    settings = {} if tuner is None else {name: own_number(value) for name, value in vars(tuner).items()}
    shown = (
        f"{name}={list(value) if isinstance(value, tuple) else value}"
        for name, value in sorted(settings.items())
        if name[0] != "_" and _is_plain(value)
    )
    return "none" if tuner is None else f"{type(tuner).__name__}({', '.join(shown)})"


def complete(module: Any, checkpoint: dict[str, Any], strict: bool, source: str) -> None:
    """Refuse a checkpoint of another base, and add the frozen weights of this one.

    Raises:
        CheckpointError: If the checkpoint was trained from other pre-trained weights, or lacks tensors.
    """
    module.configure_model()
    saved = checkpoint.get("base_identity", {})
    if saved.get("fingerprint") != module.base_identity.get("fingerprint"):
        raise CheckpointError(
            f"This checkpoint was trained from {saved.get('name', 'an unknown base')} "
            f"(fingerprint {str(saved.get('fingerprint'))[:12]}), but the model here starts from "
            f"{module.base_identity.get('name')} (fingerprint {str(module.base_identity.get('fingerprint'))[:12]}). "
            "Pass the pre-trained model that the run was started from."
        )
    changed = module.source_facts.differences(checkpoint.get("source", {}))
    if changed:
        raise CheckpointError(
            f"{source} was trained with {' and '.join(changed)}. Keep the objective's loss and diffusion, and the "
            "autoencoder, as the run had them."
        )
    tuners = checkpoint.get("tuner"), describe_tuner(module.tuner)
    if tuners[0] not in (None, tuners[1]):
        raise CheckpointError(
            f"{source} was trained with the tuner {tuners[0]}, and the tuner here is {tuners[1]}: with the same "
            "weights it is another network. Give the module the tuner that the run had."
        )
    current = module.state_dict()
    for name in frozen_names(module):
        if name in current:
            checkpoint["state_dict"].setdefault(name, current[name])
    if strict:
        check_state(checkpoint["state_dict"], current, source)
