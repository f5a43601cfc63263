"""Families of text-to-image pipelines: each draws what its pipeline draws, and trains what its scripts train."""

from __future__ import annotations

import importlib
import io
import logging
import math
import shutil
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pipelines import ATTENTION, FAMILIES, PROMPTS, built, data_of, module_of, pipeline_of
from tiny import quiet_trainer

from lightning_difftune import DiffTuningObjective, MemoryBank, TextToImageDiffTuningModule
from lightning_difftune.cli import main
from lightning_difftune.cli.lightning import run_lightning
from lightning_difftune.data import LatentCache
from lightning_difftune.densities import Uniform
from lightning_difftune.draws import Draws, noise_of
from lightning_difftune.errors import CheckpointError, ConfigError, StoreError
from lightning_difftune.modules import families
from lightning_difftune.retention_targets import OnlineTeacher
from lightning_difftune.sampling import Sampler
from lightning_difftune.tuners import LoRA


def latents_of(pipeline: Any, family: str, noise: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
    """What the pipeline itself draws of the first two prompts."""
    given: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent"}
    if family != "flux":
        return pipeline(PROMPTS[:2], latents=noise, **given).images
    packed = pipeline._pack_latents(noise, *noise.shape)
    result = pipeline(PROMPTS[:2], latents=packed, height=32, width=32, **given).images
    return pipeline._unpack_latents(result, 32, 32, pipeline.vae_scale_factor)


@pytest.mark.parametrize(("family", "settings"), [*((f, {}) for f in FAMILIES), ("flux", {"is_schnell": True})])
def test_our_latents_are_the_pipelines_own(
    folder_of: Callable[..., str], family: str, settings: dict[str, Any]
) -> None:
    folder = folder_of(family, **settings)
    scale = 4.0 if family != "flux" else 1.0
    module = built(folder, sampler=Sampler(None, 3, scale, None))
    indices = torch.tensor([0, 1])
    ours = module.draw_latents(module.denoise, module.sampler, indices, module.conditions(indices))
    noise = noise_of(0, indices, module.sample_shape)
    theirs = latents_of(pipeline_of(folder), family, noise, 3, scale if family != "flux" else 3.5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("forces_zeros", [True, False])
def test_the_empty_prompt_of_sdxl_is_the_pipelines_negative(folder_of: Callable[..., str], forces_zeros: bool) -> None:
    module = built(folder_of("sdxl", forces_zeros=forces_zeros))
    null, empty = module.null_text(), module.embed(("",))
    assert bool((null["prompt_embeds"] == 0).all()) is forces_zeros
    assert all(torch.equal(null[name], empty[name]) for name in null)
    assert module.null_text()["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]
    indices = torch.tensor([0])
    assert not module.sampler.guided(module.denoise, *module.prompted(("",), indices)).is_guided
    assert module.sampler.guided(module.denoise, *module.prompted(("a cat",), indices)).is_guided


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tuner", [None, LoRA(rank=2, alpha=4, target_modules=ATTENTION)], ids=["full", "lora"])
def test_it_trains_with_a_bank_of_its_own_and_resumes_to_the_bit(
    tmp_path: Path, folder_of: Callable[..., str], family: str, tuner: Any
) -> None:
    folder = folder_of(family)
    settings = {"sampler": Sampler(None, 2, 1.0, None), "tuner": tuner, "gradient_checkpointing": True}

    def fit(steps: int, checkpoint: str | None = None) -> TextToImageDiffTuningModule:
        torch.manual_seed(0)  # of a LoRA's first factors
        module = module_of(folder, **settings)
        trainer = quiet_trainer(tmp_path, steps)
        trainer.fit(module, data_of(tmp_path, latent_cache=tmp_path / "cache"), ckpt_path=checkpoint)
        assert all(value.isfinite() for value in trainer.callback_metrics.values())
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    fit(2)
    resumed, straight = fit(4, str(tmp_path / "2.ckpt")), fit(4)
    pairs = zip(resumed.trainable_parameters(), straight.trainable_parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)
    bank = MemoryBank(tmp_path / "bank")
    columns: Any = bank.read(torch.arange(4))
    assert columns["class_labels"].tolist() == [0, 1, 0, 1]
    if family == "flux":
        assert columns["guidance"].tolist() == [3.5] * 4
    saved = torch.load(tmp_path / "4.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith(("unet.", "transformer.")) for name in saved)


@pytest.mark.parametrize("family", FAMILIES)
def test_under_lora_the_pretrained_network_is_the_same_one(folder_of: Callable[..., str], family: str) -> None:
    folder = folder_of(family)
    module = built(folder, tuner=LoRA(rank=2, target_modules=ATTENTION))
    plain = built(folder)
    plain.network.requires_grad_(False)  # on a CPU, convolutions round otherwise where weights have gradients
    for parameter in module.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, t = torch.randn(2, *module.sample_shape), torch.tensor([3, 900])
    condition, _ = module.conditions(torch.arange(2))
    with torch.no_grad():
        expected = plain.denoise(x, t, condition)
        assert torch.equal(module.pretrained()(x, t, condition), expected)
        assert not torch.allclose(module.denoise(x, t, condition), expected, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_steps_are_swapped_for_the_pretrained_network(folder_of: Callable[..., str], family: str) -> None:
    module = built(folder_of(family), tuner=LoRA(2, 2, ATTENTION), sampler=Sampler(None, 2, 1.0, None))
    for parameter in module.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    indices = torch.arange(2)
    with torch.no_grad():
        tuned, half, pretrained = module.generate_swapped(indices, [0.0, 0.5, 1.0])
        assert torch.equal(tuned, module.generate(indices))
    plain = built(folder_of(family), sampler=Sampler(None, 2, 1.0, None))
    plain.network.requires_grad_(False)
    assert torch.equal(pretrained, plain.generate(indices))
    assert not torch.equal(half, tuned)
    assert not torch.equal(half, pretrained)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_networks_in_bfloat16_and_updates_in_float32(
    tmp_path: Path, folder_of: Callable[..., str], family: str
) -> None:
    module = module_of(
        folder_of(family),
        tuner=LoRA(rank=2, target_modules=ATTENTION),
        frozen_dtype="bfloat16",
        sampler=Sampler(None, 2, 1.0, None),
    )
    quiet_trainer(tmp_path, 2).fit(module, data_of(tmp_path))
    assert {p.dtype for p in module.trainable_parameters()} == {torch.float32}
    frozen = [p for p in module.network.parameters() if not p.requires_grad]
    assert {p.dtype for p in [*frozen, *module.text_encoder.network.parameters()]} == {torch.bfloat16}
    with torch.no_grad():
        output = module.denoise(
            torch.randn(2, *module.sample_shape), torch.tensor([3, 9]), module.conditions(torch.arange(2))[0]
        )
    assert output.dtype == torch.float32


def test_the_loss_is_that_of_diffusers_script_for_sdxl(folder_of: Callable[..., str]) -> None:
    """train_text_to_image_sdxl.py: mean squared error of the noise under text and sizes."""
    from diffusers import DDPMScheduler

    folder = folder_of("sdxl")
    module, pipeline = built(folder), pipeline_of(folder)
    x0, noise = torch.randn(2, 2, 4, 16, 16).unbind(0)
    t = torch.tensor([10, 700])
    condition = module.prompted(PROMPTS, torch.arange(2))[0]
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS[:2], do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)}
    noisy = DDPMScheduler.from_config(pipeline.scheduler.config).add_noise(x0, noise, t)
    with torch.no_grad():
        predicted = pipeline.unet(noisy, t, embeds, added_cond_kwargs=added).sample
        ours = module.denoising_losses(module.denoise, x0, condition, t, noise)
    torch.testing.assert_close(ours, (predicted - noise).square().mean((1, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_the_loss_is_that_of_diffusers_script_for_flux(folder_of: Callable[..., str], guidance: float) -> None:
    """train_dreambooth_lora_flux.py: mean squared error of noise - x0 at sigma, packed, with the guidance number."""
    folder = folder_of("flux")
    module, pipeline = built(folder, target_guidance=guidance), pipeline_of(folder)
    x0, noise = torch.randn(2, 2, 4, 16, 16).unbind(0)
    t = torch.tensor([99, 699])
    text = module.text_encoder.encode(PROMPTS[:2])
    condition = module.target_condition(text)
    sigma = (t + 1.0) / 1000
    noisy = (1 - sigma.view(-1, 1, 1, 1)) * x0 + sigma.view(-1, 1, 1, 1) * noise
    embeds, pooled, text_ids = pipeline.encode_prompt(PROMPTS[:2], max_sequence_length=512)
    ids = pipeline._prepare_latent_image_ids(2, 8, 8, "cpu", torch.float32)
    with torch.no_grad():
        output = pipeline.transformer(
            hidden_states=pipeline._pack_latents(noisy, 2, 4, 16, 16),
            timestep=sigma,
            guidance=torch.full((2,), guidance),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=ids,
        ).sample
        predicted = pipeline._unpack_latents(output, 32, 32, pipeline.vae_scale_factor)
        ours = module.denoising_losses(module.denoise, x0, condition, t, noise)
    expected = (predicted - (noise - x0)).square().mean((1, 2, 3))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_flux_is_retained_under_captions_at_the_banks_guidance(tmp_path: Path, folder_of: Callable[..., str]) -> None:
    module = built(folder_of("flux"), distilled_guidance=2.5, target_guidance=1.5)
    retained: Any = {"class_labels": torch.tensor([1]), "guidance": torch.tensor([4.0])}
    assert module.retention_condition(retained)["guidance"].tolist() == [4.0]
    assert module.conditions(torch.arange(2))[0]["guidance"].tolist() == [2.5, 2.5]
    encoded: Any = {"latent_mean": torch.zeros(2, 4, 16, 16), **module.text_encoder.encode(["a", "b"])}
    batch: Any = {"target": encoded, "retention": retained | {"latents": torch.zeros(1, 4, 16, 16)}}
    condition = module.prepare(batch, Draws(0, 0, torch.device("cpu")))[1]
    assert condition["guidance"].tolist() == [1.5, 1.5, 4.0]
    pictures = module.picture_columns(torch.zeros(2, 4, 16, 16))  # no guidance has drawn them
    assert module.retention_condition(pictures)["guidance"].tolist() == [1.5, 1.5]
    empty = module_of(folder_of("flux"), bank_prompts=("",), sampler=Sampler(None, 2, 1.0, None))
    with pytest.raises(ConfigError, match=r"no unconditional branch.*bank_prompts"):
        quiet_trainer(tmp_path, 1).fit(empty, data_of(tmp_path))


def test_replay_on_a_step_distilled_base_is_refused(tmp_path: Path, folder_of: Callable[..., str]) -> None:
    settings: dict[str, Any] = {"sampler": Sampler(None, 2, 1.0, None), "tuner": LoRA(2, 2, ATTENTION)}
    schnell = folder_of("flux", is_schnell=True)
    with pytest.raises(ConfigError, match=r"distilled to a few steps.*OnlineTeacher"):
        quiet_trainer(tmp_path, 1).fit(module_of(schnell, **settings), data_of(tmp_path))
    objective = DiffTuningObjective(retention_target=OnlineTeacher())
    module = module_of(schnell, objective=objective, **settings)
    quiet_trainer(tmp_path, 1).fit(module, data_of(tmp_path))
    with pytest.raises(ConfigError, match="does not take its guidance as a number"):
        built(schnell, distilled_guidance=3.5)


@pytest.mark.parametrize(
    ("family", "shift"), [("sdxl", None), ("flux", math.exp(0.5 - 0.65 * 192 / 3840)), ("sd3", 3.0)]
)
def test_timesteps_are_drawn_from_the_familys_density_times_psi_and_xi(
    folder_of: Callable[..., str], family: str, shift: float | None
) -> None:
    objective = built(folder_of(family)).objective
    s = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    p0 = torch.ones_like(s) if shift is None else shift / (shift - (shift - 1) * s).square()
    for weights, cdf in ((objective.psi, objective.reconsolidation_cdf), (objective.xi, objective.retention_cdf)):
        expected = (weights.double() * p0).cumsum(0)
        torch.testing.assert_close(cdf.double(), expected / expected[-1], rtol=0, atol=2e-3)
    given = built(folder_of(family), objective=DiffTuningObjective(density=Uniform(7.0))).objective
    assert given.density.shift == 7.0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "shift"),
    [
        ({"shift": 6.0}, 6.0),
        ({"shift": 1.0}, 1.0),
        ({"use_dynamic_shifting": True, "base_shift": 0.9, "max_shift": 0.9}, math.exp(0.9)),
        ({"use_dynamic_shifting": True, "base_shift": 2.0, "max_shift": 2.0, "time_shift_type": "linear"}, 2.0),
    ],
)
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_the_density_has_the_shift_of_the_pipelines_own_scheduler(
    tmp_path: Path, folder_of: Callable[..., str], family: str, settings: dict[str, Any], shift: float
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = tmp_path / family
    shutil.copytree(folder_of(family), folder)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**settings)
    scheduler.save_pretrained(folder / "scheduler")
    module = built(str(folder), bank_prompts=PROMPTS)
    assert module.objective.density.shift == pytest.approx(shift)  # type: ignore[union-attr]
    # It is the grid that samples are drawn on: u = 0.5 is at s = shift / (1 + shift).
    scheduler.set_timesteps(sigmas=[1.0, 0.5], **({"mu": settings["base_shift"]} if "base_shift" in settings else {}))
    assert float(scheduler.sigmas[1]) == pytest.approx(shift / (1 + shift), abs=1e-4)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_pictures_that_are_no_whole_patches_are_refused(folder_of: Callable[..., str], family: str) -> None:
    with pytest.raises(ConfigError, match="image_size 30 must be a positive multiple of 4"):
        built(folder_of(family), bank_prompts=PROMPTS, image_size=30)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_is_opened_in_silence(folder_of: Callable[..., str], family: str, capfd: Any) -> None:
    folder = folder_of(family)
    capfd.readouterr()  # bars of writing it
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        built(folder, bank_prompts=PROMPTS)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_long_captions_of_a_data_set_are_not_all_named(folder_of: Callable[..., str], family: str) -> None:
    text = built(folder_of(family), bank_prompts=PROMPTS).text_encoder
    stream = logging.StreamHandler(said := io.StringIO())
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).addHandler(stream)
    try:
        for number in range(20):
            text.encode(["a photo of a cat and a dog " * 200 + str(number)])
    finally:
        for library in ("diffusers", "transformers"):
            logging.getLogger(library).removeHandler(stream)
    assert "indexing errors" not in said.getvalue()
    lines = [line for line in said.getvalue().splitlines() if "truncated" in line]
    assert len(lines) == 4
    assert lines[-1] == "Further prompts are too long and are truncated, without being named."


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_cached_once_and_the_text_encoders_are_asked_for_each_once(
    tmp_path: Path, folder_of: Callable[..., str], family: str
) -> None:
    module = module_of(folder_of(family), sampler=Sampler(None, 2, 1.0, None))
    module.configure_model()
    asked: list[str] = []
    encode = module.text_encoder.encode
    module.text_encoder.encode = lambda prompts: (asked.extend(prompts), encode(prompts))[1]
    data = data_of(tmp_path, latent_cache=tmp_path / "cache", horizontal_flip=True)
    quiet_trainer(tmp_path, 2).fit(module, data)
    assert sorted(asked) == sorted([*PROMPTS, *PROMPTS, *PROMPTS[:2]]), "captions, prompts, prompts of the bank"
    files = sorted((tmp_path / "cache").glob("captions*/*.safetensors"))
    assert len(files) == len(PROMPTS)
    batch: Any = LatentCache(tmp_path / "cache").read([0, 4], [True, False])
    expected = encode([PROMPTS[0], PROMPTS[1]])
    for name, value in expected.items():
        torch.testing.assert_close(batch[name], value, rtol=1e-2, atol=1e-2)
    if family == "sdxl":
        assert torch.equal(batch["time_ids"], expected["time_ids"])
    files[0].write_bytes(files[0].read_bytes()[:-9] + b"x" * 9)
    with pytest.raises(StoreError, match=r"A caption of .*cache cannot be read.*Delete"):
        LatentCache(tmp_path / "cache").read(list(range(6)), [False] * 6)


def test_an_optimizer_of_8_bits_is_named_by_its_class(
    tmp_path: Path, folder_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes' classes are torch optimizers that take the parameters first, as this one does."""
    fake = types.ModuleType("bitsandbytes_like")
    fake.AdamW8bit = type("AdamW8bit", (torch.optim.AdamW,), {})  # type: ignore[attr-defined]
    fake.AdamW8bit.__module__ = fake.__name__  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    config: dict[str, Any] = {
        "model": {
            "class_path": "lightning_difftune.TextToImageDiffTuningModule",
            "init_args": {
                "model": folder_of("sdxl"),
                "optimizer": {"class_path": "bitsandbytes_like.AdamW8bit", "init_args": {"lr": 1e-3}},
            },
        },
        "data": {
            "class_path": "lightning_difftune.MemoryBankDataModule",
            "init_args": {
                "target": {
                    "class_path": "lightning_difftune.data.CaptionedFolder",
                    "init_args": {"root": str(tmp_path)},
                }
            },
        },
        "trainer": {"accelerator": "cpu", "logger": False},
    }
    Image.new("RGB", (32, 32)).save(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text("a cat")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    module: Any = run_lightning(["--config", str(tmp_path / "run.yaml")], run=False).model
    module.configure_model()
    optimizer = module.configure_optimizers()
    assert (type(optimizer).__name__, optimizer.defaults["lr"]) == ("AdamW8bit", 1e-3)


def test_a_family_of_the_documentation_is_added_by_reading_that_page_alone(
    tmp_path: Path, folder_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tasks" / "own-family.md").read_text()
    (tmp_path / "my_family.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_family")
    folder = tmp_path / "pipeline"
    shutil.copytree(folder_of("sd3"), folder)
    index = (folder / "model_index.json").read_text().replace("StableDiffusion3Pipeline", "MyPipeline")
    (folder / "model_index.json").write_text(index)
    module = module_of(str(folder), sampler=Sampler(None, 2, 1.0, None))
    quiet_trainer(tmp_path, 1).fit(module, data_of(tmp_path))
    own, theirs = built(str(folder)), built(folder_of("sd3"))
    indices = torch.arange(2)
    assert torch.equal(own.generate(indices), theirs.generate(indices))
    del families.FAMILIES["MyPipeline"]


def test_pipelines_of_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    with pytest.raises(CheckpointError, match=r"is a SanaPipeline, which is not supported.*StableDiffusionXLPipeline"):
        built(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_folder_of_pictures_to_pictures_by_the_command_line(
    tmp_path: Path,
    folder_of: Callable[..., str],
    family: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fit a LoRA with a meter of forgetting, sample, export it as a LoRA and merged; the pipeline opens both."""
    monkeypatch.chdir(tmp_path)
    Path("pipeline").symlink_to(folder_of(family))
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)):
        Path("captioned").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(f"captioned/{number}.png")
        Path(f"captioned/{number}.txt").write_text(PROMPTS[number % 3])
    source = {"class_path": "lightning_difftune.data.CaptionedFolder", "init_args": {"root": "captioned"}}
    lora = {"rank": 2, "alpha": 6, "target_modules": list(ATTENTION)}
    meter = {"every_n_steps": 1, "num_bins": 2, "num_samples": 2}
    config: dict[str, Any] = {
        "model": {
            "class_path": "lightning_difftune.TextToImageDiffTuningModule",
            "init_args": {
                "model": "pipeline",
                "image_size": 32,
                "prompts": PROMPTS,
                "bank_prompts": PROMPTS,
                "tuner": {"class_path": "lightning_difftune.tuners.LoRA", "init_args": lora},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}},
                "sampler": {"num_inference_steps": 2, "guidance_scale": 1.0, "guidance_channels": None},
            },
        },
        "data": {
            "class_path": "lightning_difftune.MemoryBankDataModule",
            "init_args": {
                "target": source,
                "val_target": source,
                "image_size": 32,
                "bank": "bank",
                "bank_size": 4,
                "batch_size": 5,
                "latent_cache": "cache",
            },
        },
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": "run",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "lightning_difftune.callbacks.ForgettingMeter", "init_args": meter}],
        },
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "run.yaml"])
    assert list(Path("run").rglob("*forget*"))
    main(["sample", "run", "--prompts", "a cat", "--num_samples", "1", "--output", "cats"])
    assert list(Path("cats").glob("*.png"))
    main(["export", "run", "--output", "lora", "--format", "diffusers"])
    main(["export", "run", "--output", "merged"])
    assert "outputs differ from the tuned network's by" in capsys.readouterr().out
    main(
        [
            "sample",
            "merged",
            "--base",
            "pipeline",
            "--prompts",
            "a",
            "--num_samples",
            "1",
            "--steps",
            "2",
            "--output",
            "b",
        ]
    )
    assert list(Path("b").glob("*.png"))
    lora_pipeline, merged = pipeline_of("pipeline"), pipeline_of("pipeline")
    lora_pipeline.load_lora_weights("lora")
    name = "unet" if family == "sdxl" else "transformer"
    setattr(merged, name, type(getattr(merged, name)).from_pretrained("merged"))
    noise = torch.randn(2, 4, 16, 16)
    first, second, plain = (
        latents_of(pipeline, family, noise, 2, 1.0) for pipeline in (lora_pipeline, merged, pipeline_of("pipeline"))
    )
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, plain, atol=1e-2)
