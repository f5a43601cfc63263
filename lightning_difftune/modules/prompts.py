"""What prompts become under a pipeline's text encoders, kept where it is asked for again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_difftune import conditions
from lightning_difftune.modules.families import TextConditions

RECENT_CAPTIONS = 64  # whose conditions are kept while a cache is made, or a validation repeats them


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
        """Conditions of a fixed list of n prompts, n rows, made once; the null condition, one row, without prompts."""
        if prompts not in self._tables:
            rows = [self.encoder.encode([prompt]) for prompt in prompts] or [self.encoder.null()]
            self._tables[prompts] = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        table = self._tables[prompts] = conditions.to(self._tables[prompts], device)
        return table

    def captions(self, captions: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """Conditions of B captions for a cache: encoded one by one, so that a batch does not change how one is rounded.

        Those seen last are kept, since pictures of a class, mirror images and validations repeat them.
        """
        for caption in dict.fromkeys(captions):
            if caption not in self._recent:
                self._recent[caption] = self.encoder.encode([caption])
        rows = [self._recent[caption] for caption in captions]
        for caption in list(self._recent)[:-RECENT_CAPTIONS]:
            del self._recent[caption]
        return {name: torch.cat([row[name].to(device) for row in rows]) for name in rows[0]}

    def forget_captions(self) -> None:
        """Free what was kept of captions."""
        self._recent.clear()
