"""What is counted of Stable Diffusion XL without its weights."""

from __future__ import annotations

import torch

from lightning_difftune import TextToImageDiffTuningModule
from lightning_difftune.cli.plan.shapes import published_shapes
from lightning_difftune.tuners import LoRA


def test_sdxl_has_its_published_number_of_parameters() -> None:
    with published_shapes(with_values=False):
        module = TextToImageDiffTuningModule(
            "stabilityai/stable-diffusion-xl-base-1.0",
            frozen_dtype="bfloat16",
            tuner=LoRA(16, 16, ("to_q", "to_v")),
        )
        module.configure_model()
    frozen = [parameter for parameter in module.network.parameters() if not parameter.requires_grad]
    assert sum(parameter.numel() for parameter in frozen) == 2_567_463_684
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
