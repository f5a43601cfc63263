"""Facts of a Lightning trainer that modules and callbacks ask for."""

from __future__ import annotations

import lightning as L


def has_validation(trainer: L.Trainer) -> bool:
    """Whether a fit has held-out batches to validate with; sets up their loaders if that has not been done."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.enable_validation:
        loop.setup_data()
    return trainer.enable_validation and any(loop.max_batches)
