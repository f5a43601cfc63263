"""Diff-Tuning of text-to-image models."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_difftune.modules.text_pipeline import TextPipelineModule
from lightning_difftune.protocols import Denoiser
from lightning_difftune.source import SourceFacts


class TextToImageDiffTuningModule(TextPipelineModule):
    """Diff-Tuning of a text-to-image pipeline's network on captioned pictures, in full or by a tuner such as LoRA.

    Takes the arguments of :class:`~lightning_difftune.modules.TextPipelineModule`.

    Example:
        >>> from lightning_difftune import MemoryBankDataModule, TextToImageDiffTuningModule
        >>> from lightning_difftune.tuners import LoRA
        >>> module = TextToImageDiffTuningModule(
        ...     "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ...     prompts=["a photo of a passion flower"],
        ...     tuner=LoRA(rank=16, alpha=16, target_modules=("to_q", "to_v")),
        ... )
    """

    def build(self) -> SourceFacts:
        """Open the pipeline's networks."""
        network = self.open_pipeline()
        setattr(self, self.family.network_folder, network)
        self.apply_memory_options(network)
        return self.facts(network)

    @property
    def network(self) -> Any:
        """The trained network; also an attribute named after its folder in the pipeline, such as ``unet``."""
        return getattr(self, self.family.network_folder)

    def trainable_modules(self) -> list[nn.Module]:
        """The network that denoises."""
        return [self.network]

    def denoising_modules(self) -> list[nn.Module]:
        """The same, if its family keeps autocast on throughout."""
        return [self.network] if getattr(self.family, "is_autocast_throughout", False) else []

    def run(self, network: Any, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """A network's output (B, c, h, w) as float32."""
        return self.family.call(network, x_t, t, condition).float()

    def denoise(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Network output (B, c, h, w) under the family's conditions, such as ``prompt_embeds`` (B, L, D)."""
        return self.run(self.network, x_t, t, condition)

    def pretrained(self) -> Denoiser:
        """The pipeline's original network: the trained one without its adapters, or else a frozen copy."""
        if hasattr(self.tuner, "disabled"):
            return self._without_adapters
        return partial(self.run, self.frozen(self.pipeline.open_network(self.frozen_dtype)))

    def _without_adapters(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        tuner: Any = self.tuner
        with tuner.disabled(self.network):
            return self.run(self.network, x_t, t, condition)
