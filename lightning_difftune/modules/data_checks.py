"""Checks that data or a second module have a module's classes, and batches its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_difftune.errors import ConfigError, DataError

FARTHEST = 1.5  # pixel values beyond [-1, 1] that an interpolation may have caused
LOOKED_AT = 20  # batches whose labels are looked at on an accelerator


def check_classes(module: Any, data: Any, saved_names: Sequence[str] | None = None) -> None:
    """Refuse classes whose numbers differ between data, module and checkpoint, and warn of a number with a new name.

    Args:
        module: The module; one without ``num_classes`` has no classes.
        data: The trainer's data module, if any.
        saved_names: Names of the classes of the checkpoint that is used, if any.

    Raises:
        ConfigError: If data and module have different numbers of classes, or a name has another number.
    """
    count, names = getattr(data, "num_classes", None), getattr(data, "class_names", None)
    own = getattr(module, "num_classes", None)
    if None not in (own, count) and own != count:
        raise ConfigError(
            f"The data have num_classes = {count} and the module {own}: it would draw classes that the data do not "
            f"have, or none of some that they have. Set num_classes of the module to {count}."
        )
    given = getattr(module, "class_names", None)
    _check_order(given, "the module's class_names", names, "the data")
    _check_order(saved_names, "the checkpoint", *((names, "the data") if given is None else (given, "class_names")))
    renamed = [
        f"{number} is {new!r} and was {old!r}"
        for number, (old, new) in enumerate(zip(saved_names or (), names or (), strict=False))
        if given is None and old != new
    ]
    if renamed:
        rank_zero_warn(
            f"Classes have other names than in the checkpoint: {', '.join(renamed[:3])} ({len(renamed)} in all"
            "). If they are other classes, one is taken for another: keep the run's, or start a new run."
        )


def _check_order(known: Sequence[str] | None, whose: str, names: Sequence[str] | None, where: str) -> None:
    """Refuse names of which one has another number among the known ones; a name without one there is let through."""
    if known is None or names is None:
        return
    numbers = {name: number for number, name in enumerate(known)}
    moved = [name for number, name in enumerate(names) if numbers.get(name, number) != number]
    if moved and len(numbers) == len(known):
        raise ConfigError(
            f"Class {moved[0]!r} has the number {list(names).index(moved[0])} in {where} and {numbers[moved[0]]} in "
            f"{whose}: one class would be taken for another ({len(moved)} of {len(names)} are moved). Keep the run's "
            "classes in their order, or start a new run."
        )


def check_subjects(module: Any, tail: Any, indices: Sequence[int]) -> None:
    """Refuse a module for the last steps of another one's pictures, if its own show something else.

    Raises:
        ConfigError: If they have other numbers of classes, or other names or prompts for a picture.
    """
    hides = module.lacks_class_names or tail.lacks_class_names
    ours, theirs = (
        [f"one of {getattr(one, 'num_classes', 0)} classes", *(() if hides else one.names_of(indices) or ())]
        for one in (module, tail)
    )
    for first, last in zip(ours, theirs, strict=False):
        if first != last:
            raise ConfigError(
                f"The tail would finish a picture as {last!r} that this model begins as {first!r}. Take runs with the "
                "same classes in one order, or with the same prompts (--model.prompts)."
            )


@torch.compiler.disable
def check_target(target: Mapping[str, Any], num_classes: int | None, number: int) -> None:
    """Refuse a target batch whose labels or pixels are not what a module takes.

    Args:
        target: The batch.
        num_classes: Classes of the module; ``None`` if it has none.
        number: Batches before it. Values are looked at in the first ones, since an accelerator would have to be waited
            for; labels on the CPU in all.

    Raises:
        DataError: If labels are not class numbers (B,) of the module, or pixels are not in [-1, 1].
    """
    labels, pixels = target.get("class_labels"), target.get("pixel_values")
    if num_classes is not None and isinstance(labels, Tensor):
        is_wrong = labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool
        if not is_wrong and len(labels) and (number < LOOKED_AT or labels.device.type == "cpu"):
            values = labels.cpu().numpy()  # no operations of the device
            is_wrong = not 0 <= values.min() <= values.max() < num_classes
        if is_wrong:
            found = f"{labels.dtype} {tuple(labels.shape)}, {labels.min():g} to {labels.max():g}"
            raise DataError(
                f"A batch has class_labels {found}; the module takes class numbers (B,) int64 from 0 to "
                f"{num_classes - 1}. Labels that count from 1 need 1 subtracted, and one-hot labels their argmax."
            )
    if not isinstance(pixels, Tensor):
        return
    low, high = (float(value) for value in pixels.aminmax()) if number == 0 else (0.0, 0.0)
    if not pixels.is_floating_point() or max(-low, high) > FARTHEST:
        raise DataError(
            f"A batch has pixel_values {pixels.dtype}, {pixels.min():g} to {pixels.max():g}; the module takes "
            "floating-point numbers in [-1, 1]. 8-bit pictures become them by lightning_difftune.pictures."
            "to_pixel_values, which is x / 127.5 - 1; leave other normalisations out."
        )
    if 0 <= low < high <= 1:
        rank_zero_warn(
            f"The first batch has pixel_values from {low:.3g} to {high:.3g}, and the module takes [-1, 1], where 0 is "
            "grey. If they are in [0, 1], as torchvision's ToTensor makes them, use 2 x - 1."
        )
