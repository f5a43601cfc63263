"""Checkpoints of what is trained, and the identity of the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_difftune.errors import CheckpointError, NumericsError
from lightning_difftune.models.checkpoints import check_state


def frozen_names(module: nn.Module) -> set[str]:
    """State-dict names of the parameters that are not trained."""
    # FSDP wraps layers, which state dicts do not show.
    names = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name.replace("_fsdp_wrapped_module.", "") for name in names}


def make_lean(module: Any, checkpoint: dict[str, Any]) -> None:
    """Leave the frozen weights out of a checkpoint and put the identity of the base in.

    Raises:
        NumericsError: If a weight is not finite; the checkpoint that was written last is then the one to resume from.
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
    checkpoint["base_identity"] = module.base_identity
    checkpoint["source"] = module.source_facts.state()


def complete(module: Any, checkpoint: dict[str, Any], strict: bool, source: str) -> None:
    """Refuse a checkpoint of another base and complete it by the frozen weights of this one.

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
    current = module.state_dict()
    for name in frozen_names(module):
        if name in current:
            checkpoint["state_dict"].setdefault(name, current[name])
    if strict:
        check_state(checkpoint["state_dict"], current, source)
