"""Regional compilation: compiles the repeated blocks of a network, each kind once, instead of the whole network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_difftune.errors import ConfigError, check_lists
from lightning_difftune.models.frozen import Frozen


class RegionalCompile(Callback):
    """Compile the repeated blocks of the module's networks by ``torch.compile``, in place.

    Blocks of one class and shape share their compiled code, so a transformer of 28 blocks is compiled in the time of
    one. Names in the state dict stay the same, so checkpoints, averages and exports do too. On devices other than
    ``devices`` nothing is compiled: on a CPU it rarely pays.

    Args:
        blocks: Class names of the blocks; ``None`` uses a network's ``_repeated_blocks`` (diffusers) or else the
            classes that occur at least twice in a ``ModuleList``.
        devices: Device types to compile on.
        backend: As for ``torch.compile``.
        mode: As for ``torch.compile``, such as ``max-autotune-no-cudagraphs``.
        whole: Compile the trained networks as a whole, each as one graph. That takes minutes instead of seconds, and
            saves the host's work between the blocks, which limits small batches. ``mode="reduce-overhead"`` also
            replays the graph from CUDA graphs: batches must then have one size, and gradients are not accumulated.

    Raises:
        ConfigError: If blocks are given together with ``whole`` or, when training starts, if there is nothing to
            compile, or gradients are accumulated over CUDA graphs, whose memory the next batch overwrites.

    Example:
        >>> trainer = L.Trainer(callbacks=[RegionalCompile()], logger=False)
    """

    def __init__(
        self,
        blocks: Sequence[str] | None = None,
        devices: Sequence[str] = ("cuda",),
        backend: str = "inductor",
        mode: str | None = None,
        whole: bool = False,
    ) -> None:
        check_lists("RegionalCompile", blocks=blocks, devices=devices)
        if whole and blocks is not None:
            raise ConfigError(f"RegionalCompile compiles either whole networks or blocks, {list(blocks)}: set one.")
        self.blocks = blocks
        self.devices = tuple(devices)
        self.backend = backend
        self.mode = mode
        self.whole = whole

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compile the module, which is built and on its device."""
        if pl_module.device.type not in self.devices:
            return
        if self.has_cuda_graphs and trainer.accumulate_grad_batches > 1:
            raise ConfigError(
                f"RegionalCompile replays CUDA graphs in mode {self.mode!r}, and trainer.accumulate_grad_batches is "
                f"{trainer.accumulate_grad_batches}: the next batch would overwrite the gradients. Leave the mode out."
            )
        found = trained(pl_module) if self.whole else list(repeated_blocks(pl_module, self.blocks))
        if not found:
            raise ConfigError(
                f"RegionalCompile finds no {' or '.join(self.blocks or ()) or 'repeated block'} in "
                f"{type(pl_module).__name__}. Name the classes of its blocks, or remove the callback."
            )
        for block in found:
            block.compile(backend=self.backend, mode=self.mode)  # in place: only forward is replaced
        kinds = sorted({type(block).__name__ for block in found})
        what = "networks" if self.whole else "blocks"
        rank_zero_info(f"RegionalCompile: {len(found)} {what} ({', '.join(kinds)}); the first steps compile them.")

    @property
    def has_cuda_graphs(self) -> bool:
        """Whether the mode replays CUDA graphs."""
        return self.mode in ("reduce-overhead", "max-autotune")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Mark the step, so that graphs may reuse the memory of the previous one."""
        if self.has_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()


def trained(module: nn.Module) -> list[nn.Module]:
    """The outermost submodules that are called as networks and have trainable parameters."""
    networks = getattr(module, "trainable_modules", None)
    if networks is not None:
        return networks()
    return [child for child in module.children() if any(p.requires_grad for p in child.parameters())]


def repeated_blocks(module: nn.Module, names: Sequence[str] | None = None) -> Iterator[nn.Module]:
    """The outermost blocks of these class names, or of repeated ones, including those of frozen networks."""
    names = repeated_names(module) if names is None else names
    for child in children_of(module):
        if type(child).__name__ in names:
            yield child
        else:
            yield from repeated_blocks(child, names)


def repeated_names(module: nn.Module) -> list[str]:
    """Class names in ``_repeated_blocks`` or, without any, those that occur at least twice in a list."""
    parts = list(descendants(module))
    declared = [name for part in parts for name in getattr(part, "_repeated_blocks", None) or ()]
    if declared:
        return declared
    lists = [[type(child).__name__ for child in part] for part in parts if isinstance(part, nn.ModuleList)]
    return [name for names in lists for name in names if names.count(name) > 1]


def descendants(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all of its submodules."""
    yield module
    for child in children_of(module):
        yield from descendants(child)


def children_of(module: nn.Module) -> list[nn.Module]:
    """A module's children, including a frozen network that is kept out of its checkpoints."""
    return [*module.children(), *([module.network] if isinstance(module, Frozen) else [])]
