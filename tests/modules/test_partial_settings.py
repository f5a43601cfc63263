"""A partial setting is completed by the model's own family, in every way of giving it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import yaml
from tiny import quiet_trainer, tiny_dit, tiny_pictures, tiny_weights

from lightning_difftune import ControlNetDiffTuningModule, DiTDiffTuningModule, MemoryBankDataModule
from lightning_difftune.cli import main
from lightning_difftune.cli.lightning import run_lightning
from lightning_difftune.cli.run import Run
from lightning_difftune.data.annotators import Canny
from lightning_difftune.errors import ConfigError
from lightning_difftune.models import load_dit
from lightning_difftune.modules.base import DiffTuningModule
from lightning_difftune.modules.text_to_image import TextToImageDiffTuningModule
from lightning_difftune.sampling import Sampler
from lightning_difftune.tuners import LoRA

SD = (20, 7.5, None, "DPMSolverMultistepScheduler")
OWN: dict[str, tuple[Any, ...]] = {  # steps, guidance, its channels and the scheduler of each family
    "DiT": (50, 1.5, 3, "DDIMScheduler"),
    "Stable Diffusion": SD,
    "ControlNet": SD,
    "sdxl": (30, 5.0, None, "EulerDiscreteScheduler"),
    "flux": (28, 1.0, None, "FlowMatchEulerDiscreteScheduler"),
    "sd3": (28, 7.0, None, "FlowMatchEulerDiscreteScheduler"),
}
GIVEN: tuple[dict[str, Any], ...] = (
    {},
    {"num_inference_steps": 2},
    {"guidance_scale": 3.0},
    {"guidance_channels": None},
    {"guidance_channels": 2},
    {"domain_guidance": True},
    {"pretrained_tail": 0.5},
    {"num_inference_steps": 2, "guidance_scale": 3.0},
)


@pytest.fixture
def make(pipeline_folder: str, folder_of: Callable[..., str]) -> Callable[..., DiffTuningModule]:
    """A built module of a family."""

    def module(family: str, **settings: Any) -> DiffTuningModule:
        made: DiffTuningModule
        if family == "DiT":
            made = DiTDiffTuningModule(tiny_dit(), **settings)
        elif family == "ControlNet":
            made = ControlNetDiffTuningModule(Canny(), pipeline_folder, **settings)
        else:
            folder = pipeline_folder if family == "Stable Diffusion" else folder_of(family)
            size = None if family == "Stable Diffusion" else 32
            made = TextToImageDiffTuningModule(folder, image_size=size, **settings)
        made.configure_model()
        return made

    return module


def said(sampler: Sampler) -> tuple[Any, ...]:
    kind = type(sampler.scheduler).__name__
    return sampler.num_inference_steps, sampler.guidance_scale, sampler.guidance_channels, kind


@pytest.mark.parametrize("family", OWN)
def test_what_a_sampler_leaves_out_is_as_the_family_has_it(family: str, make: Callable[..., Any]) -> None:
    steps, scale, channels, scheduler = OWN[family]
    module = make(family)
    for given in GIVEN:
        if given.get("domain_guidance") and scale == 1:
            with pytest.raises(ConfigError, match="domain_guidance changes nothing at a guidance_scale of 1"):
                module.sampler = Sampler(**given)
            continue
        module.sampler = Sampler(**given)
        assert said(module.sampler) == (
            given.get("num_inference_steps", steps),
            given.get("guidance_scale", scale),
            given.get("guidance_channels", channels),
            scheduler,
        )


@pytest.mark.parametrize("family", OWN)
def test_what_a_bank_sampler_leaves_out_is_as_the_sampler_has_it(family: str, make: Callable[..., Any]) -> None:
    options = {"guidance_channels": 2, "domain_guidance": True, "pretrained_tail": 0.5}
    sampler = Sampler(num_inference_steps=7, guidance_scale=max(OWN[family][1], 1.5), **options)
    prompted = {} if family == "DiT" else {"bank_prompts": ("grey",)}
    module = make(family, sampler=sampler, bank_sampler=Sampler(num_inference_steps=9), **prompted)
    scale = OWN[family][1] if family == "DiT" else 1.0
    assert said(module.bank_sampler) == (9, scale, 2, OWN[family][3])
    assert (module.bank_sampler.domain_guidance, module.bank_sampler.pretrained_tail) == (False, 0.0)
    module.bank_sampler = Sampler(guidance_scale=3.0)
    assert said(module.bank_sampler) == (7, 3.0, 2, OWN[family][3])


def test_a_bank_sampler_has_the_samplers_scheduler() -> None:
    heun = diffusers.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    module = DiTDiffTuningModule(tiny_dit(), sampler=Sampler(heun), bank_sampler=Sampler(num_inference_steps=9))
    module.configure_model()
    assert module.bank_sampler.scheduler is module.sampler.scheduler is heun


def test_a_sampler_that_is_assigned_before_the_model_is_built_counts(pipeline_folder: str) -> None:
    module = TextToImageDiffTuningModule(pipeline_folder)
    module.sampler = Sampler(num_inference_steps=3)
    module.configure_model()
    assert said(module.sampler) == (3, 7.5, None, "DPMSolverMultistepScheduler")
    assert said(module.bank_sampler) == (3, 1.0, None, "DPMSolverMultistepScheduler")


class OfOnesOwn(DiTDiffTuningModule):
    """A family without a default sampler."""

    default_sampler = DiffTuningModule.default_sampler


def test_a_family_of_ones_own_is_not_guided_by_default() -> None:
    module = OfOnesOwn(tiny_dit(), sampler=Sampler(num_inference_steps=2))
    module.configure_model()
    assert said(module.sampler) == (2, 1.0, None, "DDIMScheduler")


# -- schedulers by name -----------------------------------------------------------------------------------------------

NAMES = ("DDIMScheduler", "diffusers.UniPCMultistepScheduler", "EulerDiscrete")


@pytest.mark.parametrize("family", ["DiT", "Stable Diffusion", "ControlNet", "sdxl"])
@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_by_its_name_is_made_for_the_model(name: str, family: str, make: Callable[..., Any]) -> None:
    module = make(family)
    own = module.sampler.scheduler.alphas_cumprod
    module.sampler = Sampler(name)
    scheduler = module.sampler.scheduler
    assert scheduler.alphas_cumprod.allclose(own, atol=1e-6)
    assert not scheduler.config.get("clip_sample", False)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_scheduler_by_its_name_integrates_a_flow(family: str, make: Callable[..., Any]) -> None:
    module = make(family)
    module.sampler = Sampler("UniPCMultistep")
    config = module.sampler.scheduler.config
    assert (config.prediction_type, config.use_flow_sigmas) == ("flow_prediction", True)
    assert config.flow_shift == module.default_scheduler().config.shift
    module.sampler = Sampler("FlowMatchHeunDiscrete")
    assert module.sampler.scheduler.config.shift == module.default_scheduler().config.shift
    with pytest.raises(ConfigError, match="predicts 'flow_prediction', but the sampler integrates with DDIMScheduler"):
        module.sampler = Sampler("DDIM")


def test_a_scheduler_by_its_name_starts_at_pure_noise_where_the_model_does() -> None:
    dit = tiny_dit()
    betas = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "clip_sample": False}
    dit.sampling = Sampler(diffusers.DDIMScheduler(**betas)).settings()
    module = DiTDiffTuningModule(dit, sampler=Sampler("DDIM"))
    module.configure_model()
    assert module.sampler.scheduler.config.timestep_spacing == "trailing"
    assert module.sampler.scheduler.config.rescale_betas_zero_snr


def test_what_is_not_a_scheduler_is_refused_where_it_is_given() -> None:
    with pytest.raises(ConfigError, match=r"diffusers has no os\.systemScheduler"):
        Sampler("os.system")
    for channels in (0, -1, "all", 1.5):
        with pytest.raises(ConfigError, match="guidance_channels is how many leading channels are guided"):
            Sampler(guidance_channels=channels)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="guidance_scale must be a number"):
        Sampler(guidance_scale=float("nan"))


@pytest.mark.parametrize("family", OWN)
def test_lora_updates_the_familys_query_and_value_projections(family: str, make: Callable[..., Any]) -> None:
    module = make(family, tuner=LoRA(rank=2))
    names = {
        name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in module.named_parameters() if ".lora_A" in name
    }
    assert names == ({"q", "v"} if family == "DiT" else {"to_q", "to_v"})
    layers = [layer for layer in module.modules() if hasattr(layer, "lora_A")]
    assert {layer.scaling["default"] for layer in layers} == {1.0}


# -- YAML, the command line and what they leave behind -----------------------------------------------------------------


def config_of(tmp_path: Path, weights: Path, **model: Any) -> Path:
    """A config of a short run."""
    settings = {
        "seed_everything": 1,
        "model": {
            "class_path": "lightning_difftune.DiTDiffTuningModule",
            "init_args": {"model": str(weights), **model},
        },
        "data": {
            "class_path": "lightning_difftune.MemoryBankDataModule",
            "init_args": {
                "target": {"class_path": "lightning_difftune.data.HandwrittenDigits", "init_args": {"split": "train"}},
                "num_classes": 10,
                "image_size": 8,
                "channels": 1,
                "batch_size": 4,
            },
        },
        "trainer": {"default_root_dir": str(tmp_path / "run"), "max_steps": 1, "accelerator": "cpu", "devices": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", ["DiT", "Stable Diffusion", "ControlNet"])
@pytest.mark.parametrize("road", ["YAML", "command line"])
def test_a_sampler_in_part_from_outside(family: str, road: str, tmp_path: Path, pipeline_folder: str) -> None:
    path = config_of(tmp_path, tiny_weights(tmp_path, num_classes=10))
    settings = yaml.safe_load(path.read_text())
    if family != "DiT":
        kind = "TextToImage" if family == "Stable Diffusion" else "ControlNet"
        settings["model"] = {"class_path": f"lightning_difftune.{kind}DiffTuningModule"}
        settings["model"]["init_args"] = {"model": pipeline_folder}
        if family == "ControlNet":
            settings["model"]["init_args"]["annotator"] = "lightning_difftune.data.annotators.Canny"
        settings["data"]["init_args"]["channels"] = 3
    options = ["--model.sampler.num_inference_steps", "6", "--model.bank_sampler.guidance_scale", "2"]
    if road == "YAML":
        settings["model"]["init_args"] |= {"sampler": {"num_inference_steps": 6}, "bank_sampler": {"guidance_scale": 2}}
        options = []
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    module: Any = run_lightning(["--config", str(path), *options], run=False).model
    module.configure_model()
    _, scale, channels, scheduler = OWN[family]
    assert said(module.sampler) == (6, scale, channels, scheduler)
    assert said(module.bank_sampler) == (6, 2.0, channels, scheduler)


def test_config_checkpoint_and_export_show_what_was_used(tmp_path: Path) -> None:
    path = config_of(tmp_path, tiny_weights(tmp_path, num_classes=10), sampler={"num_inference_steps": 6})
    main(["fit", "--config", str(path)])
    run = Run.find(str(tmp_path / "run"))
    used = {"num_inference_steps": 6, "guidance_scale": 1.5, "guidance_channels": 3}
    for text in (run.config_text, run.content["config"]):
        model = yaml.safe_load(text)["model"]["init_args"]
        assert {key: model["sampler"][key] for key in used} == used
        assert {key: model["bank_sampler"][key] for key in used} == used
        assert model["sampler"]["scheduler"] is None, "it is made for the model"
    main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "tuned.safetensors")])
    sampling: Any = load_dit(tmp_path / "tuned.safetensors").sampling
    assert {key: sampling[key] for key in used} == used
    settings = {
        key: value for key, value in yaml.safe_load(run.config_text).items() if key in ("model", "data", "trainer")
    }
    module: Any = run_lightning(["--config", yaml.safe_dump(settings)], run=False).model
    module.configure_model()
    assert said(module.sampler) == (6, 1.5, 3, "DDIMScheduler")


def test_a_run_from_python_has_them_too(tmp_path: Path) -> None:
    module = DiTDiffTuningModule(tiny_dit(num_classes=3), sampler=Sampler(num_inference_steps=2))
    quiet_trainer(tmp_path, 1).fit(module, MemoryBankDataModule(tiny_pictures(), 3, 8, 1, batch_size=4))
    assert said(module.sampler) == (2, 1.5, 3, "DDIMScheduler")
