"""A pipeline's text encoders, asked as the pipeline itself asks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_difftune.errors import CheckpointError
from lightning_difftune.files import json_digest
from lightning_difftune.models.checkpoint_files import find_weights, read_json
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.models.frozen import Frozen
from lightning_difftune.models.hub import folder_of
from lightning_difftune.models.text_encoder import without_bars

Encode = Callable[[Any, list[str]], dict[str, Tensor]]


class PipelineText(Frozen):
    """The tokenizers and text encoders of a pipeline; never trained, never in a checkpoint.

    Args:
        pipeline_class: Of diffusers.
        model: Pipeline: hub repository or local folder.
        revision: Branch, tag or commit of a hub repository.
        encode: Given the pipeline (without its other parts) and B prompts, returns tensors of B rows by name.
        null: Given the pipeline, returns the condition of the unconditional branch in one row. That is also what the
            empty prompt means.
        dtype: Of the weights.

    Raises:
        CheckpointError: If the text encoders are not found or cannot be opened.
    """

    keeps_type = True

    def __init__(
        self,
        pipeline_class: Any,
        model: str | Path,
        revision: str | None,
        encode: Encode,
        null: Callable[[Any], dict[str, Tensor]],
        dtype: torch.dtype,
    ) -> None:
        self.pipeline = open_text_parts(pipeline_class, model, revision, dtype)
        names = sorted(name for name in self.pipeline.components if name.startswith("text_encoder"))
        networks = [getattr(self.pipeline, name) for name in names]
        super().__init__(nn.ModuleList(network for network in networks if network is not None))
        self._encode, self._null = encode, null

    def fingerprint(self) -> str:
        """Identity of weights, vocabularies and settings."""
        tokenizers = [part for name, part in self.pipeline.components.items() if name.startswith("tokenizer") and part]
        vocabularies = [[part.get_vocab(), part.model_max_length] for part in tokenizers]
        zeros = self.pipeline.config.get("force_zeros_for_empty_prompt")
        return json_digest([fingerprint(self.network), vocabularies, zeros])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of B rows by name, float32; rows of empty prompts are :meth:`null`'s."""
        device = next(self.network.parameters()).device
        with torch.autocast(device.type, enabled=False):
            encoded = self._encode(self.pipeline, list(prompts))
            if "" not in prompts:
                return {name: value.float() for name, value in encoded.items()}
            null = self.null()
        is_empty = torch.tensor([prompt == "" for prompt in prompts], device=device)
        return {
            name: torch.where(is_empty.view(-1, *[1] * (value.ndim - 1)), null[name], value.float())
            for name, value in encoded.items()
        }

    @torch.no_grad()
    def null(self) -> dict[str, Tensor]:
        """What a dropped prompt is, in one row, float32."""
        device = next(self.network.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return {name: value.float() for name, value in self._null(self.pipeline).items()}


def open_text_parts(pipeline_class: Any, model: str | Path, revision: str | None, dtype: torch.dtype) -> Any:
    """A pipeline of its tokenizers and text encoders alone.

    Raises:
        CheckpointError: If they are not found or cannot be opened.
    """
    folder = folder_of(model, "text_encoder", revision)
    parts = {name: part for name, part in read_json(folder / "model_index.json").items() if isinstance(part, list)}
    absent: dict[str, Any] = dict.fromkeys(parts)
    variants = set()
    for name, (library, _) in parts.items():
        if library is None:
            continue
        if name.startswith("text_encoder"):
            folder = folder_of(model, name, revision)
            weights = find_weights([file.name for file in (folder / name).iterdir()])
            variants.add(weights.variant if weights is not None else None)
        if name.startswith(("text_encoder", "tokenizer")):
            del absent[name]
    try:
        with without_bars():
            opened = pipeline_class.from_pretrained(
                folder,
                local_files_only=True,
                torch_dtype=dtype,
                variant=variants.pop() if len(variants) == 1 else None,
                **absent,
            )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{folder}: its tokenizers and text encoders cannot be opened: {error}") from error
    for network in opened.components.values():
        if isinstance(network, nn.Module) and any(p.dtype != dtype for p in network.parameters()):
            network.to(dtype)
    return opened
