"""A family outside the package, PixArt-Sigma, written only from docs/tasks/own-family.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from pipelines import ATTENTION, PROMPTS, built, data_of, module_of, pipeline_of
from tiny import quiet_trainer

from lightning_difftune import MemoryBank
from lightning_difftune.draws import noise_of
from lightning_difftune.modules.families import FAMILIES
from lightning_difftune.modules.families.text import PipelineText
from lightning_difftune.sampling import NoiseScheduler, Sampler
from lightning_difftune.source import SourceFacts, scheduler_from
from lightning_difftune.tuners import LoRA


class PixArtSigma:
    """Predicts noise and a variance, which is dropped; its text has a mask."""

    network_folder = "transformer"

    def network_class(self) -> Any:
        from diffusers import PixArtTransformer2DModel

        return PixArtTransformer2DModel

    def sample_size(self, network: Any) -> int:
        return int(network.config.sample_size)

    def open_text(self, model: str | Path, revision: str | None, image_size: int, dtype: torch.dtype) -> PipelineText:
        from diffusers import PixArtSigmaPipeline

        return PipelineText(PixArtSigmaPipeline, model, revision, encode, dtype)

    def check(self, model: str, network: Any, text: Any, latent_channels: int) -> None:
        pass

    def call(
        self, network: Any, x_t: torch.Tensor, t: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        output: torch.Tensor = network(
            x_t,
            timestep=t,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_mask"],
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return output.chunk(2, dim=1)[0]

    def sampler(self) -> Sampler:
        return Sampler(num_inference_steps=20, guidance_scale=4.5, guidance_channels=None)

    def scheduler(self, source: SourceFacts) -> NoiseScheduler:
        stated: Any = source.scheduler
        scheduler: NoiseScheduler = scheduler_from(stated["_class_name"], stated)
        return scheduler

    def density(self, scheduler: Mapping[str, Any], num_tokens: int) -> None:
        return None

    def is_step_distilled(self, network: Any, scheduler: dict[str, Any]) -> bool:
        return False

    def takes_guidance(self, network: Any) -> bool:
        return False


def encode(pipeline: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    embeds, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=16)
    return {"prompt_embeds": embeds, "prompt_mask": mask}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[str]:
    """Pictures of 32 px, latents (4, 16, 16)."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        cross_attention_dim=24,
        caption_channels=32,
        in_channels=4,
        out_channels=8,
    )
    encoder, tokenizer = pipelines.t5()
    pipeline: Any = PixArtSigmaPipeline(
        vae=pipelines.autoencoder(scaling_factor=0.13025),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )
    pipeline.save_pretrained(tmp_path / "pixart")
    FAMILIES["PixArtSigmaPipeline"] = PixArtSigma()
    yield str(tmp_path / "pixart")
    del FAMILIES["PixArtSigmaPipeline"]


def test_its_latents_are_the_pipelines_own(folder: str) -> None:
    module, indices = built(folder, sampler=Sampler(None, 3, 4.0, None)), torch.tensor([0, 1])
    ours = module.draw_latents(module.denoise, module.sampler, indices, module.conditions(indices))
    theirs = pipeline_of(folder)(
        PROMPTS[:2],
        latents=noise_of(0, indices, module.sample_shape),
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="latent",
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=16,
        height=32,
        width=32,
    ).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))


def test_it_trains_with_a_bank_and_a_cache_and_is_swapped(folder: str, tmp_path: Path) -> None:
    module = module_of(folder, tuner=LoRA(2, 2, ATTENTION), sampler=Sampler(None, 2, 1.0, None))
    trainer = quiet_trainer(tmp_path, 2)
    trainer.fit(module, data_of(tmp_path, latent_cache=tmp_path / "cache"))
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    assert {"train/loss", "train/retention"} <= trainer.callback_metrics.keys()
    assert len(MemoryBank(tmp_path / "bank")) == 4
    assert set(module.caption_columns) == {"prompt_embeds", "prompt_mask"}
    with torch.no_grad():
        assert len(module.eval().generate_swapped(torch.arange(1), [0.0, 0.5])) == 2


def test_weights_are_cast_together_only_where_a_family_says_that_it_fits(folder: str) -> None:
    """A network may switch autocast off for some of its layers, as diffusers' ZImage does."""
    assert built(folder).denoising_modules() == []
