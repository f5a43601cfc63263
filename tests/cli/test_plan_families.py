"""What is counted of published text-to-image pipelines without their weights."""

from __future__ import annotations

import pytest
import torch

from lightning_difftune import TextToImageDiffTuningModule
from lightning_difftune.cli.plan.shapes import published_shapes
from lightning_difftune.tuners import LoRA

CLIP_L, CLIP_L_PROJECTING, CLIP_BIGG, T5_XXL = 123_060_480, 123_650_304, 694_659_840, 4_762_310_656
PARAMETERS = {  # of the network and of the text encoders, as published
    "stabilityai/stable-diffusion-xl-base-1.0": [2_567_463_684, CLIP_L, CLIP_BIGG],
    "black-forest-labs/FLUX.1-dev": [11_901_408_320, CLIP_L, T5_XXL],
    "stabilityai/stable-diffusion-3.5-medium": [2_243_171_520, CLIP_L_PROJECTING, CLIP_BIGG, T5_XXL],
    "stabilityai/stable-diffusion-3.5-large": [8_056_627_520, CLIP_L_PROJECTING, CLIP_BIGG, T5_XXL],
}


@pytest.mark.parametrize(("name", "published"), PARAMETERS.items())
def test_each_has_its_published_number_of_parameters(name: str, published: list[int]) -> None:
    with published_shapes(with_values=False):
        module = TextToImageDiffTuningModule(
            name, frozen_dtype="bfloat16", tuner=LoRA(16, 16, ("to_q", "to_v")), bank_prompts=["a photo"]
        )
        module.configure_model()
    frozen = [parameter for parameter in module.network.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    text = [sum(p.numel() for p in network.parameters()) for network in module.text_encoder.network]
    assert [sum(parameter.numel() for parameter in frozen), *text] == published
