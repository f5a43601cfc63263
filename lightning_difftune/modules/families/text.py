"""A pipeline's text encoders, called as the pipeline calls them, and a cache of their outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_difftune import conditions
from lightning_difftune.errors import CheckpointError
from lightning_difftune.files import json_digest
from lightning_difftune.models.checkpoint_files import find_weights, read_json
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.models.frozen import NAMED_PROMPTS, Frozen
from lightning_difftune.models.hub import folder_of, without_bars

RECENT_CAPTIONS = 64  # captions whose conditions are kept, while a cache is built or a validation repeats them


class TextConditions(Protocol):
    """Frozen text encoders; a module that follows its parent to any device."""

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """B prompts => tensors of B rows by name, float32; the names are also columns of cached targets."""

    def null(self) -> dict[str, Tensor]:
        """The condition of guidance's unconditional branch and of dropped captions, in one row."""

    def fingerprint(self) -> str:
        """Identity of weights and vocabularies."""


class PipelineText(Frozen):
    """The tokenizers and text encoders of a pipeline; never trained, never in a checkpoint.

    Args:
        pipeline_class: A pipeline's class in diffusers.
        model: Pipeline: hub repository or local folder.
        revision: Branch, tag or commit of a hub repository.
        encode: Given the pipeline (without its other parts) and B prompts, returns tensors of B rows by name.
        dtype: Type of the weights.
        null: Given the pipeline, returns the condition of the unconditional branch in one row, which then also stands
            for the empty prompt; by default ``encode`` of the empty prompt.

    Raises:
        CheckpointError: If the text encoders are not found or cannot be opened.
    """

    keeps_type = True

    def __init__(
        self,
        pipeline_class: Any,
        model: str | Path,
        revision: str | None,
        encode: Callable[[Any, list[str]], dict[str, Tensor]],
        dtype: torch.dtype,
        null: Callable[[Any], dict[str, Tensor]] | None = None,
    ) -> None:
        self.pipeline = open_text_parts(pipeline_class, model, revision, dtype)
        names = sorted(name for name in self.pipeline.components if name.startswith("text_encoder"))
        networks = [getattr(self.pipeline, name) for name in names]
        super().__init__(nn.ModuleList(network for network in networks if network is not None))
        self._encode, self._long_prompts = encode, LongPrompts()
        self._null = null if null is not None else lambda pipeline: encode(pipeline, [""])

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
        with torch.autocast(device.type, enabled=False), self._long_prompts.few():
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
        """The condition of a dropped prompt, in one row, float32."""
        device = next(self.network.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return {name: value.float() for name, value in self._null(self.pipeline).items()}


class LongPrompts(logging.Filter):
    """Lets a pipeline name the first prompts that are truncated, and not each of a data set's captions."""

    def __init__(self) -> None:
        super().__init__()
        self.said = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show a message."""
        if "truncated" not in record.getMessage():  # the tokenizer's own, of the same prompt, speaks of errors
            return "sequence length is longer than the specified maximum" not in record.getMessage()
        if "number" not in vars(record):  # the first of several handlers
            self.said += 1
            record.number = self.said
        if self.said == NAMED_PROMPTS + 1:
            record.msg, record.args = "Further prompts are too long and are truncated, without being named.", ()
        return self.said <= NAMED_PROMPTS + 1

    @contextmanager
    def few(self) -> Iterator[None]:
        """A ``with`` block in which it applies to the messages of diffusers and transformers."""
        handlers = [h for library in ("diffusers", "transformers") for h in logging.getLogger(library).handlers]
        for handler in handlers:
            handler.addFilter(self)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(self)


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
        with without_bars("transformers"), without_bars("diffusers"):
            opened = pipeline_class.from_pretrained(
                folder,
                local_files_only=True,
                dtype=dtype,
                variant=variants.pop() if len(variants) == 1 else None,
                **absent,
            )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{folder}: its tokenizers and text encoders cannot be opened: {error}") from error
    for network in opened.components.values():
        if isinstance(network, nn.Module) and any(p.dtype != dtype for p in network.parameters()):
            network.to(dtype)
    return opened


class PromptConditions:
    """Conditions of prompts and captions, as tensors of one row per prompt by name, such as ``prompt_embeds``.

    Args:
        encoder: The frozen text encoders.
    """

    def __init__(self, encoder: TextConditions) -> None:
        self.encoder = encoder
        self._tables: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._recent: dict[str, dict[str, Tensor]] = {}

    def table(self, prompts: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
        """Conditions of a fixed list of n prompts, n rows, computed once; without prompts, the null condition."""
        if prompts not in self._tables:
            rows = [self.encoder.encode([prompt]) for prompt in prompts] or [self.encoder.null()]
            self._tables[prompts] = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        table = self._tables[prompts] = conditions.to(self._tables[prompts], device)
        return table

    def captions(self, captions: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """Conditions of B captions for a cache: encoded one by one, so that the batch does not change the rounding.

        The latest are kept, since pictures of a class, mirror images and validations repeat them.
        """
        for caption in dict.fromkeys(captions):
            if caption not in self._recent:
                self._recent[caption] = self.encoder.encode([caption])
        rows = [self._recent[caption] for caption in captions]
        for caption in list(self._recent)[:-RECENT_CAPTIONS]:
            del self._recent[caption]
        return {name: torch.cat([row[name].to(device) for row in rows]) for name in rows[0]}

    def forget_captions(self) -> None:
        """Free the kept conditions of captions."""
        self._recent.clear()


def with_guidance(condition: dict[str, Tensor], guidance: Tensor | float | None) -> dict[str, Tensor]:
    """A condition of B rows with the network's guidance, a number or (B,), if it takes any."""
    if guidance is None:
        return condition
    like = next(iter(condition.values()))
    return {**condition, "guidance": torch.as_tensor(guidance, device=like.device).float().expand(len(like))}
