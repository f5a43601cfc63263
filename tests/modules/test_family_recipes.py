"""The families train what diffusers' scripts train; and distilled models are not replayed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import ATTENTION, FAMILIES, PROMPTS, built, data_of, module_of, pipeline_of
from tiny import quiet_trainer

from lightning_difftune import ControlNetDiffTuningModule, DiffTuningObjective
from lightning_difftune.densities import LogitNormal, TimestepDensity, Uniform, masses
from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.modules.families import few_step_name
from lightning_difftune.retention_targets import OnlineTeacher
from lightning_difftune.sampling import Sampler
from lightning_difftune.trust import check_trust
from lightning_difftune.tuners import LoRA


@pytest.mark.parametrize("scheme", ["logit_normal", "sigma_sqrt", "none"])
@pytest.mark.parametrize("preconditions", [False, True])
def test_the_loss_is_that_of_diffusers_script_for_sd3(
    folder_of: Callable[..., str], scheme: str, preconditions: bool
) -> None:
    """train_dreambooth_lora_sd3.py; ours is the velocity's error, theirs times its weighting and, of x0, sigma^2."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    folder = folder_of("sd3")
    module, pipeline = built(folder), pipeline_of(folder)
    x0, noise = torch.randn(2, 2, 4, 16, 16).unbind(0)
    t = torch.tensor([149, 699])
    sigma = ((t + 1) / 1000).view(-1, 1, 1, 1)
    noisy = (1 - sigma) * x0 + sigma * noise
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS[:2], None, None, do_classifier_free_guidance=False)
    with torch.no_grad():
        predicted = pipeline.transformer(noisy, embeds, pooled, timestep=1000 * sigma.flatten()).sample
        ours = module.denoising_losses(module.denoise, x0, module.prompted(PROMPTS, torch.arange(2))[0], t, noise)
    target = noise - x0
    if preconditions:
        predicted, target = predicted * -sigma + noisy, x0
    weighting = compute_loss_weighting_for_sd3(scheme, sigma)
    theirs = (weighting * (predicted - target).square()).mean((1, 2, 3))
    factor = weighting.flatten() * (sigma.flatten() ** 2 if preconditions else 1)
    torch.testing.assert_close(ours * factor, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "settings", "shift", "density"),
    [
        ("logit_normal", {"logit_mean": 0.0, "logit_std": 1.0}, 3.0, LogitNormal(0.0, 1.0, shift=3.0)),  # SD3's script
        ("logit_normal", {"logit_mean": -0.5, "logit_std": 0.8}, 1.0, LogitNormal(0.5, 0.8)),  # they count from noise
        ("none", {}, 1.0, Uniform()),  # FLUX.1's script
        ("none", {}, 3.0, Uniform(3.0)),
    ],
)
def test_the_scripts_noise_levels_are_a_density_here(
    scheme: str, settings: dict[str, float], shift: float, density: TimestepDensity
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.training_utils import compute_density_for_timestep_sampling

    torch.manual_seed(0)
    u = compute_density_for_timestep_sampling(
        scheme, 100_000, settings.get("logit_mean", 0.0), settings.get("logit_std", 1.0), 1.29
    )
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    drawn = scheduler.timesteps[(u * 1000).long()] / 1000
    cumulated = masses(density, 1000).cumsum(0) / 1000
    for s in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert float((drawn <= s).double().mean()) == pytest.approx(float(cumulated[round(1000 * s) - 1]), abs=6e-3)


@pytest.mark.parametrize("tuner", [None, LoRA(2, 2, ATTENTION)], ids=["whole", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_checkpointing_are_those_without(folder_of: Callable[..., str], family: str, tuner: Any) -> None:
    gradients, kept = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = built(folder_of(family), tuner=tuner, gradient_checkpointing=checkpointing).train()
        for parameter in module.trainable_parameters():
            if tuner is not None:
                torch.nn.init.normal_(parameter, std=0.3)
        condition = module.prompted(PROMPTS, torch.arange(2))[0]
        saved: list[int] = []

        def keep(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            x0, noise = torch.randn(2, 2, *module.sample_shape, generator=torch.Generator().manual_seed(1)).unbind(0)
            loss = module.denoising_losses(module.denoise, x0, condition, torch.tensor([100, 800]), noise).mean()
        gradients.append(torch.autograd.grad(loss, module.trainable_parameters(), allow_unused=True))
        kept.append(sum(saved))
    assert kept[1] < 0.8 * kept[0], "activations are recomputed"
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        if plain is not None:
            torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


def changed(folder: str, to: Path, file: str, **content: Any) -> str:
    """A copy of a pipeline with other settings in one of its JSON files."""
    shutil.copytree(folder, to)
    path = to / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    return str(to)


SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
FEW_STEPS = {  # as they are published, or saved after what is published was loaded into them
    "SDXL Turbo": (
        "sdxl",
        SCHEDULER,
        {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    ),
    "SDXL Lightning": ("sdxl", SCHEDULER, {"timestep_spacing": "trailing"}),
    "LCM": ("sdxl", SCHEDULER, {"_class_name": "LCMScheduler"}),
    "Hyper-SD": ("sdxl", SCHEDULER, {"_class_name": "TCDScheduler"}),
    "SD3.5 Turbo": ("sd3", INDEX, {"_name_or_path": "stabilityai/stable-diffusion-3.5-large-turbo"}),
    "schnell, saved again": ("flux", "transformer/config.json", {"_name_or_path": "FLUX.1-schnell/transformer-lcm"}),
}


@pytest.mark.parametrize("name", FEW_STEPS)
def test_bases_of_few_steps_are_told_by_their_files_and_retained_by_a_teacher(
    tmp_path: Path, folder_of: Callable[..., str], name: str
) -> None:
    family, file, content = FEW_STEPS[name]
    folder = changed(folder_of(family), tmp_path / "base", file, **content)
    few: dict[str, Any] = {"sampler": Sampler(None, 2, 1.0, None), "tuner": LoRA(2, 2, ATTENTION)}
    with pytest.raises(
        ConfigError, match=r"distilled to a few steps, by .*\(replay\).*OnlineTeacher.*is_step_distilled"
    ):
        built(folder, **few).bank_generator()
    built(folder, **few, is_step_distilled=False).bank_generator()
    taught = module_of(folder, objective=DiffTuningObjective(retention_target=OnlineTeacher()), **few)
    trainer = quiet_trainer(tmp_path, 1)
    trainer.fit(taught, data_of(tmp_path))
    assert trainer.callback_metrics["train/retention"].isfinite()


@pytest.mark.parametrize("family", FAMILIES)
def test_bases_of_many_steps_are_replayed_unless_one_says_otherwise(folder_of: Callable[..., str], family: str) -> None:
    built(folder_of(family)).bank_generator()
    with pytest.raises(ConfigError, match="what is_step_distilled says"):
        built(folder_of(family), is_step_distilled=True).bank_generator()


def test_a_name_is_a_sign_by_its_last_part_and_whole_words() -> None:
    bases = ["runs/lightning/sdxl-base", "turboprop-photos", "SG161222/RealVisXL_V5.0", "FLUX.1-dev", "hyperreal"]
    assert few_step_name(bases) is None
    for name in ("stabilityai/sd-turbo", "ByteDance/SDXL-Lightning", "SG161222/RealVisXL_V5.0_Lightning", "x/lcm-sdxl"):
        assert few_step_name([*bases, name]) == name


def test_a_consistency_models_unet_is_refused(tmp_path: Path, folder_of: Callable[..., str]) -> None:
    """It takes its guidance as an embedding that this package does not make."""
    module = built(folder_of("sdxl"))
    module.network.register_to_config(time_cond_proj_dim=256)
    with pytest.raises(CheckpointError, match=r"time_cond_proj_dim.*LCM"):
        module.family.check("lcm-sdxl", module.network, module.text_encoder, 4)


class White:
    """Control maps of ones."""

    channels = 1

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.full_like(pictures[:, :1], 255)

    def identity(self) -> str:
        return "white"


def controlnet_of(folder: str, **settings: Any) -> ControlNetDiffTuningModule:
    return ControlNetDiffTuningModule(
        White(),
        folder,
        image_size=32,
        sampler=Sampler(None, 2, 3.0, None),
        conditioning_embedding_out_channels=(4, 8),
        **settings,
    )


def test_a_controlnet_beside_sdxl_has_the_loss_of_diffusers_script(folder_of: Callable[..., str]) -> None:
    """train_controlnet_sdxl.py: mean squared error of the noise, text and sizes given to ControlNet and UNet."""
    from diffusers import DDPMScheduler

    folder = folder_of("sdxl")
    module, pipeline = controlnet_of(folder), pipeline_of(folder)
    module.configure_model()
    torch.manual_seed(0)
    for block in (*module.controlnet.controlnet_down_blocks, module.controlnet.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.5)
    x0, noise = torch.randn(2, 2, 4, 16, 16).unbind(0)
    t, maps = torch.tensor([10, 700]), torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8)
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS[:2], do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)}
    noisy = DDPMScheduler.from_config(pipeline.scheduler.config).add_noise(x0, noise, t)
    with torch.no_grad():
        down, middle = module.controlnet(noisy, t, embeds, maps / 255, added_cond_kwargs=added, return_dict=False)
        predicted = pipeline.unet(
            noisy,
            t,
            embeds,
            added_cond_kwargs=added,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        ours = module.denoising_losses(module.denoise, x0, module.controlled(PROMPTS[:2], maps)[0], t, noise)
        plain = pipeline.unet(noisy, t, embeds, added_cond_kwargs=added).sample
    torch.testing.assert_close(ours, (predicted - noise).square().mean((1, 2, 3)), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(predicted, plain, atol=1e-2)


def test_a_controlnet_beside_sdxl_trains_and_draws(tmp_path: Path, folder_of: Callable[..., str]) -> None:
    module = controlnet_of(folder_of("sdxl"))
    trainer = quiet_trainer(tmp_path, 2)
    trainer.fit(module, data_of(tmp_path, latent_cache=tmp_path / "cache"))
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    maps = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    assert module.eval().generate_controlled(torch.tensor([0]), maps, ["a cat"]).shape == (1, 3, 32, 32)


def test_other_families_have_no_controlnet_and_say_so(folder_of: Callable[..., str]) -> None:
    for family, network in (("flux", "FluxTransformer2DModel"), ("sd3", "SD3Transformer2DModel")):
        with pytest.raises(CheckpointError, match=f"1.x, 2.x and XL, and this pipeline has a {network}"):
            controlnet_of(folder_of(family)).configure_model()


def test_an_optimizer_of_bitsandbytes_resumes_to_the_bit(tmp_path: Path, folder_of: Callable[..., str]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def fit(steps: int, checkpoint: str | None = None) -> Any:
        def optimizer(parameters: Any) -> torch.optim.Optimizer:
            made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=16)
            return made

        module = module_of(folder_of("sdxl"), sampler=Sampler(None, 2, 1.0, None), optimizer=optimizer)
        trainer = quiet_trainer(tmp_path, steps)
        trainer.fit(module, data_of(tmp_path), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module, trainer.optimizers[0]

    fit(2)
    (resumed, _), (straight, optimizer) = fit(4, str(tmp_path / "2.ckpt")), fit(4)
    kinds = {value.dtype for state in optimizer.state.values() for value in state.values() if hasattr(value, "dtype")}
    assert torch.uint8 in kinds
    pairs = zip(resumed.trainable_parameters(), straight.trainable_parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


def test_a_checkpoint_that_names_bitsandbytes_is_opened_by_who_trusts_it() -> None:
    settings = {"optimizer": {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 1e-4}}}
    with pytest.raises(ConfigError, match=r"bitsandbytes.optim.AdamW8bit.*--trust"):
        check_trust(settings, "run.ckpt")
    check_trust(settings, "run.ckpt", ["bitsandbytes"])
