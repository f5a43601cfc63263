"""The optimizer and its scheduler: made to fit the length of the run, and compared with those of a resumed one."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from lightning_difftune.errors import CheckpointError, ConfigError

# The argument in which a scheduler that has an end is told where it is.
LENGTHS: dict[type[LRScheduler], str] = {
    OneCycleLR: "total_steps",
    CosineAnnealingLR: "T_max",
    PolynomialLR: "total_iters",
}
LEFT_OUT = (None, -1)  # what stands for "take it from the trainer" or, as max_lr, "from the optimizer"
RECORD = "optimization"  # the key of a checkpoint under which the configured optimizers and schedulers are


def run_length(trainer: L.Trainer) -> int | None:
    """Optimizer steps of a run: ``max_steps``, or those of ``max_epochs``; ``None`` if it has no end."""
    if trainer.max_epochs in (None, -1):
        return trainer.max_steps if trainer.max_steps != -1 else None
    steps = trainer.estimated_stepping_batches
    trainer.fit_loop._combined_loader = None  # made for the count; the loop makes its own when it knows where it starts
    return None if math.isinf(steps) else int(steps)


def make_scheduler(
    build: Callable[..., Any], optimizer: Optimizer, trainer: L.Trainer, default_lr: float | None = None
) -> Any:
    """Build a scheduler that ends with the run.

    A length that is left out (``total_steps`` of ``OneCycleLR``, ``T_max`` of ``CosineAnnealingLR``, ``total_iters`` of
    ``PolynomialLR``), or is -1, is the run's; the ``max_lr`` of ``OneCycleLR`` is the optimizer's rate.

    Args:
        build: Given the optimizer, returns a scheduler; a class, a ``functools.partial`` of one, or what Lightning's
            command line makes of a ``class_path`` can be given what is left out.
        optimizer: The optimizer.
        trainer: The trainer that is about to fit.
        default_lr: A rate of the optimizer that nobody asked for.

    Raises:
        ConfigError: If the scheduler ends elsewhere than the run.
    """
    kind, given = _class_of(build)
    length = next((name for known, name in LENGTHS.items() if kind is not None and issubclass(kind, known)), None)
    missing: dict[str, Any] = {}
    if length is not None and given.get(length) in LEFT_OUT and given.get("epochs") is None:
        steps = run_length(trainer)
        if steps is None:
            raise ConfigError(
                f"{kind.__name__} goes to the end of the run, but the run has none. Set trainer.max_steps."  # type: ignore[union-attr]
            )
        missing[length] = max(steps, 1)
    if kind is OneCycleLR:
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        peak = given.get("max_lr")
        if peak in LEFT_OUT:
            missing["max_lr"] = rates
        elif isinstance(peak, int | float) and any(rate not in (peak, default_lr) for rate in rates):
            rank_zero_warn(
                f"OneCycleLR takes the rate up to max_lr = {peak:g}; the optimizer's lr of {rates[0]:g} is not used. "
                "Leave max_lr out (or set it to -1), and it is the optimizer's lr."
            )
    scheduler = build(optimizer, **missing)
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        check_length(scheduler, trainer)
    return scheduler


def check_length(scheduler: Any, trainer: L.Trainer) -> None:
    """Refuse a scheduler that ends elsewhere than the run.

    Raises:
        ConfigError: If it does.
    """
    found = length_of(scheduler)
    if found is None:
        return
    name, length = found
    steps = run_length(trainer)
    if steps is None or length == steps or steps < 1:
        return
    what = {
        "total_steps": "end in an error there" if length < steps else "not come down to its end",
        "T_max": "rise again from there" if length < steps else "not come down to its end",
        "total_iters": "be 0 from there" if length < steps else "not come down to its end",
    }[name]
    raise ConfigError(
        f"{type(scheduler).__name__} ends at step {length:,} ({name}), but the run has {steps:,} steps "
        f"(trainer.max_steps): the rate would {what}. Leave {name} out (or set it to -1), and it is the run's length."
    )


def length_of(scheduler: Any) -> tuple[str, int] | None:
    """The name and value of a scheduler's last step, counted from the run's start; ``None`` if it has no end."""
    if isinstance(scheduler, SequentialLR):
        last = length_of(scheduler._schedulers[-1])
        return None if last is None else (last[0], last[1] + scheduler._milestones[-1])
    if isinstance(scheduler, ChainedScheduler):
        return next((found for inner in scheduler._schedulers if (found := length_of(inner)) is not None), None)
    name = next((name for kind, name in LENGTHS.items() if isinstance(scheduler, kind)), None)
    return None if name is None else (name, getattr(scheduler, name))


def default_rate(optimizer: Optimizer) -> float | None:
    """The learning rate that an optimizer's class has if nobody sets it."""
    parameter = inspect.signature(type(optimizer)).parameters.get("lr")
    default = None if parameter is None else parameter.default
    return float(default) if isinstance(default, int | float) else None


def _class_of(build: Any) -> tuple[type[LRScheduler] | None, Mapping[str, Any]]:
    """The class that a factory makes and the arguments it gives, where they can be seen."""
    given: Mapping[str, Any] = {}
    parts: list[Any] = [build]
    if isinstance(build, partial):  # jsonargparse's has the class among its arguments
        parts, given = [build.func, *build.args], build.keywords
    found = next((part for part in parts if inspect.isclass(part) and issubclass(part, LRScheduler)), None)
    return found, given


def step_plateaus(trainer: L.Trainer) -> None:
    """Step the schedulers that go by a metric, after a validation of ``fit``.

    Raises:
        ConfigError: If the metric is not there.
    """
    if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
        return
    for config in trainer.lr_scheduler_configs:
        if not isinstance(config.scheduler, ReduceLROnPlateau):
            continue
        metric = trainer.callback_metrics.get(str(config.monitor))
        if metric is None:
            found = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ConfigError(
                f"ReduceLROnPlateau goes by {config.monitor}, which the validation did not log; it logged {found}. Set "
                "monitor of lightning.pytorch.cli.ReduceLROnPlateau to one of them, or hold out pictures: val_target."
            )
        config.scheduler.step(float(metric))


# -- resuming ---------------------------------------------------------------------------------------------------------


def describe(optimizers: Sequence[Any], schedulers: Sequence[Any]) -> dict[str, Any]:
    """How optimizers and schedulers that have not stepped are configured, in plain values."""
    return {
        "optimizers": [
            {"class": _name(one), "groups": _groups(one), "defaults": _plain(one.defaults)} for one in optimizers
        ],
        "schedulers": [{"class": _name(one), "state": _plain(one.state_dict())} for one in schedulers],
    }


def carry_settings(checkpoint: dict[str, Any], optimizers: Sequence[Any], schedulers: Sequence[Any]) -> list[str]:
    """Let settings that were changed since a checkpoint take effect where its state is about to be restored.

    What was not changed is restored as it was saved, to the bit. A changed scheduler, or changed rates under one, start
    where the run stands: the rate at step n is what the new settings give at step n.

    Args:
        checkpoint: What is about to be restored; its optimizers' and schedulers' states are changed in place.
        optimizers: The new ones, which have not stepped.
        schedulers: The new ones, which have not stepped; those that changed are stepped to where the run stands.

    Returns:
        What was changed, in words.

    Raises:
        CheckpointError: If the checkpoint is of another kind of optimizer, or of other parameters.
        ConfigError: If a new scheduler ends before the step where the run stands.
    """
    states, record = checkpoint.get("optimizer_states", []), checkpoint.get(RECORD)
    if len(states) != len(optimizers):
        raise CheckpointError(f"The checkpoint has {len(states)} optimizers and the model {len(optimizers)}.")
    now = describe(optimizers, schedulers)
    for number, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        saved = record["optimizers"][number]["class"] if record else None
        _check_kind(saved, optimizer, state)
    if record is None:
        return []
    changes: list[str] = []
    new_schedule = _schedule_changes(record, now, changes)
    if schedulers and not new_schedule:
        _refuse_unused_rate(record, now, schedulers)
    managed = {key for one in optimizers for group in one.param_groups for key in group if key not in one.defaults}
    if new_schedule:
        before = [[dict(group) for group in one.param_groups] for one in optimizers]
        _advance(schedulers, checkpoint)
        checkpoint["lr_schedulers"] = [one.state_dict() for one in schedulers]
        managed |= {
            key
            for one, groups in zip(optimizers, before, strict=True)
            for group, old in zip(one.param_groups, groups, strict=True)
            for key in group
            if key != "params" and _plain(group[key]) != _plain(old.get(key))
        }
        if any(not isinstance(one, ReduceLROnPlateau) for one in schedulers) or not schedulers:
            managed.add("lr")
    for number, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        old_groups, new_groups = record["optimizers"][number]["groups"], now["optimizers"][number]["groups"]
        for place, (old, new) in enumerate(zip(old_groups, new_groups, strict=True)):
            target, current = state["param_groups"][place], optimizer.param_groups[place]
            for key, value in new.items():
                changed = key in old and old[key] != value
                if changed and key not in ("initial_lr", "min_lr"):
                    changes.append(f"{key} {_shown(old[key])} -> {_shown(value)}")
                if (changed and (key not in managed or not schedulers)) or (new_schedule and key in managed):
                    target[key] = current[key]
            if new_schedule:
                for key in [key for key in target if key not in current and key != "params"]:
                    del target[key]  # of a scheduler that is no longer there
    if schedulers and all(isinstance(one, ReduceLROnPlateau) for one in schedulers):
        _carry_plateau(record, now, checkpoint, schedulers, changes)
    return list(dict.fromkeys(changes))


def _check_kind(saved: str | None, optimizer: Any, state: dict[str, Any]) -> None:
    groups, expected = state["param_groups"], optimizer.param_groups
    kind, missing = _name(optimizer), sorted(set(optimizer.defaults) - set(groups[0]))
    if saved not in (None, kind) or missing:
        was = saved or f"another, without {', '.join(missing)}"
        raise CheckpointError(
            f"The checkpoint's optimizer is {was}, and the model's is {kind}: the state of the one is of no use to the "
            f"other. Resume with {saved or 'the optimizer of the run'}, or start a new run from the checkpoint's "
            "weights: export them and set --model.init_args.model."
        )
    sizes = [[len(group["params"]) for group in groups] for groups in (groups, expected)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"The checkpoint's optimizer has groups of {sizes[0]} parameters, and the model's of {sizes[1]}. Resume "
            "with the tuner and the optimizer that the run was started with."
        )


def _schedule_changes(record: dict[str, Any], now: dict[str, Any], changes: list[str]) -> bool:
    """Whether the rates of the steps to come are no longer those that the run was started with."""
    old, new = record["schedulers"], now["schedulers"]
    if [one["class"] for one in old] != [one["class"] for one in new]:
        names = [", ".join(one["class"].rpartition(".")[2] for one in side) or "none" for side in (old, new)]
        changes.append(f"scheduler {names[0]} -> {names[1]}")
        return True
    if not new or all(one["class"].endswith("ReduceLROnPlateau") for one in new):
        return False  # which has no schedule
    for before, after in zip(old, new, strict=True):
        if before["state"] != after["state"]:
            keys = [key for key in after["state"] if before["state"].get(key) != after["state"][key]]
            shown = [key for key in keys if not key.startswith("_")]
            changes += [f"{key} {_shown(before['state'].get(key))} -> {_shown(after['state'][key])}" for key in shown]
            if keys and not shown:
                changes.append("the scheduler's settings")
            return True
    managed = ("lr", "initial_lr", "max_lr", "min_lr")
    groups = [[g for one in side["optimizers"] for g in one["groups"]] for side in (record, now)]
    return any(a.get(key) != b.get(key) for a, b in zip(*groups, strict=True) for key in managed)


def _refuse_unused_rate(record: dict[str, Any], now: dict[str, Any], schedulers: Sequence[Any]) -> None:
    """Say that a new rate is of no effect where the scheduler has one of its own."""
    for old, new, one in zip(record["optimizers"], now["optimizers"], schedulers, strict=False):
        rates = [side.get("defaults", {}).get("lr") for side in (old, new)]
        if rates[0] != rates[1] and old["groups"][0].get("lr") == new["groups"][0].get("lr"):
            raise ConfigError(
                f"The optimizer's lr was {_shown(rates[0])} and is {_shown(rates[1])}, which has no effect: "
                f"{type(one).__name__} has a rate of its own, max_lr = {_shown(new['groups'][0].get('max_lr'))}. "
                "Change that one, or set it to -1 to have it follow lr."
            )


def _advance(schedulers: Sequence[Any], checkpoint: dict[str, Any]) -> None:
    """Step schedulers to where the run stands."""
    old: list[dict[str, Any]] = checkpoint.get("lr_schedulers", [])
    position = int(old[0]["last_epoch"]) if old and "factor" not in old[0] else int(checkpoint.get("global_step", 0))
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a scheduler that steps before its optimizer
                for _ in range(position):
                    scheduler.step()
        except ValueError as error:
            raise ConfigError(
                f"The checkpoint stands at step {position:,}, but {type(scheduler).__name__} cannot be taken there "
                f"({error}). Raise trainer.max_steps, or leave the scheduler's length out."
            ) from error


def _carry_plateau(
    record: dict[str, Any],
    now: dict[str, Any],
    checkpoint: dict[str, Any],
    schedulers: Sequence[Any],
    changes: list[str],
) -> None:
    """Set what was changed of schedulers that go by a metric; what they have seen of it stays."""
    for old, new, state, one in zip(
        record["schedulers"], now["schedulers"], checkpoint["lr_schedulers"], schedulers, strict=True
    ):
        for key, value in new["state"].items():
            if old["state"].get(key) != value and not key.startswith("_"):
                state[key] = one.state_dict()[key]
                changes.append(f"{key} {_shown(old['state'].get(key))} -> {_shown(value)}")


def say_changes(changes: Sequence[str], step: int) -> None:
    """Log what takes effect from here on."""
    if changes:
        rank_zero_info(f"Changed since the checkpoint, from step {step:,} on: {', '.join(changes)}.")


def _name(one: Any) -> str:
    return f"{type(one).__module__}.{type(one).__qualname__}"


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    return [
        {key: value for key in group if key != "params" and (value := _plain(group[key])) is not _SKIPPED}
        for group in optimizer.param_groups
    ]


_SKIPPED = object()


def _plain(value: Any) -> Any:
    """Numbers, words and what is made of them; functions and objects, which cannot be compared, are left out."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): inner for key in value if (inner := _plain(value[key])) is not _SKIPPED}
    if isinstance(value, list | tuple):
        return [inner for one in value if (inner := _plain(one)) is not _SKIPPED]
    return value if value is None or type(value) in (bool, int, float, str) else _SKIPPED


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
