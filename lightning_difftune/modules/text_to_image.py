"""Diff-Tuning of text-to-image models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.modules.stable_diffusion import StableDiffusionModule
from lightning_difftune.protocols import Denoiser


class TextToImageDiffTuningModule(StableDiffusionModule):
    """Diff-Tuning of a Stable Diffusion UNet on pictures with captions, whole or by a tuner such as LoRA.

    ``LoRA(target_modules=("to_q", "to_v"))`` fits the attention layers of diffusers' UNets. Arguments as those of
    :class:`~lightning_difftune.modules.StableDiffusionModule`.

    Example:
        >>> from lightning_difftune import MemoryBankDataModule, TextToImageDiffTuningModule
        >>> from lightning_difftune.tuners import LoRA
        >>> module = TextToImageDiffTuningModule(
        ...     "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ...     prompts=["a photo of a passion flower"],
        ...     tuner=LoRA(rank=16, alpha=16, target_modules=("to_q", "to_v")),
        ... )
    """

    unet: Any

    def build(self) -> dict[str, Any]:
        """Open the pipeline's networks."""
        self.unet = self.open_unet()
        self.build_frozen(self.unet)
        self.apply_memory_options(self.unet)
        return {"name": self.model, "fingerprint": fingerprint(self.unet)}

    def trainable_modules(self) -> list[nn.Module]:
        """The UNet."""
        return [self.unet]

    def denoise(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Network output (B, c, h, w) under embeddings (B, L, D)."""
        return self.unet(x_t, t, encoder_hidden_states=condition).sample

    def pretrained(self) -> Denoiser:
        """The UNet as the pipeline has it."""
        unet = self.open_unet().requires_grad_(False).eval().to(self.device)
        return lambda x_t, t, condition: unet(x_t, t, encoder_hidden_states=condition).sample
