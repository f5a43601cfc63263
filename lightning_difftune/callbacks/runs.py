"""What the command line asks the callbacks of a run, none of which it knows by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich.console import Console

from lightning_difftune.callbacks.chain_of_forgetting import ChainOfForgetting
from lightning_difftune.callbacks.distance import DistanceCallback
from lightning_difftune.callbacks.ema import EMA
from lightning_difftune.callbacks.preemption import Preemption
from lightning_difftune.callbacks.progress_bar import StepLines, StepProgressBar
from lightning_difftune.errors import ConfigError


def with_defaults(callbacks: Iterable[Callback]) -> list[Callback]:
    """The callbacks of a run with what each run has: progress that counts its steps, and leaving in good order."""
    progress = StepProgressBar if Console().is_terminal or Console().is_jupyter else StepLines
    callbacks = [progress() if type(callback) is RichProgressBar else callback for callback in callbacks]
    if any(isinstance(callback, Preemption) for callback in callbacks):
        return callbacks
    return [*callbacks, Preemption()]  # the last one: it saves what the others have made of a step


def averages_in(checkpoint: Mapping[str, Any]) -> EMA | None:
    """The averaged weights that a checkpoint holds; ``None`` if there are none."""
    states = checkpoint.get("callbacks", {}).values()
    state = next((state for state in states if "averages" in state), None)
    if state is None:
        return None
    averages = EMA()
    averages.load_state_dict(state)
    return averages


def swap_meter(callbacks: Iterable[Callback]) -> ChainOfForgetting:
    """What measures swapped pictures: the run's own callback, or one that measures as a Fréchet distance of it does.

    Raises:
        ConfigError: If there is neither.
    """
    distances = [callback for callback in callbacks if isinstance(callback, DistanceCallback)]
    if not distances:
        raise ConfigError(
            "The config has neither a ChainOfForgetting nor a FID callback that says how pictures are measured. Add "
            "one of them to trainer.callbacks."
        )
    own = next((callback for callback in distances if isinstance(callback, ChainOfForgetting)), None)
    if own is not None:
        return own
    like = distances[0]
    extractor = like.distance.feature_extractor
    chain = ChainOfForgetting(like.num_samples, feature_extractor=extractor, batch_size=like.batch_size)
    chain.reference, chain.cache = like.reference, like.cache
    return chain
