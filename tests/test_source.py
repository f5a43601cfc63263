"""The facts of a pre-trained model against what a run says: all is right, or refused with the fix named."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import diffusers
import pytest
import torch
from tiny import quiet_trainer, tiny_dit, tiny_pictures

from lightning_difftune import (
    ControlNetDiffTuningModule,
    DiffTuningObjective,
    DiTDiffTuningModule,
    MemoryBankDataModule,
    PowerSchedule,
    TextToImageDiffTuningModule,
)
from lightning_difftune.data.annotators import Canny
from lightning_difftune.densities import LogitNormal
from lightning_difftune.diffusion import GaussianDiffusion, RectifiedFlow, same_process
from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.losses import eps_mse_loss, hybrid_loss, v_mse_loss, velocity_mse_loss, x0_mse_loss
from lightning_difftune.models import FrozenAutoencoder, export_dit
from lightning_difftune.modules import families
from lightning_difftune.sampling import Sampler
from lightning_difftune.sampling.sampler import check_scheduler
from lightning_difftune.source import SourceFacts, process_of

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DIT = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
FAMILIES = ("DiT of pixels", "DiT of latents", "text-to-image", "ControlNet")
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
LOSSES = {
    None: None,
    "eps": eps_mse_loss,
    "hybrid": hybrid_loss,
    "v": v_mse_loss,
    "x0": x0_mse_loss,
    "velocity": velocity_mse_loss,
}
RIGHT_LOSS = {
    "epsilon": {None, "eps", "hybrid"},
    "v_prediction": {None, "v"},
    "sample": {None, "x0"},
    "flow_prediction": {None, "velocity"},
}
SAMPLERS = ("none", "right", "fractional", "other betas", "other prediction", "clipping", "thresholding", "zero-SNR")


def published(family, prediction, zero=False):
    """The scheduler that a model comes with."""
    if prediction == "flow_prediction":
        return diffusers.FlowMatchEulerDiscreteScheduler()
    betas = DIT if "DiT" in family else SD
    return diffusers.DDIMScheduler(
        **betas,
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=True,
        rescale_betas_zero_snr=zero,
        timestep_spacing="trailing",
    )


def scheduler_of(kind, family, prediction, zero=False):
    """The scheduler that a run asks for."""
    if kind == "none":
        return None
    if prediction == "flow_prediction":
        return {
            "right": diffusers.FlowMatchEulerDiscreteScheduler(),
            "fractional": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            "other betas": diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500),
            "other prediction": diffusers.DDIMScheduler(clip_sample=False),
            "clipping": diffusers.DPMSolverMultistepScheduler(
                prediction_type=prediction, use_flow_sigmas=True, thresholding=True
            ),
            "thresholding": diffusers.DPMSolverMultistepScheduler(
                prediction_type=prediction, use_flow_sigmas=True, thresholding=True
            ),
            "zero-SNR": diffusers.DPMSolverMultistepScheduler(prediction_type=prediction, use_flow_sigmas=False),
        }[kind]
    betas, other = (DIT, SD) if "DiT" in family else (SD, DIT)
    settings = {**betas, "prediction_type": prediction, "rescale_betas_zero_snr": zero}
    changes = {
        "right": {"clip_sample": False},
        "other betas": {"clip_sample": False, **other},
        "other prediction": {
            "clip_sample": False,
            "prediction_type": "epsilon" if prediction != "epsilon" else "v_prediction",
        },
        "clipping": {"clip_sample": True},
        "thresholding": {"clip_sample": False, "thresholding": True},
        "zero-SNR": {"clip_sample": False, "rescale_betas_zero_snr": not zero},
    }
    if kind == "fractional":
        return diffusers.EulerDiscreteScheduler(**settings, use_karras_sigmas=True)
    return diffusers.DDIMScheduler(**{**settings, "timestep_spacing": "trailing"} | changes[kind])


def refusal(family, prediction, loss, sampler, zero=False):
    """What the message must name; None for what is right."""
    if zero and prediction == "epsilon":
        return "pure noise"
    if loss not in RIGHT_LOSS[prediction]:
        return f"predicts '{prediction}', but the objective's loss is"
    if loss == "hybrid" and "DiT" not in family:
        return "predicts none"
    if sampler in ("none", "right", "fractional"):
        return None
    if sampler in ("clipping", "thresholding"):
        name = "thresholding" if prediction == "flow_prediction" else {"clipping": "clip_sample"}.get(sampler, sampler)
        return None if family == "DiT of pixels" else f"has {name} on"
    if sampler == "other prediction":
        return f"predicts '{prediction}', but the sampler integrates with"
    flows = {"zero-SNR": "use_flow_sigmas", "other betas": "another noise schedule"}
    return flows[sampler] if prediction == "flow_prediction" else "another noise schedule"


@pytest.fixture(scope="module")
def pipelines(pipeline_folder, tmp_path_factory):
    """Folders of one pipeline by what its scheduler says; networks and text encoder are shared links."""

    def folder_for(scheduler) -> str:
        folder = tmp_path_factory.mktemp("pipeline")
        for entry in Path(pipeline_folder).iterdir():
            if entry.name != "scheduler":
                (folder / entry.name).symlink_to(entry)
        scheduler.save_pretrained(folder / "scheduler")
        return str(folder)

    return folder_for


@pytest.fixture(autouse=True)
def opened_once(monkeypatch):
    """Opens each part of the pipeline once per test: only the facts differ."""
    kept = {}

    def once(make):
        def opened(*args, **settings):
            key = make, *(arg if isinstance(arg, type) else Path(str(arg)).name[:0] for arg in args)
            if key not in kept:
                kept[key] = make(*args, **settings)
            return kept[key]

        return opened

    for name in ("open_network", "FrozenAutoencoder", "fingerprint"):
        monkeypatch.setattr(families, name, once(getattr(families, name)))


def module_of(family, scheduler, folder, **settings):
    """A module of a model that was published with a scheduler."""
    if "DiT" in family:
        dit = tiny_dit(in_channels=1 if family == "DiT of pixels" else 4)
        dit.sampling = Sampler(scheduler).settings()
        return DiTDiffTuningModule(dit, **settings)
    if family == "ControlNet":
        return ControlNetDiffTuningModule(Canny(), folder, **settings)
    return TextToImageDiffTuningModule(folder, **settings)


def oracle(x0, process, prediction):
    """The network that is right about a world of one sample, in any parametrisation; t may have a fraction."""

    def denoise(x_t, t, condition):
        if prediction == "flow_prediction":
            return (x_t - x0) / ((t.float() + 1) / 1000).clamp(min=1e-3).view(-1, 1, 1, 1)
        low = t.float().floor().long().clamp(0, 999)
        high = (low + 1).clamp(max=999)
        share = (t.float() - low).view(-1, 1, 1, 1)
        (a, b), (c, d) = (process.coefficients(i, x_t) for i in (low, high))
        # diffusers interpolates log sigma between whole timesteps
        if share.any():
            low_sigma, high_sigma = ((b / a).clamp(max=4096).log(), (d / c).clamp(max=4096).log())
            sigma = (low_sigma * (1 - share) + high_sigma * share).exp()
            a, b = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        eps = (x_t - a * x0) / b
        return {"epsilon": eps, "v_prediction": a * eps - b * x0, "sample": x0.expand_as(x_t)}[prediction]

    return denoise


def check_right(module, prediction):
    """The loss of a network that is right is 0, and it draws the only sample there is."""
    x0 = torch.tensor(0.7 if module.source_facts.latents is None else 3.0).expand(1, 1, 2, 2)
    process = module.objective.diffusion
    network = oracle(x0, process, prediction)
    t, noise = torch.tensor([10, 500, 998]), torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    losses = module.denoising_losses(network, x0.expand(3, -1, -1, -1), None, t, noise)
    assert losses.max() < 1e-6
    drawn = Sampler(module.sampler.scheduler, 12, 1.0)(network, noise, None, None)
    torch.testing.assert_close(drawn, x0.expand_as(drawn), rtol=0.01, atol=0.02)


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero-SNR"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_combination_is_right_or_refused(family, prediction, zero, pipelines):
    if zero and prediction == "flow_prediction":
        pytest.skip("every flow ends in pure noise")
    scheduler = published(family, prediction, zero)
    folder = None if "DiT" in family else pipelines(scheduler)
    wrong = []
    for loss, kind in product(LOSSES, SAMPLERS):
        if loss not in (None, "eps") and kind not in ("none", "right"):
            continue  # loss and sampler are compared each with the model
        expected = refusal(family, prediction, loss, kind, zero)
        sampler = Sampler(scheduler_of(kind, family, prediction, zero), 4, 1.0, None)
        try:
            module = module_of(
                family, scheduler, folder, objective=DiffTuningObjective(loss=LOSSES[loss]), sampler=sampler
            )
            module.configure_model()
        except ConfigError as error:
            if expected is None or expected not in str(error):
                wrong.append(f"{loss} loss, {kind} sampler: {error}; expected {expected}")
            continue
        if expected is not None:
            wrong.append(f"{loss} loss, {kind} sampler: accepted; expected {expected}")
            continue
        if kind != "thresholding":  # it divides by the largest value, which is more than 1 on the way
            check_right(module, prediction)
    assert not wrong, "\n".join(wrong)


# -- what a source says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_step_of_training_has_the_loss_of_the_pipeline(prediction, pipelines):
    """By the module's own step: the true prediction has no error, under the network's real call."""
    scheduler = published("text-to-image", prediction)
    module = module_of("text-to-image", scheduler, pipelines(scheduler))
    module.configure_model()
    x0, noise = torch.randn(2, 2, 4, 8, 8)
    t = torch.tensor([3, 800])
    condition, _ = module.prompted(("grey",), torch.arange(2))
    x_t = module.objective.diffusion.add_noise(x0, noise, t)
    a, b = module.objective.diffusion.coefficients(t, x0)
    target = a * noise - b * x0 if prediction == "v_prediction" else x0
    expected = (module.denoise(x_t, t, condition) - target).square().flatten(1).mean(1)
    out = module.objective.at(module.denoise, x0, condition, torch.tensor([False, True]), t, noise)
    torch.testing.assert_close(out.per_sample, expected)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"),
        diffusers.DDPMScheduler(trained_betas=torch.linspace(1e-3, 0.03, 100).tolist()),
        diffusers.DDIMScheduler(rescale_betas_zero_snr=True, **SD),
        diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True, **SD),
        diffusers.PNDMScheduler(**SD),
    ],
    ids=["cosine", "trained", "zero", "zero-euler", "pndm"],
)
def test_a_process_is_that_of_the_scheduler(scheduler):
    process = process_of(scheduler)
    torch.testing.assert_close(process.levels()[0].square(), scheduler.alphas_cumprod.float(), rtol=1e-4, atol=1e-6)
    again = diffusers.DDIMScheduler(num_train_timesteps=process.num_timesteps, **process.scheduler_settings)
    assert same_process(process_of(again), process), "its settings make the same one"


def test_processes_are_compared_by_their_levels():
    zero = GaussianDiffusion(rescale_betas_zero_snr=True)
    assert zero.has_zero_terminal_snr
    assert not same_process(zero, GaussianDiffusion())
    assert not same_process(RectifiedFlow(), GaussianDiffusion())
    assert not same_process(GaussianDiffusion(100), GaussianDiffusion())
    assert same_process(GaussianDiffusion.from_alphas_cumprod(zero.levels()[0].square()), zero)
    with pytest.raises(ConfigError, match="numbers that fall"):
        GaussianDiffusion.from_alphas_cumprod(torch.tensor([0.1, 0.5]))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        # It takes the velocities of a sine of t in [0, 1], not noise at T timesteps.
        (diffusers.IPNDMScheduler(), "IPNDMScheduler, which does not say what it takes.*Take one of a Gaussian diff"),
        (diffusers.EDMEulerScheduler(), "has no alphas_cumprod.*Take one with betas, such as diffusers.DDIM"),
        (diffusers.EulerDiscreteScheduler(**DIT, timestep_type="continuous"), "timestep_type to 'discrete'"),
        (diffusers.DDIMScheduler(prediction_type="flow_prediction"), "DDIMScheduler, which does not say what it takes"),
        (diffusers.DDPMScheduler(**DIT, clip_sample=False, variance_type="learned_range"), "predicts no variance"),
        (diffusers.DDIMScheduler(**DIT, clip_sample=True, clip_sample_range=0.5), "clip_sample_range to 1.0"),
    ],
)
def test_schedulers_that_would_draw_something_else_are_refused(scheduler, message):
    source = SourceFacts("A model", "", GaussianDiffusion(), "epsilon")
    with pytest.raises(ConfigError, match=message):
        check_scheduler(scheduler, source)


def test_the_word_of_a_bundled_model_is_in_its_file():
    flow = DiTDiffTuningModule("dit-nano-omniglot-flow")
    flow.configure_model()
    assert flow.objective.loss is velocity_mse_loss
    assert isinstance(flow.objective.diffusion, RectifiedFlow)
    assert type(flow.sampler.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    wrong = DiTDiffTuningModule("dit-nano-omniglot", objective=DiffTuningObjective(diffusion=RectifiedFlow()))
    with pytest.raises(ConfigError, match="dit-nano-omniglot was trained with another noise schedule"):
        wrong.configure_model()


def test_what_nothing_states_is_taken_from_the_objective():
    module = DiTDiffTuningModule(tiny_dit(), objective=DiffTuningObjective(diffusion=RectifiedFlow()))
    module.configure_model()
    assert module.objective.loss is velocity_mse_loss
    assert module.source_facts.prediction_type == "flow_prediction"
    assert type(module.sampler.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"


def test_an_export_of_the_trained_network_alone_states_it_as_well(tmp_path):
    module = DiTDiffTuningModule(tiny_dit(), num_classes=3, objective=DiffTuningObjective(diffusion=RectifiedFlow()))
    data = MemoryBankDataModule(tiny_pictures(), 3, 8, 1, batch_size=4)
    quiet_trainer(tmp_path, 1).fit(module, data)
    again = DiTDiffTuningModule(str(export_dit(module.dit, tmp_path / "tuned.safetensors")))
    again.configure_model()
    assert again.source_facts.prediction_type == "flow_prediction"
    assert type(again.sampler.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"


def test_a_sampler_that_comes_later_is_compared_too():
    module = DiTDiffTuningModule(tiny_dit())
    module.configure_model()
    with pytest.raises(ConfigError, match="the sampler integrates with FlowMatchEuler"):
        module.sampler = Sampler(diffusers.FlowMatchEulerDiscreteScheduler())
    module.bank_sampler = Sampler(num_inference_steps=3)
    assert module.bank_sampler.scheduler is not None


@pytest.mark.parametrize("prompts", [("",), ("grey",), ("", "grey")])
@pytest.mark.parametrize("family", ["text-to-image", "ControlNet"])
def test_a_bank_that_is_replayed_under_prompts_is_not_guided(family, prompts, pipelines):
    scheduler = published(family, "epsilon")
    module = module_of(family, scheduler, pipelines(scheduler), bank_prompts=prompts)
    module.configure_model()
    assert module.sampler.guidance_scale == 7.5
    assert module.bank_sampler.guidance_scale == 1.0
    given = module_of(family, scheduler, pipelines(scheduler), bank_prompts=prompts, bank_sampler=Sampler(None, 2, 3.0))
    assert given.bank_sampler.guidance_scale == 3.0


# -- pipelines that are something else --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["StableDiffusionInpaintPipeline", "QwenImagePipeline", "StableUnCLIPPipeline", "PixArtSigmaPipeline"],
)
@pytest.mark.parametrize("family", ["text-to-image", "ControlNet"])
def test_pipelines_of_other_classes_are_refused_by_name(name, family, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(CheckpointError, match=f"is a {name}, which is not supported. Supported are .*StableDiffusionP"):
        module_of(family, None, str(tmp_path)).configure_model()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, "takes 9 channels and returns 4.*inpainting"),
        ({"in_channels": 8}, "takes 8 channels and returns 4.*InstructPix2Pix"),
        ({"num_class_embeds": 10}, r"beyond noisy latents and text \(num_class_embeds\)"),
        ({"time_cond_proj_dim": 8}, r"time_cond_proj_dim"),
        ({"cross_attention_dim": 24}, "embeddings of width 24.*not of one pipeline"),
    ],
)
def test_networks_that_take_more_than_they_get_are_refused(changes, message, pipelines, tmp_path):
    from diffusers import UNet2DConditionModel

    folder = Path(pipelines(published("text-to-image", "epsilon")))
    config = UNet2DConditionModel.load_config(folder / "unet")
    (folder / "unet").unlink()
    UNet2DConditionModel.from_config({**config, **changes}).save_pretrained(folder / "unet")
    with pytest.raises(CheckpointError, match=message):
        module_of("text-to-image", None, str(folder)).configure_model()


def test_a_checkpoint_of_another_parametrisation_is_refused(tmp_path):
    def saved(objective):
        module = DiTDiffTuningModule(tiny_dit(), objective=objective)
        module.configure_model()
        return module

    checkpoint = {"state_dict": (run := saved(None)).state_dict()}
    run.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    saved(DiffTuningObjective(loss=eps_mse_loss)).on_load_checkpoint(dict(checkpoint))
    with pytest.raises(CheckpointError, match="trained with prediction type epsilon instead of v_prediction"):
        saved(DiffTuningObjective(loss=v_mse_loss)).on_load_checkpoint(dict(checkpoint))
    other = GaussianDiffusion(1000, 0.00085, 0.012, "scaled_linear")
    with pytest.raises(CheckpointError, match="other noise levels"):
        saved(DiffTuningObjective(diffusion=other)).on_load_checkpoint(dict(checkpoint))


def test_a_tail_of_another_kind_is_refused():
    module, tail = (
        DiTDiffTuningModule(tiny_dit(), objective=DiffTuningObjective(loss=loss)) for loss in (None, v_mse_loss)
    )
    for each in (module, tail):
        each.configure_model()
        each.sampler = Sampler(num_inference_steps=2)
    with pytest.raises(ConfigError, match="The tail has prediction type v_prediction instead of epsilon"):
        module.generate_swapped(torch.arange(1), [0.5], tail)


def test_a_folder_of_others_says_what_it_was_trained_with(tmp_path):
    export_dit(tiny_dit(), tmp_path / "dit", "diffusers")
    diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction").save_pretrained(
        tmp_path / "dit" / "scheduler"
    )
    for sums in (tmp_path / "dit").rglob("*SUMS*"):
        sums.unlink()
    module = DiTDiffTuningModule(str(tmp_path / "dit"))
    module.configure_model()
    assert module.objective.loss is v_mse_loss
    assert module.sampler.scheduler.config.prediction_type == "v_prediction"
    assert module.objective.diffusion.levels()[0, 500] == pytest.approx(0.702, abs=0.01)  # cos(pi/2 * (0.5 + ..))


def test_an_objective_or_loss_that_comes_later_is_compared_too(tmp_path):
    module = DiTDiffTuningModule(tiny_dit(num_classes=3))
    module.configure_model()
    with pytest.raises(ConfigError, match="predicts 'epsilon', but the objective's loss is v_mse_loss"):
        module.objective = DiffTuningObjective(loss=v_mse_loss)
    module.objective = DiffTuningObjective(PowerSchedule(0.5))
    assert module.objective.loss is hybrid_loss
    module.objective.schedule = PowerSchedule(1.0)
    data = MemoryBankDataModule(tiny_pictures(), num_classes=3, image_size=8, channels=1, batch_size=4)
    quiet_trainer(tmp_path, 1).fit(module, data)
    torch.testing.assert_close(module.objective.psi, torch.arange(1, 1001) / 1000, msg="psi is of the new schedule")
    module.objective.loss = v_mse_loss
    with pytest.raises(ConfigError, match="predicts 'epsilon', but the objective's loss is v_mse_loss"):
        quiet_trainer(tmp_path, 2).fit(module, data)


def test_an_objective_that_two_modules_get_has_the_density_of_each(pipeline_folder, folder_of):
    objective = DiffTuningObjective()
    flux = TextToImageDiffTuningModule(folder_of("flux"), image_size=32, objective=objective)
    flux.configure_model()
    assert objective.density is not None
    TextToImageDiffTuningModule(pipeline_folder, objective=objective).configure_model()
    assert objective.density is None


class Latents(DiTDiffTuningModule):
    """A latent family that states no scale."""

    def encoder_identity(self):
        return "an encoder"


def test_a_family_with_an_encoder_denoises_latents():
    module = Latents(tiny_dit(), sampler=Sampler(diffusers.DDIMScheduler(**DIT)))
    with pytest.raises(ConfigError, match="clip_sample on"):
        module.configure_model()


def test_an_autoencoder_of_another_scale_than_the_models_is_refused():
    module = DiTDiffTuningModule("dit-nano-imagenet", autoencoder=FrozenAutoencoder("sd-nano-flowers", 0.18215, "vae"))
    with pytest.raises(ConfigError, match=r"scaling_factor of 0\.633.*, but the autoencoder here has 0\.18215"):
        module.configure_model()


SCALES = [
    {"scaling_factor": 0.4},
    {"shift_factor": 0.2},
    {"latents_mean": (0.1, 0.0, 0.0, -0.2), "latents_std": (1.0, 2.0, 1.0, 0.5)},
]


def autoencoder_of(folder, **scale):
    """A small autoencoder in a folder that states its scale."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    vae.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    scale = {key: list(value) if isinstance(value, tuple) else value for key, value in scale.items()}
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5, **scale}))
    return FrozenAutoencoder(folder)


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("scale", SCALES, ids=["scale", "shift", "mean and std"])
def test_an_export_knows_the_whole_scale_of_its_latents(scale, kind, tmp_path):
    """Of an autoencoder in a folder of this machine, too, which an export cannot name."""
    module = DiTDiffTuningModule(tiny_dit(in_channels=4), autoencoder=autoencoder_of(tmp_path / "vae", **scale))
    module.configure_model()
    path = tmp_path / ("tuned.safetensors" if kind == "file" else "tuned")
    module.write_export(module.dit, path)

    def opened(autoencoder):
        again = DiTDiffTuningModule(str(path), autoencoder=autoencoder)
        again.configure_model()
        return again

    assert opened(autoencoder_of(tmp_path / "same", **scale)).source_facts.latents == module.source_facts.latents
    assert opened(None).source_facts.latents == module.source_facts.latents
    for others in [{}, *SCALES]:
        if others != scale:
            other = autoencoder_of(tmp_path / "other", **others)
            with pytest.raises(ConfigError, match=r"denoises latents with a scaling_factor of .*, but the autoencoder"):
                opened(other)


def test_what_is_assigned_to_an_objective_stays_however_often_it_is_bound() -> None:
    objective = DiffTuningObjective()
    process, density = GaussianDiffusion(), LogitNormal()
    objective.loss, objective.diffusion, objective.density = eps_mse_loss, process, density
    facts = SourceFacts("model", "", prediction_type="epsilon")
    for _ in range(3):
        objective.bind(facts)
        assert (objective.loss, objective.diffusion, objective.density) == (eps_mse_loss, process, density)


def test_two_modules_may_be_given_one_objective():
    objective = DiffTuningObjective()
    first = DiTDiffTuningModule(tiny_dit(), objective=objective)
    second = DiTDiffTuningModule(tiny_dit(learn_sigma=False), objective=objective)
    for module in (first, second):
        module.configure_model()
    assert (first.objective.loss, second.objective.loss) == (hybrid_loss, eps_mse_loss)
    assert first.objective is objective
    second.objective = objective
    assert (first.objective.loss, second.objective.loss) == (hybrid_loss, eps_mse_loss)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def published_as(kind, **settings):
    return getattr(diffusers, kind)(**{"clip_sample": False, **BETAS, **settings})


@pytest.mark.parametrize("family", ["DiT of pixels", "text-to-image"])
@pytest.mark.parametrize(
    ("published", "asked", "warning"),
    [
        ("DDIMScheduler", "LCM", "LCMScheduler is for models .* was published with DDIMScheduler"),
        ("DDIMScheduler", "TCD", "TCDScheduler is for models .* was published with DDIMScheduler"),
        ("LCMScheduler", "LCM", None),
        ("TCDScheduler", "LCM", None),
        ("LCMScheduler", "DDIM", None),
    ],
)
def test_few_step_schedulers_of_plain_models_are_warned_of(family, published, asked, warning, pipelines, recwarn):
    scheduler = published_as(published)
    folder = pipelines(scheduler) if family == "text-to-image" else None
    module_of(family, scheduler, folder, sampler=Sampler(asked, 4)).configure_model()
    said = [str(warned.message) for warned in recwarn if "distilled to a few steps" in str(warned.message)]
    assert bool(said) == (warning is not None)
    assert all(re.search(f"the (bank_)?sampler: {warning}", text) for text in said)


@pytest.mark.parametrize(
    ("spacing", "kind"),
    [("leading", "DDIMScheduler"), ("linspace", "DDIMScheduler"), ("trailing", "DDIMScheduler"), (None, "DDIM")],
)
def test_a_grid_that_misses_pure_noise_is_warned_of(spacing, kind, recwarn):
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    published = published_as("DDIMScheduler", timestep_spacing="trailing", **zero)
    asked = kind if spacing is None else published_as(kind, timestep_spacing=spacing, **zero)
    module_of("DiT of latents", published, None, sampler=Sampler(asked, 10)).configure_model()
    said = [str(warned.message) for warned in recwarn if "trained to begin at 999" in str(warned.message)]
    assert bool(said) == (spacing == "leading")
    assert all("starts at timestep 900 with its timestep_spacing 'leading'" in text for text in said)
