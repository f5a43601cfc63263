"""Counts of published text-to-image pipelines without their weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace

from lightning_difftune import TextToImageDiffTuningModule
from lightning_difftune.cli.lightning import ModelReader
from lightning_difftune.cli.plan import Memory, size
from lightning_difftune.cli.plan.phases import bank
from lightning_difftune.cli.plan.probe import PARTS, Costs, Probe, costs_of, saved_tensors
from lightning_difftune.cli.plan.shapes import published_shapes
from lightning_difftune.sampling import Sampler
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


ROOT = Path(__file__).parents[2]
WHOLE = "configs/text_to_image/whole_unet.yaml"
SAID = dict(
    re.findall(r"^\| ([^|]*) \| [\d.]+ GB \| ([\d.]+ GB) \|$", (ROOT / "docs/tasks/base-models.md").read_text(), re.M)
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folder"),
    [("Stable Diffusion XL", "sdxl"), ("FLUX.1-dev", "flux"), ("Stable Diffusion 3.5 medium", "sd3")],
)
def test_the_pages_memory_of_a_whole_network_is_what_plan_counts(
    name: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of LoRA is in the README, too, whose rows are compared with the whole command."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)
    files = f"configs/{folder}/base.yaml", "configs/text_to_image/folder.yaml", WHOLE
    with published_shapes(with_values=False) as mode:
        reader = ModelReader([word for file in files for word in ("--config", file)])
        module, data = reader.model, reader.composed.data.init_args
        module.configure_model()
        module.train()
        one, two = (Probe(module, (3, 1024, 1024), batch_size, "bf16-mixed") for batch_size in (1, 2))
        nbytes = []
        for probe in (one, two):
            with mode, saved_tensors() as saved_bytes:
                loss = probe.loss()
            nbytes.append(saved_bytes())
            del loss
        costs = costs_of(one, {}, nbytes[1] - nbytes[0])
    assert size(Memory.of(costs, data.batch_size, data.latent_cache is not None).most) == SAID[name]


def test_the_pages_memory_of_a_lora_is_the_readmes() -> None:
    page, readme = ((ROOT / file).read_text() for file in ("docs/tasks/base-models.md", "README.md"))
    loras = re.findall(r"^\| [^|]* \| ([\d.]+ GB) \| [\d.]+ GB \|$", page, re.M)
    assert loras == re.findall(r"^\| .*base-models.*\| ([\d.]+ GB) \|", readme, re.M)
    assert len(loras) == len(SAID) == 3


@pytest.mark.parametrize(
    ("prompts", "words"), [([""], "2 samples, 3 steps"), (["", "a cat"], "2 samples, 3 steps, guided")]
)
def test_a_bank_under_no_prompt_is_not_guided_whatever_its_sampler_says(prompts: list[str], words: str) -> None:
    sampler = Sampler(None, 3, 5.0, None)
    module = TextToImageDiffTuningModule("sd-nano-flowers", bank_prompts=prompts, bank_sampler=sampler)
    module.configure_model()
    costs = Costs(dict.fromkeys(PARTS, 1.0), 0, 0, 0, 0, 0, 0)
    found = bank(Namespace(bank_size=2, bank_source=None), module, costs, None)
    assert found.what == words
    assert found.flops(costs) == 2 * (6 if "guided" in words else 3) + 2
