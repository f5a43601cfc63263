"""Settings of optimizers and schedulers that changed since the checkpoint that a run is resumed from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.files import own_number

RECORD = "optimization"  # the checkpoint's key for the settings of optimizers and schedulers


def describe(optimizers: Sequence[Any], schedulers: Sequence[Any]) -> dict[str, Any]:
    """The settings of optimizers and schedulers that have not stepped, in plain values."""
    return {
        "optimizers": [
            {"class": _name(optimizer), "groups": _groups(optimizer), "defaults": _plain(optimizer.defaults)}
            for optimizer in optimizers
        ],
        "schedulers": [
            {"class": _name(scheduler), "state": _plain(scheduler.state_dict())} for scheduler in schedulers
        ],
    }


def carry_settings(checkpoint: dict[str, Any], optimizers: Sequence[Any], schedulers: Sequence[Any]) -> list[str]:
    """Apply settings that changed since a checkpoint to the state that is about to be restored.

    Everything else is restored as it was saved, to the bit. A changed scheduler, or changed rates under one, start at
    the current step: the rate at step n is what the new settings give at step n.

    Args:
        checkpoint: The checkpoint; its optimizers' and schedulers' states are changed in place.
        optimizers: The new ones, which have not stepped.
        schedulers: The new ones, which have not stepped; those that changed are stepped to the current step.

    Returns:
        The changes, in words.

    Raises:
        CheckpointError: If the checkpoint is of another kind of optimizer, or of other parameters.
        ConfigError: If a new scheduler ends before the current step.
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
    managed = {
        key
        for optimizer in optimizers
        for group in optimizer.param_groups
        for key in group
        if key not in optimizer.defaults
    }
    if new_schedule:
        before = [[dict(group) for group in optimizer.param_groups] for optimizer in optimizers]
        _advance(schedulers, checkpoint)
        checkpoint["lr_schedulers"] = [scheduler.state_dict() for scheduler in schedulers]
        managed |= {
            key
            for optimizer, groups in zip(optimizers, before, strict=True)
            for group, old in zip(optimizer.param_groups, groups, strict=True)
            for key in group
            if key != "params" and _plain(group[key]) != _plain(old.get(key))
        }
        if any(not isinstance(scheduler, ReduceLROnPlateau) for scheduler in schedulers) or not schedulers:
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
                    del target[key]  # left over from a scheduler that was removed
    if schedulers and all(isinstance(scheduler, ReduceLROnPlateau) for scheduler in schedulers):
        _carry_plateau(record, now, checkpoint, schedulers, changes)
    return list(dict.fromkeys(changes))


def _check_kind(saved: str | None, optimizer: Any, state: dict[str, Any]) -> None:
    groups, expected = state["param_groups"], optimizer.param_groups
    kind, missing = _name(optimizer), sorted(set(optimizer.defaults) - set(groups[0]))
    if saved not in (None, kind) or missing:
        was = saved or f"another, without {', '.join(missing)}"
        raise CheckpointError(
            f"The checkpoint's optimizer is {was}, and the model's is {kind}: the one cannot use the state of the "
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
    """Whether the rates of the remaining steps differ from those that the run was started with."""
    old, new = record["schedulers"], now["schedulers"]
    if [scheduler["class"] for scheduler in old] != [scheduler["class"] for scheduler in new]:
        names = [
            ", ".join(scheduler["class"].rpartition(".")[2] for scheduler in side) or "none" for side in (old, new)
        ]
        changes.append(f"scheduler {names[0]} -> {names[1]}")
        return True
    if not new or all(scheduler["class"].endswith("ReduceLROnPlateau") for scheduler in new):
        return False  # there is no schedule
    for before, after in zip(old, new, strict=True):
        if before["state"] != after["state"]:
            keys = [key for key in after["state"] if before["state"].get(key) != after["state"][key]]
            shown = [key for key in keys if not key.startswith("_")]
            changes += [f"{key} {_shown(before['state'].get(key))} -> {_shown(after['state'][key])}" for key in shown]
            if keys and not shown:
                changes.append("the scheduler's settings")
            return True
    managed = ("lr", "initial_lr", "max_lr", "min_lr")
    groups = [[g for optimizer in side["optimizers"] for g in optimizer["groups"]] for side in (record, now)]
    return any(a.get(key) != b.get(key) for a, b in zip(*groups, strict=True) for key in managed)


def _refuse_unused_rate(record: dict[str, Any], now: dict[str, Any], schedulers: Sequence[Any]) -> None:
    """Refuse a new rate that has no effect because the scheduler sets its own."""
    for old, new, scheduler in zip(record["optimizers"], now["optimizers"], schedulers, strict=False):
        rates = [side.get("defaults", {}).get("lr") for side in (old, new)]
        if rates[0] != rates[1] and old["groups"][0].get("lr") == new["groups"][0].get("lr"):
            raise ConfigError(
                f"The optimizer's lr was {_shown(rates[0])} and is {_shown(rates[1])}, which has no effect: "
                f"{type(scheduler).__name__} has a rate of its own, max_lr = {_shown(new['groups'][0].get('max_lr'))}. "
                "Change that one, or set it to -1 to have it follow lr."
            )


def _advance(schedulers: Sequence[Any], checkpoint: dict[str, Any]) -> None:
    """Step schedulers to the current step of the run."""
    old: list[dict[str, Any]] = checkpoint.get("lr_schedulers", [])
    position = int(old[0]["last_epoch"]) if old and "factor" not in old[0] else int(checkpoint.get("global_step", 0))
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about a scheduler that steps before its optimizer
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
    """Apply changed settings of schedulers that follow a metric; their history of it stays."""
    for old, new, state, scheduler in zip(
        record["schedulers"], now["schedulers"], checkpoint["lr_schedulers"], schedulers, strict=True
    ):
        for key, value in new["state"].items():
            if old["state"].get(key) != value and not key.startswith("_"):
                state[key] = scheduler.state_dict()[key]
                changes.append(f"{key} {_shown(old['state'].get(key))} -> {_shown(value)}")


def _name(instance: Any) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    return [
        {key: value for key in group if key != "params" and (value := _plain(group[key])) is not _SKIPPED}
        for group in optimizer.param_groups
    ]


_SKIPPED = object()


def _plain(value: Any) -> Any:
    """Plain values and containers of them; functions and objects, which cannot be compared, are left out."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): inner for key in value if (inner := _plain(value[key])) is not _SKIPPED}
    if isinstance(value, list | tuple):
        return [inner for entry in value if (inner := _plain(entry)) is not _SKIPPED]
    value = own_number(value)
    return value if value is None or type(value) in (bool, int, float, str) else _SKIPPED


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
